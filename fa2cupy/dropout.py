"""dropout_mask: what dropout keeps, as an array."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from fa2cupy import philox
from fa2cupy.checks import check_dropout, check_seed, shown
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import framework_of
from fa2cupy.frameworks.base import describe
from fa2cupy.frameworks.jax import is_traced

__all__ = ["dropout_mask"]


def dropout_mask(
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    dropout_seed: Any,
    *,
    like: Any = None,
) -> Any:
    """Which P `attention` keeps with dropout_p and dropout_seed: bool (batch, num_heads, seqlen_q, seqlen_k), True =
    kept. num_heads counts query heads. It depends on nothing else: a part of it, from the first sequence, head, query
    and key on, is the mask of less of them.

    Args:
        batch, num_heads, seqlen_q, seqlen_k: 0 or more. Of packed sequences batch is their number, and the mask of
            each is the corner that its lengths say.
        dropout_p: as `attention` takes it: rounded to a multiple of 2^-15, and then below 1.
        dropout_seed: as `attention` takes it, a JAX key too; an array on a GPU is waited for.
        like: an array whose framework and device are taken; None gives NumPy. It is computed on the CPU all the same.

    Raises: ValueError or TypeError for anything else.
    """
    shape = [_length(name, value) for name, value in (
        ("batch", batch), ("num_heads", num_heads), ("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)
    )]  # fmt: skip
    p = 0.0 if dropout_p is None else check_dropout("dropout_p", dropout_p) or 0.0
    (seed,) = check_seed("dropout_seed", dropout_seed)
    seed = np.array(seed, np.int64) if isinstance(seed, tuple) else _on_the_host(seed)
    mask = np.empty(shape, np.bool_)
    tweaks = philox.tweaks(seed, np.arange(shape[0]), np.arange(shape[1]))
    queries, keys = slice(0, shape[2]), slice(0, shape[3])
    for place in np.ndindex(*shape[:2]):  # a head at a time: what it takes beside the mask is as little
        t0, t1 = (t[place] for t in tweaks)
        mask[place] = philox.kept((t0, t1), queries, keys, p)
    if like is None:
        return mask
    framework = framework_of(like)
    if framework is None:
        raise InvalidType(f"like is a {describe(like)}: an array of CuPy, PyTorch, JAX or NumPy is needed")
    return framework.from_host(mask, like)


def _length(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidType(f"{shown(name, value)} is a {describe(value)}: an int is needed")
    length = operator.index(value)
    if length < 0:
        raise InvalidArgument(f"{shown(name, value)} is not supported: 0 or more is needed")
    return length


def _on_the_host(array: Any) -> np.ndarray:
    framework = framework_of(array)
    if framework is None:
        raise InvalidType(
            f"dropout_seed is a {describe(array)}: two ints, or an array of CuPy, PyTorch, JAX or NumPy is needed"
        )
    if is_traced(array):
        raise InvalidType("dropout_seed is traced: dropout_mask is computed on the CPU, outside of jit")
    return framework.to_host(array)
