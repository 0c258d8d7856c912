"""The keywords of a cache and of a call on it, checked one by one: arrays by name, and everything else."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fa2cupy.checks import shown
from fa2cupy.declared import DROPOUT_OF_CACHE, RIGHT_OF_CAUSAL
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks.base import describe
from fa2cupy.keywords import KEYWORDS, is_neutral, not_supported, too_many_by_position, unknown

__all__ = ["MAX_LENGTH", "ROTARY_STYLES", "Given", "given"]

ROTARY_STYLES = ("neox", "interleaved")
MAX_LENGTH = 2**30  # of cache_seqlens as a number


@dataclass(frozen=True, slots=True)
class Given:
    """What a function was given by name, less what is neutral.

    arrays: unchecked, by name; of rotary its two, rotary_cos and rotary_sin. options: checked and hashable, by name; of
    rotary the style, rotary_style. numbers: where a number stands in for an array, by its name: k_scale, v_scale,
    cache_seqlens.
    """

    arrays: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, float | int] = field(default_factory=dict)

    def both(self, other: Given) -> Given:
        """The two together; no name is in both."""
        return Given(self.arrays | other.arrays, self.options | other.options, self.numbers | other.numbers)  # type: ignore[operator]


def given(function: str, positional: tuple[object, ...], keywords: Mapping[str, Any]) -> Given:
    """From all that `function` was given beyond its arrays. Raises for what it does not take."""
    if positional:
        raise too_many_by_position(function, positional)
    if "dropout_p" in keywords:
        raise DROPOUT_OF_CACHE.error(value=repr(keywords["dropout_p"]))
    for name in keywords:
        if name not in KEYWORDS or function not in KEYWORDS[name].functions:
            raise unknown(function, name)
    arrays: dict[str, Any] = {}
    options: dict[str, Any] = {}
    counted: dict[str, float | int] = {}
    for keyword in KEYWORDS.values():
        name = keyword.name
        value = keywords.get(name)
        if name not in keywords or (name != "causal" and is_neutral(keyword, value)):
            continue
        if not keyword.since:
            raise not_supported(function, keyword, value)
        if name == "rotary":
            arrays["rotary_cos"], arrays["rotary_sin"], options["rotary_style"] = _rotary(value)
        elif name in ("k_scale", "v_scale") and _is_number(value):
            counted[name] = _scale(name, value)
        elif name == "cache_seqlens" and _is_number(value):
            counted[name] = _length(name, value)
        elif keyword.check is None:
            arrays[name] = value
        else:
            options[name] = keyword.check(name, value)
    window = options.get("window_size")
    if options.get("causal") and window is not None and window[1] > 0:
        raise RIGHT_OF_CAUSAL.error(value=window)
    if "cache_seqlens" in arrays.keys() | counted.keys() and "seqused_k" in arrays:
        raise InvalidArgument(
            "cache_seqlens is given beside seqused_k: give one of them (cache_seqlens counts the keys before the new "
            "ones, seqused_k all of them)"
        )
    for one, other in (("indptr", "indices"), ("indices", "indptr")):
        if one in arrays and other not in arrays:
            raise InvalidArgument(f"{one} is given without {other}: the pages of a sequence need both")
    if "block_table" in arrays and "indptr" in arrays:
        raise InvalidArgument("block_table is given beside indptr and indices: give one of the two")
    return Given(arrays, options, counted)


def _is_number(value: object) -> bool:
    """A Python or NumPy number, or a bool, which is refused as one; not an array."""
    return isinstance(value, (numbers.Real, np.number, np.bool_))


def _scale(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)):
        raise InvalidType(f"{name}={value!r} is a bool: a number or an array is needed")
    scale = float(value)
    if not (math.isfinite(scale) and scale > 0):
        raise InvalidArgument(f"{shown(name, value)} is not supported: a positive, finite number is needed")
    return scale


def _length(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InvalidType(f"{name}={value!r} is a {describe(value)}: an int or an array of int32 is needed")
    length = int(value)
    if not 0 <= length <= MAX_LENGTH:
        raise InvalidArgument(f"{shown(name, value)} is not supported: 0 to {MAX_LENGTH}")
    return length


def _rotary(value: Any) -> tuple[Any, Any, str]:
    """cos, sin, style."""
    form = '(cos, sin, "neox") or (cos, sin, "interleaved") is needed'
    if not isinstance(value, (tuple, list)):
        raise InvalidType(f"{shown('rotary', value)} is a {describe(value)}: {form}")
    if len(value) != 3:
        raise InvalidArgument(f"rotary has {len(value)} elements: {form}")
    cos, sin, style = value
    if not isinstance(style, str):
        raise InvalidType(f"rotary ends with a {describe(style)}: {form}")
    if style not in ROTARY_STYLES:
        raise InvalidArgument(f"rotary ends with {style!r}: {form}")
    for name, array in (("cos", cos), ("sin", sin)):
        if array is None or isinstance(array, (str, bool)) or _is_number(array):
            raise InvalidType(f"the {name} of rotary is a {describe(array)}: an array is needed")
    return cos, sin, style
