"""merge_attention: attention over all keys from attention over pieces of them.

    lse = log(sum_i exp(lse_i)),   out = sum_i exp(lse_i - lse) out_i

exact for any cut of the keys. CuPy arrays and torch tensors on a GPU are merged by a kernel, forward and backward
(`merged.py`); everything else by the framework's own operators, which torch and JAX differentiate.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import CUPY, JAX, TORCH, framework_of

__all__ = ["merge_attention"]


def merge_attention(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    """(out, lse) over all keys from the (out, lse) of pieces of them. Layout "bshd": each out is (batch, seqlen_q,
    num_heads, head_dim_v), each lse (batch, num_heads, seqlen_q); packed (total, num_heads, head_dim_v) and (num_heads,
    total).

    Args:
        outs: what `attention(..., return_lse=True)` gave for each piece, one or more, of one shape and dtype.
        lses: the log-sum-exps, natural logarithms, in the same order.

    Returns:
        out in the dtype of the pieces (the sum is taken in lse's), lse in that of the lses. A piece in which a row sees
        no key (lse = -inf) has weight 0 there; a row that sees no key in any piece has out = 0 and lse = -inf. Through
        torch and JAX both are differentiable with respect to every out and lse.

    Raises: ValueError or TypeError where the pieces do not fit together.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise InvalidArgument(f"outs has {len(outs)} pieces and lses {len(lses)}: as many of each, and at least one")
    framework = framework_of(outs[0])
    if framework is None or any(framework_of(array) is not framework for array in (*outs, *lses)):
        raise InvalidType("outs and lses must be arrays of one framework: CuPy, PyTorch, JAX or NumPy")
    out_shape, lse_shape = tuple(outs[0].shape), tuple(lses[0].shape)
    if len(out_shape) not in (3, 4) or lse_shape != (*out_shape[:-3], out_shape[-2], out_shape[-3]):
        raise InvalidArgument(
            f"outs[0] has shape {out_shape} and lses[0] {lse_shape}: (batch, seqlen_q, num_heads, head_dim_v) and "
            "(batch, num_heads, seqlen_q) are needed, or without batch"
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if tuple(out.shape) != out_shape or tuple(lse.shape) != lse_shape:
            raise InvalidArgument(
                f"piece {i} has shapes {tuple(out.shape)} and {tuple(lse.shape)}: "
                f"{out_shape} and {lse_shape} are needed"
            )
        if out.dtype != outs[0].dtype or lse.dtype != lses[0].dtype:
            raise InvalidType(
                f"piece {i} has dtypes {out.dtype} and {lse.dtype}: {outs[0].dtype} and {lses[0].dtype} are needed"
            )
    for name, array in (("outs", outs[0]), ("lses", lses[0])):
        if "float" not in str(array.dtype):  # uint16 with dtype="bfloat16" would be added up as integers
            raise InvalidType(f"{name} has dtype {array.dtype}: a floating-point one is needed")
    if framework is TORCH:
        from fa2cupy.autograd import merging

        return merging.merge(outs, lses, _by_torch)
    if framework is JAX:
        merged: tuple[Any, Any] = _jax_program()(outs, lses)
        return merged
    if framework is CUPY:
        from fa2cupy import merged as kernels

        results = kernels.merge(CUPY, outs, lses)
        if results is not None:
            return results
    import numpy as np

    namespace = importlib.import_module(framework.namespace)
    with np.errstate(divide="ignore"):
        return _merge(namespace, outs, lses, lambda x: x, lambda x, dtype: x.astype(dtype))


def _by_torch(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    import torch

    return _merge(torch, list(outs), list(lses), torch.Tensor.detach, torch.Tensor.to)


@functools.cache
def _jax_program() -> Callable[[list[Any], list[Any]], tuple[Any, Any]]:
    """Jitted, so that XLA makes of it one pass over the pieces."""
    import jax

    def merge(outs: list[Any], lses: list[Any]) -> tuple[Any, Any]:
        return _merge(jax.numpy, outs, lses, jax.lax.stop_gradient, jax.lax.convert_element_type)

    program: Callable[[list[Any], list[Any]], tuple[Any, Any]] = jax.jit(merge)
    return program


def _merge(xp: Any, outs: list[Any], lses: list[Any], constant: Any, astype: Any) -> tuple[Any, Any]:
    maximum = lses[0]
    for lse in lses[1:]:
        maximum = xp.maximum(maximum, lse)
    # The weights do not depend on what is taken off before the exponentials: a constant for derivatives.
    shift = constant(xp.where(xp.isfinite(maximum), maximum, xp.zeros_like(maximum)))
    weights = [xp.exp(lse - shift) for lse in lses]
    total = sum(weights[1:], weights[0])
    unseen = constant(total) == 0
    divisor = xp.where(unseen, xp.ones_like(total), total)
    lse = xp.where(unseen, xp.full_like(total, -float("inf")), xp.log(divisor) + shift)
    out = None
    for piece, weight in zip(outs, weights, strict=True):
        factor = xp.swapaxes(weight / divisor, -1, -2)[..., None]
        piece = astype(piece, weight.dtype)
        # A piece without keys may hold anything, NaN too: its weight is 0, and so is the derivative.
        term = factor * xp.where(constant(factor) == 0, xp.zeros_like(piece), piece)
        out = term if out is None else out + term
    return astype(out, outs[0].dtype), lse
