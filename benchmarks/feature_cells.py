"""The cells of features, what is right in them, and the bars: packed sequences, windows, padded keys, scores.

A cell is a batch of sequences, each with as many queries as keys; packed ones are rows behind one another, dense ones
too once batch and seqlen are one axis, so that everything below sees (rows, heads, head_dim). Only (query, key) pairs
that live count as work: 4 D of them forward, 10 D backward, for each head.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

from benchmarks import results

__all__ = [
    "BARS",
    "CELLS",
    "DENSE",
    "GROUPS",
    "MODES",
    "Bar",
    "Cell",
    "Group",
    "References",
    "Verdict",
    "judge",
    "reference",
    "select",
    "tiny",
]

MODES = ("fwd", "bwd")
DENSE = "fa2cupy-dense"  # ours on the same sequences, as a batch
ROWS_AT_ONCE = 1024  # of the reference's scores
SAMPLED = 16  # sequences that the reference computes, about, of many


@dataclass(frozen=True, slots=True)
class Cell:
    """lengths: of packed sequences (batch is 1 then, seqlen their sum). used: keys in use of each dense sequence.

    window: (left, right), -1 without an end. alibi: slopes 2^(-8 (head + 1) / heads). sinks: a normal logit for each
    head. floors: bars of this cell's own, forward and backward. best: who was the fastest of the others, forward and
    backward, when they were first measured: without these two a comparison says little.
    """

    name: str
    group: str
    batch: int = 2
    seqlen: int = 8192
    num_heads: int = 16
    num_heads_k: int = 16
    head_dim: int = 128
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    lengths: tuple[int, ...] = ()
    used: tuple[int, ...] = ()
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    dropout: float = 0.0
    floors: tuple[float, float] | None = None
    best: tuple[tuple[str, ...], tuple[str, ...]] = (("fa4",), ("fa4",))

    def sequences(self) -> list[tuple[int, int, int]]:
        """Of each sequence: its first row, its rows, how many of these are keys in use."""
        lengths = self.lengths or (self.seqlen,) * self.batch
        return list(zip(accumulate(lengths, initial=0), lengths, self.used or lengths, strict=False))

    def seen(self, row: int, keys: int) -> tuple[int, int]:
        """The keys that a query of a sequence sees: from, up to."""
        left, right = self.window
        right = 0 if self.causal else right
        return (max(0, row - left) if left >= 0 else 0), (min(keys, row + right + 1) if right >= 0 else keys)

    @property
    def pairs(self) -> int:
        """Live (query, key) pairs of one head."""
        return _pairs(self)

    def flops(self, mode: str) -> float:
        return (4.0 if mode == "fwd" else 10.0) * self.pairs * self.num_heads * self.head_dim

    def __str__(self) -> str:
        text = f"B{self.batch} S{self.seqlen} H{self.num_heads}/{self.num_heads_k} D{self.head_dim} "
        text += "causal" if self.causal else "full"
        if self.window != (-1, -1):
            text += f", window {self.window}"
        if self.lengths:
            text += f", {len(self.lengths)} packed sequences of {min(self.lengths)} to {max(self.lengths)}"
        if self.used:
            text += f", {min(self.used)} to {max(self.used)} keys used"
        if self.softcap:
            text += f", softcap {self.softcap:g}"
        text += ", ALiBi" * self.alibi + ", sinks" * self.sinks
        if self.dropout:
            text += f", dropout {self.dropout:g}"
        return text

    @property
    def windowed(self) -> bool:
        return self.window != (-1, -1)

    @property
    def right(self) -> float:
        """Relative error of a result that is right: a window that is off by one has 1.6e-2 at 4,096 keys; under a
        softcap there are libraries whose tanh is right to percents."""
        return 8e-2 if self.softcap else 1e-2


@cache
def _pairs(cell: Cell) -> int:
    rows = (cell.seen(row, keys) for _, rows, keys in cell.sequences() for row in range(rows))
    return sum(max(0, last - first) for first, last in rows)


# A long tail of document lengths, 16 to 7,025; and one with empty sequences.
_MIX = (71, 44, 193, 43, 202, 33, 429, 547, 140, 2512, 19, 7025, 240, 44, 177, 223, 16, 1285, 864, 644, 847, 786)
_ZERO = (3000, 0, 1096, 0, 0, 4096, 2048, 0, 1952, 4096, 96, 0)
_USED = (743, 1469, 1370, 523, 1013, 1492, 1226, 1537)


def _packed(name: str, lengths: tuple[int, ...], forward: str = "fa3", backward: str = "fa4", **more: Any) -> Cell:
    return Cell(name, "packed", 1, sum(lengths), lengths=lengths, best=((forward,), (backward,)), **more)


def _window(name: str, left: int, seqlen: int, right: int = 0, **more: Any) -> Cell:
    best = (("fa4", "vfa3"), ("fa4",))
    more.setdefault("causal", right == 0)
    return Cell(name, "window", 16384 // seqlen or 1, seqlen, window=(left, right), best=best, **more)


def _scores(name: str, floors: tuple[float, float], best: str = "fa4", backward: str = "", **more: Any) -> Cell:
    return Cell(name, "scores", floors=floors, best=((best,), (backward or best,)), **more)


def _equal(seqlen: int, head_dim: int, causal: bool) -> Cell:
    batch, heads = 16384 // seqlen, 2048 // head_dim
    name = f"eq{seqlen // 1024}k_{'c' if causal else 'f'}" + (f"_d{head_dim}" if head_dim != 128 else "")
    lengths, best = (seqlen,) * batch, ((DENSE,), (DENSE,))
    return Cell(name, "equal", 1, 16384, heads, heads, head_dim, causal, lengths=lengths, best=best)


_ALL = (
    _packed("vl_mix_c", _MIX),
    _packed("vl_mix_f", _MIX, causal=False),
    _packed("vl_zero_c", _ZERO),
    _packed("vl_mix_c_gqa", _MIX, num_heads=32, num_heads_k=8),
    _packed("vl_mix_c_d256", _MIX, "fa4", num_heads=8, num_heads_k=8, head_dim=256),
    _packed("vl16x1k_c", (1024,) * 16),
    _packed("vl16x1k_f_d64", (1024,) * 16, "fa4", num_heads=32, num_heads_k=32, head_dim=64, causal=False),
    _packed("vl64x256_c", (256,) * 64),
    _packed("vl512x32_f", (32,) * 512, "flex", "flex", causal=False),
    _window("w1k_8k", 1024, 8192),
    _window("w4k_32k", 4096, 32768),
    _window("w512sym_8k", 512, 8192, 512),
    _window("w256_8k", 256, 8192),
    _window("w4k_8k", 4096, 8192),
    _window("w256_32k", 256, 32768),
    _window("w1k_32k", 1024, 32768),
    _window("w1k_8k_gqa", 1024, 8192, num_heads=32, num_heads_k=8),
    _window("w1k_8k_d64", 1024, 8192, num_heads=32, num_heads_k=32, head_dim=64),
    Cell("keypad", "keypad", 8, 2048, causal=False, used=_USED, best=(("fa3",), ("jax",))),
    _scores("softcap30", (0.97, 1.35), "fa3", "fa4", softcap=30.0),
    _scores("softcap50_gqa", (0.97, 1.35), "fa3", "fa4", softcap=50.0, num_heads=32, num_heads_k=8),
    _scores("alibi", (1.02, 0.97), alibi=True),
    _scores("sink", (1.02, 1.02), sinks=True),
    _scores("drop_c", (1.7, 1.15), "cudnn", dropout=0.1),
    _scores("drop_f", (1.7, 1.15), "cudnn", dropout=0.1, causal=False),
    _scores("gptoss", (1.5, 1.5), sinks=True, window=(127, 0), num_heads=64, num_heads_k=8, head_dim=64),
    _scores("gemma2", (1.25, 1.4), softcap=50.0, window=(4096, 0), num_heads=8, num_heads_k=4, head_dim=256),
    *(
        _equal(seqlen, head_dim, causal)
        for head_dim in (128, 64, 256)
        for seqlen in (1024, 2048, 4096, 8192)
        for causal in (True, False)
    ),
)
CELLS: Mapping[str, Cell] = {cell.name: cell for cell in _ALL}


def select(patterns: Iterable[str], modes: Sequence[str] = MODES) -> list[Cell]:
    """The cells whose names match, in their own order. ValueError for a pattern that matches none."""
    patterns = list(patterns)
    for pattern in patterns:
        if not fnmatch.filter(CELLS, pattern):
            raise ValueError(f"no cell matches {pattern!r}: {', '.join(CELLS)}")
    return [cell for name, cell in CELLS.items() if any(fnmatch.fnmatch(name, p) for p in patterns)]


def tiny(cell: Cell) -> Cell:
    """The same features at a size for a CPU."""
    heads_k = max(1, 2 * cell.num_heads_k // cell.num_heads)
    small = {"num_heads": 2, "num_heads_k": heads_k, "head_dim": min(32, cell.head_dim // 4)}
    if cell.lengths:
        lengths = (
            (0, 17, 30, 0, 1, 16) if 0 in cell.lengths else (16,) * 4 if cell.group == "equal" else (17, 30, 1, 16)
        )
        return replace(cell, seqlen=64, lengths=lengths, **small)
    window = tuple(w if w <= 0 else 1 + w // 512 for w in cell.window)
    return replace(cell, batch=2, seqlen=64, window=window, used=(40, 64) if cell.used else (), **small)


# ----------------------------------------------------------------------------------------------------------------------
# What is right


def _sampled(cell: Cell) -> Iterator[tuple[tuple[int, int, int], int]]:
    """Sequences, and of each a key head: some of many, the longest and the last among them, and each head in turn."""
    sequences = cell.sequences()
    longest = max(range(len(sequences)), key=lambda n: sequences[n][1])
    chosen = {*range(0, len(sequences), max(1, len(sequences) // SAMPLED)), longest, len(sequences) - 1}
    for turn, number in enumerate(sorted(n for n in chosen if sequences[n][1])):
        yield sequences[number], turn * 5 % cell.num_heads_k


def slope(cell: Cell, head: int) -> float:
    """ALiBi's of a query head."""
    return 2.0 ** (-8.0 * (head + 1) / cell.num_heads) if cell.alibi else 0.0


