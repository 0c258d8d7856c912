"""Attention on a KV cache on the CPU: each sequence against float64, caches with NaN wherever nobody may read."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fa2cupy
from fa2cupy.cached import formats
from fa2cupy.keywords import KEYWORDS
from fa2cupy.kvcache import KVCache, attention_with_kvcache
from tests import caches
from tests.caches import FLOAT8, INT8, CacheCase, Drawn, draw
from tests.covering import covering
from tests.reference import as_ml_dtypes

pytestmark = pytest.mark.filterwarnings("error")


def user_array(x: Any, layout: str) -> Any:
    """As a user has it: bfloat16 of ml_dtypes, heads in front of the rows."""
    if not isinstance(x, np.ndarray):
        return float(x)
    x = as_ml_dtypes(x)
    return x.swapaxes(1, 2) if layout == "bhsd" and x.ndim == 4 else x


def keywords_of(drawn: Drawn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of KVCache, and those of attend less q."""
    case = drawn.case
    names = {name for name, keyword in KEYWORDS.items() if "KVCache" in keyword.functions}
    given = {name: user_array(x, case.layout) for name, x in drawn.arrays.items()}
    of_cache = {name: x for name, x in given.items() if name in names}
    of_call = {name: x for name, x in given.items() if name not in names}
    of_call = {{"k_new": "k", "v_new": "v"}.get(name, name): x for name, x in of_call.items()}
    if case.rotary is not None:
        of_call["rotary"] = of_call.pop("rotary_cos"), of_call.pop("rotary_sin"), case.rotary[1]
    if case.kv_dtype:
        of_cache["kv_dtype"] = case.kv_dtype
    of_call |= {"causal": case.causal, "window_size": case.window, "softmax_scale": case.scale}
    of_call["softcap"] = case.softcap
    return of_cache | {"layout": case.layout}, of_call


def caches_of(drawn: Drawn) -> tuple[Any, Any]:
    stored = np.int8 if drawn.case.kv_dtype == INT8 else np.uint8
    pair = (drawn.k_cache, drawn.v_cache)
    if drawn.case.is_quantised:
        pair = pair[0].view(stored), pair[1].view(stored)
    k, v = (user_array(x, drawn.case.layout) for x in pair)
    return k, v


