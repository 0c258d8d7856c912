"""No modules of fa2cupy import each other in a circle: imports inside functions and for types alone count too.

A circle that a late import hides is still one: neither module can be understood, or moved, without the other.
"""

from __future__ import annotations

import ast
from pathlib import Path

import fa2cupy

PACKAGE = Path(fa2cupy.__file__).parent


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of everything in a package."""
    names = {}
    for path in package.rglob("*.py"):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, names: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports anywhere; `from a import b` is of a.b, if that is a module."""
    found: set[str] = set()
    package = name if names[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(names[name].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            inner = [f"{source}.{alias.name}" for alias in node.names]
            found.update(each if each in names else source for each in inner)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found.update(str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))
    return (found & names.keys()) - {name}


def circles(package: Path) -> list[str]:
    """Every largest set of modules that reach each other, as one line with the imports that close it."""
    names = modules(package)
    edges = {name: imports(name, names) for name in names}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        pending = [start]
        while pending:
            new = edges[pending.pop()] - seen
            seen |= new
            pending += new
        return seen

    reach = {name: reached(name) for name in names}
    found = []
    for name in sorted(names):
        circle = sorted(other for other in reach[name] if name in reach[other])
        if circle and circle[0] == name:
            arrows = [f"{one} -> {', '.join(sorted(edges[one] & set(circle)))}" for one in circle]
            found.append("; ".join(arrows))
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert len(modules(PACKAGE)) > 20
    found = circles(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_the_instrument(tmp_path: Path) -> None:
    """Late, typing, relative and named imports are seen; a package's own name in a string or a comment is none."""
    package = tmp_path / "p"
    files = {
        "__init__.py": "from p.a import x\n",
        "a.py": "import os, p.b\nx = 'import p.c'\n",
        "b.py": "def f():\n    from p import c\n",
        "c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import f\n",
        "sub/__init__.py": "from . import d\n",
        "sub/d.py": "import importlib\ndef g():\n    return importlib.import_module('p.sub.e')\n",
        "sub/e.py": "from ..a import x\nfrom p.sub import d\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    names = modules(package)
    assert imports("p.sub.e", names) == {"p.a", "p.sub.d"}
    assert circles(package) == ["p.b -> p.c; p.c -> p.b", "p.sub.d -> p.sub.e; p.sub.e -> p.sub.d"]
    (package / "c.py").write_text("import p\n")
    assert circles(package)[0].startswith("p -> p.a; p.a -> p.b; p.b -> p.c; p.c -> p")
