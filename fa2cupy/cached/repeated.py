"""The short way of a call on a cache on a GPU: what has been prepared for calls like it, by types, shapes and options.

Nothing is checked here: whatever is not as it was when a signature was prepared has another signature, and whatever is
wrong has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from fa2cupy.cached.call import OF_CACHE, OF_CALL, Call
from fa2cupy.cached.prepared import PreparedAttend, prepare
from fa2cupy.frameworks import framework_of
from fa2cupy.frameworks.base import Framework, GpuFramework
from fa2cupy.locks import Lock

__all__ = ["Fixed", "attend", "first"]

_MAX_PREPARED = 4096
_PREPARED: dict[Any, PreparedAttend] = {}
_FIXED: dict[Any, int] = {}  # signature of a cache -> its number
_lock = Lock()

_OPTIONS = ("causal", "window_size", "softmax_scale", "softcap", "split_size", "return_lse")
_ARRAYS = tuple((name, {"k_new": "k", "v_new": "v"}.get(name, name)) for name in OF_CALL[1:])
_KNOWN = {*_OPTIONS, *(keyword for _, keyword in _ARRAYS), "rotary", "workspace"}
_NUMBER = len(OF_CACHE) + OF_CALL.index("cache_seqlens")


class Fixed(NamedTuple):
    """The arrays of a cache on a GPU, in the order of OF_CACHE, their pointers, and the number of their signature."""

    framework: GpuFramework
    arrays: list[Any]
    pointers: list[int]
    number: int

    @classmethod
    def of(cls, framework: Framework, arrays: Mapping[str, Any], options: tuple[Any, ...]) -> Fixed | None:
        """None where there is no short way. options: everything else that makes the cache, hashable."""
        if not isinstance(framework, GpuFramework) or framework.device(arrays["k_cache"], "k").kind == "cpu":
            return None
        ordered = [arrays.get(name) for name in OF_CACHE]
        signature, pointers = framework.signature(ordered)
        with _lock:
            number = _FIXED.setdefault((signature, options), len(_FIXED))
        return cls(framework, ordered, pointers, number)

    @classmethod
    def of_keywords(cls, arrays: Mapping[str, Any], keywords: Mapping[str, Any]) -> Fixed | None:
        """Of what has not been checked."""
        framework = framework_of(arrays["k_cache"])
        try:
            every = {**arrays, **{name: x for name, x in keywords.items() if x is not None}}
            rest = tuple((name, type(x), x) for name, x in every.items() if name not in OF_CACHE or type(x) is float)
            every = {name: x for name, x in every.items() if name in OF_CACHE and type(x) is not float}
            return None if framework is None else cls.of(framework, every, rest)
        except Exception:  # not hashable, not of one framework, ...: whoever checks says what
            return None


def attend(fixed: Fixed, q: Any, keywords: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """out, lse of a call that is like one before; None for one that is not."""
    try:
        arrays, number, key = _call(fixed, q, keywords)
        signature, pointers = fixed.framework.signature(arrays)
        prepared = _PREPARED.get((key, signature))
    except Exception:  # unhashable options, arrays of another library, ...: the first call says what is wrong
        return None
    if prepared is None:
        return None
    return _run(prepared, fixed, arrays, pointers, number, keywords.get("workspace"))


def first(fixed: Fixed | None, call: Call, keywords: Mapping[str, Any], workspace: Any) -> tuple[Any, Any]:
    """out, lse of a call that was checked; the next ones like it take the short way."""
    prepared = prepare(call)
    if fixed is None:
        fixed = Fixed.of(call.cache.framework, call.cache.arrays, ("of what was converted",))
        assert fixed is not None
        arrays = [call.arrays.get(name) for name in OF_CALL]
        _, pointers = fixed.framework.signature(arrays)
        return _run(prepared, fixed, arrays, pointers, call.numbers.get("cache_seqlens"), workspace)
    arrays, number, key = _call(fixed, call.arrays["q"], keywords)
    arrays = [call.arrays.get(name) for name in OF_CALL]
    signature, pointers = fixed.framework.signature(arrays)
    with _lock, contextlib.suppress(TypeError):  # a list as window_size has no hash
        if len(_PREPARED) >= _MAX_PREPARED:
            _PREPARED.clear()
        _PREPARED[key, signature] = prepared
    return _run(prepared, fixed, arrays, pointers, number, workspace)


def _call(fixed: Fixed, q: Any, keywords: Mapping[str, Any]) -> tuple[list[Any], int | None, tuple[Any, ...]]:
    """The arrays of a call, cache_seqlens where it is a number, and what its options are."""
    if not keywords.keys() <= _KNOWN:
        raise TypeError
    arrays = [q, *(keywords.get(keyword) for _, keyword in _ARRAYS)]
    number, style = None, None
    length = keywords.get("cache_seqlens")
    if type(length) is int:
        number = length
        arrays[OF_CALL.index("cache_seqlens")] = None
        if not 0 <= length <= 2**30:
            raise ValueError
    rotary = keywords.get("rotary")
    if rotary is not None:
        cos, sin, style = rotary
        arrays[OF_CALL.index("rotary_cos")], arrays[OF_CALL.index("rotary_sin")] = cos, sin
    options = tuple(keywords.get(name) for name in _OPTIONS)
    return arrays, number, (fixed.number, options, tuple(map(type, options)), style, number is not None)


def _run(
    prepared: PreparedAttend, fixed: Fixed, arrays: list[Any], pointers: list[int], number: Any, workspace: Any
) -> tuple[Any, Any]:
    pointers = fixed.pointers + pointers
    if number is not None:
        pointers[_NUMBER] = int(number)
    return prepared.run(fixed.arrays + arrays, pointers, workspace)
