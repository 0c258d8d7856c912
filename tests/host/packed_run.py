"""Sequences whose lengths only the device knows, run on the CPU as their plan says, and judged one by one.

Whatever belongs to no sequence is NaN: the rows between, in front of and behind them, and the guard bands. So are the
queries that see no key, and the keys that no query sees.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from fa2cupy.frameworks.base import Device, TensorRef
from fa2cupy.kernels import Plan, plan_backward, plan_forward
from fa2cupy.options import Options
from fa2cupy.problem import AttentionProblem, Sizes, with_features
from tests import reference
from tests.host import kernel_run, run
from tests.host.build import Mutation
from tests.host.kernel_run import BACKWARD, FORWARD, Tensor
from tests.host.run import Schedule

_OF_KEYS = ("k", "v", "dk", "dv")


@dataclass(frozen=True)
class Sequence:
    """Its queries and keys, and rows that are there but unused: behind its queries, in front of and behind its keys."""

    seqlen_q: int
    seqlen_k: int
    gap_q: int = 0
    left_k: int = 0
    gap_k: int = 0

    def rows(self, of_keys: bool) -> int:
        return self.left_k + self.seqlen_k + self.gap_k if of_keys else self.seqlen_q + self.gap_q


def lengths(*pairs: tuple[int, ...]) -> tuple[Sequence, ...]:
    return tuple(Sequence(*pair) for pair in pairs)


@dataclass(frozen=True)
class PackedCase:
    """packed_q, packed_k: whether a side is packed; otherwise each sequence has a row of the batch. behind: rows behind
    the last sequence of a packed side. pad: columns between rows. dlse: a backward is given a gradient of lse.
    """

    sequences: tuple[Sequence, ...]
    head_dim: int
    arch: str = "sm_90"
    dtype: str = "bfloat16"
    causal: bool = False
    window: tuple[int, int] | None = None
    heads: tuple[int, int] = (2, 1)
    deterministic: bool = False
    packed_q: bool = True
    packed_k: bool = True
    behind: int = 0
    pad: int = 0
    head_dim_v: int | None = None
    dlse: bool = False
    seed: int = 0

    def __str__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return " ".join(f"{name}={value}" for name, value in values)

    def is_packed(self, of_keys: bool) -> bool:
        return self.packed_k if of_keys else self.packed_q

    def rows(self, of_keys: bool) -> int:
        """Of an array, or of each row of its batch."""
        each = [sequence.rows(of_keys) for sequence in self.sequences]
        return sum(each) + self.behind if self.is_packed(of_keys) else max(each, default=0)

    def place(self, number: int, of_keys: bool) -> tuple[int, slice]:
        """Row of the batch (0 where it is packed), and the rows of a sequence."""
        sequence = self.sequences[number]
        first = sum(other.rows(of_keys) for other in self.sequences[:number]) if self.is_packed(of_keys) else 0
        first += sequence.left_k if of_keys else 0
        length = sequence.seqlen_k if of_keys else sequence.seqlen_q
        return 0 if self.is_packed(of_keys) else number, slice(first, first + length)

    def given(self) -> dict[str, np.ndarray]:
        """The arrays of lengths, in the order of the keywords."""
        arrays: dict[str, list[int]] = {}
        for side, of_keys in (("q", False), ("k", True)):
            if self.is_packed(of_keys):
                rows = [sequence.rows(of_keys) for sequence in self.sequences]
                arrays[f"cu_seqlens_{side}"] = [sum(rows[:n]) for n in range(len(rows) + 1)]
        if not self.packed_q or any(sequence.gap_q for sequence in self.sequences):
            arrays["seqused_q"] = [sequence.seqlen_q for sequence in self.sequences]
        if not self.packed_k or any(sequence.gap_k for sequence in self.sequences):
            arrays["seqused_k"] = [sequence.left_k + sequence.seqlen_k for sequence in self.sequences]
        if any(sequence.left_k for sequence in self.sequences):
            arrays["leftpad_k"] = [sequence.left_k for sequence in self.sequences]
        return {name: np.array(values, np.int32) for name, values in arrays.items()}

    def unseen(self, sequence: Sequence) -> tuple[int, int]:
        """Leading queries that see no key, and leading keys that no query sees."""
        left, right = self.window or (-1, -1)
        left, right = (1 << 30 if end < 0 else end for end in (left, 0 if self.causal else right))
        seqlen_q, seqlen_k = sequence.seqlen_q, sequence.seqlen_k
        queries = seqlen_q if seqlen_k == 0 else max(0, seqlen_q - seqlen_k - right)
        keys = seqlen_k if seqlen_q == 0 else max(0, seqlen_k - seqlen_q - left)
        return queries, keys


@dataclass
class Prepared:
    case: PackedCase
    backward: bool
    tensors: dict[str, Tensor]
    arrays: dict[str, np.ndarray]
    plan: Plan
    expected: list[reference.Expected | None]  # by sequence, None of one without queries or keys
    workspace: Tensor

    @property
    def results(self) -> tuple[str, ...]:
        return ("dq", "dk", "dv") if self.backward else ("out", "lse")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the pointers of a call, less the workspace."""
        return (*(BACKWARD if self.backward else FORWARD), *self.plan.problem.extra_arrays)


