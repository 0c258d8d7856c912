"""Attention on a KV cache on the CPU: each sequence against float64, caches with NaN wherever nobody may read."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

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
        rotary and (*rotary, ("float32", choice["dtype"])[seed % 2]), choice["kv_dtype"], choice["scales"], seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize(("seed", "choice"), list(enumerate(covering(_FACTORS, impossible=_impossible))))
def test_all_pairs_of_choices(seed: int, choice: dict[str, Any]) -> None:
    drawn = draw(_case(choice, seed))
    if seed % 3 == 0:
        drawn.arrays = {n: x.astype(np.int64) if x.dtype == np.int32 else x for n, x in drawn.arrays.items()}
    out, lse = run(drawn, as_function=bool(seed % 2))
    caches.check(drawn, out, lse)
