"""Exact attention (FlashAttention-2), forward and backward, for CuPy, PyTorch, JAX and NumPy arrays.

Importing this package imports neither CuPy nor torch nor jax. The doors to them, `fa2cupy.torch` and the like, are
imported when they are first asked for.
"""

from typing import TYPE_CHECKING

from fa2cupy.attention import (
    attention,
    attention_backward,
    attention_vjp,
    backward_workspace_bytes,
    forward_workspace_bytes,
)
from fa2cupy.block_mask import BlockMask
from fa2cupy.counts import report
from fa2cupy.dropout import dropout_mask
from fa2cupy.errors import (
    CompilationError,
    Fa2Error,
    Fa2Warning,
    InvalidArgument,
    InvalidType,
    LaunchError,
    MissingDependency,
    NotTaken,
    UnsupportedDevice,
)
from fa2cupy.install import install_as_flash_attn, uninstall_flash_attn
from fa2cupy.kvcache import KVCache, attention_with_kvcache
from fa2cupy.lse import convert_lse
from fa2cupy.merge import merge_attention

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "CompilationError",
    "Fa2Error",
    "Fa2Warning",
    "InvalidArgument",
    "InvalidType",
    "KVCache",
    "LaunchError",
    "MissingDependency",
    "NotTaken",
    "UnsupportedDevice",
    "attention",
    "attention_backward",
    "attention_vjp",
    "attention_with_kvcache",
    "backward_workspace_bytes",
    "convert_lse",
    "dropout_mask",
    "forward_workspace_bytes",
    "install_as_flash_attn",
    "merge_attention",
    "report",
    "uninstall_flash_attn",
]

# Modules that import a framework, as attributes after `import fa2cupy` alone; those that are there are offered.
_DOORS = ("flash_attn", "jax", "torch", "transformers")

if not TYPE_CHECKING:  # for a type checker any attribute would be there

    def __getattr__(name: str) -> object:
        if name in _DOORS:
            import importlib

            module = f"{__name__}.{name}"
            try:
                return importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:  # the door is there, and its framework is not
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)

    def __dir__() -> list[str]:
        from importlib.util import find_spec

        return sorted({*globals(), *(name for name in _DOORS if find_spec(f"{__name__}.{name}"))})