def reference(
    xp: Any, cell: Cell, arrays: Sequence[Any], sequence: tuple[int, int, int], head_k: int, sinks: Any = None
) -> tuple[Any, Any, Any, Any]:
    """out, dq, dk, dv of one sequence and one key head with its query heads, in float64, from (q, k, v, dout).

    xp is numpy or torch. The formula as it stands; a block of rows at a time, with the keys that any of them sees.
    Nothing is dropped.
    """
    start, rows, keys = sequence
    group = cell.num_heads // cell.num_heads_k
    heads = slice(head_k * group, (head_k + 1) * group)
    which = (heads, head_k, head_k, heads)
    q, k, v, dout = (
        xp.asarray(a[start : start + rows, h], dtype=xp.float64) for a, h in zip(arrays, which, strict=True)
    )
    scale = cell.head_dim**-0.5
    left, right = cell.window
    right = 0 if cell.causal else right
    out, dq, dk, dv = (xp.zeros_like(a) for a in (q, q, k, v))
    for begin in range(0, rows, ROWS_AT_ONCE):
        end = min(rows, begin + ROWS_AT_ONCE)
        first, last = cell.seen(begin, keys)[0], cell.seen(end - 1, keys)[1]
        i = xp.arange(begin, end, device=q.device)[:, None]
        j = xp.arange(first, last, device=q.device)[None]
        seen = (j >= i - left if left >= 0 else j >= 0) & (j <= i + right if right >= 0 else j < keys)
        near_k, near_v = k[first:last], v[first:last]
        for h in range(group):
            scores, slant = q[begin:end, h] @ near_k.T * scale, 1.0
            if cell.softcap:
                tanh = xp.tanh(scores / cell.softcap)
                scores, slant = cell.softcap * tanh, 1 - tanh**2
            if cell.alibi:
                scores = scores - slope(cell, head_k * group + h) * abs(i - j)
            weights = xp.exp(scores) * seen  # normal inputs, or a softcap: no score is large
            total = weights.sum(-1)[:, None]
            if sinks is not None:
                total = total + math.exp(float(sinks[head_k * group + h].item()))
            p = weights / (total + (total == 0))
            out[begin:end, h] = p @ near_v
            dp = dout[begin:end, h] @ near_v.T
            ds = p * (dp - (dout[begin:end, h] * out[begin:end, h]).sum(-1)[:, None]) * slant * scale
            dq[begin:end, h] = ds @ near_k
            dk[first:last] += ds.T @ q[begin:end, h]
            dv[first:last] += p.T @ dout[begin:end, h]
    return out, dq, dk, dv


