"""A case, run on the CPU as its plan says, and judged: by the reference, by its guard bands, by its repeats."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fa2cupy import philox
from fa2cupy.frameworks.base import Device, TensorRef
from fa2cupy.jit import source as source_module
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import KernelLaunch, Plan, plan_backward, plan_forward
from fa2cupy.kernels.sm90.flash_fwd import FwdTileSm90
from fa2cupy.kernels.tiles import SHARED_MEMORY
from fa2cupy.options import Options
from fa2cupy.problem import SPECS, AttentionProblem
from fa2cupy.spec import MASK_ARRAYS, SoftmaxSpec
from tests import reference, scores
from tests.gpu import cases as gpu_cases
from tests.gpu.cases import Case
from tests.host import build, masks, run, sanitized, tensor_map
from tests.host.build import Mutation
from tests.host.run import Schedule

FORWARD = ("q", "k", "v", "out", "lse")
BACKWARD = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")
_GUARD_BYTES = 128 << 10  # on both sides: a tile's worth of rows


@dataclass(frozen=True)
class HostCase:
    """A case and the GPU that its plan is made for.

    flip: every tensor runs backwards along seqlen and heads. tile: the forward's, if not the one that the plan chooses.
    dlse: the backward is given a gradient of lse, too. sinks: their dtype, "float32" or the case's, or none; and
    whether the backward is to make their gradient. scores: what becomes of them, of `tests.scores.NAMES`. dropout: its
    p, and 32-bit words of its seed. mask: which keys queries see, of `tests.host.masks.NAMES`;
    mask_array: by an array, not by lists.
    """

    case: Case
    arch: str = "sm_90"
    flip: bool = False
    tile: FwdTileSm90 | None = None
    dlse: bool = False
    sinks: str = ""
    dsinks: bool = True
    scores: tuple[str, ...] = ()
    dropout: tuple[float, int] = (0.0, 4)
    mask: str = ""
    mask_array: bool = False

    def __str__(self) -> str:
        own = (" flip" if self.flip else "") + (f" {self.tile}" if self.tile else "") + " dlse" * self.dlse
        own += "".join(f" {name}" for name in self.scores)
        own += f" dropout {self.dropout[0]} of {self.dropout[1]} words" if self.dropout[0] else ""
        own += f" mask {self.mask}" + " array" * self.mask_array if self.mask else ""
        own += f" sinks {self.sinks}" + " without dsinks" * (not self.dsinks) if self.sinks else ""
        return f"{self.case} {self.arch}" + own

    def results(self, backward: bool) -> tuple[str, ...]:
        if not backward:
            return ("out", "lse")
        return ("dq", "dk", "dv") + ("dsinks",) * bool(self.sinks and self.dsinks)

    def extra(self, backward: bool) -> tuple[str, ...]:
        """Inputs beyond those of dense attention, in the order of a call."""
        alibi = ("alibi_slopes",) * any(name.startswith("alibi") for name in self.scores)
        sinks, dropout = ("sinks",) * bool(self.sinks), ("dropout_seed",) * bool(self.dropout[0])
        mask = () if not self.mask else ("mask",) if self.mask_array else MASK_ARRAYS
        return (*alibi, *mask, *sinks, *dropout, *("dlse",) * (backward and self.dlse))

    def features(self) -> dict[str, Any]:
        """Of scores, as keywords of `attention`."""
        case = self.case
        return scores.draw_features(self.scores, case.seed, case.batch, case.heads[0], case.dtype)

    def drawn_mask(self) -> tuple[str, int, int, int, int, int]:
        """The arguments of `masks.drawn`."""
        case = self.case
        return self.mask, case.seed, case.batch, case.heads[0], case.seqlen_q, case.seqlen_k

    def names(self, backward: bool) -> tuple[str, ...]:
        """Of the arrays of a call, in the order of its pointers."""
        dense = BACKWARD if backward else FORWARD
        return (*dense, *(name for name in self.results(backward) if name not in dense), *self.extra(backward))


@functools.cache
def device(arch: str) -> DeviceInfo:
    """A GPU of that architecture, but with a second-level cache so small that few heads share a section."""
    digits = arch.removeprefix("sm_")
    cc = int(digits[:-1]), int(digits[-1])
    return DeviceInfo(0, arch, cc, 4, SHARED_MEMORY[arch], 1 << 18)


class Tensor:
    """Elements at the case's strides in a buffer of their own. Everything else in it is poison, and has to stay so."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, shift: int = 0) -> None:
        item = np.dtype({"float32": np.float32, "bool": np.uint8}.get(dtype, np.uint16))
        reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
        length = (high - low + 1) if 0 not in shape else 0
        guard = 0 if build.sanitizing() else _GUARD_BYTES // item.itemsize
        nbytes = (length + 2 * guard + shift) * item.itemsize
        raw = sanitized.empty((nbytes,), np.uint8) if build.sanitizing() else np.empty(nbytes + 256, np.uint8)
        start = 0 if build.sanitizing() else -raw.ctypes.data % 256
        self._bytes = raw[start : start + nbytes]
        self._bytes[:] = 0xFF
        flat = self._bytes.view(item)
        self.shape, self.strides, self.dtype = shape, strides, dtype
        self.values = np.lib.stride_tricks.as_strided(
            flat[guard + shift - low :], shape, [s * item.itemsize for s in strides]
        )
        self._foreign = np.ones(flat.shape, bool)
        self._foreign[guard + shift : guard + shift + length] = False
        if length:
            np.lib.stride_tricks.as_strided(self._foreign[guard + shift - low :], shape, strides)[...] = False
            gaps = np.ones(length, bool)
            np.lib.stride_tricks.as_strided(gaps[-low:], shape, strides)[...] = False
            self._foreign[guard + shift : guard + shift + length] = gaps
        self._words = flat.view(f"u{item.itemsize}")
        self.pointer = self._bytes.ctypes.data + (guard + shift - low) * item.itemsize

    def ref(self) -> TensorRef:
        return TensorRef(self.pointer, self.shape, self.strides, self.dtype, Device("cuda", 0), self)

    def poison(self) -> None:
        self._bytes[:] = 0xFF

    @property
    def address(self) -> int:
        """Of the first of `bits`."""
        return int(self._bytes.ctypes.data)

    def fill(self, bits: bytes) -> None:
        self._bytes[:] = np.frombuffer(bits, np.uint8)

    def bits(self) -> bytes:
        return self._bytes.tobytes()

    def untouched_outside(self) -> bool:
        poison = (1 << 8 * self._words.itemsize) - 1
        return bool((self._words[self._foreign] == poison).all())


