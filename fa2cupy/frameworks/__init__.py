"""Arrays in, results out: what fa2cupy knows about CuPy, PyTorch, JAX, NumPy and `__dlpack__` producers.

The registry above the frameworks. `base.py` has their interfaces; a module each has what one of them does differently.
None of the libraries is imported here: an array of it cannot exist before its user has imported it.
"""

from __future__ import annotations

import numpy as np

from fa2cupy.frameworks.base import Framework
from fa2cupy.frameworks.cupy import CUPY
from fa2cupy.frameworks.jax import JAX
from fa2cupy.frameworks.numpy import NUMPY
from fa2cupy.frameworks.torch import TORCH

__all__ = ["CUPY", "JAX", "NUMPY", "TORCH", "framework_of"]


def framework_of(array: object) -> Framework | None:
    """The framework whose array this is; None for `__dlpack__` producers of other libraries and everything else."""
    if isinstance(array, np.ndarray):
        return NUMPY
    for base in type(array).__mro__:
        root = base.__module__.partition(".")[0]
        if root == "torch" and base.__name__ == "Tensor":
            return TORCH
        if root == "cupy" and base.__name__ == "ndarray":
            return CUPY
        if root in ("jax", "jaxlib") and base.__name__ in ("Array", "ArrayImpl", "Tracer"):
            return JAX
    return None