class References:
    """The reference on some sequences of a cell; flat: the inputs as (rows, heads, head_dim)."""

    def __init__(self, xp: Any, cell: Cell, flat: Sequence[Any], sinks: Any = None) -> None:
        self.xp, self.cell = xp, cell
        self.parts = [(s, h, reference(xp, cell, flat, s, h, sinks)) for s, h in _sampled(cell)]

    def wrong(self, found: Sequence[Any], mode: str) -> str:
        """What is not right, empty if nothing is.

        What drops at random is right on average: its regression on the reference has slope 1, and its own noise.
        """
        bad = []
        for name, error, along in self.compared(found, mode):
            if not self.cell.dropout:
                if not error < self.cell.right:
                    bad.append(f"{name} is off by {error:.1e}")
            elif not (0.9 < along < 1.1 and error > 5e-2):
                bad.append(f"{name} is {along:.2f} x the right one, and off by {error:.1e}: not as dropout leaves it")
        return ", ".join(bad)

    def errors(self, found: Sequence[Any], mode: str) -> dict[str, float]:
        return {name: error for name, error, _ in self.compared(found, mode)}

    def compared(self, found: Sequence[Any], mode: str) -> list[tuple[str, float, float]]:
        """Name, root-mean-square error over the right one's own, slope of the regression on the right one, of each
        result; infinite if a number of it is not finite."""
        group = self.cell.num_heads // self.cell.num_heads_k
        names = ("out",) if mode == "fwd" else ("dq", "dk", "dv")
        compared = []
        for index, (name, whole) in enumerate(zip(names, found, strict=True), mode == "bwd"):
            if not bool(self.xp.isfinite(whole).all()):
                compared.append((name, math.inf, math.inf))
                continue
            whole = whole.reshape(-1, whole.shape[-2], whole.shape[-1])
            off = size = along = 0.0
            for (start, rows, _), head_k, right in self.parts:
                heads: Any = slice(head_k * group, (head_k + 1) * group) if name in ("out", "dq") else head_k
                got = self.xp.asarray(whole[start : start + rows, heads], dtype=self.xp.float64)
                off += float(((got - right[index]) ** 2).sum())
                size += float((right[index] ** 2).sum())
                along += float((right[index] * got).sum())
            compared.append((name, math.sqrt(off / size), along / size))
        return compared


