"""Sequences whose lengths are data on the device: what they are, what queries see, and their attention by the kernels,
run on the CPU and judged sequence by sequence."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from fa2cupy.kernels import Plan, plan_backward, plan_forward
from fa2cupy.options import Options
from fa2cupy.problem import SPECS, AttentionProblem, Sizes
from fa2cupy.spec import LengthsSpec
from tests import reference, scores
from tests.gpu.cases import WIDE_DTYPES
from tests.host import run
from tests.host.build import Mutation
from tests.host.kernel_run import (
    BACKWARD,
    FORWARD,
    Tensor,
    device,
    keep_of,
    run_plan,
    seed_of,
    sinks_of,
    with_dropout,
)
from tests.host.run import Schedule

ARRAYS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k")


def starts(*lengths: int) -> tuple[int, ...]:
    """cu_seqlens of sequences that follow each other."""
    return tuple(int(n) for n in np.cumsum((0, *lengths)))


@dataclass(frozen=True)
class Lengths:
    """The arrays of a call, each None where there is none. rows_q, rows_k: of all, or of each row of the batch.

    segment_ids: of the queries and of the keys, a tuple for each row of the batch; then `sequences` are the segments
    that have a query.
    """

    rows_q: int
    rows_k: int
    sequences: int
    cu_seqlens_q: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None
    seqused_q: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    leftpad_k: tuple[int, ...] | None = None
    causal: bool = False
    window: tuple[int, int] | None = None
    segment_ids: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]] | None = None

    @property
    def spec(self) -> LengthsSpec:
        given = {name: getattr(self, name) is not None for name in ARRAYS}
        if self.segment_ids is not None:
            return LengthsSpec(self.problem_batch * min(self.rows_q, self.rows_k), segments=True, **given)
        return LengthsSpec(self.sequences, **given)

    @property
    def problem_batch(self) -> int:
        """As a call counts it: sequences, or rows of segments."""
        return self.sequences if self.segment_ids is None else len(self.segment_ids[0])

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """int32, by name."""
        ids = dict(zip(("segment_ids_q", "segment_ids_k"), self.segment_ids or (), strict=False))
        return {name: np.array(ids.get(name) or getattr(self, name), np.int32) for name in self.spec.arrays()}

    def is_packed(self, side: str) -> bool:
        return getattr(self, f"cu_seqlens_{side}") is not None

    def batch(self, side: str) -> int:
        return 1 if self.is_packed(side) else self.problem_batch

    def row(self, side: str, sequence: int) -> int:
        """The row of the batch that a sequence is in."""
        if self.segment_ids is not None:
            return self._segments[sequence][0]
        return 0 if self.is_packed(side) else sequence

    @functools.cached_property
    def _segments(self) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
        """Of each segment: its row of the batch, and (first row, length) of the queries and of the keys; last those
        without keys.
        """
        assert self.segment_ids is not None
        found, keyless = [], []
        for b, (ids_q, ids_k) in enumerate(zip(*self.segment_ids, strict=True)):
            first_k = self.leftpad_k[b] if self.leftpad_k else 0
            sides = []
            for ids, first, used in ((ids_q, 0, self.seqused_q), (ids_k, first_k, self.seqused_k)):
                rows: dict[int, list[int]] = {}
                for row in range(first, used[b] if used else len(ids)):
                    rows.setdefault(ids[row], []).append(row)
                sides.append(rows)
            for number, queries in sides[0].items():
                keys = sides[1].get(number)
                if number >= 0 and keys:
                    found.append((b, (queries[0], len(queries)), (keys[0], len(keys))))
                elif number >= 0:
                    keyless.append((b, (queries[0], len(queries)), (0, 0)))
        return found + keyless

    def number(self, sequence: int) -> int:
        """By which arrays for each row of the batch know a sequence."""
        return sequence if self.segment_ids is None else self._segments[sequence][0]

    def runs(self, side: str) -> list[tuple[int, int]]:
        """(first row, length) of each sequence on a side, of right lengths."""
        if self.segment_ids is not None:
            return [segment["qk".index(side) + 1] for segment in self._segments]
        origins, used = getattr(self, f"cu_seqlens_{side}"), getattr(self, f"seqused_{side}")
        found = []
        for b in range(self.sequences):
            first, length = (origins[b], origins[b + 1] - origins[b]) if origins else (0, getattr(self, f"rows_{side}"))
            if used:
                length = used[b]
            if side == "k" and self.leftpad_k:
                first, length = first + self.leftpad_k[b], length - self.leftpad_k[b]
            found.append((first, length))
        return found

    def visible(self, seqlen_q: int, seqlen_k: int) -> np.ndarray:
        """(seqlen_q, seqlen_k) bool: whom a query sees, of a sequence of these lengths."""
        distance = np.arange(seqlen_k)[None, :] - np.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
        left, right = self.window or (-1, -1)
        left, right = (1 << 20 if end < 0 else end for end in (left, 0 if self.causal else right))
        return np.asarray((distance >= -left) & (distance <= right))

    def there(self, side: str) -> np.ndarray:
        """(batch, rows) bool: rows of a sequence."""
        found = np.zeros((self.batch(side), getattr(self, f"rows_{side}")), bool)
        for b, (first, length) in enumerate(self.runs(side)):
            found[self.row(side, b), first : first + length] = True
        return found

    def seen(self, side: str) -> np.ndarray:
        """(batch, rows) bool: queries that see a key, or keys that a query sees."""
        found = np.zeros((self.batch(side), getattr(self, f"rows_{side}")), bool)
        for b, ((first_q, sq), (first_k, sk)) in enumerate(zip(self.runs("q"), self.runs("k"), strict=True)):
            visible = self.visible(sq, sk)
            first, which = (first_q, visible.any(1)) if side == "q" else (first_k, visible.any(0))
            found[self.row(side, b), first : first + len(which)] |= which
        return found


def lengths_of(
    *sequences: tuple[int, ...],
    packed_q: bool = True,
    packed_k: bool = True,
    behind: int = 0,
    causal: bool = False,
    window: tuple[int, int] | None = None,
) -> Lengths:
    """Of sequences (seqlen_q, seqlen_k, rows behind its queries, in front of its keys, behind its keys), the last three
    unused, 0 where they are left out. A side that is not packed has a row of the batch for each. behind: rows behind
    all of them, of a packed side.
    """
    full = [(*sequence, *(0,) * (5 - len(sequence))) for sequence in sequences]
    rows = {"q": [sq + gap for sq, _, gap, _, _ in full], "k": [left + sk + gap for _, sk, _, left, gap in full]}
    used = {"q": tuple(sq for sq, *_ in full), "k": tuple(left + sk for _, sk, _, left, _ in full)}
    pads = tuple(left for _, _, _, left, _ in full)
    given: dict[str, tuple[int, ...] | None] = {"leftpad_k": pads if any(pads) else None}
    lengths = {}
    for side, packed in (("q", packed_q), ("k", packed_k)):
        lengths[side] = sum(rows[side]) + behind if packed else max(rows[side])
        given[f"cu_seqlens_{side}"] = starts(*rows[side]) if packed else None
        given[f"seqused_{side}"] = None if packed and used[side] == tuple(rows[side]) else used[side]
    return Lengths(lengths["q"], lengths["k"], len(full), causal=causal, window=window, **given)


def segments_of(
    *rows: tuple[tuple[int, ...], ...],
    reverse_keys: bool = False,
    used: dict[str, tuple[int, ...]] | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
) -> Lengths:
    """Of rows of the batch, each of segments (queries, keys, padding behind both), 0 where it is left out; rows end in
    padding. reverse_keys: the keys of a row come in the other order. used: seqused_q, seqused_k, leftpad_k.
    """
    sides: list[list[list[int]]] = []
    for axis in (0, 1):
        found = []
        for number, row in enumerate(rows):
            runs = []
            for place, segment in enumerate(row):
                own = (7919 * place + 3 * number) % 100003  # equal numbers in other rows, in no order
                runs.append([own] * segment[axis] + [-1 - place] * sum(segment[2:]))
            found.append(list(itertools.chain(*reversed(runs) if axis and reverse_keys else runs)))
        sides.append(found)
    lengths = [max(len(ids) for ids in side) for side in sides]
    padded = (tuple(tuple(x + [-9] * (n - len(x))) for x in side) for side, n in zip(sides, lengths, strict=True))
    whole = Lengths(*lengths, 0, causal=causal, window=window, segment_ids=tuple(padded), **(used or {}))  # type: ignore[arg-type]
    return dataclasses.replace(whole, sequences=len(whole._segments))


@dataclass(frozen=True)
class LengthsCase:
    """Lengths, and what else a call has. pad: elements between heads. heads_first: in memory heads before rows.
    dlse: a backward is given a gradient of lse. sinks: their dtype, "float32" or the case's, or none. scores: what
    becomes of them, of `tests.scores.NAMES`. dropout: its p, and 32-bit words of its seed.
    """

    lengths: Lengths
    head_dim: int = 64
    dtype: str = "bfloat16"
    heads: tuple[int, int] = (2, 1)
    arch: str = "sm_90"
    head_dim_v: int | None = None
    pad: int = 0
    heads_first: bool = False
    deterministic: bool = False
    family: str | None = None
    seed: int = 1
    dlse: bool = False
    sinks: str = ""
    scores: tuple[str, ...] = ()
    dropout: tuple[float, int] = (0.0, 4)

    @property
    def is_wide(self) -> bool:
        return self.dtype in WIDE_DTYPES

    @property
    def lse_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    def features(self) -> dict[str, Any]:
        """Of scores, as keywords of `attention`."""
        return scores.draw_features(self.scores, self.seed, self.lengths.problem_batch, self.heads[0], self.dtype)

    def __str__(self) -> str:
        texts = (f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self))
        return f"LengthsCase({', '.join(texts)})"


_OF_QUERIES = ("q", "out", "lse", "dlse", "dout", "dq")


@dataclass
class Prepared:
    case: LengthsCase
    backward: bool
    tensors: dict[str, Tensor]
    arrays: dict[str, np.ndarray]
    plan: Plan
    expected: list[reference.Expected | None]  # of each sequence that has a query and a key
    workspace: Tensor
    inputs: dict[str, bytes]

    @property
    def results(self) -> tuple[str, ...]:
        return ("dq", "dk", "dv") + ("dsinks",) * bool(self.case.sinks) if self.backward else ("out", "lse")


def _tensor(case: LengthsCase, name: str) -> Tensor:
    """(batch, rows, heads, width) of the array, whatever its memory is; lse (batch, heads, rows)."""
    lengths = case.lengths
    if name in ("sinks", "dsinks"):
        return Tensor((case.heads[0],), (1,), case.sinks)
    if name == "dropout_seed":
        return Tensor((case.dropout[1],), (1,), "float32")
    if name == "alibi_slopes":
        shape = case.features()[name].shape
        return Tensor(shape, (1, shape[0])[: len(shape)], case.lse_dtype)  # of the batch, heads outermost
    side = "q" if name in _OF_QUERIES else "k"
    batch, rows = lengths.batch(side), getattr(lengths, f"rows_{side}")
    heads = case.heads[0] if side == "q" else case.heads[1]
    if name in ("lse", "dlse"):
        return Tensor((batch, heads, rows), (heads * rows, rows, 1), case.lse_dtype)
    width = (case.head_dim_v or case.head_dim) if name in ("v", "out", "dout", "dv") else case.head_dim
    pitch = width + case.pad
    row, head = (pitch, rows * pitch) if case.heads_first else (heads * pitch, pitch)
    return Tensor((batch, rows, heads, width), (rows * heads * pitch, row, head, 1), case.dtype)


def problem_of(case: LengthsCase, tensors: dict[str, Tensor]) -> AttentionProblem:
    """As a call makes it."""
    lengths = case.lengths
    sizes = Sizes(
        lengths.problem_batch, lengths.rows_q, lengths.rows_k, *case.heads, case.head_dim,
        case.head_dim_v or case.head_dim, lengths.is_packed("q"), lengths.is_packed("k"),
    )  # fmt: skip
    refs = {name: tensor.ref() for name, tensor in tensors.items()}  # of one row the stride is 0
    dense = {name: ref for name, ref in refs.items() if name in BACKWARD}
    options = Options.checked(lengths.causal, None, "bshd", None, case.deterministic)
    problem = AttentionProblem.from_refs(dense, sizes, case.dtype, options)
    problem = dataclasses.replace(problem, lengths=lengths.spec)
    if lengths.window is not None:
        problem = SPECS["window_size"](problem, lengths.window)
    if "softcap" in case.features():
        problem = SPECS["softcap"](problem, case.features()["softcap"])
    for name in ("alibi_slopes", "sinks", "dsinks", "dlse"):
        if name in refs:
            problem = SPECS[name](problem, refs[name])
    return with_dropout(problem, case.dropout) if case.dropout[0] else problem


def prepare(case: LengthsCase, backward: bool) -> Prepared:
    """Rows that belong to no sequence hold NaN, and so do queries that see no key, and keys that no query sees."""
    lengths = case.lengths
    names = (BACKWARD if backward else FORWARD) + ("dlse",) * (backward and case.dlse)
    names += ("sinks",) * bool(case.sinks) + ("dsinks",) * (backward and bool(case.sinks))
    features = case.features()
    names += ("alibi_slopes",) * ("alibi_slopes" in features) + ("dropout_seed",) * bool(case.dropout[0])
    tensors = {name: _tensor(case, name) for name in names}
    if "alibi_slopes" in features:
        tensors["alibi_slopes"].values[...] = features["alibi_slopes"]
    numbers = reference.make_inputs(
        case.seed, lengths.rows_q, lengths.rows_k, dtype=case.dtype, batch=max(1, lengths.problem_batch),
        heads=case.heads, head_dim=case.head_dim, head_dim_v=case.head_dim_v,
    )._asdict()  # fmt: skip
    for name in ("q", "k", "v", "dout"):
        if name in tensors:
            side = "q" if name in _OF_QUERIES else "k"
            values = tensors[name].values
            for b, (first, length) in enumerate(lengths.runs(side)):
                rows = slice(first, first + length)
                values[lengths.row(side, b), rows] = numbers[name].view(values.dtype)[lengths.row(side, b), rows]
            values[~lengths.seen(side)] = np.nan if case.is_wide else 0xFFFF
    if "dlse" in tensors:
        dlse = tensors["dlse"].values.swapaxes(1, 2)
        seen = lengths.seen("q") if not case.sinks else lengths.there("q")  # then it is the sink that they see
        dlse[seen] = np.random.default_rng(case.seed).standard_normal(dlse[seen].shape)
    sinks = None
    if case.sinks:
        stored = sinks_of(case.seed, case.heads[0], case.sinks)
        tensors["sinks"].values[...] = stored.view(tensors["sinks"].values.dtype)
        sinks = reference.as_float64(stored)
    if case.dropout[0]:
        tensors["dropout_seed"].values.view(np.uint32)[...] = seed_of(case.seed, case.dropout[1])
    expected: list[reference.Expected | None] = []
    for b, ((first_q, sq), (first_k, sk)) in enumerate(zip(lengths.runs("q"), lengths.runs("k"), strict=True)):
        if not sq or not (sk or case.sinks):
            expected.append(None)
            continue
        of = {
            name: _part(case, tensor, name, b, (first_q, sq) if name in _OF_QUERIES else (first_k, sk))
            for name, tensor in tensors.items()
            if name not in ("alibi_slopes", "sinks", "dsinks", "dropout_seed")
        }
        want = reference.expect(
            of["q"], of["k"], of["v"], of.get("dout"), causal=lengths.causal, window=lengths.window,
            dlse=of.get("dlse"),
            features=reference.Features(
                features.get("softcap"), _slopes(features, lengths.number(b)), sinks, case.dropout[0], _keep(case, b)
            ),
            own_accuracy=case.is_wide,
        )  # fmt: skip
        expected.append(want)
        if backward:
            model = want.bounds["out"].model
            assert model is not None
            of["out"][...] = reference.store(model, case.dtype).view(of["out"].dtype)
            of["lse"][...] = want.lse
    problem = problem_of(case, tensors)
    gpu = device(case.arch)
    if backward:
        plan: Plan = plan_backward(problem, gpu, case.deterministic, family=case.family)
    else:
        plan = plan_forward(problem, gpu, family=case.family)
    workspace = Tensor((plan.workspace_bytes // 4,), (1,), "float32")
    prepared = Prepared(case, backward, tensors, lengths.arrays, plan, expected, workspace, {})
    prepared.inputs = {name: each.bits() for name, each in tensors.items() if name not in prepared.results}
    return prepared


def _slopes(features: dict[str, Any], number: int) -> np.ndarray | None:
    slopes = features.get("alibi_slopes")
    return slopes if slopes is None or slopes.ndim == 1 else slopes[number]


def _keep(case: LengthsCase, sequence: int) -> np.ndarray | None:
    """(1, heads, queries, keys) bool: what dropout keeps of a sequence. Rows in front of it count, of a segment those
    of its row of the batch."""
    p, words = case.dropout
    if not p:
        return None
    lengths, number = case.lengths, case.lengths.number(sequence)
    firsts = []
    for side in "qk":
        first, starts = lengths.runs(side)[sequence][0], getattr(lengths, f"cu_seqlens_{side}")
        firsts.append(first - starts[sequence] if starts else first)
    (first_q, first_k), seed = firsts, seed_of(case.seed, words)
    sq, sk = (lengths.runs(side)[sequence][1] for side in "qk")
    whole = keep_of(seed, number + 1, case.heads[0], slice(first_q, first_q + sq), slice(first_k, first_k + sk), p)
    return whole[number : number + 1]


def _part(case: LengthsCase, tensor: Tensor, name: str, sequence: int, rows: tuple[int, int]) -> np.ndarray:
    """A sequence's part of an array, with a batch of one."""
    row = case.lengths.row("q" if name in _OF_QUERIES else "k", sequence)
    there = slice(rows[0], rows[0] + rows[1])
    if name in ("lse", "dlse"):
        return tensor.values[row : row + 1, :, there]
    part = tensor.values[row : row + 1, there]
    return part.view(np.float16) if case.dtype == "float16" else part


