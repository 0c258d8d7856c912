"""The inputs of the cells of features, and ours as one call without arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.feature_cells import Cell, slope

__all__ = [
    "Call",
    "MissingError",
    "Tensors",
    "UnableError",
    "as_given",
    "make_tensors",
    "ours",
    "ours_dense",
    "starts_of",
]

Call = Callable[[], Any]


class UnableError(Exception):
    """The library has no such thing."""


class MissingError(Exception):
    """Ours has no such thing yet."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """(batch, seqlen, heads, head_dim) or (rows, heads, head_dim); starts (sequences + 1,), used (batch,): int32;
    slopes (num_heads,) float32; sinks (num_heads,) as q, with a gradient."""

    q: Any
    k: Any
    v: Any
    dout: Any
    starts: Any = None
    used: Any = None
    slopes: Any = None
    sinks: Any = None

    @property
    def differentiated(self) -> tuple[Any, ...]:
        return (self.q, self.k, self.v) if self.sinks is None else (self.q, self.k, self.v, self.sinks)

    def flat(self) -> list[Any]:
        """q, k, v and dout as (rows, heads, head_dim)."""
        given = [t.detach() if hasattr(t, "detach") else t for t in (self.q, self.k, self.v, self.dout)]
        return [t.reshape(-1, t.shape[-2], t.shape[-1]) for t in given]


def _shapes(cell: Cell) -> list[tuple[int, ...]]:
    lead = (cell.seqlen,) if cell.lengths else (cell.batch, cell.seqlen)
    return [
        (*lead, heads, cell.head_dim) for heads in (cell.num_heads, cell.num_heads_k, cell.num_heads_k, cell.num_heads)
    ]


def starts_of(cell: Cell) -> list[int]:
    """Where each sequence begins, and where the last ends."""
    sequences = cell.sequences()
    return [*(start for start, _, _ in sequences), sequences[-1][0] + sequences[-1][1]]


def make_tensors(cell: Cell, device: str = "cuda", seed: int = 0) -> Tensors:
    """bfloat16 on a GPU, float32 on a CPU by torch ("cpu") or NumPy ("numpy"), unless the cell is of another type; q, k
    and v of torch require grad."""
    if device == "numpy":
        import numpy as np

        normal = np.random.default_rng(seed).standard_normal
        wide = np.float64 if cell.dtype == "float64" else np.float32
        arrays = [normal(shape, wide) for shape in _shapes(cell)]
        arrays[0] *= _spread(cell)
        starts, used = (np.asarray(x, np.int32) for x in (starts_of(cell), cell.used))
        slopes = np.asarray([slope(cell, head) for head in range(cell.num_heads)], np.float32)
        sinks = normal(cell.num_heads, np.float32)
    else:
        import torch

        generator = torch.Generator(device).manual_seed(seed)
        dtype = torch.float32 if device == "cpu" and cell.dtype == "bfloat16" else getattr(torch, cell.dtype)
        shapes = (*_shapes(cell), (cell.num_heads,))
        *arrays, sinks = (torch.randn(s, device=device, dtype=dtype, generator=generator) for s in shapes)
        arrays[0] *= _spread(cell)
        for array in (*arrays[:3], sinks):
            array.requires_grad_()
        starts, used = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts_of(cell), cell.used))
        slopes = torch.tensor([slope(cell, head) for head in range(cell.num_heads)], device=device)
    return Tensors(
        *arrays,
        starts=starts if cell.lengths else None,
        used=used if cell.used else None,
        slopes=slopes if cell.alibi else None,
        sinks=sinks if cell.sinks else None,
    )


def _spread(cell: Cell) -> float:
    """Of the scores, so that a cap is felt."""
    return cell.softcap / 4 if cell.softcap else 1.0


def as_given(found: Any, tensors: Tensors, mode: str) -> list[Any]:
    """What a call returned, of the inputs' own framework and shapes."""
    shaped = (tensors.q,) if mode == "fwd" else (tensors.q, tensors.k, tensors.v)
    found = [found] if mode == "fwd" else list(found)[:3]
    if hasattr(tensors.q, "detach"):
        import torch

        found = [x.detach() if isinstance(x, torch.Tensor) else torch.from_dlpack(x.block_until_ready()) for x in found]
    return [x.reshape(like.shape) for x, like in zip(found, shaped, strict=True)]


def ours(cell: Cell, t: Tensors, mode: str, package: Any = None) -> Call:
    """A call of `package`: fa2cupy, or the same of another commit."""
    keywords: dict[str, Any] = {"causal": cell.causal}
    if cell.windowed:
        keywords["window_size"] = cell.window
    if cell.softcap:
        keywords["softcap"] = cell.softcap
    if t.slopes is not None:
        keywords["alibi_slopes"] = t.slopes
    if t.sinks is not None:
        keywords["sinks"] = t.sinks.detach() if hasattr(t.sinks, "detach") else t.sinks
    if cell.dropout:
        keywords |= {"dropout_p": cell.dropout, "dropout_seed": (42, 0)}
    if t.starts is not None:
        keywords |= {"cu_seqlens_q": t.starts, "cu_seqlens_k": t.starts}
    if t.used is not None:
        keywords["seqused_k"] = t.used
    if cell.precision:
        keywords["precision"] = cell.precision
    return _ours_with(t, mode, keywords, package)


def ours_dense(cell: Cell, t: Tensors, mode: str) -> Call:
    """Sequences of one length as a batch."""
    (length,) = set(cell.lengths)
    q, k, v, dout = (x.reshape(-1, length, *x.shape[-2:]) for x in t.flat())
    return _ours_with(Tensors(q, k, v, dout), mode, {"causal": cell.causal})


def _ours_with(t: Tensors, mode: str, keywords: dict[str, Any], package: Any = None) -> Call:
    if package is None:
        import fa2cupy as package

    q, k, v = (x.detach() if hasattr(x, "detach") else x for x in (t.q, t.k, t.v))
    try:
        out, lse = package.attention(q, k, v, **keywords, return_lse=True)
    except package.InvalidArgument as error:
        if "not supported yet" in str(error):
            raise MissingError(str(error)) from None
        raise
    if mode == "fwd":
        return lambda: package.attention(q, k, v, **keywords, return_lse=True)[0]
    if t.sinks is not None:
        keywords["grad_of"] = ("sinks",)
    return lambda: package.attention_backward(t.dout, q, k, v, out, lse, **keywords)
