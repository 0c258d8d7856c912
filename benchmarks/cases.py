"""What is measured: the grid of 72 cells, the extra cells beside it, and cells named on the command line.

A cell is a shape, a mask, a dtype and a mode (``fwd`` or ``bwd``). FLOPs are counted as the field counts them:
2 B H S^2 (D + Dv) forward, 2 B H S^2 (3 D + 2 Dv) backward, half of it if causal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

__all__ = ["CASE_SETS", "HEAD_DIMS", "MODES", "SEQLENS", "Case", "grid", "parse_case", "select"]

MODES = ("fwd", "bwd")
HEAD_DIMS = (64, 128, 256)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS = 16384  # batch x seqlen
WIDTH = 2048  # num_heads x head_dim


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "f32": "float32", "f64": "float64"}


@dataclass(frozen=True, slots=True)
class Case:
    """One cell. seqlen is both seqlen_q and seqlen_k."""

    mode: str
    head_dim: int
    seqlen: int
    causal: bool
    batch: int
    num_heads: int
    num_heads_k: int
    dtype: str = "bfloat16"
    head_dim_v: int = 0  # 0: head_dim

    def __post_init__(self) -> None:
        if self.head_dim_v == 0:
            object.__setattr__(self, "head_dim_v", self.head_dim)

    @property
    def flops(self) -> float:
        """Of its matrix products; 4 B H S^2 D forward and 10 backward if D = Dv."""
        d, dv = self.head_dim, self.head_dim_v
        width = d + dv if self.mode == "fwd" else 3 * d + 2 * dv
        return 2.0 * self.batch * self.num_heads * self.seqlen**2 * width / (2 if self.causal else 1)

    @property
    def label(self) -> str:
        """Short and unique, in the form that `parse_case` reads."""
        d = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        h = f"h{self.num_heads}" + (f"/{self.num_heads_k}" if self.num_heads_k != self.num_heads else "")
        mask = "causal" if self.causal else "full"
        kind = next(kind for kind, dtype in _DTYPES.items() if dtype == self.dtype)
        return f"{self.mode}:{d}:b{self.batch}:s{self.seqlen}:{h}:{mask}:{kind}"


def grid(
    modes: Iterable[str] = MODES, head_dims: Iterable[int] = HEAD_DIMS, seqlens: Iterable[int] = SEQLENS
) -> list[Case]:
    """The cells that comparisons are made over: batch x seqlen = 16,384, heads x head_dim = 2,048, full and causal."""
    return [
        Case(mode, d, s, causal, TOKENS // s, max(1, WIDTH // d), max(1, WIDTH // d))
        for mode in modes
        for d in head_dims
        for causal in (False, True)
        for s in seqlens
    ]


def _both(case: Case) -> list[Case]:
    return [case, replace(case, mode="bwd")]


def _gqa() -> list[Case]:
    return _both(Case("fwd", 128, 8192, True, 2, 32, 8)) + _both(Case("fwd", 128, 4096, True, 1, 32, 1))


def _fp16() -> list[Case]:
    return [c for causal in (False, True) for c in _both(Case("fwd", 128, 4096, causal, 4, 16, 16, "float16"))]


def _thin() -> list[Case]:
    """A grid with fewer blocks than the GPU has room for."""
    return [c for causal in (False, True) for c in _both(Case("fwd", 128, 2048, causal, 1, 8, 8))]


def _head_dims() -> list[Case]:
    """Head dims between the grid's, 16 heads, batch x seqlen = 16,384."""
    return [
        c
        for d in (80, 96, 112, 160, 192)
        for causal in (False, True)
        for c in _both(Case("fwd", d, 4096, causal, 4, 16, 16))
    ]


def _wide() -> list[Case]:
    """Head dims 96, 192, and 192 with values of 128, at two lengths; 16 heads, batch x seqlen = 16,384."""
    return [
        c
        for d, dv in ((96, 96), (192, 192), (192, 128))
        for causal in (False, True)
        for s in (4096, 16384)
        for c in _both(Case("fwd", d, s, causal, TOKENS // s, 16, 16, head_dim_v=dv))
    ]


def _long() -> list[Case]:
    """Sequences of the length of Path-X and of Path-256, 16 heads of 64."""
    return [c for s in (16384, 65536) for causal in (False, True) for c in _both(Case("fwd", 64, s, causal, 1, 16, 16))]


def _causal() -> list[Case]:
    """The grid's cells with a mask."""
    return [case for case in grid() if case.causal]


def _tiny() -> list[Case]:
    """One small cell of each mode: a quick look at whether everything runs."""
    return _both(Case("fwd", 64, 512, True, 2, 4, 4))


CASE_SETS = {
    "grid": grid,
    "causal": _causal,
    "gqa": _gqa,
    "fp16": _fp16,
    "thin": _thin,
    "head_dims": _head_dims,
    "wide": _wide,
    "long": _long,
    "tiny": _tiny,
}

_SPEC = re.compile(
    r"(?P<mode>fwd|bwd):d(?P<d>\d+)(/(?P<dv>\d+))?:b(?P<b>\d+):s(?P<s>\d+):h(?P<h>\d+)(/(?P<hk>\d+))?"
    r":(?P<mask>causal|full)(:(?P<dtype>bf16|fp16|f32|f64))?"
)


def parse_case(spec: str) -> Case:
    """``fwd:d128:b2:s8192:h32/8:causal:bf16`` (``d192/128`` names head_dim/head_dim_v, ``h32/8`` query/key heads)."""
    m = _SPEC.fullmatch(spec)
    if m is None:
        raise ValueError(
            f"case {spec!r}: use a set ({', '.join(CASE_SETS)}) or the form fwd:d128:b2:s8192:h32/8:causal"
        )
    heads = int(m["h"])
    return Case(
        m["mode"],
        int(m["d"]),
        int(m["s"]),
        m["mask"] == "causal",
        int(m["b"]),
        heads,
        int(m["hk"] or heads),
        _DTYPES[m["dtype"] or "bf16"],
        int(m["dv"] or 0),
    )


def select(
    names: Sequence[str], modes: Sequence[str], head_dims: Sequence[int], seqlens: Sequence[int], part: tuple[int, int]
) -> list[Case]:
    """The cells of the named sets and specs that pass the filters (an empty filter passes all), part i of n of them.

    A head_dim or seqlen outside the grid's own is allowed with the set ``grid`` and makes a grid of its own.
    """
    cases: list[Case] = []
    for name in names:
        if name == "grid":
            cases += grid(modes or MODES, head_dims or HEAD_DIMS, seqlens or SEQLENS)
        else:
            cases += CASE_SETS[name]() if name in CASE_SETS else [parse_case(name)]
    kept = [
        c
        for c in dict.fromkeys(cases)
        if (not modes or c.mode in modes)
        and (not head_dims or c.head_dim in head_dims)
        and (not seqlens or c.seqlen in seqlens)
    ]
    index, count = part
    if not 1 <= index <= count:
        raise ValueError(f"part {index}/{count}: use 1/{count} to {count}/{count}")
    return kept[index - 1 :: count]
