"""fa2cupy in flash_attn's place: `import flash_attn` finds our modules, package metadata finds a flash-attn.

Code that looks for flash-attn asks importlib for the module and importlib.metadata for a distribution of that name and
its version; a finder at the front of sys.meta_path answers both. Importing this module imports nothing of fa2cupy's and
no metadata: sitecustomize loads it at the start of Python.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["FLASH_ATTN_VERSION", "install_as_flash_attn", "uninstall_flash_attn"]

FLASH_ATTN_VERSION = "2.8.3+fa2cupy"  # whose interface this is, and who computes it

# What is served, and whether it is a package. Everything else below flash_attn is an ImportError that says so.
_SERVED = {
    "flash_attn": ("fa2cupy.flash_attn", True),
    "flash_attn.bert_padding": ("fa2cupy.flash_attn.bert_padding", False),
    "flash_attn.flash_attn_interface": ("fa2cupy.flash_attn.flash_attn_interface", False),
    "flash_attn.layers": ("fa2cupy.flash_attn.layers", True),
    "flash_attn.layers.rotary": ("fa2cupy.flash_attn.layers.rotary", False),
    "flash_attn.ops": ("fa2cupy.flash_attn.ops", True),
    "flash_attn.ops.triton": ("fa2cupy.flash_attn.ops.triton", True),
    "flash_attn.ops.triton.rotary": ("fa2cupy.flash_attn.ops.triton.rotary", False),
    "flash_attn_2_cuda": ("fa2cupy.flash_attn.extension", False),
    "flash_attn_interface": ("fa2cupy.flash_attn.fa3", False),  # FlashAttention-3's
}
_TOP_LEVEL = tuple(name for name in _SERVED if "." not in name)
_CACHES_THE_ANSWER = ("transformers", "diffusers")  # whether flash-attn is there is looked up once


def install_as_flash_attn(force: bool = False) -> None:
    """Let `import flash_attn` mean `fa2cupy.flash_attn`, in this process.

    Served are flash_attn with flash_attn_interface, bert_padding, layers.rotary and ops.triton.rotary;
    flash_attn_2_cuda; and flash_attn_interface, FlashAttention-3's top-level name, unless FlashAttention-3 is
    installed. Other modules below flash_attn raise an ImportError that says whose it is. Package metadata has a
    flash-attn of version 2.8.3+fa2cupy, and flash_attn.__fa2cupy__ is fa2cupy's version. A second call does nothing.

    Call it before transformers or diffusers is imported: they look for flash-attn once. Names that were imported from
    a real flash_attn before stay what they are.

    Args:
        force: replace a real flash-attn (in this process; nothing on disk is changed). Without it, and with a real
            flash-attn installed or imported, this is a ValueError.
    """
    if _installed() is not None:
        return
    if not force and (real := _real_flash_attn()):
        from fa2cupy.errors import InvalidArgument

        raise InvalidArgument(f"{real}: install_as_flash_attn(force=True) replaces it, in this process")
    served = {name: target for name, target in _SERVED.items() if name != "flash_attn_interface"}
    if force or _found_elsewhere("flash_attn_interface") is None:
        served = _SERVED
    hidden = {name: module for name, module in sys.modules.items() if _is_below(name, served)}
    for name in hidden:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder(served, hidden))
    late = [name for name in _CACHES_THE_ANSWER if name in sys.modules]
    if late:
        warnings.warn(
            f"{' and '.join(late)} may have looked for flash-attn already, and will then not see fa2cupy: call "
            "install_as_flash_attn() before importing it",
            RuntimeWarning,
            stacklevel=2,
        )


def uninstall_flash_attn() -> None:
    """Undo `install_as_flash_attn`: a real flash-attn, or none, is found again. Names imported meanwhile stay ours."""
    finder = _installed()
    if finder is None:
        return
    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if _is_below(name, finder.served)]:
        del sys.modules[name]
    sys.modules.update(finder.hidden)


def _installed() -> _Finder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)


def _is_below(name: str, served: Iterable[str]) -> bool:
    """Whether a module is one of `served` or inside it. FlashAttention-4's flash_attn.cute is nobody's but its own."""
    return name.partition(".")[0] in served and not f"{name}.".startswith("flash_attn.cute.")


def _real_flash_attn() -> str:
    """What is found of a real flash-attn, or the empty string. FlashAttention-4 is none: it has only flash_attn.cute"""
    for name in ("flash_attn", "flash_attn_2_cuda"):
        if getattr(sys.modules.get(name), "__file__", None) is not None:
            return f"{name} is already imported"
    if _found_elsewhere("flash_attn_2_cuda") is None:
        package = _found_elsewhere("flash_attn")
        folders = package.submodule_search_locations if package is not None else None
        if not any(Path(folder, "flash_attn_interface.py").is_file() for folder in folders or ()):
            return ""
    from importlib import metadata

    try:
        return f"flash-attn {metadata.version('flash-attn')} is installed"
    except metadata.PackageNotFoundError:
        return "a flash_attn is on the path"


def _found_elsewhere(name: str) -> ModuleSpec | None:
    """The spec that the other finders give for a top-level name."""
    for finder in sys.meta_path:
        find = None if isinstance(finder, _Finder) else getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find(name, None) if find is not None else None
        if spec is not None:
            return spec
    return None


class _Finder(MetaPathFinder):
    """served: of `_SERVED`, what this finder answers for; hidden: modules of those names that it took the place of."""

    def __init__(self, served: dict[str, tuple[str, bool]], hidden: dict[str, ModuleType]) -> None:
        self.served, self.hidden = served, hidden

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "flash_attn.cute":
            return PathFinder.find_spec(name, [str(Path(entry, "flash_attn")) for entry in sys.path])
        if not _is_below(name, self.served):
            return None
        if name in self.served:
            real, is_package = self.served[name]
            return ModuleSpec(name, _SameModule(real), origin=_file(real, is_package), is_package=is_package)
        if sys._getframe(2).f_globals.get("__name__") == "importlib.util":
            return None  # importlib.util.find_spec asks, for which nothing there is None
        raise ModuleNotFoundError(
            f"no module named {name!r}: flash_attn is fa2cupy's here ({FLASH_ATTN_VERSION}), which has "
            f"{', '.join(module for module, (_, is_package) in self.served.items() if not is_package)}",
            name=name,
        )

    def find_distributions(self, context: Any = None) -> Iterable[Any]:
        name = getattr(context, "name", None)
        if name is None or name.replace("_", "-").lower() == "flash-attn":
            yield _distribution()


def _file(module: str, is_package: bool) -> str:
    """Where a module of fa2cupy's is."""
    path = Path(__file__).resolve().parent.joinpath(*module.split(".")[1:])
    return str(path / "__init__.py" if is_package else path.with_suffix(".py"))


class _SameModule(Loader):
    """Loads no second copy: the module of fa2cupy itself goes under the other name as well."""

    def __init__(self, real: str) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.real)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has just put the other name's there


@functools.cache
def _distribution() -> Any:
    """The flash-attn that package metadata finds."""
    from importlib import metadata

    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {FLASH_ATTN_VERSION}\n"
        "Summary: flash_attn's functions computed by fa2cupy\n",
        "top_level.txt": "".join(f"{name}\n" for name in _TOP_LEVEL),
        "INSTALLER": "fa2cupy\n",
    }

    class FlashAttn(metadata.Distribution):
        def read_text(self, filename: str) -> str | None:
            return files.get(filename)

        def locate_file(self, path: Any) -> Any:
            return path

    return FlashAttn()