def prepare(case: PackedCase, backward: bool) -> Prepared:
    names = BACKWARD if backward else FORWARD
    tensors = {name: _tensor(case, name) for name in (*names, *(("dlse",) if case.dlse and backward else ()))}
    expected = []
    for number, sequence in enumerate(case.sequences):
        values = _fill(case, tensors, number, sequence)
        if 0 in (sequence.seqlen_q, sequence.seqlen_k):
            expected.append(None)
            continue
        dlse = _view(case, tensors, "dlse", number)[None] if "dlse" in tensors else None
        bounds = reference.expect(
            values["q"], values["k"], values["v"], values.get("dout"), causal=case.causal, window=case.window, dlse=dlse
        )
        expected.append(bounds)
        if backward:
            model = bounds.bounds["out"].model
            assert model is not None
            _view(case, tensors, "out", number)[...] = reference.store(model[0], case.dtype).view(np.uint16)
            _view(case, tensors, "lse", number)[...] = bounds.lse[0]
    arrays = case.given()
    refs = {name: tensor.ref() for name, tensor in tensors.items() if name != "dlse"}
    device = Device("cuda", 0)
    given = {
        name: TensorRef(array.ctypes.data, array.shape, (1,), "int32", device, array) for name, array in arrays.items()
    }
    features: dict[str, object] = {} if case.window is None else {"window_size": case.window}
    features |= given
    if "dlse" in tensors:
        features["dlse"] = tensors["dlse"].ref()
    options = Options.checked(case.causal, None, "bshd", None, case.deterministic)
    sizes = Sizes.of({**refs, **given}, "bshd")
    problem = with_features(AttentionProblem.from_refs(refs, sizes, case.dtype, options), features)
    gpu = kernel_run.device(case.arch)
    plan = plan_backward(problem, gpu, case.deterministic) if backward else plan_forward(problem, gpu)
    workspace = Tensor((plan.workspace_bytes // 4,), (1,), "float32")
    return Prepared(case, backward, tensors, arrays, plan, expected, workspace)


def _tensor(case: PackedCase, name: str) -> Tensor:
    of_keys, batch = name in _OF_KEYS, len(case.sequences)
    rows, heads = case.rows(of_keys), case.heads[of_keys]
    if name in ("lse", "dlse"):
        shape: tuple[int, ...] = (heads, rows) if case.packed_q else (batch, heads, rows)
        strides = (rows, 1) if case.packed_q else (heads * rows, rows, 1)
        return Tensor(shape, strides, "float32")
    width = (case.head_dim_v or case.head_dim) if name in ("v", "dv", "out", "dout") else case.head_dim
    row = heads * width + case.pad
    if case.is_packed(of_keys):
        return Tensor((rows, heads, width), (row, width, 1), case.dtype)
    return Tensor((batch, rows, heads, width), (rows * row, row, width, 1), case.dtype)


def _view(case: PackedCase, tensors: dict[str, Tensor], name: str, number: int) -> np.ndarray:
    """A sequence's part of a tensor: (seqlen, heads, width), of lse (heads, seqlen)."""
    of_keys = name in _OF_KEYS
    batch, rows = case.place(number, of_keys)
    values = tensors[name].values
    of_batch = values if case.is_packed(of_keys) else values[batch]
    return of_batch[:, rows] if name in ("lse", "dlse") else of_batch[rows]


def _fill(case: PackedCase, tensors: dict[str, Tensor], number: int, sequence: Sequence) -> dict[str, np.ndarray]:
    """A sequence's inputs; their values as the reference wants them."""
    numbers = reference.make_inputs(
        case.seed * 1000 + number,
        sequence.seqlen_q,
        sequence.seqlen_k,
        dtype=case.dtype,
        batch=1,
        heads=case.heads,
        head_dim=case.head_dim,
        head_dim_v=case.head_dim_v,
    )._asdict()
    unseen_queries, unseen_keys = case.unseen(sequence)
    values = {}
    for name in ("q", "k", "v", "dout"):
        if name not in tensors:
            continue
        view = _view(case, tensors, name, number)
        view[...] = numbers[name][0].view(np.uint16)
        view[: unseen_keys if name in _OF_KEYS else unseen_queries] = 0xFFFF
        values[name] = (view if case.dtype == "bfloat16" else view.view(np.float16))[None]
    if "dlse" in tensors:
        dlse = _view(case, tensors, "dlse", number)
        dlse[...] = np.random.default_rng(case.seed + number).standard_normal(dlse.shape)
        dlse[:, :unseen_queries] = np.nan
    return values


def execute(
    prepared: Prepared, schedule: Schedule, *, mutation: Mutation | None = None, plant: str | None = None, seed: int = 1
) -> dict[str, bytes]:
    """Run the plan into poisoned results; their bits."""
    results = {name: prepared.tensors[name] for name in prepared.results}
    workspace = prepared.workspace
    for tensor in (*results.values(), workspace):
        tensor.poison()
    places = {name: tensor.pointer for name, tensor in prepared.tensors.items()}
    places |= {name: array.ctypes.data for name, array in prepared.arrays.items()}
    pointers = (*(places[name] for name in prepared.names), workspace.pointer)
    before = workspace.bits()
    for launch in prepared.plan.launches:
        after = workspace.bits()
        late = None
        if launch.config.overlaps_previous:
            late = workspace.address, after
            workspace.fill(before)
        kernel_run._launch(launch, pointers, schedule, plant, mutation, seed, late)
        before = after
    return {name: tensor.bits() for name, tensor in results.items()}


def judge(prepared: Prepared) -> None:
    """AssertionError unless each sequence's results are right, other rows zeros, and nothing else was written."""
    case = prepared.case
    for name in prepared.results:
        assert prepared.tensors[name].untouched_outside(), f"{name}: something outside the array was written"
    assert prepared.workspace.untouched_outside(), "something outside the workspace was written"
    seen = {name: np.zeros(prepared.tensors[name].shape, bool) for name in prepared.results}
    masks = {name: _Mask(mask) for name, mask in seen.items()}
    for number, expected in enumerate(prepared.expected):
        if expected is None:
            continue
        got = {}
        for name in prepared.results:
            _view(case, masks, name, number)[...] = True  # type: ignore[arg-type]
            view = _view(case, prepared.tensors, name, number)[None]
            got[name] = view if name == "lse" or case.dtype == "bfloat16" else view.view(np.float16)
        try:
            expected.check(**got)
        except AssertionError as error:
            raise AssertionError(f"sequence {number}, {case.sequences[number]}: {error}") from error
    for name, mask in seen.items():
        others = prepared.tensors[name].values[~mask]
        filled = np.isneginf(others) if name == "lse" else others == 0
        assert filled.all(), f"{name}: rows of no sequence are not {'-inf' if name == 'lse' else '0'}"


@dataclass
class _Mask:
    """What `_view` needs of a tensor."""

    values: np.ndarray


def check(
    case: PackedCase,
    backward: bool,
    *,
    schedules: tuple[Schedule, ...] = tuple(Schedule),
    mutation: Mutation | None = None,
    plant: str | None = None,
) -> Prepared:
    """Under each schedule all is right, and bits depend on none (of dq only where that is promised)."""
    prepared = prepare(case, backward)
    inputs = {name: tensor.bits() for name, tensor in prepared.tensors.items() if name not in prepared.results}
    first: dict[str, bytes] | None = None
    for number, schedule in enumerate(schedules):
        results = execute(prepared, schedule, mutation=mutation, plant=plant, seed=case.seed + number)
        try:
            judge(prepared)
            for name, bits in inputs.items():
                assert prepared.tensors[name].bits() == bits, f"{name} is an input, and was written"
            for name, bits in (first or results).items():
                same = bits == results[name] or (name == "dq" and not case.deterministic)
                assert same, f"{name} depends on the order in which warps and blocks run"
        except (AssertionError, run.HostRunError) as error:
            raise AssertionError(f"{case} [{schedule.name}]: {error}") from error
        first = first or results
    return prepared