# ----------------------------------------------------------------------------------------------------------------------
# What is fast enough


@dataclass(frozen=True, slots=True)
class Bar:
    """Least speed of ours over the best of the others that is right: the geometric mean of the cells, and any cell."""

    mean: float | None
    floor: float


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    bars: Mapping[str, Bar]


_EQUAL = Bar(None, 1 / 1.03)
GROUPS: Mapping[str, Group] = {
    "packed": Group("packed sequences", {"fwd": Bar(1.03, 0.95), "bwd": Bar(1.12, 0.97)}),
    "window": Group("windows", {"fwd": Bar(1.05, 0.97), "bwd": Bar(1.08, 0.97)}),
    "scores": Group("scores, each with a bar of its own", {"fwd": Bar(None, 0.0), "bwd": Bar(None, 0.0)}),
    "keypad": Group("padded keys", {"fwd": Bar(None, 1.0), "bwd": Bar(None, 1.25)}),
    "equal": Group("equal lengths, packed over dense", {"fwd": _EQUAL, "bwd": _EQUAL}),
}
BARS = {(name, mode): bar for name, group in GROUPS.items() for mode, bar in group.bars.items()}
SHORT = Bar(None, 1 / 1.06)  # equal lengths of 1,024


def _floor(cell: Cell, mode: str, bar: Bar) -> float:
    if cell.floors:
        return cell.floors[MODES.index(mode)]
    return SHORT.floor if cell.group == "equal" and cell.lengths[0] < 2048 else bar.floor