def run(drawn: Drawn, *, as_function: bool = False, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    """out in bshd order, bits of bfloat16 as uint16; lse."""
    of_cache, of_call = keywords_of(drawn)
    k, v = caches_of(drawn)
    q = user_array(drawn.q, drawn.case.layout)
    if as_function:
        out, lse = attention_with_kvcache(q, k, v, **of_cache, **of_call, return_lse=True, **more)
    else:
        out, lse = KVCache(k, v, **of_cache).attend(q, **of_call, return_lse=True, **more)
    assert out.dtype == q.dtype
    if out.dtype == ml_dtypes.bfloat16:
        out = out.view(np.uint16)
    return (out.swapaxes(1, 2) if drawn.case.layout == "bhsd" and out.ndim == 4 else out), lse


_LENS = (0, 1, 17, 63, 64, 90, 100)
_FACTORS = {
    "page": (None, 1, 3, 16, 17, 64),
    "table": ("block_table", "indptr"),
    "queries": (1, 3, (1, 5, 0, 2, 7, 1, 4)),
    "new": (None, 1, 5),
    "by": (None, "cache_seqlens", "seqused_k"),
    "mask": ("full", "causal", (7, 3), "causal (9, -1)"),
    "leftpad": (False, True),
    "batch_idx": (False, True),
    "rotary": (None, (32, "neox"), (12, "interleaved"), (2, "neox"), (30, "interleaved")),
    "kv_dtype": (None, FLOAT8, INT8),
    "scales": (("none", "number"), ("head", "batch"), ("page", "page")),
    "softcap": (None, 3.0),
    "slopes": (None, "head", "batch"),
    "sinks": (False, True),
    "heads": ((4, 4), (6, 3), (4, 1)),
    "head_dims": ((32, 32), (40, 24), (33, 7)),
    "dtype": ("float16", "bfloat16", "float32"),
    "layout": ("bshd", "bhsd"),
}


def _impossible(choice: dict[str, Any]) -> bool:
    """Of choices that may be incomplete."""
    needs_lengths = choice.get("new") is not None or choice.get("rotary") is not None or choice.get("table") == "indptr"
    if choice.get("rotary") is not None and choice.get("new", 1) is None:
        return True
    if choice.get("by", 1) is None and needs_lengths:
        return True
    by_page = choice.get("kv_dtype") is not None and "page" in choice.get("scales", ())
    return choice.get("page", 1) is None and (choice.get("table") == "indptr" or by_page)


def _case(choice: dict[str, Any], seed: int = 0) -> CacheCase:
    mask = choice["mask"]
    window = mask if isinstance(mask, tuple) else (9, -1) if mask == "causal (9, -1)" else None
    rotary = choice["rotary"]
    page = choice["page"] or 1
    capacity = -(-105 // page) * page
    before = _LENS if choice["by"] is not None else (capacity,) * 7
    return CacheCase(
        before, choice["queries"], choice["new"], choice["heads"], choice["head_dims"][0], choice["head_dims"][1],
        choice["dtype"], choice["page"], choice["table"], capacity, choice["layout"],
        choice["by"], str(mask).startswith("causal"), window, None,
        tuple(min(5, length) for length in before) if choice["leftpad"] else None, choice["batch_idx"],
        rotary and (*rotary, ("float32", choice["dtype"])[seed % 2]), choice["kv_dtype"], choice["scales"],
        softcap=choice["softcap"], slopes=choice["slopes"],
        sinks=(None, ("float32", choice["dtype"])[seed % 2])[choice["sinks"]], seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize(("seed", "choice"), list(enumerate(covering(_FACTORS, impossible=_impossible))))
def test_all_pairs_of_choices(seed: int, choice: dict[str, Any]) -> None:
    drawn = draw(_case(choice, seed))
    if seed % 3 == 0:
        drawn.arrays = {n: x.astype(np.int64) if x.dtype == np.int32 else x for n, x in drawn.arrays.items()}
    out, lse = run(drawn, as_function=bool(seed % 2))
    caches.check(drawn, out, lse)


# ----------------------------------------------------------------------------------------------------------------------
# What broke others, by the number of the report

_PEERS = {
    "flash-attention-1745 NaN behind the keys": CacheCase((5, 100, 0), 1, None, page=None),
    "flash-attention-2374 NaN in a page's rest": CacheCase((5, 100, 17), 1, 1, page=16),
    "flashinfer-941 NaN in pages of nobody": CacheCase((1, 33, 64), 3, None, page=1, causal=True, spare=9),
    "flashinfer-942 infinity times zero": CacheCase((30, 2), 4, 4, page=16, causal=True, leftpad=(7, 2)),
    "flashmla entries behind the last page": CacheCase((1, 16, 17), 1, 1, page=16, capacity=512),
    "flash-attention-1325 the last free row": CacheCase((127, 128, 126), 1, 1, page=16),
    "flash-attention-2709 no page for a new key": CacheCase((128, 31, 64), 2, 2, page=16, causal=True),
    "flash-attention-2711 pages that are no 256": CacheCase((40, 128), 2, 2, page=3, capacity=129, causal=True),
    "torchtitan-3235 a window that leaves most out": CacheCase((128, 3), 2, None, page=16, window=(4, 0)),
    "flash-attention-2595 one query beside a prefill": CacheCase((99, 0, 1), 1, 1, (8, 1), 128, causal=True),
    "rocm a page for everything": CacheCase((200, 7), 1, 1, page=256, capacity=256, kv_dtype=FLOAT8),
    "flash-attention-1486 by number of the cache": CacheCase((3, 9, 1), 1, 1, page=None, batch_idx=True, spare=61),
    "sglang-23500 sequences without keys": CacheCase((0, 0, 0, 0), (2, 0, 1, 0), None, page=16, by="seqused_k"),
}


@pytest.mark.parametrize("name", _PEERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_what_broke_others(name: str, dtype: str) -> None:
    drawn = draw(caches.replace(_PEERS[name], dtype=dtype))
    out, lse = run(drawn)
    caches.check(drawn, out, lse)


def test_one_query_is_a_row_of_the_whole() -> None:
    """Token by token on a cache, and all at once by `attention`."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 40, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    whole = fa2cupy.attention(q, k, v, causal=True)
    cache = KVCache(np.full((2, 40, 2, 16), np.nan, np.float32), np.full((2, 40, 2, 16), np.nan, np.float32))
    for start, stop in ((0, 7), *((i, i + 1) for i in range(7, 40))):
        own = slice(start, stop)
        out = cache.attend(q[:, own], cache_seqlens=start, k=k[:, own], v=v[:, own], causal=True)
        np.testing.assert_allclose(out, whole[:, own], rtol=1e-5, atol=1e-6)


def test_no_bit_depends_on_the_others() -> None:
    """In a batch, alone, and in pages of another size; with split_size and without."""
    before = (100, 7, 64, 0, 31)
    for more in ({}, {"split_size": 64}):
        case = CacheCase(before, 2, 2, causal=True)
        together = draw(case)
        out, lse = run(together, **more)
        paged = draw(caches.replace(case, page=17, capacity=136))
        for b in range(len(before)):
            alone = draw(caches.replace(case, before=before[b : b + 1]))
            for x, y in ((alone, together), (paged, together)):
                x.q[...] = y.q[b : b + 1] if x is alone else y.q
                for name in ("k_new", "v_new"):
                    x.arrays[name][...] = y.arrays[name][b : b + 1] if x is alone else y.arrays[name]
            for name in ("k_cache", "v_cache"):
                getattr(alone, name)[0] = together.after[name][b]
            own, own_lse = run(alone, **more)
            assert (own[0] == out[b]).all() and (own_lse[0] == lse[b]).all()


def test_results_go_where_they_are_wanted() -> None:
    drawn = draw(CacheCase((5, 70), 2, None, page=16, head_dim_v=8))
    of_cache, of_call = keywords_of(drawn)
    wide, lse_out = np.full((2, 2, 4, 16), np.nan, np.float16), np.full((2, 4, 2), np.nan, np.float32)
    out = wide[..., 4:12]
    cache = KVCache(*caches_of(drawn), **of_cache)
    got = cache.attend(drawn.q, **of_call, out=out, lse_out=lse_out, workspace=np.zeros(3, np.uint8))
    assert got is out
    caches.check(drawn, out, lse_out)
    assert np.isnan(wide[..., :4]).all() and np.isnan(wide[..., 12:]).all()
    both = cache.attend(drawn.q, **of_call, out=out, return_lse=True)
    assert both[0] is out and (both[1] == lse_out).all()


def test_a_number_of_keys_for_all() -> None:
    drawn = draw(CacheCase((9, 9), 1, 1, page=16))
    arrays = drawn.arrays
    arrays["cache_seqlens"] = np.int64(9)
    of_cache, of_call = keywords_of(drawn)
    of_call["cache_seqlens"] = 9
    out, lse = KVCache(*caches_of(drawn), **of_cache).attend(drawn.q, **of_call, return_lse=True)
    caches.check(drawn, out, lse)


def test_pages_may_be_shared() -> None:
    """Two sequences with the same first page, and a page twice in one row."""
    drawn = draw(CacheCase((40, 40), 1, None, page=16))
    table = drawn.arrays["block_table"]
    table[1, 0] = table[0, 0]
    table[0, 1] = table[0, 0]
    for b in range(2):
        positions = np.arange(40)
        pages = table[b, positions // 16]
        drawn.keys[b], drawn.values[b] = (x[pages, positions % 16] for x in (drawn.k_cache, drawn.v_cache))
    out, lse = run(drawn)
    caches.check(drawn, out, lse)


def test_wrong_numbers_reach_nothing_outside() -> None:
    """Lengths and tables of any value: finite results of finite caches, and new keys nowhere but in pages."""
    rng = np.random.default_rng(0)
    wild = np.array([*caches.GARBAGE, 0, 1, 5, 127], np.int64)
    for seed in range(40):
        case = CacheCase((3, 4, 5), (2, 1, 3), 1, page=4, capacity=24, causal=True, batch_idx=True, leftpad=(0, 1, 2),
                         table=("block_table", "indptr")[seed % 2], by=("cache_seqlens", "seqused_k")[seed // 2 % 2],
                         rotary=(8, "neox", "float32"), seed=seed)  # fmt: skip
        drawn = draw(case)
        for array in drawn.arrays.values():
            if array.dtype == np.int32:
                places = rng.random(array.shape) < 0.3
                array[places] = rng.choice(wild, int(places.sum())).astype(np.int64).astype(np.int32)
        for cache in (drawn.k_cache, drawn.v_cache):
            cache[...] = 1
        out, _ = run(drawn)
        assert np.isfinite(out).all()


@pytest.mark.parametrize("kv_dtype", [FLOAT8, INT8])
def test_every_code(kv_dtype: str) -> None:
    """Each of the 256 codes as a key and as a value, and back."""
    codes = np.arange(256, dtype=np.uint8)
    numbers = formats.dequantised(codes, kv_dtype, 0.5)
    np.testing.assert_array_equal(numbers, caches.decoded(codes, kv_dtype) * 0.5)
    again = formats.quantised(numbers, kv_dtype, 0.5)
    np.testing.assert_array_equal(formats.dequantised(again, kv_dtype, 0.5), numbers)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(20000) * 10.0 ** rng.uniform(-6, 4, 20000)).astype(np.float32)
    middle = numbers[:-1][np.isfinite(numbers[:-1])]
    x = np.concatenate([x, (middle[1:] + middle[:-1]) / 2, [0, -0.0, np.inf, -np.inf, 448.5, -1e30]]).astype(np.float32)
    np.testing.assert_array_equal(formats.quantised(x, kv_dtype, 1.0), caches.encoded(x.astype(np.float64), kv_dtype))
    nan = formats.quantised(np.array([np.nan], np.float32), kv_dtype, 1.0)
    assert nan[0] == (0x7F if kv_dtype == FLOAT8 else 0)


def test_8_bits_of_ml_dtypes_need_no_word() -> None:
    drawn = draw(CacheCase((20, 3), 1, 1, kv_dtype=FLOAT8))
    of_cache, of_call = keywords_of(drawn)
    del of_cache["kv_dtype"]
    k, v = (x.view(ml_dtypes.float8_e4m3fn) for x in (drawn.k_cache, drawn.v_cache))
    out, lse = KVCache(k, v, **of_cache).attend(drawn.q, **of_call, return_lse=True)
    caches.check(drawn, out, lse)


def test_duplicate_rows_of_the_cache() -> None:
    """Two sequences write one row: each sees its own key, and one of them is what stays."""
    drawn = draw(CacheCase((5, 5), 1, 1, batch_idx=True))
    drawn.arrays["cache_batch_idx"][1] = row = drawn.arrays["cache_batch_idx"][0]
    for name in ("k", "v"):
        old = getattr(drawn, f"{name}_cache")[row, :5]
        (drawn.keys if name == "k" else drawn.values)[:] = [
            np.concatenate([old, drawn.arrays[f"{name}_new"][b]]) for b in range(2)
        ]
        drawn.after[f"{name}_cache"] = getattr(drawn, f"{name}_cache").copy()
        drawn.after[f"{name}_cache"][row, 5] = drawn.arrays[f"{name}_new"][1, 0]
    out, lse = run(drawn)
    caches.check(drawn, out, lse)
