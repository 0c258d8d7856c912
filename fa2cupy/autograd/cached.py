"""The operators `fa2cupy::attend` and `fa2cupy::append_and_attend`: attention on a KV cache in a compiled graph.

The second one writes new keys and values to the cache, and says so. Neither has a gradient. torch.compile traces the
functions here that are not a kernel.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from typing import Any

import torch

from fa2cupy import dynamo
from fa2cupy.cached import eager
from fa2cupy.errors import InvalidArgument
from fa2cupy.keywords import unknown

__all__ = ["append_op", "attend", "attend_op", "text_of"]

# Arrays beside q, the cache, and new keys and values.
_ARRAYS = (
    "block_table", "indptr", "indices", "k_scale", "v_scale", "cache_seqlens", "seqused_k", "cache_batch_idx",
    "leftpad_k", "rotary_cos", "rotary_sin", "cu_seqlens_q", "alibi_slopes", "sinks",
)  # fmt: skip
# Everything else that is no array: constants of a graph, but for softmax_scale and a number of keys.
_OPTIONS = ("causal", "window_size", "softcap", "split_size", "layout", "kv_dtype", "k_scale", "v_scale")
_OWN = ("k", "v", "rotary", "softmax_scale", "return_lse", "out", "lse_out", "workspace")

_REST = f"{', '.join(f'Tensor? {name}' for name in _ARRAYS)}, SymInt? length, float? softmax_scale, str options"
_RESULTS = "(Tensor out, Tensor lse)"
_library = torch.library.Library("fa2cupy", "FRAGMENT")
_library.define(f"attend(Tensor q, Tensor k_cache, Tensor v_cache, {_REST}) -> {_RESULTS}")
_library.define(
    f"append_and_attend(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, {_REST}) -> {_RESULTS}"
)
attend_op = torch.ops.fa2cupy.attend.default
append_op = torch.ops.fa2cupy.append_and_attend.default


# ----------------------------------------------------------------------------------------------------------------------
# What torch.compile traces


def attend(function: str, q: Any, k_cache: Any, v_cache: Any, keywords: Mapping[str, Any]) -> Any:
    """What `function` returns."""
    given = {name: value for name, value in keywords.items() if value is not None}
    arrays = {name: given[name] for name in _ARRAYS if isinstance(given.get(name), torch.Tensor)}
    options, length, style = {}, None, None
    for name, value in given.items():
        if name in _ARRAYS and name not in _OPTIONS and name not in arrays:
            if name != "cache_seqlens":
                raise unknown(function, name)
            length = value
        elif name in _OPTIONS and name not in arrays:
            options[name] = value
        elif name not in _ARRAYS and name not in _OWN:
            raise unknown(function, name)
    if "rotary" in given:
        arrays["rotary_cos"], arrays["rotary_sin"], style = given["rotary"]
    if style is not None:
        options["style"] = style
    scale = given.get("softmax_scale")
    rest = [arrays.get(name) for name in _ARRAYS]
    rest += [length, None if scale is None else float(scale), text_of(tuple(options.items()))]
    k, v = given.get("k"), given.get("v")
    if k is None and v is None:
        out, lse = attend_op(q, k_cache, v_cache, *rest)
    elif k is None or v is None:
        raise InvalidArgument("k and v come together: one of them is not given")
    else:
        out, lse = append_op(q, k_cache, v_cache, k, v, *rest)
    if "out" in given:
        out = given["out"].copy_(out)
    if "lse_out" in given:
        lse = given["lse_out"].copy_(lse)
    return (out, lse) if given.get("return_lse") else out


@dynamo.constant
def text_of(options: tuple[tuple[str, Any], ...]) -> str:
    """(("causal", True),) as text. InvalidArgument for values that have none."""
    text = "".join(f"{option!r},\n" for option in options)
    try:
        if _options_of(text) == options:
            return text
    except (SyntaxError, ValueError):
        pass
    names = ", ".join(name for name, _ in options)
    raise InvalidArgument(f"{names}: not supported where torch traces; call it outside of what is compiled")


@functools.lru_cache(maxsize=1024)
def _options_of(text: str) -> tuple[tuple[str, Any], ...]:
    """The inverse."""
    options: tuple[tuple[str, Any], ...] = ast.literal_eval(f"({text})") if text else ()
    return options


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


def _attend(q: Any, k_cache: Any, v_cache: Any, *rest: Any) -> tuple[Any, Any]:
    return _run(q, k_cache, v_cache, {}, rest)


def _append(q: Any, k_cache: Any, v_cache: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any]:
    return _run(q, k_cache, v_cache, {"k": k, "v": v}, rest)


def _run(q: Any, k_cache: Any, v_cache: Any, new: dict[str, Any], rest: tuple[Any, ...]) -> tuple[Any, Any]:
    *arrays, length, softmax_scale, text = rest
    keywords = {name: array for name, array in zip(_ARRAYS, arrays, strict=True) if array is not None} | new
    options = dict(_options_of(text))
    if "rotary_cos" in keywords:
        keywords["rotary"] = keywords.pop("rotary_cos"), keywords.pop("rotary_sin"), options.pop("style")
    if length is not None:
        keywords["cache_seqlens"] = int(length)
    if softmax_scale is not None:
        keywords["softmax_scale"] = softmax_scale
    with torch.no_grad():
        out, lse = eager.attend(q, k_cache, v_cache, **keywords, **options, return_lse=True)
    return out, lse


def _shapes(q: Any, k_cache: Any, v_cache: Any, *rest: Any) -> tuple[Any, Any]:
    """Without data: what is wrong is said by the kernel."""
    *arrays, _, _, text = rest[-len(_ARRAYS) - 3 :]
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
    if arrays[_ARRAYS.index("cu_seqlens_q")] is not None:
        sizes = [q.shape[1], q.shape[0]]
    else:
        batch, first, second = q.shape[:-1]
        is_bhsd = dict(_options_of(text)).get("layout") == "bhsd"
        sizes = [batch, first, second] if is_bhsd else [batch, second, first]
    return out, q.new_empty(sizes, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _refuse_gradients(operator: Any, names: tuple[str, ...]) -> Any:
    """What runs at the Autograd key."""

    def kernel(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for name, x in zip(names, arguments, strict=False):
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    raise InvalidArgument(
                        f"{name} requires grad, but attention on a cache has no gradient: use torch.no_grad() or "
                        ".detach()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return kernel


_CACHE = ("q", "k_cache", "v_cache")
for _name, _kernel, _operator, _names in (
    ("attend", _attend, attend_op, (*_CACHE, *_ARRAYS)),
    ("append_and_attend", _append, append_op, (*_CACHE, "k", "v", *_ARRAYS)),
):
    _library.impl(_name, _refuse_gradients(_operator, _names), "Autograd")
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"fa2cupy::{_name}", _shapes, lib=_library)
