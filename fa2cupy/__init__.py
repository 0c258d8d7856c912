"""Exact attention (FlashAttention-2), forward and backward, for CuPy, PyTorch, JAX and NumPy arrays.

Importing this package imports neither CuPy nor torch nor jax.
"""

from fa2cupy.attention import attention, attention_backward, backward_workspace_bytes, forward_workspace_bytes
from fa2cupy.errors import (
    CompilationError,
    Fa2Error,
    InvalidArgument,
    InvalidType,
    LaunchError,
    MissingDependency,
    UnsupportedDevice,
)

__version__ = "0.1.0"

__all__ = [
    "CompilationError",
    "Fa2Error",
    "InvalidArgument",
    "InvalidType",
    "LaunchError",
    "MissingDependency",
    "UnsupportedDevice",
    "attention",
    "attention_backward",
    "backward_workspace_bytes",
    "forward_workspace_bytes",
]