def execute(
    prepared: Prepared,
    schedule: Schedule = Schedule.LOWEST_FIRST,
    *,
    plant: str | None = None,
    mutation: Mutation | None = None,
    seed: int = 1,
    arrays: dict[str, np.ndarray] | None = None,
) -> tuple[dict[str, bytes], set[run.Site]]:
    """The results' bits, and the synchronisations reached. arrays: other lengths than those of the case."""
    for name in prepared.results:
        prepared.tensors[name].poison()
    names = BACKWARD if prepared.backward else FORWARD
    pointers = tuple(prepared.tensors[name].pointer for name in names)
    pointers += tuple(
        prepared.tensors[name].pointer
        for name in ("dsinks", "alibi_slopes", "sinks", "dropout_seed")
        if name in prepared.tensors
    )
    pointers += tuple(array.ctypes.data for array in (arrays or prepared.arrays).values())
    if "dlse" in prepared.tensors:
        pointers += (prepared.tensors["dlse"].pointer,)
    sites = run_plan(prepared.plan, pointers, prepared.workspace, schedule, plant=plant, mutation=mutation, seed=seed)
    return {name: prepared.tensors[name].bits() for name in prepared.results}, sites


def judge_memory(prepared: Prepared) -> None:
    """AssertionError if anything but the results was written."""
    for name in prepared.results:
        assert prepared.tensors[name].untouched_outside(), f"{name}: something outside the array was written"
    assert prepared.workspace.untouched_outside(), "something outside the workspace was written"
    for name, bits in prepared.inputs.items():
        assert prepared.tensors[name].bits() == bits, f"{name} is an input, and was written"


