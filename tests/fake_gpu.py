"""A GPU that is not there: CuPy arrays over host memory, plans that compute with `cpu.py` from raw pointers.

What the front end hands down - pointers, strides, layouts, streams, devices - is used exactly as a kernel would use it,
so a wrong one gives wrong numbers. Everything that would reach a driver is replaced.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fa2cupy import cpu, cpu_mask, prepared, sequences
from fa2cupy.block_mask import arrays
from fa2cupy.block_mask.lists import BLOCK
from fa2cupy.frameworks import CUPY, TORCH
from fa2cupy.frameworks.overlap import Extent
from fa2cupy.jit import driver
from fa2cupy.kernels import planner
from fa2cupy.kernels.common import pointer_names
from fa2cupy.prepared import PREPARED
from fa2cupy.problem import AttentionProblem

ROW = SimpleNamespace(head_dim=128)  # of every plan
FORWARD_NAMES = ("q", "k", "v", "out", "lse")
BACKWARD_NAMES = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")


def aligned_empty(size: int, offset: int = 0) -> np.ndarray:
    """`size` bytes, all 0xff (NaN), that start `offset` bytes after a multiple of 512, as GPU allocators have it."""
    block = np.full(size + 1024, 0xFF, np.uint8)
    start = -block.ctypes.data % 512 + offset
    return block[start : start + size]


def cupy_array(
    shape: tuple[int, ...], dtype: Any, device: int = 0, *, offset: int = 0, strides: tuple[int, ...] | None = None
) -> Any:
    """A cupy.ndarray over new host memory, all 0xff; `strides` in bytes, `offset` in bytes from an aligned address."""
    import cupy

    dtype = np.dtype(dtype)
    steps = strides or np.empty(shape, dtype).strides
    extent = Extent.of(shape, steps, dtype.itemsize)
    memory = aligned_empty(max(1, extent.high - extent.low), offset)
    owned = cupy.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(owned, -extent.low), steps)


def host_view(array: Any) -> np.ndarray:
    """The memory of a fake CuPy array as NumPy, without a copy."""
    return view(array.data.ptr, array.shape, array.strides, array.dtype, owner=array)


def to_cupy(array: np.ndarray, device: int = 0, *, offset: int = 0, order: tuple[int, ...] | None = None) -> Any:
    """A fake CuPy array with the values of `array`; `order` lists the axes from slowest to fastest in memory."""
    order = order or tuple(range(array.ndim))
    memory = cupy_array(tuple(array.shape[i] for i in order), array.dtype, device, offset=offset)
    result = memory.transpose(np.argsort(order).tolist())
    host_view(result)[...] = array
    return result


def view(ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, owner: Any = None) -> np.ndarray:
    """NumPy over raw memory, which `owner` keeps alive; strides in bytes."""
    dtype = np.dtype(dtype)
    extent = Extent.of(shape, strides, dtype.itemsize)
    if extent.empty:
        return np.empty(shape, dtype)
    memory: Any = (ctypes.c_char * (extent.high - extent.low)).from_address(ptr + extent.low)
    memory.owner = owner
    return np.ndarray(shape, dtype, memory, -extent.low, strides)


def tensor(problem: AttentionProblem, name: str, ptr: int) -> np.ndarray:
    """The tensor `name` of a problem in bshd order (lse: bhs); bfloat16 as uint16."""
    p, strides = problem, dict(problem.strides)[name]
    starts = "cu_seqlens_k" if name in ("k", "v", "dk", "dv") else "cu_seqlens_q"
    batch = 1 if p.lengths is not None and starts in p.lengths.arrays() else p.batch
    if name == "lse":
        shape: tuple[int, ...] = (batch, p.num_heads, p.seqlen_q)
        return view(ptr, shape, tuple(4 * s for s in strides), np.float32)
    length, heads = (p.seqlen_k, p.num_heads_k) if name in ("k", "v", "dk", "dv") else (p.seqlen_q, p.num_heads)
    width = p.head_dim_v if name in ("v", "dv", "out", "dout") else p.head_dim
    dtype = np.uint16 if p.dtype == "bfloat16" else p.dtype
    return view(ptr, (batch, length, heads, width), (*(2 * s for s in strides), 2), dtype)


@dataclass
class Launch:
    """One call of a fake launchable."""

    problem: AttentionProblem
    pointers: dict[str, int]
    stream: int
    device: int
    current_device: int | None
    deterministic: bool | None = None

    def run(self) -> None:
        p = self.problem
        extra = ("workspace", *p.extra_arrays, *p.extra_results)
        arrays = {name: tensor(p, name, ptr) for name, ptr in self.pointers.items() if name not in extra}
        if p.softmax is not None:
            shape = arrays["lse"].shape
            steps = tuple(4 * step for step in p.softmax.dlse)
            arrays["dlse"] = view(self.pointers["dlse"], shape, steps, np.float32)
        window = None if p.window is None else (p.window.left, p.window.right)
        options = {"causal": p.causal, "softmax_scale": p.softmax_scale, "window_size": window, **self.features()}
        compute = cpu.backward if "dout" in arrays else cpu.forward
        if p.lengths is not None:
            compute = sequences.backward if "dout" in arrays else sequences.forward
            lengths = {name: self.lengths(name) for name in p.lengths.arrays()}
            for name, x in arrays.items():  # without the batch of one that they have here
                starts = "cu_seqlens_k" if name in ("k", "v", "dk", "dv") else "cu_seqlens_q"
                arrays[name] = x[0] if starts in lengths else x
            options["lengths"] = lengths
        compute(**arrays, **options)

    def features(self) -> dict[str, Any]:
        """What becomes of scores, and sinks."""
        p, options = self.problem, dict[str, Any]()
        if p.score is not None:
            options["softcap"] = p.score.softcap
            if p.score.alibi is not None:
                steps = tuple(4 * step for step in p.score.alibi)
                options["alibi_slopes"] = view(self.pointers["alibi_slopes"], (p.batch, p.num_heads), steps, np.float32)
        if p.mask is not None:
            options["mask"] = self.mask()
        if p.sinks is not None:
            dtype = np.dtype((np.uint16 if p.dtype == "bfloat16" else p.dtype) if p.sinks.sixteen_bit else np.float32)
            for name in (*p.sinks.arrays(), *p.sinks.results()):
                options[name] = view(self.pointers[name], (p.num_heads,), (dtype.itemsize,), dtype)
        return options

    def mask(self) -> cpu_mask.Mask:
        """By the lists that are there; how long they are, they say themselves."""
        p, spec = self.problem, self.problem.mask
        assert spec is not None
        if spec.array is not None:
            dense = view(self.pointers["mask"], spec.array.shape, spec.array.strides, np.bool_)
            (first, last), apart = spec.array.band, np.arange(p.seqlen_k) - np.arange(p.seqlen_q)[:, None]
            return cpu_mask.mask_of({"mask": dense & (apart >= first) & (apart <= last)}, p.seqlen_q, p.seqlen_k)
        shape = p.batch if spec.batch_masks else 1, p.num_heads if spec.head_masks else 1

        def words(name: str, *lengths: int) -> np.ndarray:
            return view(self.pointers[name], lengths, np.empty(lengths, np.int32).strides, np.int32)

        rows = words("mask_rows_q", shape[0] * shape[1], spec.query_blocks, 4)
        entries = words("mask_entries_q", int(rows[..., :3].sum(-1).max(initial=0)), 2)
        own = {
            "mask_rows_q": rows,
            "mask_entries_q": entries,
            "mask_rows_k": words("mask_rows_k", shape[0] * shape[1], spec.key_blocks, 4),
            "mask_entries_k": words("mask_entries_k", len(entries), 2),
            "mask_ranks": words("mask_ranks", len(entries)),
            "mask_bits": words("mask_bits", int(entries[:, 1].max(initial=-1)) + 1, 2, BLOCK, 4),
        }
        return cpu_mask.mask_of({"mask": (*shape, p.seqlen_q, p.seqlen_k), **own}, p.seqlen_q, p.seqlen_k)

    def lengths(self, name: str) -> np.ndarray:
        p = self.problem
        shapes = {"segment_ids_q": (p.batch, p.seqlen_q), "segment_ids_k": (p.batch, p.seqlen_k)}
        shape = shapes.get(name, (p.batch + name.startswith("cu"),))
        return view(self.pointers[name], shape, np.empty(shape, np.int32).strides, np.int32)


@dataclass
class FakePlan:
    gpu: FakeGpu
    problem: AttentionProblem
    workspace_bytes: int
    deterministic: bool | None = None
    launches: tuple[Any, ...] = ()
    family: str | None = None
    objection: str = ""

    def bind(self, device_index: int) -> Any:
        self.gpu.binds += 1
        names = FORWARD_NAMES if self.deterministic is None else BACKWARD_NAMES
        names = pointer_names(self.problem, names)
        if self.deterministic is not None or self.workspace_bytes:
            names += ("workspace",)

        def launch(pointers: tuple[int, ...], stream: int) -> None:
            assert len(pointers) == len(names)
            assert all(type(pointer) is int for pointer in pointers) and type(stream) is int
            named = dict(zip(names, pointers, strict=True))
            record = Launch(self.problem, named, stream, device_index, self.gpu.current, self.deterministic)
            self.gpu.launches.append(record)
            if self.gpu.compute:
                record.run()

        return launch


@dataclass
class FakeGpu:
    """`launches`: what was launched; `plans`: what was planned. `current`: the device whose context is current.

    `launches_of_plans`: what plans say that they launch, unless sm_90 was objected to.
    """

    current: int | None = None
    stream: int = 0
    capturing: bool = False
    compute: bool = True
    workspace_bytes: int = 1024
    forward_workspace_bytes: int = 0
    launches_of_plans: tuple[Any, ...] = ()
    binds: int = 0
    plans: list[FakePlan] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    allocations: list[Any] = field(default_factory=list)

    @property
    def last(self) -> Launch:
        return self.launches[-1]

    def plan_forward(
        self, problem: AttentionProblem, device: Any, family: str | None, compiler: Callable[[str, Any], str]
    ) -> FakePlan:
        return self._plan(problem, self.forward_workspace_bytes, None, family, compiler)

    def plan_backward(
        self,
        problem: AttentionProblem,
        device: Any,
        deterministic: bool,
        family: str | None,
        compiler: Callable[[str, Any], str],
    ) -> FakePlan:
        return self._plan(problem, self.workspace_bytes, deterministic, family, compiler)

    def _plan(
        self,
        problem: AttentionProblem,
        workspace_bytes: int,
        deterministic: bool | None,
        family: str | None,
        compiler: Callable[[str, Any], str],
    ) -> FakePlan:
        objection = next(filter(None, (compiler(launch.arch, ROW) for launch in self.launches_of_plans)), "")
        launches = () if objection else self.launches_of_plans
        self.plans.append(FakePlan(self, problem, workspace_bytes, deterministic, launches, family, objection))
        return self.plans[-1]

    @contextmanager
    def guard(self, index: int) -> Any:
        before, self.current = self.current, index
        yield
        self.current = before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Planning, the driver, and CuPy's allocator, streams and copies replaced for one test."""
    fake = FakeGpu()
    _forget()
    monkeypatch.setattr(planner, "plan_forward", fake.plan_forward)
    monkeypatch.setattr(planner, "plan_backward", fake.plan_backward)
    monkeypatch.setattr(driver, "device_guard", fake.guard)
    monkeypatch.setattr(driver, "context_check", lambda index: lambda: fake.current == index)
    monkeypatch.setattr(
        driver, "device_info", lambda index: driver.DeviceInfo(index, "fake", (9, 0), 132, 227 * 1024, 50 << 20)
    )
    _replace_cupy(fake, monkeypatch)
    yield fake
    _forget()


