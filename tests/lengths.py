"""Sequences in packed or padded arrays: cases of them, and a judge, which takes each by itself in float64.

    case = draw(seed, form="packed", ...)           arrays with NaN in every row that no sequence has
    fa2cupy.attention(*case.inputs[:3], **case.lengths)
    expect_sequences(case.inputs, case.lengths, causal=True).check(out=out, lse=lse)

Nothing here is shared with `fa2cupy.sequences`: rows are lists of numbers, and arrays are indexed by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.reference import Bound, Expected, Features, Inputs, as_float64, dtype_name, expect, round_to, store
from tests.scores import features_of

FORMS = ("packed", "q packed", "k packed", "dense", "segments", "segment pairs")

# Lengths of the queries and the keys of each sequence: zeros on either side, one token, longer than a tile, equal ones.
MIXED = ((3, 5), (0, 4), (1, 1), (300, 270), (17, 0), (0, 0), (9, 40), (40, 9), (64, 64))
SMALL = ((2, 3), (0, 0), (0, 0), (1, 0), (0, 1), (0, 0), (1, 1), (0, 0))  # more sequences than tokens


class Place(NamedTuple):
    """A sequence: its rows of q in row `batch_q` of the batch, and those of k.

    number: of its slopes and of what dropout drops, in which row `first_q` is its first query, `first_k` its first key.
    """

    batch_q: int
    rows_q: list[int]
    batch_k: int
    rows_k: list[int]
    number: int
    first_q: int
    first_k: int


class Case(NamedTuple):
    """inputs: rows of no sequence hold NaN. lengths: by keyword."""

    inputs: Inputs
    lengths: dict[str, Any]


def places(lengths: Mapping[str, Any], batch: int, seqlen_q: int, seqlen_k: int) -> list[Place]:
    """Every sequence, empty ones too, from arrays that are right."""

    def first(side: str, b: int) -> int:
        starts = lengths.get(f"cu_seqlens_{side}")
        return 0 if starts is None else int(starts[b])

    def rows(side: str, seqlen: int, b: int) -> list[int]:
        starts, used = lengths.get(f"cu_seqlens_{side}"), lengths.get(f"seqused_{side}")
        start, end = first(side, b), seqlen if starts is None else int(starts[b + 1])
        end = end if used is None else start + int(used[b])
        pad = int(lengths["leftpad_k"][b]) if side == "k" and "leftpad_k" in lengths else 0
        return list(range(start + pad, end))

    found = []
    for b in range(batch):
        batch_q, batch_k = (0 if f"cu_seqlens_{side}" in lengths else b for side in "qk")
        rows_q, rows_k = rows("q", seqlen_q, b), rows("k", seqlen_k, b)
        if "segment_ids" not in lengths:
            found.append(Place(batch_q, rows_q, batch_k, rows_k, b, first("q", b), first("k", b)))
            continue
        ids = lengths["segment_ids"]
        ids_q, ids_k = ids if isinstance(ids, tuple) else (ids, ids)
        for number in sorted({int(ids_q[b][row]) for row in rows_q} | {int(ids_k[b][row]) for row in rows_k}):
            if number >= 0:
                own = [row for row in rows_q if ids_q[b][row] == number]
                found.append(Place(b, own, b, [row for row in rows_k if ids_k[b][row] == number], b, 0, 0))
    return found


def places_of(inputs: Inputs, lengths: Mapping[str, Any]) -> list[Place]:
    starts = next((lengths[name] for name in ("cu_seqlens_q", "cu_seqlens_k") if name in lengths), None)
    batch = len(inputs.q) if starts is None else len(starts) - 1
    return places(lengths, batch, inputs.q.shape[-3], inputs.k.shape[-3])


def draw(
    seed: int,
    form: str,
    *,
    pairs: Sequence[tuple[int, int]] = MIXED,
    used: Sequence[str] = (),
    dtype: str = "float64",
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    head_dim_v: int | None = None,
    integers: Any = np.int32,
    poison: float = np.nan,
) -> Case:
    """A case of `form` (one of FORMS) with sequences of those lengths. used: of seqused_q, seqused_k, leftpad_k, those
    that are given, at random where the sequences would be longer without them.
    """
    rng = np.random.default_rng(seed)
    room = [(n_q + int(rng.integers(0, 4)), n_k + int(rng.integers(0, 4))) for n_q, n_k in pairs]
    pads = [int(rng.integers(0, 3)) if "leftpad_k" in used else 0 for _ in pairs]
    room = [(n_q, n_k + pad) for (n_q, n_k), pad in zip(room, pads, strict=True)]
    lengths: dict[str, Any] = {}
    sizes = []
    for axis, side in enumerate("qk"):
        own = [pair[axis] for pair in pairs]
        name = f"seqused_{side}"
        if side == "k" and "leftpad_k" in used:
            own = [n + pad for n, pad in zip(own, pads, strict=True)]
        held = [pair[axis] for pair in room] if name in used else own
        if form == "packed" or form == f"{side} packed":
            front, behind = rng.integers(0, 5, 2)
            lengths[f"cu_seqlens_{side}"] = np.cumsum([front, *held]).astype(integers)
            sizes.append((int(front) + sum(held) + int(behind),))
        elif form.startswith("segment"):
            sizes.append((3, 0))  # below
        else:  # all rows of the batch are as long as the longest, so that without seqused sequences are too
            sizes.append((len(pairs), max(held, default=0)))
        if name in used:
            lengths[name] = np.array(own, integers)
    if "leftpad_k" in used:
        lengths["leftpad_k"] = np.array(pads, integers)
    if form.startswith("segment"):
        lengths = {}
        ids, sizes = _segments(rng, pairs, form == "segment pairs")
        lengths["segment_ids"] = tuple(x.astype(integers) for x in ids) if len(ids) == 2 else ids[0].astype(integers)
        for name, seqlen in (("seqused_q", sizes[0][1]), ("seqused_k", sizes[1][1])):
            if name in used:
                lengths[name] = np.append(rng.integers(seqlen // 2, seqlen + 1, 2), 0).astype(integers)
        if "leftpad_k" in used:
            lengths["leftpad_k"] = np.append(rng.integers(0, seqlen // 3 + 1, 2), 0).astype(integers)
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    shapes = {"q": (*sizes[0], heads[0], head_dim), "k": (*sizes[1], heads[1], head_dim)}
    shapes |= {"v": (*sizes[1], heads[1], head_dim_v), "dout": (*sizes[0], heads[0], head_dim_v)}
    inputs = Inputs(**{name: store(rng.standard_normal(shape), dtype) for name, shape in shapes.items()})
    dead_q, dead_k = dead_rows(inputs, lengths)
    for array, dead in ((inputs.q, dead_q), (inputs.dout, dead_q), (inputs.k, dead_k), (inputs.v, dead_k)):
        array[dead] = store(np.array(poison), dtype)
    return Case(inputs, lengths)


def _segments(rng: Any, pairs: Sequence[tuple[int, int]], are_pairs: bool) -> tuple[list[Any], list[tuple[int, int]]]:
    """Ids of three rows of the batch, in which all runs occur; gaps of padding between some."""
    rows: list[list[list[int]]] = [[[], []] for _ in range(3)]
    names = rng.permutation(len(pairs))
    for n, pair in enumerate(pairs):
        row, gap = rows[n % 3], int(rng.integers(0, 3))
        for axis in range(2):
            row[axis] += [int(names[n])] * pair[axis if are_pairs else 0] + [-1 - gap] * gap
    sides = []
    for axis in range(2 if are_pairs else 1):
        seqlen = max(len(row[axis]) for row in rows) + 2
        sides.append(np.array([row[axis] + [-7] * (seqlen - len(row[axis])) for row in rows]))
    return sides, [(3, sides[0].shape[1]), (3, sides[-1].shape[1])]


def dead_rows(inputs: Inputs, lengths: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of the queries, and of the keys, no sequence has; of the shape of q and k without heads."""
    dead_q, dead_k = (np.ones(x.shape[:-2], bool) for x in (inputs.q, inputs.k))
    for place in places_of(inputs, lengths):
        _batched(dead_q, 1)[place.batch_q, place.rows_q] = False
        _batched(dead_k, 1)[place.batch_k, place.rows_k] = False
    return dead_q, dead_k