def judge(prepared: Prepared) -> None:
    """AssertionError unless every sequence is right, and every row of none, or that sees nothing, is 0."""
    judge_memory(prepared)
    case, lengths = prepared.case, prepared.case.lengths
    of_sequences = [name for name in prepared.results if name != "dsinks"]
    for name in of_sequences:
        seen = lengths.seen("q" if name in _OF_QUERIES else "k")
        values = prepared.tensors[name].values
        if name == "lse":
            nobodys = ~(lengths.there("q") if case.sinks else seen)  # lse of the others is their sink, as expected
            assert (values.swapaxes(1, 2)[nobodys] == -np.inf).all(), "lse: a row that sees no key is not -inf"
        else:
            assert not values[~seen].any(), f"{name}: a row that is not seen is not 0"
    for b, want in enumerate(prepared.expected):
        if want is None:
            continue
        sides = {side: lengths.runs(side)[b] for side in "qk"}
        got = {
            name: _part(case, prepared.tensors[name], name, b, sides["q" if name in _OF_QUERIES else "k"])
            for name in of_sequences
        }
        try:
            want.check(**got)
        except AssertionError as error:
            raise AssertionError(f"sequence {b}: {error}") from error
    if "dsinks" in prepared.results:
        judge_dsinks(prepared)


