"""Attention on a KV cache: `KVCache(...).attend(...)`, and the same in one call, `attention_with_kvcache`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fa2cupy import doors, dynamo
from fa2cupy.cached import eager, prompts, repeated
from fa2cupy.cached.arguments import Given, given
from fa2cupy.cached.cache import Cache
from fa2cupy.cached.call import Call
from fa2cupy.cached.repeated import Fixed
from fa2cupy.frameworks import JAX
from fa2cupy.keywords import KEYWORDS, signature, too_many_by_position

__all__ = ["KVCache", "attention_with_kvcache"]


class KVCache:
    """Keys and values of sequences, in rows of the cache or in pages. Layout "bshd": k is (batch, capacity,
    num_heads_k, head_dim), with pages (pages, page_size, num_heads_k, head_dim). The arrays are held, not copied: their
    memory must stay where it is.

        cache = fa2cupy.KVCache(k_pages, v_pages, block_table=table)
        out = cache.attend(q, cache_seqlens=lengths, k=k, v=v, causal=True)  # and k, v are in the cache

    Args:
        k: keys, of 16 bits (on the CPU float32 and float64 too) or of 8 bits. Any strides, the last dimension
            contiguous where new keys are written. head_dim is 1 to 256.
        v: values, the same with head_dim_v columns.
        block_table: (batch, pages of the longest) int32: the pages of each sequence, in order. Entries behind the last
            page of a sequence are never used. Pages have any size, and may be shared.
        indptr, indices: the same without padding: sequence b has the pages indices[indptr[b]:indptr[b + 1]].
            (batch + 1,) and (pages of all,), int32.
        layout: "bshd", or "bhsd" for heads before rows: of the cache, of q and of new k and v. Packed q, k and v are
            (total, heads, head_dim) in either.
        kv_dtype: "float8_e4m3fn" (uint8 arrays, or that dtype of torch and ml_dtypes) or "int8": what 8 bits hold.
        k_scale, v_scale: what elements of 8 bits are multiplied by: a positive number, or float32 of shape
            (num_heads_k,), (batch, num_heads_k) or, by page, (pages, 1, num_heads_k). None is 1.

    Raises: as `attention`.
    """

    @dynamo.leave
    def __init__(self, k: Any, v: Any, *positional: object, **keywords: Any) -> None:
        self._cache = cache = Cache.of(k, v, given("KVCache", positional, keywords), ("k", "v"))
        self._fixed = Fixed.of(cache.framework, cache.arrays, (cache.layout, cache.dtype, *cache.numbers.items()))
        # For torch.compile: the arrays by name, and everything else.
        self._arrays = dict(cache.arrays)
        self._options = (("layout", cache.layout), ("kv_dtype", keywords.get("kv_dtype")), *cache.numbers.items())

    def __repr__(self) -> str:
        cache = self._cache
        rows = f"{cache.rows} {'x' if cache.tables is None else 'pages of'} {cache.page} keys"
        heads = f"{cache.num_heads_k} heads of {cache.head_dim}"
        heads += f" and {cache.head_dim_v}" if cache.head_dim_v != cache.head_dim else ""
        return f"KVCache({rows}, {heads}, {cache.dtype}, {cache.framework.name} on {cache.device})"

    def attend(self, q: Any, *positional: object, **keywords: Any) -> Any:
        """Attention of q over the keys that each sequence has here. Layout "bshd": q is (batch, seqlen_q, num_heads,
        head_dim). causal=True is bottom-right aligned: the last query stands beside the last key in use.

        Args:
            q: queries, of the cache's dtype, or of 16 bits over a cache of 8. With cu_seqlens_q (total, num_heads,
                head_dim). num_heads is a multiple of the cache's.
            cache_seqlens: keys of each sequence before new ones are written: (batch,) int32, or an int for all. Without
                it, seqused_k and k, all of the capacity is in use.
            seqused_k: (batch,) int32: keys of each sequence, new ones included. One of the two.
            k, v: new keys and values, (batch, seqlen_new, num_heads_k, head_dim): written to the cache behind those in
                use and seen by q; with cu_seqlens_q one for each query, packed alike. What there is no room for is
                neither written nor seen.
            cu_seqlens_q: (batch + 1,) int32: where the queries of each sequence start, and the last end. Rows of no
                sequence get out 0 and lse -inf.
            cache_batch_idx: (batch,) int32: the row of the cache, or of the table of pages, of each sequence. A number
                that is no row's is a sequence without keys.
            leftpad_k: (batch,) int32: the first key in use.
            rotary: (cos, sin, "neox" or "interleaved"): cos and sin are (positions, rotary_dim / 2), float32 or q's
                dtype. Turns the new k by their places in the cache, and q by the places from the first new key on; all
                of q by that one where neither causal nor a window says that queries follow each other.
            causal, window_size, softmax_scale, softcap, sinks, alibi_slopes: as in `attention`.
            split_size: a positive multiple of 64: the keys of a sequence are cut into parts of so many, so that no bit
                depends on the other sequences, the page size or the GPU's size. None cuts them as they fit the GPU.
            return_lse, out, lse_out, workspace: as in `attention`.

        Returns:
            out, (batch, seqlen_q, num_heads, head_dim_v) in q's dtype and the layout; with return_lse=True (out, lse),
            lse (batch, num_heads, seqlen_q) float32. Packed, (total_q, num_heads, head_dim_v) and (num_heads, total_q).
            A sequence without keys has out 0 and lse -inf. Same inputs, same bits. Of JAX arrays, which are immutable,
            with k and v the two caches come back, too: (out, k, v) or (out, lse, k, v). The old ones are donated.

        Where and when, Lengths, Raises: as `attention`. There are no gradients.
        """
        if doors.torch_compiles():
            return _traced("KVCache.attend", q, self._arrays, self._options, positional, keywords)
        return self._attend(q, positional, keywords)

    def _attend(self, q: Any, positional: tuple[object, ...], keywords: dict[str, Any]) -> Any:
        if self._fixed is not None and not positional:
            results = repeated.attend(self._fixed, q, keywords)
            if results is not None:
                return results if keywords.get("return_lse") else results[0]
        return _attend(self._cache, self._fixed, q, keywords, given("KVCache.attend", positional, keywords))


def attention_with_kvcache(
    q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, *positional: object, **keywords: Any
) -> Any:
    """`KVCache(k_cache, v_cache, ...).attend(q, k=k, v=v, ...)` in one call. Layout "bshd": q is (batch, seqlen_q,
    num_heads, head_dim), the caches (batch or pages, seqlen or page_size, num_heads_k, head_dim). causal=True is
    bottom-right aligned. The keywords are those of `KVCache` and of its `attend`.
    """
    if doors.torch_compiles():
        arrays = {"k_cache": k_cache, "v_cache": v_cache}
        return _traced("attention_with_kvcache", q, arrays, (), positional, {"k": k, "v": v, **keywords})
    return _attend_once(q, k_cache, v_cache, k, v, positional, keywords)


eager.attend = attention_with_kvcache


def _attend_once(
    q: Any, k_cache: Any, v_cache: Any, k: Any, v: Any, positional: tuple[object, ...], keywords: dict[str, Any]
) -> Any:
    new = {name: array for name, array in (("k", k), ("v", v)) if array is not None}
    of_call = new | {name: value for name, value in keywords.items() if name not in _OF_CACHE}
    fixed = None
    if not positional:
        arrays = {"k_cache": k_cache, "v_cache": v_cache}
        fixed = Fixed.of_keywords(arrays, {name: keywords[name] for name in _OF_CACHE if name in keywords})
        results = None if fixed is None else repeated.attend(fixed, q, of_call)
        if results is not None:
            return results if keywords.get("return_lse") else results[0]
    everything = given("attention_with_kvcache", positional, keywords)
    cache = Cache.of(k_cache, v_cache, _only(everything, _OF_CACHE), ("k_cache", "v_cache"))
    return _attend(cache, fixed, q, of_call, _without(everything, _OF_CACHE).both(Given(new)))


def _traced(
    function: str,
    q: Any,
    arrays: dict[str, Any],
    options: tuple[tuple[str, Any], ...],
    positional: tuple[object, ...],
    keywords: dict[str, Any],
) -> Any:
    """Inside torch.compile: an operator."""
    if positional:
        raise too_many_by_position(function, positional)
    own = {name: x for name, x in arrays.items() if name not in ("k_cache", "v_cache")}
    own.update(options)
    return doors.torch_attend(function, q, arrays["k_cache"], arrays["v_cache"], {**own, **keywords})


_OF_CACHE = {name for name, keyword in KEYWORDS.items() if "KVCache" in keyword.functions}


def _append(cache: Cache, q: Any, keywords: Mapping[str, Any], all_given: Given) -> None:
    """New keys alone: of a call whose queries have no heads."""
    none = q[:, :, :0] if cache.layout == "bshd" else q[:, :0]
    skipped = ("out", "lse_out", "alibi_slopes", "sinks")
    left = Given(
        {name: x for name, x in all_given.arrays.items() if name not in skipped}, all_given.options, all_given.numbers
    )
    repeated.first(None, Call.of(cache, none, left, None), {}, None)


def _attend_in_jax(cache: Cache, q: Any, all_given: Given) -> Any:
    """And the caches, if new keys are written."""
    from fa2cupy.xla import cached

    arrays = {name: x for name, x in cache.arrays.items() if name not in ("k_cache", "v_cache")}
    kind = {"kv_dtype": cache.dtype} if cache.is_quantised else {}
    of_cache = Given(arrays, {"layout": cache.layout, **kind}, cache.numbers)
    everything = of_cache.both(all_given)
    out, lse, *caches = cached.attend(cache.arrays["k_cache"], cache.arrays["v_cache"], q, everything, _OF_CACHE)
    results = (out, lse, *caches) if all_given.options.get("return_lse") else (out, *caches)
    return results if len(results) > 1 else out


def _only(all_given: Given, names: set[str]) -> Given:
    return Given(*({n: x for n, x in part.items() if n in names} for part in _parts(all_given)))


def _without(all_given: Given, names: set[str]) -> Given:
    return Given(*({n: x for n, x in part.items() if n not in names} for part in _parts(all_given)))


def _parts(all_given: Given) -> tuple[Any, Any, Any]:
    return all_given.arrays, all_given.options, all_given.numbers


def _attend(cache: Cache, fixed: Fixed | None, q: Any, keywords: Mapping[str, Any], all_given: Given) -> Any:
    if cache.framework is JAX:
        return _attend_in_jax(cache, q, all_given)
    workspace = all_given.arrays.get("workspace")
    call = Call.of(cache, q, all_given, workspace)
    if cache.device.kind == "cpu":
        from fa2cupy.cached import host

        out, lse = host.attend(call)
    elif prompts.suits(call, all_given):
        out, lse = prompts.attend(call, lambda: _append(cache, q, keywords, all_given))
    else:
        out, lse = repeated.first(fixed, call, keywords, workspace)
    return (out, lse) if all_given.options.get("return_lse") else out


for _function, _name in (
    (KVCache, "KVCache"),
    (KVCache.attend, "KVCache.attend"),
    (attention_with_kvcache, "attention_with_kvcache"),
):
    setattr(_function, "__signature__", signature(_name))  # noqa: B010 - as `keywords.public` does
