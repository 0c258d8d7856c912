"""convert_lse: log-sum-exps as other libraries keep them."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

from fa2cupy.checks import shown
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import framework_of
from fa2cupy.frameworks.base import describe

__all__ = ["convert_lse"]


@dataclass(frozen=True, slots=True)
class _Convention:
    """How lse lies and what it says. shape: with a batch; without one it has a dimension less.

    log2: in base 2. heads_last: (rows, heads). trailing: with a last dimension of 1. unseen: of a row that sees no key.
    """

    shape: str
    log2: bool = False
    heads_last: bool = False
    trailing: bool = False
    unseen: float = -math.inf


_CONVENTIONS = {
    "fa2cupy": _Convention("(batch, num_heads, seqlen_q)"),
    "flash_attn": _Convention("(batch, num_heads, seqlen_q)", unseen=math.inf),
    "flashinfer": _Convention("(batch, seqlen_q, num_heads)", log2=True, heads_last=True),
    "jax": _Convention("(batch, seqlen_q, num_heads)", heads_last=True),
    "cudnn": _Convention("(batch, num_heads, seqlen_q, 1)", trailing=True),
}


def convert_lse(lse: Any, *, source: str, target: str) -> Any:
    """lse of another library as ours, or the other way round: base, layout, rows without keys.

    Args:
        lse: a floating array of CuPy, PyTorch, JAX or NumPy, with a batch, or packed, a dimension less.
        source, target: whose convention lse follows, and whose the result does:

            "fa2cupy"     natural logarithm, (batch, num_heads, seqlen_q), -inf for a row that sees no key
            "flash_attn"  the same, but +inf for such rows (-inf is understood too, as FlashAttention 3 has both)
            "flashinfer"  base 2, (batch, seqlen_q, num_heads): to its (total, num_heads) by reshape
            "jax"         as jax.nn.dot_product_attention's residual, (batch, seqlen_q, num_heads)
            "cudnn"       its statistics, (batch, num_heads, seqlen_q, 1)

    Returns:
        The converted array, of lse's dtype; a view of it where nothing but the layout differs. Differentiable through
        torch and JAX.

    FlashAttention 2 leaves a row's constant out of lse where ALiBi meets causal: that is not undone here.

    Raises: ValueError or TypeError for anything else.
    """
    ends = []
    for name, value in (("source", source), ("target", target)):
        if not isinstance(value, str) or value not in _CONVENTIONS:
            kind = InvalidArgument if isinstance(value, str) else InvalidType
            raise kind(f"{shown(name, value)} is unknown: one of {', '.join(map(repr, _CONVENTIONS))} is needed")
        ends.append(_CONVENTIONS[value])
    of, to = ends
    framework = framework_of(lse)
    if framework is None:
        raise InvalidType(f"lse is a {describe(lse)}: an array of CuPy, PyTorch, JAX or NumPy is needed")
    if "float" not in str(lse.dtype):
        raise InvalidType(f"lse has dtype {lse.dtype}: a floating-point one is needed")
    shape = tuple(lse.shape)
    if len(shape) - of.trailing not in (2, 3) or (of.trailing and shape[-1] != 1):
        raise InvalidArgument(f"lse has shape {shape}: {of.shape} is needed for source={source!r}, or without batch")
    xp = importlib.import_module(framework.namespace)
    if of.trailing:
        lse = lse[..., 0]
    if of.heads_last != to.heads_last:
        lse = xp.swapaxes(lse, -1, -2)
    if of.log2 != to.log2:
        lse = lse * (math.log(2) if of.log2 else math.log2(math.e))
    if source == "jax" or of.unseen != to.unseen:
        # jax.nn hides keys by 0.7 of the lowest number: a row that sees none has something like it.
        is_unseen = (lse < 0.5 * float(xp.finfo(lse.dtype).min)) if source == "jax" else xp.isinf(lse)
        lse = xp.where(is_unseen, xp.full_like(lse, to.unseen), lse)
    return lse[..., None] if to.trailing else lse
