"""Attention on a KV cache against float64: rows and pages with NaN wherever nobody may read, guards around everything,
one graph for all lengths, the same bits each time; counters are 0 after every test."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np
import pytest
import torch

import fa2cupy
from fa2cupy.cached import counters, prepared, repeated
from fa2cupy.cached.problem import CacheProblem
from fa2cupy.errors import InvalidArgument
from fa2cupy.jit import driver
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels.decode import DecodePlan, plan_decode
from tests import caches
from tests.caches import FLOAT8, INT8, CacheCase, draw
from tests.gpu import oracle
from tests.gpu.ledger import LEDGER
from tests.host import caches as host

Tensor = torch.Tensor

GUARD = 1024  # bytes of 0xff, NaN, around every array
_LENS = (300, 0, 17, 64, 1, 603)
_NEOX, _PAIRS = (32, "neox", "float32"), (12, "interleaved", "bfloat16")
_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8, FLOAT8: torch.float8_e4m3fn}

# head_dim, head_dim_v, dtype; and those at which the kernels with more to do are compiled.
WIDTHS = (
    (32, None, "float16"),
    (33, 7, "bfloat16"),
    (40, None, "bfloat16"),
    (64, None, "bfloat16"),
    (96, None, "float16"),
    (128, None, "bfloat16"),
    (128, None, "float16"),
    (192, 128, "bfloat16"),
    (256, None, "float16"),
)
FEW_WIDTHS = ((64, None, "bfloat16"), (128, None, "float16"), (256, None, "bfloat16"))


def _case(width: tuple[int, int | None, str], before: tuple[int, ...], *more: Any, **changes: Any) -> CacheCase:
    head_dim, head_dim_v, dtype = width
    page = changes.get("page") or 1
    usual: dict[str, Any] = {"heads": (8, 2), "causal": True, "capacity": -(-640 // page) * page}
    sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "dtype": dtype}
    return CacheCase(before, *more, **{**usual, **sizes, **changes})


def plain_cases(width: tuple[int, int | None, str]) -> list[CacheCase]:
    """Rows, pages of 16 and more, pages of any size; 16 packed rows and more."""
    full = 3 * (640,)
    return [
        _case(width, _LENS, 1),
        _case(width, full, 1, by=None, heads=(4, 4)),
        _case(width, _LENS, 4, causal=False, window=(40, 3), leftpad=(33, 0, 4, 0, 1, 600)),
        _case(width, _LENS, 9, heads=(4, 2), layout="bhsd", window=(50, -1), batch_idx=True),
        _case(width, _LENS, (1, 2, 0, 40, 3, 5), heads=(6, 1), by="seqused_k", scale=0.3),
        _case(width, _LENS, 1, page=64, heads=(16, 1)),
        _case(width, _LENS, 4, page=256, table="indptr", layout="bhsd"),
        _case(width, _LENS, (1, 2, 0, 4, 3, 1), page=64, leftpad=(33, 0, 4, 0, 1, 15), batch_idx=True, heads=(3, 3)),
        _case(width, _LENS, 2, page=1, table="indptr"),
        _case(width, _LENS, 3, page=17, window=(20, -1), heads=(4, 4), layout="bhsd"),
    ]


def more_cases(width: tuple[int, int | None, str]) -> list[CacheCase]:
    """New keys, rotary, scores, sinks, 8 bits; many rows."""
    dtype = width[2]
    before, short = (283, 0, 17, 64, 1, 603), (130, 0, 17)  # to encode 8 bits takes a while
    return [
        _case(width, before, 3, 3, page=17, rotary=_NEOX),
        _case(width, before, 2, 1, page=1, rotary=(12, "interleaved", dtype), causal=False, by="seqused_k"),
        _case(width, before, (3, 0, 9, 1, 1, 2), 1, page=16, rotary=_NEOX, window=(25, -1), batch_idx=True),
        _case(width, (640, 639, 0, 5), 2, 2, page=16, rotary=_NEOX),
        _case(width, before, 2, 1, leftpad=(30, 0, 16, 0, 1, 600), layout="bhsd"),
        _case(width, (30, 0, 500), 5, 70, page=16, rotary=_NEOX),
        _case(width, (100, 0, 613), (70, 0, 27), 1, page=16),
        _case(width, _LENS, 1, page=64, softcap=3.0),
        _case(width, _LENS, 4, page=64, slopes="batch", causal=True),
        _case(width, _LENS, 4, page=64, slopes="head", sinks=dtype, causal=False),
        _case(width, _LENS, 2, page=64, sinks="float32", softcap=1.5, slopes="head", window=(70, 5), causal=False),
        _case(width, short, 1, page=64, kv_dtype=FLOAT8, scales=("head", "number")),
        _case(width, _LENS, 4, page=64, kv_dtype=INT8, scales=("batch", "head"), heads=(4, 4)),
        _case(width, short, 2, 2, page=16, kv_dtype=FLOAT8, scales=("page", "page"), rotary=_NEOX),
        _case(width, before, 3, 1, page=16, kv_dtype=INT8, scales=("page", "head"), by="seqused_k"),
        _case(width, _LENS, 50, page=64, causal=True),
        _case(width, _LENS, (200, 1, 0, 3, 1, 130), page=64, heads=(4, 4), window=(90, -1)),
    ]


def random_cases(count: int) -> Iterator[CacheCase]:
    """Of one width and two kernels: lengths, pages, rows, masks."""
    rng = random.Random(0)
    for seed in range(count):
        page = rng.choice((1, 2, 3, 5, 7, 8, 17, 24, 100))
        capacity = -(-rng.randint(1, 700) // page) * page
        before = tuple(rng.choice((0, 1, capacity, rng.randint(0, capacity))) for _ in range(rng.choice((1, 2, 5, 33))))
        packed = rng.random() < 0.3
        queries: Any = tuple(rng.randint(0, 5) for _ in before) if packed else rng.randint(1, 5)
        yield CacheCase(
            before,
            queries,
            None,
            rng.choice(((4, 2), (8, 2), (3, 3), (2, 1), (5, 1))),
            128,
            dtype="bfloat16",
            page=page,
            table=rng.choice(("block_table", "indptr")),
            capacity=capacity,
            by=rng.choice(("cache_seqlens", "seqused_k")),
            causal=rng.random() < 0.5,
            window=rng.choice((None, None, (rng.randint(0, 300), -1), (rng.randint(0, 30), 0))),
            leftpad=tuple(rng.randint(0, n) for n in before) if rng.random() < 0.3 else None,
            batch_idx=rng.random() < 0.3,
            spare=rng.randint(0, 4),
            seed=seed,
        )


OTHER_CLASSES = (166912, 101376)
_RANDOM = 150


def _rows_of_others() -> list[CacheCase]:
    return [_case(width, _LENS, queries, page=64) for width in FEW_WIDTHS for queries in (1, 6)]


def needed_plans(info: DeviceInfo) -> Iterator[DecodePlan]:
    """What is to be compiled beforehand."""
    wanted = [case for width in WIDTHS for case in plain_cases(width)]
    wanted += [case for width in FEW_WIDTHS for case in more_cases(width)]
    wanted += random_cases(_RANDOM)
    for case in wanted:
        yield plan_decode(_problem(case), info)
    for size in OTHER_CLASSES:
        for case in _rows_of_others():
            yield plan_decode(_problem(case), dataclasses.replace(info, shared_mem_optin=size))
    for page in (None, 16):
        for split_size in (64, 128):
            yield plan_decode(_problem(_case(WIDTHS[5], (5,), page=page), split_size), info)


def _problem(case: CacheCase, split_size: int | None = None) -> CacheProblem:
    """As the GPU's will be, of fewer keys, which no kernel is compiled for."""
    none = (0,) * case.batch
    few = {"before": none, "leftpad": none if case.leftpad else None, "capacity": case.page or 16, "spare": 1}
    return CacheProblem.of(host.call_of(draw(dataclasses.replace(case, **few)), split_size)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Arrays between guards


class Guarded:
    """NumPy arrays on the device, each with bytes of 0xff around it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wholes: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return self.put(np.full(shape, -1, {"float32": np.int32}.get(dtype, np.int16))).view(getattr(torch, dtype))

    def put(self, x: np.ndarray) -> Tensor:
        """Of bfloat16 as its bits, seen as int16."""
        x = np.ascontiguousarray(x)
        x = x.view(np.int16) if x.dtype == np.uint16 else x
        whole = torch.full((2 * GUARD + x.nbytes,), 0xFF, dtype=torch.uint8, device=self.device)
        own = whole[GUARD : GUARD + x.nbytes]
        own.copy_(torch.from_numpy(x.reshape(-1).view(np.uint8)))
        self.wholes.append(whole)
        return own.view(torch.from_numpy(x[:0]).dtype).view(x.shape)

    @property
    def are_whole(self) -> bool:
        return all(bool((w[:GUARD] == 0xFF).all() and (w[-GUARD:] == 0xFF).all()) for w in self.wholes)


class Held:
    """A case on the device."""

    def __init__(self, case: CacheCase, device: torch.device) -> None:
        self.case, self.drawn, self.memory = case, draw(case), Guarded(device)
        drawn = self.drawn
        self.q, k, v = self._tensor(drawn.q), self._stored(drawn.k_cache), self._stored(drawn.v_cache)
        every = {{"k_new": "k", "v_new": "v"}.get(n, n): self._tensor(x) for n, x in drawn.arrays.items()}
        names = ("block_table", "indptr", "indices", "k_scale", "v_scale")
        of_cache = {name: every.pop(name) for name in names if name in every}
        of_cache["kv_dtype"] = case.kv_dtype
        if case.rotary is not None:
            every["rotary"] = every.pop("rotary_cos"), every.pop("rotary_sin"), case.rotary[1]
        every |= {"causal": case.causal, "window_size": case.window, "softmax_scale": case.scale}
        self.of_call = every | {"softcap": case.softcap}
        self.k, self.v = k, v
        self.cache = fa2cupy.KVCache(k, v, layout=case.layout, **of_cache)

    def _tensor(self, x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return float(x)
        is_bhsd = self.case.layout == "bhsd" and x.ndim == 4
        found = self.memory.put(x.swapaxes(1, 2) if is_bhsd else x)
        return found.view(torch.bfloat16) if x.dtype == np.uint16 else found

    def _stored(self, x: np.ndarray) -> Tensor:
        found = self._tensor(x)
        return found.view(_TORCH[self.case.kv_dtype]) if self.case.kv_dtype else found

    def results(self) -> tuple[Tensor, Tensor]:
        """out and lse to be written, of NaN."""
        case, drawn = self.case, self.drawn
        shape = (*drawn.q.shape[:-1], case.head_dim_v or case.head_dim)
        if case.layout == "bhsd" and len(shape) == 4:
            shape = (shape[0], shape[2], shape[1], shape[3])
        rows = drawn.q.shape[:-2]
        lse = (case.heads[0], rows[0]) if case.is_packed else (rows[0], case.heads[0], rows[1])
        return self.memory.empty(shape, case.dtype), self.memory.empty(lse, "float32")

    def check(self, out: Tensor, lse: Tensor) -> None:
        """AssertionError unless they are right, and the cache is as it has to be, and nothing beside."""
        assert self.memory.are_whole, "memory beside an array was written"
        case, drawn = self.case, self.drawn
        if case.layout == "bhsd" and out.ndim == 4:
            out = out.transpose(1, 2)
        bits = out.contiguous().view(torch.int16).cpu().numpy()
        for name, tensor in (("k_cache", self.k), ("v_cache", self.v)):
            tensor = tensor.transpose(1, 2) if case.layout == "bhsd" else tensor
            stored = tensor.contiguous().view(torch.uint8 if case.kv_dtype else torch.int16).cpu().numpy()
            setattr(drawn, name, stored.view(getattr(drawn, name).dtype))
        caches.check(drawn, bits.view(np.uint16 if case.dtype == "bfloat16" else np.float16), lse.cpu().numpy())
        LEDGER.compared += 1


def check_all(cases: list[CacheCase], device: torch.device, **more: Any) -> None:
    """Each with results of its own, and once more with the caller's."""
    problems = []
    for number, case in enumerate(cases):
        held = Held(case, device)
        given: dict[str, Any] = {}
        if number % 3 != 0:
            given = dict(zip(("out", "lse_out"), held.results(), strict=True))
        try:
            held.check(*held.cache.attend(held.q, **held.of_call, **given, **more, return_lse=True))
        except AssertionError as error:
            problems.append(f"{case}: {error}")
    assert not problems, f"{len(problems)} problems in {len(cases)} cases:\n" + "\n".join(problems[:20])


def _counters_are_0() -> bool:
    torch.cuda.synchronize()
    for index, slab in counters._state.slabs.items():
        memory = cupy.cuda.UnownedMemory(slab.pointer, counters._SLAB_BYTES, None, index)
        if cupy.ndarray((slab.used // 4,), np.int32, cupy.cuda.MemoryPointer(memory, 0)).any():
            return False
    return True


@pytest.fixture(autouse=True)
def _counters() -> Iterator[None]:
    yield
    assert _counters_are_0(), "counters are not 0 again"


# ----------------------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_plain(width: tuple[int, int | None, str], device: torch.device) -> None:
    check_all(plain_cases(width), device)


@pytest.mark.parametrize("width", FEW_WIDTHS, ids=str)
def test_more(width: tuple[int, int | None, str], device: torch.device) -> None:
    check_all(more_cases(width), device)


@pytest.mark.parametrize("width", FEW_WIDTHS[:2], ids=str)
def test_prompts_over_rows(width: tuple[int, int | None, str], device: torch.device) -> None:
    """By the forward kernels, behind new keys."""
    cases = [
        _case(width, (283, 0, 17), 100, 100, leftpad=(2, 0, 9)),
        _case(width, (283, 0, 17), 70, 64, layout="bhsd", by="seqused_k", sinks="float32"),
        _case(width, _LENS, 130, None, window=(90, -1), slopes="batch"),
        _case(width, (640, 640), 64, None, by=None, softcap=2.0),
    ]
    check_all(cases, device)


@pytest.mark.parametrize("start", range(0, _RANDOM, 50))
def test_random(start: int, device: torch.device) -> None:
    check_all(list(random_cases(_RANDOM))[start : start + 50], device)


@pytest.mark.parametrize("size", OTHER_CLASSES)
def test_rows_of_other_gpus(size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for less shared memory."""
    info = driver.device_info(0)
    _as_device(monkeypatch, dataclasses.replace(info, shared_mem_optin=size))
    check_all(_rows_of_others(), device)


def _as_device(monkeypatch: pytest.MonkeyPatch, info: DeviceInfo) -> None:
    """Plan for another GPU than there is."""
    monkeypatch.setattr(driver, "device_info", lambda index: info)
    prepared.bound_plan.cache_clear()
    repeated._PREPARED.clear()


@pytest.fixture(autouse=True)
def _forget_plans() -> Iterator[None]:
    """Of another GPU."""
    yield
    prepared.bound_plan.cache_clear()
    repeated._PREPARED.clear()


def _normal(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)


def _check_beside_float64(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **options: Any) -> None:
    """One sequence."""
    lse_ref, bounds = oracle.attention(q, k, v, None, causal=True, scale=q.shape[-1] ** -0.5, **options)
    judgements = oracle.judge({"out": out}, lse, lse_ref, bounds, {})
    LEDGER.add("bfloat16", judgements)
    problems = [text for each in judgements.values() for text in each.problems]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize(("heads", "queries"), [((32, 8), 1), ((64, 8), 1), ((8, 1), 4), ((32, 8), 16), ((4, 4), 1)])
def test_long_sequences(heads: tuple[int, int], queries: int, page: int, device: torch.device) -> None:
    """Tiles that many thread blocks share, one very long sequence beside short ones."""
    lengths = (40000, 8192, 100, 0, 16, 8191)
    rows = 40000 if not page else 2500
    shape = (len(lengths), rows, heads[1], 128) if not page else (len(lengths) * rows, page, heads[1], 128)
    k, v = _normal(shape, device, 1), _normal(shape, device, 2)
    q = _normal((len(lengths), queries, heads[0], 128), device)
    table = torch.randperm(shape[0], device=device).int().view(len(lengths), rows) if page else None
    used = torch.tensor(lengths, dtype=torch.int32, device=device)
    out, lse = fa2cupy.attention_with_kvcache(q, k, v, block_table=table, seqused_k=used, causal=True, return_lse=True)
    for b, n in enumerate(lengths):
        if n < queries:
            continue
        keys, values = (x[b, :n] if table is None else x[table[b].long()].flatten(0, 1)[:n] for x in (k, v))
        _check_beside_float64(q[b : b + 1], keys[None], values[None], out[b : b + 1], lse[b : b + 1])
    assert not out[3].any() and (lse[3] == -torch.inf).all()


def test_many_sequences(device: torch.device) -> None:
    """More of them than lanes read at once, of which most are short."""
    lengths = torch.randint(0, 300, (1025,), device=device, dtype=torch.int32)
    lengths[7] = 3000
    pages = torch.arange(1025 * 188, device=device, dtype=torch.int32).view(1025, 188) % 5000
    k, v = _normal((5000, 16, 1, 128), device, 1), _normal((5000, 16, 1, 128), device, 2)
    q = _normal((1025, 1, 8, 128), device)
    cache = fa2cupy.KVCache(k, v, block_table=pages)
    out, lse = cache.attend(q, seqused_k=lengths, return_lse=True)
    for b in (0, 1, 7, 8, 31, 32, 500, 1023, 1024):
        n = int(lengths[b])
        keys, values = (x[pages[b].long()].flatten(0, 1)[:n][None] for x in (k, v))
        if n:
            _check_beside_float64(q[b : b + 1], keys, values, out[b : b + 1], lse[b : b + 1])


def test_a_pool_beyond_2_to_the_31(device: torch.device) -> None:
    """Elements: pages at its end."""
    pages = (1 << 31) // (16 * 8 * 128) + 40
    k, v = (torch.empty((pages, 16, 8, 128), dtype=torch.bfloat16, device=device) for _ in range(2))
    for seed, x in enumerate((k, v)):
        x[-40:] = _normal((40, 16, 8, 128), device, seed + 1)
    table = (pages - 1 - torch.randperm(40, device=device)).int().view(2, 20)
    q, lengths = _normal((2, 1, 32, 128), device), torch.tensor([320, 150], dtype=torch.int32, device=device)
    new = _normal((2, 1, 8, 128), device, 5)
    out, lse = fa2cupy.attention_with_kvcache(
        q, k, v, new, new, block_table=table, seqused_k=lengths, return_lse=True, causal=True
    )
    for b, n in enumerate((320, 150)):
        keys, values = (x[table[b].long()].flatten(0, 1)[:n][None] for x in (k, v))
        assert torch.equal(keys[0, -1], new[b, 0]) and torch.equal(values[0, -1], new[b, 0])
        _check_beside_float64(q[b : b + 1], keys, values, out[b : b + 1], lse[b : b + 1])


def test_cupy_arrays(device: torch.device) -> None:
    for case in (plain_cases(WIDTHS[6])[0], plain_cases(WIDTHS[6])[5], more_cases(FEW_WIDTHS[1])[1]):
        drawn = draw(case)
        q, k, v, of_cache, of_call = host.arguments(drawn)
        rotary = of_call.pop("rotary", None)
        if rotary is not None:
            of_call["rotary"] = cupy.asarray(rotary[0]), cupy.asarray(rotary[1]), rotary[2]
        of_cache, of_call = (
            {n: cupy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in each.items()}
            for each in (of_cache, of_call)
        )
        k, v = cupy.asarray(k), cupy.asarray(v)
        out, lse = fa2cupy.KVCache(k, v, **of_cache).attend(cupy.asarray(q), **of_call, return_lse=True)
        assert isinstance(out, cupy.ndarray)
        drawn.k_cache, drawn.v_cache = cupy.asnumpy(k), cupy.asnumpy(v)
        caches.check(drawn, cupy.asnumpy(out), cupy.asnumpy(lse))


def test_wrong_numbers_reach_nothing_outside(device: torch.device) -> None:
    """Lengths and tables of any value: finite results of finite caches, and nothing written beside the arrays."""
    rng = np.random.default_rng(0)
    wild = np.array([*caches.GARBAGE, 0, 1, 5, 127], np.int64)
    for seed in range(20):
        case = _case(
            FEW_WIDTHS[1], (3, 4, 5), (2, 1, 3), 1, page=16, batch_idx=True, leftpad=(0, 1, 2), rotary=_NEOX,
            table=("block_table", "indptr")[seed % 2], by=("cache_seqlens", "seqused_k")[seed // 2 % 2], seed=seed,
        )  # fmt: skip
        held = Held(case, device)
        for x in (held.k, held.v):
            x.fill_(1)
        for array in (*held.of_call.values(), *held.cache._cache.arrays.values()):
            if isinstance(array, Tensor) and array.dtype == torch.int32:
                numbers = array.cpu().numpy()
                places = rng.random(numbers.shape) < 0.3
                numbers[places] = rng.choice(wild, int(places.sum())).astype(np.int32)
                array.copy_(torch.from_numpy(numbers))
        out = held.cache.attend(held.q, **held.of_call)
        assert torch.isfinite(out).all() and held.memory.are_whole
        assert torch.isfinite(held.k).all() and torch.isfinite(held.v).all()


def test_lengths_looked_at(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(_case(WIDTHS[5], (70, 3, 33), 1, page=64), device)
    held.cache.attend(held.q, **held.of_call)
    monkeypatch.setenv("FA2CUPY_CHECK", "1")
    held.check(*held.cache.attend(held.q, **held.of_call, return_lse=True))
    held.of_call["cache_seqlens"][1] = 700
    with pytest.raises(InvalidArgument, match=r"^cache_seqlens of sequence 1 is 700: 0 to 640 is needed"):
        held.cache.attend(held.q, **held.of_call)


# ----------------------------------------------------------------------------------------------------------------------
# Bits, graphs, streams


class Steady:
    """A cache without NaN, of which any length may be taken."""

    def __init__(self, device: torch.device, page: int = 16, batch: int = 3, capacity: int = 4096) -> None:
        rows = (batch * capacity // page, page) if page else (batch, capacity)
        self.k, self.v = (_normal((*rows, 2, 128), device, seed) for seed in (1, 2))
        table = torch.randperm(rows[0], device=device).int().view(batch, -1) if page else None
        self.cache = fa2cupy.KVCache(self.k, self.v, block_table=table)
        self.q = _normal((batch, 1, 8, 128), device)
        self.lengths = torch.full((batch,), capacity, dtype=torch.int32, device=device)
        self.out = torch.empty_like(self.q)
        self.lse = torch.empty((batch, 8, 1), device=device)

    def __call__(self, **more: Any) -> tuple[Tensor, Tensor]:
        out, lse = self.cache.attend(self.q, cache_seqlens=self.lengths, return_lse=True, **more)
        return out, lse


def test_the_same_bits_each_time(device: torch.device) -> None:
    steady = Steady(device)
    steady.lengths.copy_(torch.tensor([4096, 77, 2500]))
    first = steady()
    same = torch.ones((), dtype=torch.bool, device=device)
    for _ in range(1000):
        for x, y in zip(steady(out=steady.out, lse_out=steady.lse), first, strict=True):
            same &= (x == y).all()
    assert same


def test_a_workspace_of_nan(device: torch.device) -> None:
    steady = Steady(device)
    first = steady()
    for split_size in (None, 64):
        wanted = steady(split_size=split_size) if split_size else first
        workspace = torch.full((64 << 20,), 0xFF, dtype=torch.uint8, device=device)
        for _ in range(3):
            found = steady(workspace=workspace.fill_(0xFF), split_size=split_size)
            assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("page", [0, 16])
def test_one_graph_for_all_lengths(page: int, device: torch.device) -> None:
    steady = Steady(device, page)
    steady()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = steady()
    for n in (0, 1, 15, 16, 17, 63, 64, 65, 1000, 2047, 4095, 4096):
        steady.lengths.copy_(torch.tensor([n, 4096 - n, (7 * n) % 4096]))
        for x in found:
            x.fill_(torch.nan)
        graph.replay()
        for x, y in zip(found, steady(), strict=True):
            assert torch.equal(x, y), n


def test_decoding_in_a_graph(device: torch.device) -> None:
    """Token by token from an empty cache, lengths on the device; the keys that are left, and rows of a prefill."""
    batch, steps = 3, 70
    q, k, v = (_normal((batch, steps, heads, 128), device, heads) for heads in (8, 2, 3))
    v = v[:, :, :2]
    pages = [torch.full((15, 16, 2, 128), torch.nan, dtype=torch.bfloat16, device=device) for _ in range(2)]
    cache = fa2cupy.KVCache(*pages, block_table=torch.randperm(15, device=device).int().view(3, 5))
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    step = [x[:, :1].clone() for x in (q, k, v)]

    def attend() -> Tensor:
        out = cache.attend(step[0], k=step[1], v=step[2], cache_seqlens=lengths, causal=True)
        lengths.add_(1)
        return out

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    lengths.zero_()
    outs = []
    for i in range(steps):
        for x, whole in zip(step, (q, k, v), strict=True):
            x.copy_(whole[:, i : i + 1])
        graph.replay()
        outs.append(out.clone())
    table = cache._cache.arrays["block_table"].long()
    for x, new in zip(pages, (k, v), strict=True):
        assert torch.equal(x[table].flatten(1, 2)[:, :steps], new)
    torch.testing.assert_close(torch.cat(outs, 1), fa2cupy.attention(q, k, v, causal=True), rtol=2**-6, atol=2**-7)


def test_cupy_graph() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (
        cupy.asarray(rng.standard_normal((2, n, h, 128)).astype(np.float16)) for n, h in ((1, 8), (640, 2), (640, 2))
    )
    cache, lengths = fa2cupy.KVCache(k, v), cupy.asarray(np.array([640, 640], np.int32))
    out, lse, workspace = cupy.empty_like(q), cupy.empty((2, 8, 1), np.float32), cupy.full(8 << 20, 0xFF, cupy.uint8)
    cache.attend(q, cache_seqlens=lengths)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(InvalidArgument, match="CuPy's memory pool cannot be used there"):
            cache.attend(q, cache_seqlens=lengths, out=out)
        cache.attend(q, cache_seqlens=lengths, out=out, lse_out=lse, workspace=workspace)
        graph = stream.end_capture()
        for n in (1, 300, 640):
            lengths.fill(n)
            graph.launch(stream)
            stream.synchronize()
            wanted = cache.attend(q, cache_seqlens=lengths)
            assert (out == wanted).all()


def test_two_streams_at_once(device: torch.device) -> None:
    """Each has counters of its own, eager and in graphs that are replayed side by side."""
    both = [Steady(device, page, 5, 8192) for page in (0, 16)]
    wanted = [steady() for steady in both]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    found: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for _ in range(20):
        for steady, stream, results in zip(both, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(steady())
    torch.cuda.synchronize()
    for results, right in zip(found, wanted, strict=True):
        assert all(torch.equal(x, y) for pair in results for x, y in zip(pair, right, strict=True))
    graphs = []
    for steady in both:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results = steady()
        found.append([results])
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for results, right in zip(found[2:], wanted, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(results[0], right, strict=True))


@pytest.mark.parametrize("split_size", [64, 128])
def test_with_parts_no_bit_depends_on_the_others(
    split_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in a batch of 33, in pages, and on another number of multiprocessors."""
    lengths = torch.tensor([0, 1, 63, 64, 65, 640, 300] + [(97 * i) % 641 for i in range(26)], device=device).int()
    k, v = (_normal((33, 640, 2, 128), device, seed) for seed in (1, 2))
    q = _normal((33, 1, 8, 128), device)
    options = {"split_size": split_size, "return_lse": True, "causal": True}
    together = fa2cupy.attention_with_kvcache(q, k, v, cache_seqlens=lengths, **options)
    plain = fa2cupy.attention_with_kvcache(q, k, v, cache_seqlens=lengths, return_lse=True)
    for x, y in zip(together, plain, strict=True):
        torch.testing.assert_close(x, y, rtol=2**-7, atol=2**-9)
    pages = [x.view(33 * 40, 16, 2, 128) for x in (k, v)]
    table = torch.arange(33 * 40, device=device, dtype=torch.int32).view(33, 40)
    for b in range(33):
        alone = fa2cupy.attention_with_kvcache(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], cache_seqlens=lengths[b : b + 1], **options
        )
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))
    for count in (None, 61, 1):
        if count:
            _as_device(monkeypatch, dataclasses.replace(driver.device_info(0), sm_count=count))
        found = fa2cupy.attention_with_kvcache(q, *pages, block_table=table, cache_seqlens=lengths, **options)
        assert all(torch.equal(x, y) for x, y in zip(found, together, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Doors


def test_flash_attn_and_compiled(device: torch.device) -> None:
    """The same bits through flash_attn's function, and through the operator of a compiled graph."""
    from fa2cupy.flash_attn import flash_attn_with_kvcache

    case = _case(WIDTHS[5], (283, 0, 17, 639), 2, 2, page=16, rotary=_NEOX)
    found = []
    for way in range(3):
        held = Held(case, device)
        call = dict(held.of_call)
        if way == 0:
            results = held.cache.attend(held.q, **call, return_lse=True)
        elif way == 1:
            cos, sin, _ = call["rotary"]
            results = flash_attn_with_kvcache(
                held.q, held.k, held.v, call["k"], call["v"], cos, sin, call["cache_seqlens"], causal=True,
                block_table=held.cache._cache.arrays["block_table"], rotary_interleaved=False, return_softmax_lse=True,
            )  # fmt: skip
        else:
            attend = held.cache.attend
            compiled = torch.compile(lambda q: attend(q, **call, return_lse=True), backend="aot_eager", fullgraph=True)  # noqa: B023
            results = compiled(held.q)
        held.check(*results)
        found.append((*results, held.k.view(torch.int16), held.v.view(torch.int16)))
    for each in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(each, found[0], strict=True))