def _batched(x: Any, rank: int) -> Any:
    """A view with a batch of one where there is no batch. rank: of what belongs to a row of the batch."""
    return x[None] if x.ndim == rank else x


def expect_sequences(
    inputs: Inputs,
    lengths: Mapping[str, Any],
    *,
    out: Any = None,
    dlse: Any = None,
    dtype: str = "",
    features: Mapping[str, Any] | None = None,
    **options: Any,
) -> Expected:
    """`expect` of every sequence by itself, put together; of rows of no sequence out 0, lse -inf, gradients 0.

    out: what the backward is given, dlse: the gradient of lse, both as `expect` has them; options: causal, window,
    scale; features: as `attention` is given them (tests/scores.py). The floors are the largest of all sequences', of
    dsinks, which adds them up, the sum.
    """
    features = features or {}
    dtype = dtype or dtype_name(inputs.q)
    q, k, v, dout = (_batched(x, 3) for x in inputs)
    lse = np.full((*q.shape[:1], q.shape[2], q.shape[1]), -np.inf)
    whole = {"out": np.zeros(dout.shape), "dq": np.zeros(q.shape), "dk": np.zeros(k.shape), "dv": np.zeros(v.shape)}
    rounds = dtype in ("float16", "bfloat16")
    models = {name: np.zeros(x.shape) for name, x in whole.items()} if rounds else {}
    floors = dict.fromkeys(whole, 0.0)
    sinks = features.get("sinks")
    if sinks is not None:
        whole["dsinks"], floors["dsinks"] = np.zeros(len(sinks)), 0.0
        models |= {"dsinks": np.zeros(len(sinks))} if rounds else {}
    all_places = places_of(inputs, lengths)
    keep = features_of(
        features, max((place.number + 1 for place in all_places), default=0), q.shape[2], q.shape[1], k.shape[1]
    ).keep
    for place in all_places:
        if not place.rows_q or (not place.rows_k and sinks is None):
            continue
        own, theirs = (place.batch_q, place.rows_q), (place.batch_k, place.rows_k)
        found = expect(
            q[own][None], k[theirs][None], v[theirs][None], dout[own][None], dtype=dtype,
            out=None if out is None else _batched(out, 3)[own][None],
            dlse=None if dlse is None else _batched(dlse, 2)[place.batch_q][:, place.rows_q][None],
            features=_features_of_one(features, place, keep), **options,
        )  # fmt: skip
        lse[place.batch_q][:, place.rows_q] = found.lse[0]
        for name, bound in found.bounds.items():
            if name == "dsinks":
                whole[name] += bound.ref
                floors[name] += bound.floor
                if bound.model is not None:
                    models[name] += bound.model
                continue
            rows = own if name in ("out", "dq") else theirs
            whole[name][rows] = bound.ref[0]
            if bound.model is not None:
                models[name][rows] = bound.model[0]
            floors[name] = max(floors[name], bound.floor)
    bounds = {}
    if sinks is not None and rounds and dtype_name(sinks) == dtype:
        models["dsinks"] = round_to(models["dsinks"], dtype)
    for name, array in whole.items():
        if name == "dsinks":
            bounds[name] = Bound(array, models.get(name), floors[name])
            continue
        packed = {"out": inputs.q, "dq": inputs.q, "dk": inputs.k, "dv": inputs.k}[name].ndim == 3
        of = models.get(name)
        bounds[name] = Bound(*(x[0] if packed and x is not None else x for x in (array, of)), floors[name])
    return Expected(lse=as_float64(lse[0] if inputs.q.ndim == 3 else lse), bounds=bounds)


def _features_of_one(features: Mapping[str, Any], place: Place, keep: Any) -> Features:
    """Those of a sequence. keep: of all of them, in whole arrays."""
    slopes, sinks = features.get("alibi_slopes"), features.get("sinks")
    if slopes is not None and slopes.ndim == 2:
        slopes = slopes[place.number : place.number + 1]
    if keep is not None:
        rows = np.array(place.rows_q, int)[:, None] - place.first_q
        keep = keep[place.number][:, rows, np.array(place.rows_k, int) - place.first_k][None]
    sinks = None if sinks is None else as_float64(sinks)  # nothing rounded before all are added up
    p = features.get("dropout_p", 0.0)
    return Features(features.get("softcap"), slopes, sinks, round(p * 2**15) / 2**15, keep)
