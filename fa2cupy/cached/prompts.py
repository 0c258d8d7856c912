"""Prompts on a cache on a GPU: many queries over rows of a cache, by the forward kernels, which `attention` has.

The kernel for few queries is right for them, too, and takes all others: it reads the keys again for every 32 rows.
"""

from __future__ import annotations

from typing import Any

from fa2cupy import env
from fa2cupy.attention import attention
from fa2cupy.cached.arguments import Given
from fa2cupy.cached.call import Call
from fa2cupy.frameworks.base import GpuFramework
from fa2cupy.jit import driver

__all__ = ["attend", "suits"]

# Queries of a sequence from which on the forward's tiles, of one head each, are full enough.
_MANY_QUERIES = 64
_BEYOND = ("cu_seqlens_q", "cache_batch_idx", "rotary_cos", "block_table", "indptr", "workspace")
_SAME = ("causal", "window_size", "softmax_scale", "softcap")
_ARRAYS = ("leftpad_k", "alibi_slopes", "sinks", "out", "lse_out")


def suits(call: Call, given: Given) -> bool:
    """Whether the forward can do it: dense queries over rows of 16 bits, nothing to be turned. given: of the call."""
    cache, framework = call.cache, call.cache.framework
    if call.seqlen_q < _MANY_QUERIES or cache.is_quantised or "split_size" in call.options or env.may_check():
        return False
    if any(name in call.arrays or name in given.arrays for name in _BEYOND):
        return False
    if not isinstance(framework, GpuFramework) or cache.device.kind == "cpu":
        return False
    stream = framework.stream(cache.device.index)(cache.device.index)
    return framework.allocates_in_capture or not framework.is_capturing(stream, cache.device.index)


def attend(call: Call, append: Any) -> tuple[Any, Any]:
    """out, lse. append: what writes the call's new keys, called if there are any."""
    arrays, options = call.arrays, call.options
    if call.appends:
        append()
    k, v, used = arrays["k_cache"], arrays["v_cache"], arrays.get("seqused_k")
    new = call.seqlen_new or 0
    if "cache_seqlens" in call.numbers:
        end = min(int(call.numbers["cache_seqlens"]) + new, call.cache.page)
        rows = (slice(None), slice(end)) if call.cache.layout == "bshd" else (slice(None), slice(None), slice(end))
        k, v = k[rows], v[rows]
    elif "cache_seqlens" in arrays:
        used = _longer(arrays["cache_seqlens"], new, call)
    given = {name: arrays[name] for name in _ARRAYS if name in arrays}
    given |= {name: options[name] for name in _SAME if name in options}
    if used is not None:
        given["seqused_k"] = used
    out, lse = attention(arrays["q"], k, v, layout=call.cache.layout, return_lse=True, **given)
    return out, lse


def _longer(lengths: Any, new: int, call: Call) -> Any:
    """Of sequences with so many new keys; clamped as the kernels clamp them, which do the rest."""
    with driver.device_guard(call.cache.device.index):
        return lengths.clip(0, call.cache.page) + new
