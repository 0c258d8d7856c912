"""Attention on a KV cache inside torch.compile: one operator in one graph, which writes to the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fa2cupy
from fa2cupy.errors import InvalidArgument
from tests import caches
from tests.caches import FLOAT8, CacheCase, Drawn, draw
from tests.frameworks.test_torch_kvcache import to_torch


def keywords_of(drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any], dict[str, Any]]:
    """q, the cache, keywords of `KVCache`, and those of `attend`."""
    case = drawn.case
    every = {{"k_new": "k", "v_new": "v"}.get(name, name): to_torch(x) for name, x in drawn.arrays.items()}
    names = ("block_table", "indptr", "indices", "k_scale", "v_scale")
    of_cache: dict[str, Any] = {name: every.pop(name) for name in names if name in every}
    if case.kv_dtype:
        of_cache["kv_dtype"] = case.kv_dtype
    if case.rotary is not None:
        every["rotary"] = every.pop("rotary_cos"), every.pop("rotary_sin"), case.rotary[1]
    every |= {"causal": case.causal, "window_size": case.window, "softcap": case.softcap, "softmax_scale": case.scale}
    return to_torch(drawn.q), to_torch(drawn.k_cache), to_torch(drawn.v_cache), of_cache, every


_CASES = {
    "new keys": CacheCase((5, 0, 70), 2, 2, page=16, causal=True, rotary=(16, "neox", "float32"), dtype="float32"),
    "pages, scores": CacheCase((5, 0, 70), 2, None, page=3, capacity=96, window=(20, 3), softcap=2.0, dtype="float32",
                               slopes="head", sinks="float32", scale=0.3),
    "packed": CacheCase((5, 0, 70), (2, 0, 3), 1, table="indptr", page=16, by="seqused_k", dtype="float32"),
    "8 bits": CacheCase((5, 0, 20), 1, 1, kv_dtype=FLOAT8, scales=("head", "none"), dtype="float32"),
}  # fmt: skip


def both_ways(drawn: Drawn, as_function: bool) -> Any:
    q, k, v, of_cache, of_call = keywords_of(drawn)
    cache = fa2cupy.KVCache(k, v, **of_cache)

    def step(q: torch.Tensor, of_call: dict[str, Any]) -> Any:
        if as_function:
            given = {"k_cache": k, "v_cache": v, **of_cache, **of_call}
            return fa2cupy.attention_with_kvcache(q * 1, return_lse=True, **given)
        return cache.attend(q * 1, return_lse=True, **of_call)

    return step, q, of_call


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("name", _CASES)
def test_one_graph(name: str, as_function: bool) -> None:
    drawn = draw(_CASES[name])
    step, q, of_call = both_ways(drawn, as_function)
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counted, fullgraph=True)
    out, lse = compiled(q, of_call)
    caches.check(drawn, out.numpy(), lse.numpy())
    assert counted.frame_count == 1
    (node,) = [n for n in counted.graphs[0].graph.nodes if "fa2cupy" in str(n.target)]
    assert ("append" in str(node.target)) == (drawn.case.new is not None)


def test_lengths_as_numbers_do_not_compile_again() -> None:
    q, k, v = (torch.randn(2, n, 2, 16) for n in (1, 64, 64))
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    cache = fa2cupy.KVCache(k, v)
    step = torch.compile(lambda n: cache.attend(q, cache_seqlens=n), backend=counted, fullgraph=True, dynamic=True)
    for n in (7, 9, 30):
        torch.testing.assert_close(step(n), fa2cupy.attention(q, k[:, :n], v[:, :n]))
    assert counted.frame_count <= 2


def test_results_of_the_callers() -> None:
    q, k, v = (torch.randn(2, n, 2, 16) for n in (1, 64, 64))
    out, lse = torch.empty_like(q), torch.empty(2, 2, 1)
    torch.compiler.reset()
    step = torch.compile(
        lambda: fa2cupy.attention_with_kvcache(q, k, v, out=out, lse_out=lse, return_lse=True),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    step()
    wanted = fa2cupy.attention(q, k, v, return_lse=True)
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])


def test_refused() -> None:
    q, k = torch.randn(2, 1, 2, 16), torch.randn(2, 64, 2, 16)
    for error, words, given in (
        (InvalidArgument, "come together", {"k": q, "cache_seqlens": 1}),
        (TypeError, "nonsense", {"nonsense": 1}),
    ):
        torch.compiler.reset()
        step = torch.compile(lambda given: fa2cupy.attention_with_kvcache(q, k, k, **given), backend="aot_eager")
        with pytest.raises((error, torch._dynamo.exc.TorchDynamoException), match=words):
            step(given)
    torch.compiler.reset()
    step = torch.compile(lambda q: fa2cupy.attention_with_kvcache(q, k, k), backend="aot_eager")
    with pytest.raises(Exception, match="q requires grad, but attention on a cache has no gradient"):
        step(q.clone().requires_grad_())
