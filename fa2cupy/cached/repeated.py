"""The short way of a call on a cache on a GPU: what has been prepared for calls like it, by types, shapes and options.

Nothing is checked here: whatever is not as it was when a signature was prepared has another signature, and whatever is
wrong has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from fa2cupy.cached.arguments import MAX_LENGTH
from fa2cupy.cached.call import ARRAYS, OF_CACHE, OF_CALL, Call
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
_ARRAYS = {{"k_new": "k", "v_new": "v"}.get(name, name): name for name in OF_CALL[1:]}
_ROTARY = ("rotary_cos", "rotary_sin")
_MAX_FORMS = 1024
_FORMS: dict[tuple[str, ...], _Form] = {}  # names of keywords, in the order in which they came


class _Form(NamedTuple):
    """Which of a call's keywords are what. Numbers are places among q and the values of the keywords; 0: not there.

    names: of `arrays`, as OF_CALL has them; length: where among these cache_seqlens is, which may be a number.
    """

    arrays: tuple[int, ...]
    names: tuple[str, ...]
    options: tuple[int, ...]
    length: int
    rotary: int
    workspace: int

    @classmethod
    def of(cls, keywords: tuple[str, ...]) -> _Form:
        """TypeError for keywords that are none."""
        arrays, names, options, others = [0], ["q"], [], {"rotary": 0, "workspace": 0}
        for place, keyword in enumerate(keywords, 1):
            if keyword in _ARRAYS:
                arrays.append(place)
                names.append(_ARRAYS[keyword])
            elif keyword in _OPTIONS:
                options.append(place)
            elif keyword in others:
                others[keyword] = place
            else:
                raise TypeError
        length = names.index("cache_seqlens") if "cache_seqlens" in names else 0
        form = cls(tuple(arrays), tuple(names), tuple(options), length, **others)
        with _lock:
            if len(_FORMS) >= _MAX_FORMS:
                _FORMS.clear()
            _FORMS[keywords] = form
        return form


# What one call asks for: its arrays and their names, cache_seqlens where it is a number, everything else, which may not
# be hashable, as a key, and a workspace. A plain tuple: one with names takes a while to make.
_Asked = tuple[list[Any], tuple[str, ...], "int | None", tuple[Any, ...], Any]


class Fixed(NamedTuple):
    """The arrays of a cache on a GPU, in the order of OF_CACHE, those that are there, the pointers of a call, of which
    theirs are known, and the number of their signature."""

    framework: GpuFramework
    arrays: list[Any]
    given: list[Any]
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
        pointers += [0] * (len(ARRAYS) - len(pointers))
        return cls(framework, ordered, [x for x in ordered if x is not None], pointers, number)

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
        arrays, _, number, key, workspace = _asked(fixed, q, keywords)
        signature, pointers = fixed.framework.signature(arrays)
        prepared = _PREPARED.get((key, signature))
    except Exception:  # unhashable options, arrays of another library, ...: the first call says what is wrong
        return None
    if prepared is None:
        return None
    return prepared.run(fixed, arrays, pointers, number, workspace)


def first(fixed: Fixed | None, call: Call, keywords: Mapping[str, Any], workspace: Any) -> tuple[Any, Any]:
    """out, lse of a call that was checked; the next ones like it take the short way."""
    number = call.numbers.get("cache_seqlens")
    number = None if number is None else int(number)
    names: tuple[str, ...] = OF_CALL
    key: tuple[Any, ...] | None = None
    if fixed is None:
        fixed = Fixed.of(call.cache.framework, call.cache.arrays, ("of what was converted",))
    else:
        _, names, found, key, _ = _asked(fixed, call.arrays["q"], keywords)
        if found != number:  # a number of NumPy's, which is no int: nothing is kept
            key = None
    assert fixed is not None
    prepared = prepare(call, names)
    arrays = [call.arrays.get(name) for name in names]
    signature, pointers = fixed.framework.signature(arrays)
    if key is not None:
        with _lock, contextlib.suppress(TypeError):  # a list as window_size has no hash
            if len(_PREPARED) >= _MAX_PREPARED:
                _PREPARED.clear()
            _PREPARED[key, signature] = prepared
    return prepared.run(fixed, arrays, pointers, number, workspace)


def _asked(fixed: Fixed, q: Any, keywords: Mapping[str, Any]) -> _Asked:
    names = tuple(keywords)
    form = _FORMS.get(names) or _Form.of(names)
    given = (q, *keywords.values())
    arrays = [given[place] for place in form.arrays]
    options = [given[place] for place in form.options]
    array_names, number = form.names, None
    if form.length:
        length = arrays[form.length]
        if type(length) is int:
            arrays[form.length], number = None, length
            if not 0 <= length <= MAX_LENGTH:
                raise ValueError
    if form.rotary:
        rotary = given[form.rotary]
        if rotary is not None:
            cos, sin, style = rotary
            arrays += (cos, sin)
            array_names += _ROTARY
            options.append(style)
    key = (fixed.number, names, number is None, *options, *map(type, options))
    return arrays, array_names, number, key, given[form.workspace] if form.workspace else None