@dataclass
class Prepared:
    """Tensors with their values, the plan, and what has to come out."""

    host_case: HostCase
    backward: bool
    tensors: dict[str, Tensor]
    plan: Plan
    expected: reference.Expected
    workspace: Tensor
    inputs: dict[str, bytes] = field(default_factory=dict)

    @property
    def results(self) -> tuple[str, ...]:
        return self.host_case.results(self.backward)


_EXPECTED: dict[tuple[object, ...], reference.Expected] = {}  # a case is run on several GPUs, and with each plant
_MAX_EXPECTED = 64


def prepare(host_case: HostCase, backward: bool) -> Prepared:
    """Inputs, outputs, plan and reference of a case. Queries that see no key hold NaN, and keys that no query sees."""
    case = host_case.case
    tensors = {name: _tensor(host_case, name) for name in host_case.names(backward)}
    numbers = reference.make_inputs(
        case.seed,
        case.seqlen_q,
        case.seqlen_k,
        dtype=case.dtype,
        batch=case.batch,
        heads=case.heads,
        head_dim=case.head_dim,
        head_dim_v=case.head_dim_v,
        outliers=case.outliers,
    )._asdict()
    empty, empty_keys = case.unseen
    values: dict[str, np.ndarray] = {}
    for name in ("q", "k", "v", "dout"):
        if name not in tensors:
            continue
        view = _bshd(tensors[name].values, case.layout)
        bits = numbers[name].view(np.uint16)
        view[...] = bits[:, :, :1] if case.expanded and name in ("k", "v") else bits
        view[:, : empty if name in ("q", "dout") else empty_keys] = 0xFFFF
        values[name] = view if case.dtype == "bfloat16" else view.view(np.float16)
    mask = masks.drawn(*host_case.drawn_mask()) if host_case.mask else None
    if mask is not None and host_case.mask_array:
        tensors["mask"].values[...] = mask
    elif mask is not None:
        for name, array in masks.arrays_of(masks.lists_of(*host_case.drawn_mask())).items():
            tensors[name].values.view(np.int32)[...] = array
    if host_case.sinks:
        values["sinks"] = sinks_of(case.seed, case.heads[0], host_case.sinks)
        tensors["sinks"].values[...] = values["sinks"].view(tensors["sinks"].values.dtype)
    if "dlse" in tensors:  # NaN of rows that see no key, as of their q and dout; unless it is the sink that they see
        dlse = tensors["dlse"].values
        dlse[...] = np.random.default_rng(case.seed).standard_normal(dlse.shape)
        if not host_case.sinks:
            dlse[:, :, :empty] = np.nan
    features = host_case.features()
    if "alibi_slopes" in features:
        tensors["alibi_slopes"].values[...] = features["alibi_slopes"]
    p, keep = host_case.dropout[0], None
    if p:
        seed = seed_of(case.seed, host_case.dropout[1])
        tensors["dropout_seed"].values.view(np.uint32)[...] = seed
        keep = keep_of(seed, case.batch, case.heads[0], slice(0, case.seqlen_q), slice(0, case.seqlen_k), p)
    # All that the values depend on.
    key = (case, backward, host_case.dlse, host_case.sinks, host_case.scores, host_case.dropout, host_case.mask)
    if key not in _EXPECTED:
        if len(_EXPECTED) >= _MAX_EXPECTED:
            _EXPECTED.clear()
        _EXPECTED[key] = reference.expect(
            values["q"],
            values["k"],
            values["v"],
            values.get("dout"),
            causal=case.causal,
            scale=case.softmax_scale,
            window=case.window,
            dlse=tensors["dlse"].values if "dlse" in tensors else None,
            features=reference.Features(
                features.get("softcap"), features.get("alibi_slopes"), values.get("sinks"), p, keep, mask
            ),
        )
    expected = _EXPECTED[key]
    if backward:
        bound = expected.bounds["out"]
        assert bound.model is not None
        model = reference.store(bound.model, case.dtype).view(np.uint16)
        _bshd(tensors["out"].values, case.layout)[...] = model
        tensors["lse"].values[...] = expected.lse
    options = Options.checked(case.causal, case.softmax_scale, case.layout, None, case.deterministic)
    refs = {name: tensor.ref() for name, tensor in tensors.items()}
    dense = {name: ref for name, ref in refs.items() if name in (BACKWARD if backward else FORWARD)}
    problem = AttentionProblem.from_refs(dense, gpu_cases.sizes_of(case), case.dtype, options)
    if case.window is not None:
        problem = SPECS["window_size"](problem, case.window)
    if "softcap" in features:
        problem = SPECS["softcap"](problem, features["softcap"])
    if mask is not None:
        problem = SPECS["mask"](problem, refs["mask"] if host_case.mask_array else mask.shape)
    for name in ("alibi_slopes", "sinks", "dsinks"):
        if name in refs:
            problem = SPECS[name](problem, refs[name])
    if p:
        problem = with_dropout(problem, host_case.dropout)
    if "dlse" in tensors:
        batch, head, row = tensors["dlse"].strides
        problem = dataclasses.replace(problem, softmax=SoftmaxSpec((batch, head, row), empty))
    gpu = device(host_case.arch)
    plan = plan_backward(problem, gpu, case.deterministic) if backward else plan_forward(problem, gpu, host_case.tile)
    workspace = Tensor((plan.workspace_bytes // 4,), (1,), "float32")
    prepared = Prepared(host_case, backward, tensors, plan, expected, workspace)
    results = prepared.results
    prepared.inputs = {name: tensor.bits() for name, tensor in tensors.items() if name not in results}
    return prepared


def seed_of(seed: int, words: int) -> np.ndarray:
    """A dropout_seed of so many 32-bit words; of 8, what is added to the numbers of sequences and heads is small."""
    drawn = np.random.default_rng(seed).integers(0, 1 << 32, 4, np.uint32)
    return np.concatenate([drawn, np.array([3, 0, 5, 0], np.uint32)])[:words]


def keep_of(seed: np.ndarray, batch: int, heads: int, queries: slice, keys: slice, p: float) -> np.ndarray:
    """(batch, heads, queries, keys) bool: which P dropout keeps."""
    return philox.kept(philox.tweaks(seed, np.arange(batch), np.arange(heads)), queries, keys, p)


def with_dropout(problem: AttentionProblem, dropout: tuple[float, int]) -> AttentionProblem:
    p, words = dropout
    seed = TensorRef(0, (words,), (1,), "uint32", Device("cuda", 0), None)
    return SPECS["dropout_seed"](SPECS["dropout_p"](problem, p), seed)


def sinks_of(seed: int, heads: int, dtype: str) -> np.ndarray:
    """A sink of each head, as the storage of that dtype: about as large as scores; of four heads one is none, and one
    much larger than all scores."""
    values = np.random.default_rng(seed).standard_normal(heads) + 1
    values[1::4], values[2::4] = -np.inf, 30
    return reference.store(values, dtype)


def _bshd(values: np.ndarray, layout: str) -> np.ndarray:
    return values if layout == "bshd" else values.swapaxes(1, 2)


def _tensor(host_case: HostCase, name: str) -> Tensor:
    case = host_case.case
    if name == "alibi_slopes":
        heads = case.heads[0]
        if "alibi of batch" in host_case.scores:  # heads outermost: any strides will do
            return Tensor((case.batch, heads), (1, case.batch), "float32")
        return Tensor((heads,), (1,), "float32")
    if name == "mask":  # keys outermost, and whatever else: any strides will do
        shape = masks.drawn(*host_case.drawn_mask()).shape
        return Tensor(shape, tuple(math.prod(shape[:n]) for n in range(4)), "bool")
    if name in MASK_ARRAYS:
        shape = masks.arrays_of(masks.lists_of(*host_case.drawn_mask()))[name].shape
        return Tensor(shape, tuple(math.prod(shape[n + 1 :]) for n in range(len(shape))), "float32")
    if name == "dropout_seed":
        return Tensor((host_case.dropout[1],), (1,), "float32")
    if name in ("sinks", "dsinks"):
        return Tensor((case.heads[0],), (1,), host_case.sinks)
    if name == "dlse":  # seqlen outermost: any strides will do
        batch, heads = case.batch, case.heads[0]
        return Tensor((batch, heads, case.seqlen_q), (1, batch, batch * heads), "float32")
    place = gpu_cases.place(case, name)
    strides = place.strides
    if host_case.flip:  # the last dimension, and seqlen of lse, stay as they are
        strides = (strides[0], *(-s for s in strides[1:-1]), strides[-1])
    dtype = "float32" if name == "lse" else case.dtype
    return Tensor(place.shape, strides, dtype, 0 if name == "lse" else case.shift)


@functools.cache
def _files_of(source: str) -> frozenset[str]:
    loaded = source_module.load(source)
    return frozenset({loaded.path, *(name for name, _ in loaded.headers)})


def execute(
    prepared: Prepared,
    schedule: Schedule,
    *,
    plant: str | None = None,
    mutation: Mutation | None = None,
    seed: int = 1,
) -> tuple[dict[str, bytes], set[run.Site]]:
    """Run the plan's launches into poisoned outputs; the results' bits, and the synchronisations that were reached."""
    outputs = {name: prepared.tensors[name] for name in prepared.results}
    for tensor in outputs.values():
        tensor.poison()
    names = prepared.host_case.names(prepared.backward)
    pointers = tuple(prepared.tensors[name].pointer for name in names)
    sites = run_plan(
        prepared.plan, pointers, prepared.workspace, schedule, plant=plant, mutation=mutation, seed=seed
    )  # fmt: skip
    return {name: tensor.bits() for name, tensor in outputs.items()}, sites


def run_plan(
    plan: Plan,
    pointers: tuple[int, ...],
    workspace: Tensor,
    schedule: Schedule,
    *,
    plant: str | None = None,
    mutation: Mutation | None = None,
    seed: int = 1,
) -> set[run.Site]:
    """All launches of a plan, as `run_launches`."""
    pointers = (*pointers, workspace.pointer)
    return run_launches(plan.launches, pointers, workspace, schedule, plant=plant, mutation=mutation, seed=seed)


def run_launches(
    launches: Sequence[KernelLaunch],
    pointers: tuple[int, ...],
    workspace: Tensor,
    schedule: Schedule,
    *,
    plant: str | None = None,
    mutation: Mutation | None = None,
    seed: int = 1,
) -> set[run.Site]:
    """Into a poisoned workspace, whose pointer is the last; the synchronisations reached.

    What a launch has written there may come late to one that overlaps it: when that one waits for it.
    """
    workspace.poison()
    sites: set[run.Site] = set()
    before = workspace.bits()
    for launch in launches:
        after = workspace.bits()
        late = None
        if launch.config.overlaps_previous:
            late = workspace.address, after
            workspace.fill(before)
        sites.update(_launch(launch, pointers, schedule, plant, mutation, seed, late))
        before = after
    return sites


def _launch(
    launch: KernelLaunch,
    pointers: tuple[int, ...],
    schedule: Schedule,
    plant: str | None,
    mutation: Mutation | None,
    seed: int,
    late: tuple[int, bytes] | None,
) -> list[run.Site]:
    mutated = mutation if mutation and mutation.path in _files_of(launch.source) else None
    library = build.library(launch.source, launch.name, launch.defines, mutation=mutated)
    has_maps = bool(getattr(launch, "tensor_maps", ()))
    params = launch.pack(pointers, tensor_map.encode) if has_maps else launch.pack(pointers)
    cluster = int(launch.defines.get("FA2_CLUSTER", 1))
    return run.launch(library, launch.config, params, schedule, plant=plant, seed=seed, cluster=cluster, late=late)


def judge(prepared: Prepared, known: frozenset[str] = frozenset()) -> None:
    """AssertionError unless the results are right, nothing else was written, and the inputs are as they were.

    known: results whose bits have been judged already.
    """
    case = prepared.host_case.case
    got: dict[str, np.ndarray] = {}
    for name in (name for name in prepared.results if name not in known):
        tensor = prepared.tensors[name]
        assert tensor.untouched_outside(), f"{name}: something outside the array was written"
        if tensor.dtype == "float32":  # lse, dsinks
            got[name] = tensor.values
        elif name == "dsinks":
            got[name] = tensor.values.view(np.float16) if tensor.dtype == "float16" else tensor.values
        else:
            view = _bshd(tensor.values, case.layout)
            got[name] = view if case.dtype == "bfloat16" else view.view(np.float16)
    assert prepared.workspace.untouched_outside(), "something outside the workspace was written"
    for name, bits in prepared.inputs.items():
        assert prepared.tensors[name].bits() == bits, f"{name} is an input, and was written"
    prepared.expected.check(**got)


def check(
    host_case: HostCase,
    backward: bool,
    *,
    schedules: tuple[Schedule, ...] = tuple(Schedule),
    plant: str | None = None,
    mutation: Mutation | None = None,
) -> set[run.Site]:
    """Run a case under each schedule: every result is right, and the bits do not depend on the order of things.

    dq alone may, unless the case is deterministic: it is summed in the order in which blocks run.
    """
    prepared = prepare(host_case, backward)
    first: Mapping[str, bytes] | None = None
    sites: set[run.Site] = set()
    for number, schedule in enumerate(schedules):
        seed = host_case.case.seed + number
        results, reached = execute(prepared, schedule, plant=plant, mutation=mutation, seed=seed)
        sites |= reached
        same = frozenset(name for name, bits in (first or {}).items() if bits == results[name])
        try:
            judge(prepared, same)
            for name in first or ():
                assert name in same or (name == "dq" and not host_case.case.deterministic), (
                    f"{name} depends on the order in which warps and blocks run"
                )
        except AssertionError as error:
            raise AssertionError(f"{host_case} [{schedule.name}]: {error}") from error
        first = first or results
    return sites