def _forget() -> None:
    PREPARED.clear()
    planner.bound_plan.cache_clear()


def _replace_cupy(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocator(shape: tuple[int, ...], dtype: str, like: Any, swapped: bool = False) -> Any:
        assert not swapped, "only torch has operators whose results are views"
        numpy_dtype = like.dtype if like.dtype.name == dtype else np.dtype(dtype)
        device = like.data.device_id

        def allocate() -> Any:
            assert gpu.current == device, "CuPy allocates on the current device"
            assert not gpu.capturing, "an allocation inside a capture"
            gpu.allocations.append(cupy_array(shape, numpy_dtype, device))
            return gpu.allocations[-1]

        return allocate

    def scratch(size: int, like: Any) -> Any:
        return allocator((size,), "uint8", like), CUPY.address

    def contiguous(array: Any) -> Any:
        assert gpu.current == array.data.device_id
        return to_cupy(host_view(array), array.data.device_id)

    monkeypatch.setattr(prepared, "_shared_blocks", {})
    monkeypatch.setattr(CUPY, "allocator", allocator)
    monkeypatch.setattr(CUPY, "scratch", scratch)
    monkeypatch.setattr(CUPY, "contiguous", contiguous)
    monkeypatch.setattr(CUPY, "stream", lambda index: lambda index: gpu.stream)
    monkeypatch.setattr(CUPY, "is_capturing", lambda stream, index: gpu.capturing)
    monkeypatch.setattr(TORCH, "is_capturing", lambda stream, index: gpu.capturing)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of CuPy's arrays between host and GPU, which there is none of."""
    monkeypatch.setattr(CUPY, "to_host", lambda array: host_view(array).copy())
    monkeypatch.setattr(arrays, "_from_host", lambda framework, array, index: to_cupy(array, index))