def judge_dsinks(prepared: Prepared) -> None:
    """Of all sequences together."""
    case = prepared.case
    bounds = [want.bounds["dsinks"] for want in prepared.expected if want is not None]
    ref, model = (np.sum([each[place] for each in bounds], axis=0) for place in (0, 1))
    floor = sum(each.floor for each in bounds)
    values = prepared.tensors["dsinks"].values
    if case.sinks != "float32" or case.dtype == "float64":
        model = reference.round_to(model, case.sinks)
        values = values.view(np.float16) if case.sinks == "float16" else values
    reference.compare("dsinks", values, ref, model, floor)


def check(
    case: LengthsCase,
    backward: bool,
    *,
    schedules: tuple[Schedule, ...] = tuple(Schedule),
    plant: str | None = None,
    mutation: Mutation | None = None,
) -> set[run.Site]:
    """Under each schedule every result is right, and no bit depends on the order of things; dq's may, as ever."""
    prepared = prepared_of(case, backward)
    first: dict[str, bytes] | None = None
    sites: set[run.Site] = set()
    for number, schedule in enumerate(schedules):
        results, reached = execute(prepared, schedule, plant=plant, mutation=mutation, seed=case.seed + number)
        sites |= reached
        try:
            judge(prepared)
            for name, bits in (first or results).items():
                same = bits == results[name] or (name == "dq" and not case.deterministic)
                assert same, f"{name} depends on the order in which warps and blocks run"
        except AssertionError as error:
            raise AssertionError(f"{case} [{schedule.name}]: {error}") from error
        first = first or results
    return sites


prepared_of = functools.lru_cache(maxsize=32)(prepare)  # a case is run again for each plant and mutant
