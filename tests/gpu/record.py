"""tests/gpu/record.json: what the GPU tests last ran on, and a digest of the sources that they ran.

    python tests/gpu/record.py                     print the digest and whether the record is for these sources
    python tests/gpu/record.py --pending "reason"  mark the record as pending: no GPU was to be had for these sources

`make gpu-test` writes the record, tests/test_gpu_record.py compares the digests: a change of a kernel does not land
without having run on a GPU. Comments, docstrings and white space do not count. Standard library only.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

__all__ = ["PATH", "SOURCES", "cuda_tokens", "digest", "now", "python_tokens", "read", "verdict", "write"]

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "tests" / "gpu" / "record.json"
# Every source between the public functions and the GPU.
SOURCES = (
    "cuda_src/**/*.cu",
    "cuda_src/**/*.cuh",
    "fa2cupy/kernels/**/*.py",
    "fa2cupy/jit/**/*.py",
    "fa2cupy/frameworks/**/*.py",
    "fa2cupy/cached/*.py",
    *(
        f"fa2cupy/{module}.py"
        for module in (
            "attention",
            "calls",
            "first_call",
            "kvcache",
            "operations",
            "options",
            "prepared",
            "problem",
            "spec",
        )
    ),
)

_CUDA_TOKEN = re.compile(
    r"""
    (?P<skip> //[^\n]* | /\*.*?\*/ | \\\n | [^\S\n]+ )
  | (?P<newline> \n )
  | (?P<token> "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | (?:\w|\.\d|(?<=\d)\.)+
      | <<<|>>>|<<=|>>=|\+\+|--|->|&&|\|\||<<|>>|::|\#\#|[<>=!+\-*/%&|^]=|. )
    """,
    re.VERBOSE | re.DOTALL,
)


def cuda_tokens(code: str) -> Iterator[str]:
    """The tokens of CUDA C; a line end only where it ends a preprocessor directive."""
    in_directive, at_line_start = False, True
    for match in _CUDA_TOKEN.finditer(code.replace("\r\n", "\n")):
        if match["newline"]:
            if in_directive:
                yield "\n"
            in_directive, at_line_start = False, True
        elif match["token"]:
            if at_line_start and match["token"] == "#":
                in_directive = True
            at_line_start = False
            yield match["token"]


def python_tokens(code: str) -> Iterator[str]:
    """The syntax tree, without docstrings and positions, in a form that does not depend on the Python version."""
    yield from _nodes(ast.parse(code))


def _nodes(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        yield "["
        for item in node:
            yield from _nodes(item)
        yield "]"
    elif isinstance(node, ast.AST):
        yield type(node).__name__
        for field, value in ast.iter_fields(node):
            # Fields that some versions do not have are empty in the others; `kind` is the u of u"text".
            if value is None or value == [] or field in ("kind", "type_ignores"):
                continue
            if field == "body" and _has_docstring(node):
                value = value[1:]
            yield field
            yield from _nodes(value)
        yield "."
    else:
        yield f"{type(node).__name__} {node!r}"


def _has_docstring(node: ast.AST) -> bool:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None


def digest(root: Path = ROOT) -> str:
    """sha256 over the names and the tokens of all sources."""
    total = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in root.glob(pattern)}):
        tokens = python_tokens if path.suffix == ".py" else cuda_tokens
        total.update(path.relative_to(root).as_posix().encode() + b"\0")
        for token in tokens(path.read_text(encoding="utf-8")):
            total.update(token.encode() + b"\0")
    return total.hexdigest()


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def read(path: Path = PATH) -> dict[str, Any]:
    """The record; an empty one where there is none."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write(record: dict[str, Any], path: Path = PATH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def verdict(record: dict[str, Any], current: str) -> tuple[bool, str]:
    """(whether the sources may land, one sentence that says why)."""
    status = record.get("status", "missing")
    if record.get("digest") != current:
        return False, (
            "the kernels or the code that launches them changed since the last GPU run: run `make gpu-test` on a GPU "
            'and commit tests/gpu/record.json, or, when there is none, `make gpu-pending REASON="..."`'
        )
    if status == "pending":
        return True, f"PENDING: these sources have not run on a GPU yet ({record.get('reason')})"
    if status == "passed":
        return True, f"these sources passed on {record.get('device')}, {record.get('date')}"
    return False, f"the last GPU run of these sources has the status {status!r}: it must be passed"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pending", metavar="REASON", help="why these sources could not be run on a GPU")
    parser.add_argument("--record", type=Path, default=PATH, help="default: %(default)s")
    args = parser.parse_args(arguments)
    current = digest()
    if args.pending is not None:
        if not args.pending.strip():
            parser.error('say why: make gpu-pending REASON="..."')
        last = {k: v for k, v in read(args.record).items() if k not in ("status", "reason", "digest", "last")}
        if read(args.record).get("status") == "pending":
            last = read(args.record).get("last", {})
        pending = {"status": "pending", "reason": args.pending.strip(), "date": now(), "digest": current, "last": last}
        write(pending, args.record)
    allowed, sentence = verdict(read(args.record), current)
    print(f"digest {current}\n{sentence}")
    return 0 if allowed else 1


if __name__ == "__main__":
    sys.exit(main())
