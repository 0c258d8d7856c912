"""A case of attention on a cache, run on the CPU as its plan says, and judged."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fa2cupy.cached.arguments import given
from fa2cupy.cached.cache import Cache
from fa2cupy.cached.call import ARRAYS, Call
from fa2cupy.cached.problem import CacheProblem
from fa2cupy.kernels.decode import DecodePlan, plan_decode
from fa2cupy.kernels.sm80.flash_decode import DecodeTile
from fa2cupy.keywords import KEYWORDS
from tests import caches, reference
from tests.caches import INT8, CacheCase, Drawn
from tests.host import build, run
from tests.host.build import Mutation
from tests.host.kernel_run import Tensor, device
from tests.host.run import Schedule


@dataclass(frozen=True)
class HostCache:
    """A case and the GPU that its plan is made for. tile: instead of the plan's. sm_count: multiprocessors."""

    case: CacheCase
    arch: str = "sm_90"
    tile: DecodeTile | None = None
    sm_count: int = 4
    split_size: int | None = None

    def __str__(self) -> str:
        return f"{self.case} {self.arch}" + (f" {self.tile}" if self.tile else "")


@dataclass
class Prepared:
    host_cache: HostCache
    drawn: Drawn
    plan: DecodePlan
    tensors: dict[str, Tensor]
    pointers: tuple[int, ...]
    workspace: Tensor
    counters: np.ndarray
    expected: list[reference.Expected]
    caches: dict[str, bytes]
    kept: list[Any]


