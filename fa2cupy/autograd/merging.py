"""merge_attention through torch: by the kernels where the tensors are plain ones on a GPU, and nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fa2cupy import merged
from fa2cupy.autograd.watchers import PLAIN, are_watched, is_compiling, is_grad_enabled, is_plain
from fa2cupy.frameworks import TORCH

__all__ = ["merge"]

Formula = Callable[[Sequence[Any], Sequence[Any]], tuple[Any, Any]]


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, *pieces: Any) -> Any:
        count = len(pieces) // 2
        results = merged.merge(TORCH, pieces[:count], pieces[count:])
        assert results is not None, "it was asked before"
        ctx.save_for_backward(*pieces, *results)
        ctx.formula = formula
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        *pieces, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        count = len(pieces) // 2
        # create_graph=True: the formula has a second derivative
        if is_grad_enabled() or are_watched() or not is_plain(dout) or not is_plain(dlse):
            with torch.enable_grad():
                again = zip(ctx.formula(pieces[:count], pieces[count:]), (dout, dlse), strict=True)
                results, gradients = zip(*(pair for pair in again if pair[0].requires_grad), strict=True)
            wanted = [piece for piece in pieces if piece.requires_grad]
            found = iter(torch.autograd.grad(results, wanted, gradients, create_graph=is_grad_enabled()))
            return None, *(next(found) if piece.requires_grad else None for piece in pieces)
        douts, dlses = merged.differentiate(TORCH, (dout, dlse), pieces[:count], pieces[count:], out, lse)
        return None, *douts, *dlses


def on_a_gpu(tensor: torch.Tensor) -> bool:
    return bool(tensor.is_cuda)


def merge(outs: Sequence[Any], lses: Sequence[Any], formula: Formula) -> tuple[Any, Any]:
    """(out, lse) of pieces whose shapes and dtypes fit together; formula: the same by torch's own operators."""
    pieces = (*outs, *lses)
    if is_compiling() or are_watched() or not all(type(piece) in PLAIN and on_a_gpu(piece) for piece in pieces):
        return formula(outs, lses)
    if is_grad_enabled() and any(piece.requires_grad for piece in pieces):
        if not merged.has_kernel(TORCH, outs, lses):
            return formula(outs, lses)
        out, lse = _Merge.apply(formula, *pieces)
        return out, lse
    return merged.merge(TORCH, outs, lses) or formula(outs, lses)
