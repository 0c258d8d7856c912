"""The way of a call on a cache to a launch: CuPy arrays over host memory, and the kernels themselves, run by g++.

What is handed down, pointers, strides, numbers, workspaces and counters, is used as a GPU would use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import fa2cupy
from fa2cupy.cached import prepared, prompts, repeated
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.jit import driver
from fa2cupy.kernels.decode import DecodePlan
from tests import caches
from tests.caches import CacheCase, Drawn, draw
from tests.fake_gpu import FakeGpu, cupy_array, host_view, to_cupy
from tests.host import build, run
from tests.reference import as_ml_dtypes

pytestmark = pytest.mark.filterwarnings("error")


@dataclass
class Decode:
    """What was planned, bound and launched; the counters of each stream."""

    gpu: FakeGpu
    plans: list[DecodePlan] = field(default_factory=list)
    launches: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    counters: dict[Any, np.ndarray] = field(default_factory=dict)

    def bind(self, plan: DecodePlan, device_index: int) -> Any:
        self.plans.append(plan)

        def launch(pointers: tuple[int, ...], stream: int) -> None:
            assert self.gpu.current == device_index
            assert all(type(pointer) is int for pointer in pointers)
            self.launches.append((pointers, stream))
            for each in plan.launches:
                library = build.library(each.source, each.name, each.defines)
                run.launch(library, each.config, each.pack(pointers))

        return launch

    def counters_of(self, device_index: int, stream: int, count: int) -> int:
        held = self.counters.setdefault((device_index, stream), np.zeros(count, np.int32))
        assert len(held) >= count
        return int(held.ctypes.data)


@pytest.fixture
def decode(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decode]:
    fake = Decode(gpu)
    monkeypatch.setattr(DecodePlan, "bind", lambda plan, index: fake.bind(plan, index))
    monkeypatch.setattr(prepared, "counters", fake.counters_of)
    monkeypatch.setattr(prepared, "make_room", lambda index: None)
    four = driver.DeviceInfo(0, "fake", (9, 0), 4, 227 * 1024, 50 << 20)
    monkeypatch.setattr(driver, "device_info", lambda index: dataclasses.replace(four, index=index))
    repeated._PREPARED.clear()
    prepared.bound_plan.cache_clear()
    yield fake
    repeated._PREPARED.clear()
    prepared.bound_plan.cache_clear()
    assert not any(held.any() for held in fake.counters.values()), "counters are not 0 again"


def on_gpu(x: Any, **memory: Any) -> Any:
    return to_cupy(as_ml_dtypes(x), **memory) if isinstance(x, np.ndarray) else x


@dataclass
class Held:
    """A case on the fake GPU."""

    drawn: Drawn
    q: Any
    k: Any
    v: Any
    of_cache: dict[str, Any]
    of_call: dict[str, Any]

    @classmethod
    def of(cls, case: CacheCase, **memory: Any) -> Held:
        drawn = draw(case)
        of_call = {{"k_new": "k", "v_new": "v"}.get(n, n): on_gpu(x) for n, x in drawn.arrays.items()}
        of_cache = {name: of_call.pop(name) for name in ("block_table", "indptr", "indices") if name in of_call}
        of_call |= {"causal": case.causal, "window_size": case.window}
        k, v = on_gpu(drawn.k_cache, **memory), on_gpu(drawn.v_cache, **memory)
        return cls(drawn, on_gpu(drawn.q), k, v, of_cache, of_call)

    def check(self, out: Any, lse: Any) -> None:
        got = host_view(out)
        got = got.view(np.uint16) if self.drawn.case.dtype == "bfloat16" else got
        self.drawn.k_cache, self.drawn.v_cache = (
            host_view(x).view(y.dtype) for x, y in ((self.k, self.drawn.k_cache), (self.v, self.drawn.v_cache))
        )
        caches.check(self.drawn, got, host_view(lse))


_CASE = CacheCase((70, 3, 33), 1, None, (4, 2), 64, page=16, dtype="bfloat16")


def test_a_call_and_the_next_ones(decode: Decode) -> None:
    held = Held.of(_CASE)
    cache = fa2cupy.KVCache(held.k, held.v, **held.of_cache)
    for _ in range(2):
        held.check(*cache.attend(held.q, **held.of_call, return_lse=True))
    held.check(
        *fa2cupy.attention_with_kvcache(held.q, held.k, held.v, **held.of_cache, **held.of_call, return_lse=True)
    )
    held.check(
        *fa2cupy.attention_with_kvcache(held.q, held.k, held.v, **held.of_cache, **held.of_call, return_lse=True)
    )
    assert len(decode.plans) == 1 and len(decode.launches) == 4
    assert len(repeated._PREPARED) == 2
    out = cache.attend(held.q, **held.of_call)
    assert out.shape == held.q.shape and len(decode.plans) == 1
    assert {stream for _, stream in decode.launches} == {0}


def test_the_lengths_are_read_at_each_launch(decode: Decode) -> None:
    """From 1 to the capacity by one plan and one signature, as an array and as a number."""
    case = dataclasses.replace(_CASE, before=(128, 128, 128))
    held = Held.of(case)
    cache = fa2cupy.KVCache(held.k, held.v, **held.of_cache)
    lengths = held.of_call.pop("cache_seqlens")
    out, lse = cupy_array(held.q.shape, held.q.dtype), cupy_array((3, 4, 1), np.float32)
    for length in (1, 16, 17, 100, 128):
        host_view(lengths)[...] = length
        cut = dataclasses.replace(held.drawn, keys=[x[:length] for x in held.drawn.keys])
        cut.values = [x[:length] for x in held.drawn.values]
        for given in (lengths, length):
            got = cache.attend(held.q, cache_seqlens=given, out=out, lse_out=lse, return_lse=True)
            assert got[0] is out and got[1] is lse
            Held(cut, held.q, held.k, held.v, {}, {}).check(out, lse)
    assert len(decode.plans) == 2 and len(decode.launches) == 10 and len(repeated._PREPARED) == 2
    assert not decode.gpu.allocations or all(x.dtype == np.uint8 for x in decode.gpu.allocations)


@pytest.mark.parametrize(
    "case",
    [
        CacheCase((70, 3, 33), (2, 0, 5), None, (4, 2), 64, page=4, causal=True, layout="bhsd"),
        CacheCase((70, 3, 33), 2, None, (4, 2), 40, 24, window=(20, 0), table="indptr", page=16, by="seqused_k"),
        CacheCase((70, 3), 2, None, (2, 2), 33, dtype="bfloat16", leftpad=(5, 0), batch_idx=True),
        CacheCase((128, 128), 1, None, (2, 2), 64, by=None),
    ],
    ids=str,
)
def test_more_of_a_call(case: CacheCase, decode: Decode) -> None:
    memory = {"order": (0, 2, 1, 3)} if case.layout == "bhsd" else {}
    held = Held.of(case, **memory)
    k, v = held.k, held.v
    if case.layout == "bhsd":
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    cache = fa2cupy.KVCache(k, v, **held.of_cache, layout=case.layout)
    held.check(*cache.attend(held.q, **held.of_call, return_lse=True))


def test_integers_and_rows_that_have_to_be_copied(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    from fa2cupy.frameworks import CUPY

    monkeypatch.setattr(CUPY, "as_int32", lambda x: to_cupy(host_view(x).astype(np.int32)))
    held = Held.of(_CASE)
    wide = {name: to_cupy(host_view(x).astype(np.int64)) for name, x in {**held.of_cache, **held.of_call}.items()
            if hasattr(x, "dtype")}  # fmt: skip
    q = to_cupy(host_view(held.q), order=(0, 1, 3, 2))
    cache = fa2cupy.KVCache(held.k, held.v, block_table=wide["block_table"])
    for _ in range(2):
        held.check(*cache.attend(q, cache_seqlens=wide["cache_seqlens"], return_lse=True))


def test_inside_a_capture(decode: Decode) -> None:
    held = Held.of(_CASE)
    cache = fa2cupy.KVCache(held.k, held.v, **held.of_cache)
    cache.attend(held.q, **held.of_call)
    decode.gpu.capturing, decode.gpu.stream = True, 7
    with pytest.raises(InvalidArgument, match=r"CuPy's memory pool cannot be used there, so out=, workspace= must be"):
        cache.attend(held.q, **held.of_call)
    out, lse = cupy_array(held.q.shape, held.q.dtype), cupy_array((3, 4, 1), np.float32)
    with pytest.raises(InvalidArgument, match=r"so workspace= must be given \(workspace: \d+ bytes\)"):
        cache.attend(held.q, **held.of_call, out=out, lse_out=lse)
    with pytest.raises(InvalidArgument, match="workspace has 64 bytes: at least"):
        cache.attend(held.q, **held.of_call, out=out, lse_out=lse, workspace=cupy_array((64,), np.uint8))
    size = decode.plans[0].workspace_bytes
    got = cache.attend(
        held.q, **held.of_call, out=out, lse_out=lse, workspace=cupy_array((size,), np.uint8), return_lse=True
    )
    assert got[0] is out
    held.check(out, lse)
    assert set(decode.counters) == {(0, 0), (0, 7)}


def test_wrong_arguments_after_right_ones(decode: Decode) -> None:
    """The short way does not hide what the long one says."""
    held = Held.of(_CASE)
    cache = fa2cupy.KVCache(held.k, held.v, **held.of_cache)
    cache.attend(held.q, **held.of_call)
    for changes, words in (
        ({"causal": 0}, "causal=0 is a int"),
        ({"cache_seqlens": True}, "cache_seqlens=True is a bool"),
        ({"cache_seqlens": -1}, "cache_seqlens=-1"),
        ({"nonsense": 1}, "has no keyword 'nonsense'"),
        ({"window_size": [1, 2, 3]}, "has 3 elements"),
    ):
        with pytest.raises((InvalidArgument, InvalidType), match=words):
            cache.attend(held.q, **{**held.of_call, **changes})
    assert cache.attend(held.q, **{**held.of_call, "window_size": [5, 5]}) is not None
    with pytest.raises(InvalidArgument, match="out shares memory with q"):
        cache.attend(held.q, **held.of_call, out=held.q)
    with pytest.raises(InvalidType, match=r"q is a numpy.ndarray but the cache has arrays of CuPy"):
        cache.attend(held.drawn.q.view(np.float16))
    with pytest.raises(InvalidType, match="float32, which is not supported: on a GPU"):
        cache.attend(cupy_array(held.q.shape, np.float32), **held.of_call)
    strided = to_cupy(host_view(held.k), order=(0, 1, 3, 2))
    with pytest.raises(InvalidArgument, match="its last dimension must be contiguous on a GPU"):
        fa2cupy.KVCache(strided, held.v, **held.of_cache).attend(held.q, **held.of_call)


def test_lengths_looked_at(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    from fa2cupy.frameworks import CUPY

    monkeypatch.setattr(CUPY, "to_host", host_view)
    held = Held.of(_CASE)
    cache = fa2cupy.KVCache(held.k, held.v, **held.of_cache)
    host_view(held.of_call["cache_seqlens"])[1] = 129
    cache.attend(held.q, **held.of_call)
    monkeypatch.setenv("FA2CUPY_CHECK", "1")
    with pytest.raises(InvalidArgument, match=r"^cache_seqlens of sequence 1 is 129: 0 to 128 is needed"):
        cache.attend(held.q, **held.of_call)
    decode.gpu.capturing, decode.gpu.stream = True, 7
    with pytest.raises(InvalidArgument, match=r"^FA2CUPY_CHECK=1 waits for lengths"):
        cache.attend(held.q, **held.of_call, out=cupy_array(held.q.shape, held.q.dtype))


def test_prompts_by_the_forward(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many queries over rows: one forward, behind the new keys. Over pages and all else: as few queries are."""

    def longer(lengths: Any, new: int, call: Any) -> Any:
        return to_cupy(host_view(lengths).clip(0, call.cache.page) + np.int32(new))

    monkeypatch.setattr(prompts, "_longer", longer)
    for by in ("cache_seqlens", "seqused_k", "number", None):
        before = (128, 128) if by is None else (9, 9) if by == "number" else (40, 3)
        for layout in ("bshd", "bhsd"):
            new = None if by is None else 64
            case = CacheCase(before, 64, new, (4, 2), 64, causal=True, by="cache_seqlens" if by == "number" else by,
                             leftpad=None if by == "number" else (2, 0), layout=layout, window=(50, -1))  # fmt: skip
            held = Held.of(case)
            if by == "number":
                held.of_call["cache_seqlens"] = 9
            k, v = held.k, held.v
            if layout == "bhsd":  # rows of the cache as they lie, seen with the heads in front
                k, v, q = (x.transpose(0, 2, 1, 3) for x in (k, v, held.q))
                new_keys = {n: held.of_call[n].transpose(0, 2, 1, 3) for n in ("k", "v") if n in held.of_call}
            else:
                q, new_keys = held.q, {}
            forwards, others = len(decode.gpu.launches), len(decode.launches)
            cache = fa2cupy.KVCache(k, v, layout=layout)
            out, lse = cache.attend(q, **{**held.of_call, **new_keys}, return_lse=True)
            assert len(decode.gpu.launches) == forwards + 1
            assert len(decode.launches) == others + (new is not None)
            held.check(out.transpose(0, 2, 1, 3) if layout == "bhsd" else out, lse)
    assert {launch.name for plan in decode.plans for launch in plan.launches} == {"append_keys"}
    forwards = len(decode.gpu.launches)
    for changes in ({"page": 16}, {"queries": 63}, {"queries": (70, 2)}, {"rotary": (16, "neox", "float32"), "new": 1}):
        held = Held.of(CacheCase((40, 3), **{"queries": 64, "head_dim": 64, "causal": True, **changes}))
        if "rotary_cos" in held.of_call:
            held.of_call["rotary"] = held.of_call.pop("rotary_cos"), held.of_call.pop("rotary_sin"), "neox"
        held.check(*fa2cupy.KVCache(held.k, held.v, **held.of_cache).attend(held.q, **held.of_call, return_lse=True))
    assert len(decode.gpu.launches) == forwards
