"""flash_attn's functions on a KV cache, on the CPU: each sequence against float64, with NaN where nobody reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fa2cupy.errors import Fa2Error
from fa2cupy.flash_attn import extension, fa3, flash_attn_varlen_func, flash_attn_with_kvcache
from tests import caches
from tests.caches import FLOAT8, CacheCase, Drawn, draw
from tests.frameworks.test_torch_kvcache import to_torch

Tensor = torch.Tensor


def tensors_of(drawn: Drawn) -> dict[str, Any]:
    """By the names that flash_attn 2 gives them; a cache is written in place, and the case sees it."""
    found = {name: to_torch(x) for name, x in drawn.arrays.items()}
    names = {"k_new": "k", "v_new": "v", "leftpad_k": "cache_leftpad"}
    return {names.get(name, name): x for name, x in found.items()} | {
        "q": to_torch(drawn.q), "k_cache": to_torch(drawn.k_cache), "v_cache": to_torch(drawn.v_cache)
    }  # fmt: skip


def options_of(case: CacheCase) -> dict[str, Any]:
    return {
        "causal": case.causal, "window_size": case.window or (-1, -1), "softmax_scale": case.scale,
        "softcap": case.softcap or 0.0, "rotary_interleaved": case.rotary is not None and case.rotary[1] != "neox",
    }  # fmt: skip


def check(drawn: Drawn, out: Tensor, lse: Tensor, *, none: float = np.inf) -> None:
    """`none`: lse of rows that see no key."""
    found = lse.numpy()
    assert not (found == -none).any()
    caches.check(drawn, out.numpy(), np.where(found == none, -np.inf, found))


_CASES = {
    "appended and turned": CacheCase((5, 0, 70), 2, 2, page=16, causal=True, rotary=(16, "neox", "float32")),
    "pairs, a window": CacheCase((5, 0, 70), 3, 1, window=(9, 2), rotary=(12, "interleaved", "float32")),
    "rows of others": CacheCase((5, 1, 70), 1, 1, batch_idx=True, leftpad=(2, 0, 9)),
    "scores": CacheCase((5, 0, 70), 2, None, page=3, capacity=96, causal=True, softcap=2.0, slopes="batch"),
    "a logit of the head's": CacheCase((5, 40, 70), 2, None, sinks="float32", head_dim_v=16),
    "all of it": CacheCase((128, 128), 4, None, by=None, scale=0.4, causal=True),
}


@pytest.mark.parametrize("num_splits", [0, 1])
@pytest.mark.parametrize("name", _CASES)
def test_flash_attn_with_kvcache(name: str, num_splits: int) -> None:
    drawn = draw(dataclasses.replace(_CASES[name], dtype="float32"))
    given = tensors_of(drawn)
    given["s_aux"] = given.pop("sinks", None)
    out, lse = flash_attn_with_kvcache(
        **given, **options_of(drawn.case), num_splits=num_splits, return_softmax_lse=True
    )
    check(drawn, out, lse)


def test_a_number_of_keys_and_only_out() -> None:
    drawn = draw(CacheCase((9, 9), 1, 1, page=16, dtype="float32"))
    given = tensors_of(drawn)
    given["cache_seqlens"] = 9
    out = flash_attn_with_kvcache(**given)
    again, lse = flash_attn_with_kvcache(**given, return_softmax_lse=True)
    assert torch.equal(out, again)
    check(drawn, out, lse)


def test_a_graph_is_no_matter() -> None:
    """As flash_attn, it has no gradient; nothing is asked of it."""
    drawn = draw(CacheCase((5, 70), 1, 1, page=16, dtype="float32"))
    given = tensors_of(drawn)
    given["q"].requires_grad_()
    out, lse = flash_attn_with_kvcache(**given, return_softmax_lse=True)
    assert not out.requires_grad
    check(drawn, out, lse)


def test_windows_that_reach_over_the_cache_turn_nothing_else() -> None:
    """Without causal and with such a window all queries are turned to one place, else each to its own."""
    case = CacheCase((5, 0, 70), 3, 3, rotary=(16, "neox", "float32"), dtype="float32")
    for window, told in (((128, 128), None), ((128, 127), (-1, 127)), ((127, -1), (127, -1))):
        drawn = draw(dataclasses.replace(case, window=told))
        options = {**options_of(drawn.case), "window_size": window}
        out, lse = flash_attn_with_kvcache(**tensors_of(drawn), **options, return_softmax_lse=True)
        check(drawn, out, lse)


@pytest.mark.parametrize(
    ("function", "by_cu"),  # flash_attn_varlen_func has no seqused_k
    [(flash_attn_varlen_func, True), (extension.varlen_fwd, True), (extension.varlen_fwd, False)],
)
def test_packed_queries_over_pages(function: Callable[..., Any], by_cu: bool) -> None:
    case = CacheCase((5, 0, 70, 9), (3, 0, 8, 1), None, page=16, causal=True, by="seqused_k", dtype="float32")
    drawn = draw(case)
    given = tensors_of(drawn)
    used = given["seqused_k"]
    starts = torch.cat([used.new_zeros(1), used.cumsum(0)]).int() if by_cu else torch.zeros(5, dtype=torch.int32)
    q, k, v = (given[name] for name in ("q", "k_cache", "v_cache"))
    if function is flash_attn_varlen_func:
        out, lse, _ = function(
            q, k, v, given["cu_seqlens_q"], starts, 8, 70, causal=True, block_table=given["block_table"],
            return_attn_probs=True,
        )  # fmt: skip
    else:
        own = torch.empty_like(q)
        out, lse, dmask, _ = function(
            q, k, v, own, given["cu_seqlens_q"], starts, None if by_cu else used, None, given["block_table"], None, 8,
            70, 0.0, None, False, True, -1, -1, 0.0, False,
        )  # fmt: skip
        assert out is own and dmask.numel() == 0
    check(drawn, out, lse)


def test_flash_attention_3() -> None:
    """Packed, in pages, with new keys; and of 8 bits."""
    case = CacheCase((5, 0, 70, 9), (3, 0, 8, 1), 1, page=16, causal=True, dtype="float32")
    drawn = draw(case)
    given = tensors_of(drawn)
    starts = given.pop("cu_seqlens_q")
    given["page_table"] = given.pop("block_table")
    out, lse = fa3.flash_attn_with_kvcache(
        **given, cu_seqlens_q=starts, cu_seqlens_k_new=starts, max_seqlen_q=8, causal=True, return_softmax_lse=True
    )
    check(drawn, out, lse, none=-np.inf)
    drawn = draw(CacheCase((5, 0, 70), 2, None, kv_dtype=FLOAT8, scales=("batch", "batch"), dtype="float32"))
    given = tensors_of(drawn)
    for name in ("k", "v"):
        given[f"{name}_cache"] = given[f"{name}_cache"].view(torch.float8_e4m3fn)
        given[f"{name}_descale"] = given.pop(f"{name}_scale")
    out, lse = fa3.flash_attn_with_kvcache(**given, return_softmax_lse=True)
    check(drawn, out, lse, none=-np.inf)


def test_what_is_not_there_is_named() -> None:
    x, table = torch.zeros(1, 4, 2, 8), torch.zeros(1, 1, dtype=torch.int32)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    for name in ("qv", "rotary_seqlens", "q_descale", "attention_chunk"):
        with pytest.raises(Fa2Error, match=f"flash_attn_with_kvcache: {name} is given, which is not supported yet"):
            fa3.flash_attn_with_kvcache(x, x, x, **{name: 3 if name == "attention_chunk" else x})
    with pytest.raises(Fa2Error, match="cu_seqlens_k_new is given, which is not supported yet"):
        fa3.flash_attn_with_kvcache(x[0], x, x, x[0], x[0], cu_seqlens_q=starts, cu_seqlens_k_new=starts.clone())
    with pytest.raises(Fa2Error, match="rotary_cos and rotary_sin come together"):
        flash_attn_with_kvcache(x, x, x, rotary_cos=x[0, 0])
    with pytest.raises(Fa2Error, match="k is given without v"):
        flash_attn_with_kvcache(x, x, x, k=x, cache_seqlens=0)
    with pytest.raises(Fa2Error, match="dropout_p is given with block_table"):
        flash_attn_varlen_func(x[0], x, x, starts, starts, 4, 4, 0.1, block_table=table)
    with pytest.raises(Fa2Error, match="block_table is given where a gradient is wanted"):
        flash_attn_varlen_func(x[0].requires_grad_(), x, x, starts, starts, 4, 4, block_table=table)
    with pytest.raises(TypeError, match=r"v_cache is a .*: a torch.Tensor is needed"):
        flash_attn_with_kvcache(x, x, x.numpy())