def arguments(drawn: Drawn) -> tuple[Any, Any, Any, dict[str, Any], dict[str, Any]]:
    """q, k, v, keywords of the cache and of the call, in the case's layout."""
    case = drawn.case

    def array(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return float(x)
        x = reference.as_ml_dtypes(x)
        return x.swapaxes(1, 2) if case.layout == "bhsd" and x.ndim == 4 else x

    names = {name for name, keyword in KEYWORDS.items() if "KVCache" in keyword.functions}
    every = {{"k_new": "k", "v_new": "v"}.get(name, name): array(x) for name, x in drawn.arrays.items()}
    of_cache = {name: every.pop(name) for name in list(every) if name in names} | {"layout": case.layout}
    if case.rotary is not None:
        every["rotary"] = every.pop("rotary_cos"), every.pop("rotary_sin"), case.rotary[1]
    stored = (drawn.k_cache, drawn.v_cache)
    if case.kv_dtype:
        of_cache["kv_dtype"] = case.kv_dtype
        stored = tuple(x.view(np.int8 if case.kv_dtype == INT8 else np.uint8) for x in stored)
    every |= {"causal": case.causal, "window_size": case.window, "softmax_scale": case.scale}
    every["softcap"] = case.softcap
    k, v = (array(x) for x in stored)
    return array(drawn.q), k, v, of_cache, every


@functools.lru_cache(maxsize=64)
def _drawn(case: CacheCase) -> tuple[Drawn, list[reference.Expected]]:
    drawn = caches.draw(case)
    return drawn, caches.expect(drawn)


def call_of(drawn: Drawn, split_size: int | None = None) -> tuple[Call, dict[str, Tensor]]:
    """A call with results of its own, which are returned too."""
    case = drawn.case
    q, k, v, of_cache, of_call = arguments(drawn)
    cache = Cache.of(k, v, given("KVCache", (), of_cache), ("k", "v"))
    sizes = Call.of(cache, q, given("KVCache.attend", (), of_call), None)
    tensors = {}
    for name, dtype in (("out", case.dtype), ("lse_out", "float32")):
        shape = sizes.shape(name)
        tensors[name] = Tensor(shape, _strides(shape), dtype)
        values = tensors[name].values
        of_call[name] = values.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else values.view(dtype)
    if split_size is not None:
        of_call["split_size"] = split_size
    return Call.of(cache, q, given("KVCache.attend", (), of_call), None), tensors


def prepare(host_cache: HostCache) -> Prepared:
    drawn, expected = _drawn(host_cache.case)
    call, tensors = call_of(drawn, host_cache.split_size)
    gpu = dataclasses.replace(device(host_cache.arch), sm_count=host_cache.sm_count)
    plan = plan_decode(CacheProblem.of(call), gpu, host_cache.tile)
    workspace = Tensor((plan.workspace_bytes // 4,), (1,), "float32")
    counters = np.zeros(plan.counters, np.int32)
    numbers = {name: int(x) for name, x in call.numbers.items()}
    ordered = [call.arrays.get(name) for name in ARRAYS]
    pointers = [numbers.get(n, 0) if x is None else x.ctypes.data for n, x in zip(ARRAYS, ordered, strict=True)]
    pointers += [workspace.pointer, counters.ctypes.data]
    before = {name: getattr(drawn, name).tobytes() for name in ("k_cache", "v_cache")}
    return Prepared(
        host_cache, drawn, plan, tensors, tuple(pointers), workspace, counters, expected, before, [ordered, counters]
    )


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def execute(
    prepared: Prepared,
    schedule: Schedule,
    *,
    plant: str | None = None,
    mutation: Mutation | None = None,
    seed: int = 1,
) -> tuple[dict[str, bytes], set[run.Site]]:
    """Run the plan's launches into poisoned results and workspace; the bits, and the synchronisations reached."""
    for tensor in prepared.tensors.values():
        tensor.poison()
    for name, bits in prepared.caches.items():
        cache = getattr(prepared.drawn, name)
        cache[...] = np.frombuffer(bits, cache.dtype).reshape(cache.shape)
    prepared.workspace.poison()
    sites: set[run.Site] = set()
    for launch in prepared.plan.launches:
        mutated = mutation if mutation and mutation.path in _files_of(launch.source) else None
        library = build.library(launch.source, launch.name, launch.defines, mutation=mutated)
        params = launch.pack(prepared.pointers)
        sites.update(run.launch(library, launch.config, params, schedule, plant=plant, seed=seed))
    results = {name: tensor.bits() for name, tensor in prepared.tensors.items()}
    results |= {name: getattr(prepared.drawn, name).tobytes() for name in prepared.caches}
    return results, sites


def _files_of(source: str) -> frozenset[str]:
    from fa2cupy.jit import source as source_module

    loaded = source_module.load(source)
    return frozenset({loaded.path, *(name for name, _ in loaded.headers)})


def judge(prepared: Prepared) -> None:
    """AssertionError unless results and caches are right, nothing else was written, and the counters are 0 again."""
    case = prepared.host_cache.case
    for name, tensor in prepared.tensors.items():
        assert tensor.untouched_outside(), f"{name}: something outside the array was written"
    assert prepared.workspace.untouched_outside(), "something outside the workspace was written"
    assert not prepared.counters.any(), "counters are not 0 again"
    out = prepared.tensors["out"].values
    if case.layout == "bhsd" and out.ndim == 4:
        out = out.swapaxes(1, 2)
    out = out if case.dtype == "bfloat16" else out.view(np.float16)
    caches.check(prepared.drawn, out, prepared.tensors["lse_out"].values, prepared.expected)


def check(
    host_cache: HostCache,
    *,
    schedules: tuple[Schedule, ...] = tuple(Schedule),
    plant: str | None = None,
    mutation: Mutation | None = None,
) -> set[run.Site]:
    """Run a case under each schedule: every result is right, and no bit depends on the order of things."""
    prepared = prepare(host_cache)
    first: dict[str, bytes] | None = None
    sites: set[run.Site] = set()
    for number, schedule in enumerate(schedules):
        prepared.counters[...] = 0
        results, reached = execute(
            prepared, schedule, plant=plant, mutation=mutation, seed=host_cache.case.seed + number
        )  # fmt: skip
        sites |= reached
        try:
            if first is None:
                judge(prepared)
            else:
                assert not prepared.counters.any(), "counters are not 0 again"
                for name in first:
                    assert results[name] == first[name], f"{name} depends on the order in which warps and blocks run"
        except AssertionError as error:
            raise AssertionError(f"{host_cache} [{schedule.name}]: {error}") from error
        first = first or results
    return sites