@dataclass(frozen=True, slots=True)
class Verdict:
    """lines: what was found, bar by bar. missed: what is not as it should be."""

    lines: tuple[str, ...]
    missed: tuple[str, ...]


def ratio(cell: Cell, mode: str, records: Iterable[Mapping[str, Any]]) -> tuple[float | None, str]:
    """Speed of ours over the best of the others that is right, and its name; or None, and what is missing."""
    row = {r["peer"]: r for r in records if r["cell"] == cell.name and r["mode"] == mode}
    ours = row.pop(results.OURS, None)
    if ours is None:
        return None, "ours was not measured"
    if ours["wrong"]:
        return None, "ours is wrong"
    absent = [name for name in cell.best[MODES.index(mode)] if name not in row]
    if absent:
        return None, f"without {' and '.join(absent)}, the fastest of the others, nothing is shown"
    right = {name: r["ms"] for name, r in row.items() if not r["wrong"]}
    if not right:
        return None, "none of the others is right"
    best = min(right, key=lambda name: right[name])
    return right[best] / ours["ms"], best


def judge(records: Sequence[Mapping[str, Any]], groups: Iterable[str], modes: Sequence[str] = MODES) -> Verdict:
    """The bars of these groups, from the records of one run. A cell that is not there misses its bars."""
    lines: list[str] = []
    missed: list[str] = []
    for name in groups:
        cells = [cell for cell in CELLS.values() if cell.group == name]
        for mode in modes:
            bar, ratios, before = BARS[name, mode], {}, len(missed)
            for cell in cells:
                value, who = ratio(cell, mode, records)
                if value is None:
                    missed.append(f"{cell.name} {mode}: {who}")
                    continue
                ratios[cell.name] = value
                floor = _floor(cell, mode, bar)
                if value < floor:
                    missed.append(f"{cell.name} {mode}: {value:.3f} of {who}'s speed, below {floor:.3f}")
            line = f"{GROUPS[name].title}, {mode}: "
            if ratios:
                floors = {n: _floor(CELLS[n], mode, bar) for n in ratios}
                mean, lowest = results.geometric_mean(ratios.values()), min(ratios, key=lambda n: ratios[n] / floors[n])
                line += f"mean {mean:.3f}" + (f" (at least {bar.mean})" if bar.mean else "")
                line += f", lowest {ratios[lowest]:.3f} in {lowest} (at least {floors[lowest]:.3f})"
                if bar.mean and mean < bar.mean:
                    missed.append(f"{GROUPS[name].title}, {mode}: a mean of {mean:.3f}, below {bar.mean}")
            line += f", {len(ratios)} of {len(cells)} cells" if ratios else f"none of {len(cells)} cells"
            lines.append(line + (": missed" if len(missed) > before else ": reached"))
    return Verdict(tuple(lines), tuple(missed))
