"""Checks of keywords' values, each of which names the keyword, the value and what is allowed."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np

from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks.base import describe
from fa2cupy.frameworks.jax import words_of_key

__all__ = [
    "KV_DTYPES",
    "LAYOUTS",
    "SEED_DTYPES",
    "SEED_SHAPES",
    "WINDOWS",
    "check_dropout",
    "check_dtype",
    "check_flag",
    "check_grad_of",
    "check_hint",
    "check_kv_dtype",
    "check_layout",
    "check_pair",
    "check_scale",
    "check_seed",
    "check_softcap",
    "check_split_size",
    "check_window",
    "is_seed",
    "shown",
]

LAYOUTS = {"bshd": "(batch, seqlen, num_heads, head_dim)", "bhsd": "(batch, num_heads, seqlen, head_dim)"}

KV_DTYPES = ("float8_e4m3fn", "int8")
SPLIT_UNIT = 64  # keys: a multiple of what any kernel takes at a time

# How windows are counted, for those who come with one number.
WINDOWS = (
    "(127, 0) sees 128 keys, the query's own among them, as Mistral counts; (128, 0) sees 128 before it and its own"
)


def shown(name: str, value: object) -> str:
    """A keyword and its value as an error names them. No array is printed: on a GPU that would wait for it."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python itself refuses to print very long ones
        return f"{name}=<an int of {value.bit_length()} bits>"
    if (hasattr(value, "ndim") or hasattr(value, "__dlpack__")) and not isinstance(value, np.generic):
        return f"{name}, a {describe(value)},"
    text = repr(value)
    return f"{name}={text}" if len(text) <= 60 else f"{name}, a {describe(value)},"


def check_flag(name: str, value: object) -> bool:
    """`value` as a bool; NumPy's bool is one."""
    if value is True or value is False:
        return value is True
    if isinstance(value, np.bool_):
        return bool(value)
    raise InvalidType(f"{shown(name, value)} is a {describe(value)}: True or False is needed")


def check_layout(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidType(f"{shown(name, value)} is a {describe(value)}: 'bshd' or 'bhsd' is needed")
    if value not in LAYOUTS:
        raise InvalidArgument(f"{shown(name, value)} is unknown: 'bshd' or 'bhsd' is needed")
    return value


def check_dtype(name: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InvalidType(f"{shown(name, value)} is a {describe(value)}: None, or 'bfloat16' for uint16 arrays, is needed")


def check_kv_dtype(name: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidType(f"{shown(name, value)} is a {describe(value)}: None, 'float8_e4m3fn' or 'int8' is needed")
    if value not in KV_DTYPES:
        raise InvalidArgument(f"{shown(name, value)} is not supported: None, 'float8_e4m3fn' or 'int8' is needed")
    return value


def check_split_size(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InvalidType(f"{shown(name, value)} is a {describe(value)}: None or an int is needed")
    if value <= 0 or value % SPLIT_UNIT:
        raise InvalidArgument(f"{shown(name, value)} is not supported: a positive multiple of {SPLIT_UNIT} is needed")
    return operator.index(value)


def check_scale(name: str, value: Any) -> float | None:
    """None or a finite number."""
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)):
        raise InvalidType(f"{name}={value!r} is a bool: None or a real number is needed")
    if not isinstance(value, (numbers.Real, np.floating, np.integer)):
        if hasattr(value, "__dlpack__") or hasattr(value, "ndim"):
            raise InvalidType(
                f"{name} is a {describe(value)}: a Python number is needed (reading an array from a GPU would "
                "wait for it)"
            )
        raise InvalidType(f"{shown(name, value)} is a {describe(value)}: None or a real number is needed")
    try:
        scale = float(value)
    except OverflowError:
        scale = math.inf
    if not math.isfinite(scale):
        raise InvalidArgument(f"{shown(name, value)} is not supported: it must be finite")
    return scale


def _known(value: Any) -> Any:
    """A number. Of one that torch.compile does not know yet, float() would make no number, but this does: options are
    part of a graph."""
    return float.fromhex(value.hex()) if isinstance(value, float) else value


def check_softcap(name: str, value: Any) -> float:
    """A finite number above 0; what is no softcap has been found neutral."""
    softcap = check_scale(name, _known(value))
    assert softcap is not None
    if not softcap > 0:
        raise InvalidArgument(f"{shown(name, value)} is not supported: a number above 0, or None or 0.0 for none")
    return softcap


DROPOUT_STEPS = 2**15  # the kernels compare 15 random bits


def check_dropout(name: str, value: Any) -> float | None:
    """A probability, rounded to a multiple of 2^-15; None where that is 0."""
    try:
        p = check_scale(name, _known(value))
    except InvalidArgument:  # not finite
        p = math.nan
    assert p is not None
    rounded = round(p * DROPOUT_STEPS) / DROPOUT_STEPS if 0 <= p < 2 else math.nan
    if not rounded < 1:
        raise InvalidArgument(
            f"{shown(name, value)} is not supported: at least 0 and, rounded to a multiple of 2^-15, below 1"
        )
    return rounded or None


# Of a dropout_seed that is an array. All hold 32-bit words: seed and offset, two words each, low ones first, and, if
# there are eight, the first batch and the first head. Two alone are a seed, as JAX's keys have it, and offset 0.
SEED_SHAPES = ((2,), (4,), (8,))
SEED_DTYPES = ("int64", "uint64", "uint32")
_SEEDS = "(seed, offset), two ints, or an array of them, int64 or uint64 (2,) or uint32 (4,) or (2,), or a JAX key"


def is_seed(shape: tuple[int, ...], dtype: str) -> bool:
    """Whether an array of that shape and dtype holds 2, 4 or 8 words."""
    return dtype in SEED_DTYPES and shape in SEED_SHAPES and (dtype == "uint32" or shape[0] <= 4)


def check_seed(name: str, value: Any) -> tuple[Any]:
    """The array, of a JAX key that of its words, or (seed, offset) as two signed numbers of 64 bits, of which a
    framework makes one.
    """
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic):
        shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        if dtype.startswith("key<"):
            if shape:
                raise InvalidArgument(f"{name} is an array of JAX keys, of shape {shape}: one key is needed")
            return check_seed(name, words_of_key(value))
        if not is_seed(shape, dtype):
            kind = InvalidType if dtype not in SEED_DTYPES else InvalidArgument
            raise kind(f"{name} has shape {shape} and dtype {dtype}: {_SEEDS} is needed")
        return (value,)
    if hasattr(value, "__dlpack__") and not isinstance(value, np.generic):
        return (value,)
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise InvalidType(f"{shown(name, value)} is a {describe(value)}: {_SEEDS} is needed")
    for item in value:
        if isinstance(item, (bool, np.bool_)) or not isinstance(item, (int, np.integer)):
            raise InvalidType(f"{shown(name, value)} holds a {describe(item)}: {_SEEDS} is needed")
        if not -(2**63) <= item < 2**64:
            raise InvalidArgument(f"{shown(name, value)} holds a number of more than 64 bits")
    seed, offset = ((int(item) + 2**63) % 2**64 - 2**63 for item in value)
    return ((seed, offset),)


GRADIENTS = {"sinks": "dsinks"}  # what grad_of may name, and the output for it


def check_grad_of(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
        raise InvalidType(f"{shown(name, value)} is a {describe(value)}: a tuple of names, as ('sinks',), is needed")
    for item in value:
        if item not in GRADIENTS:
            raise InvalidArgument(f"{shown(name, value)} names {item!r}: {', '.join(map(repr, GRADIENTS))} is possible")
        if value.count(item) > 1:
            raise InvalidArgument(f"{shown(name, value)} names {item!r} twice")
    return tuple(value)


def check_hint(name: str, value: Any) -> None:
    """A number, or an array that may hold one: nobody reads it."""
    if isinstance(value, (bool, np.bool_, str, bytes, tuple, list, dict)):
        raise InvalidType(f"{shown(name, value)} is a {describe(value)}: a number, or an array of one, is needed")


def check_pair(name: str, value: Any) -> tuple[Any, Any]:
    """(for the queries, for the keys) of an array for both, or of two."""
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2 or any(item is None for item in value):
        raise InvalidType(f"{name} is a {describe(value)} of {len(value)}: an array, or a pair of them, is needed")
    return value[0], value[1]


def check_window(name: str, value: Any) -> tuple[int, int]:
    """(left, right), -1 where it is unlimited."""
    if isinstance(value, (int, np.integer)) and value is not True and value is not False:
        raise InvalidType(f"{shown(name, value)} is one number: (left, right) is needed ({WINDOWS})")
    if not isinstance(value, (tuple, list)):
        raise InvalidType(f"{shown(name, value)} is a {describe(value)}: None or (left, right) is needed")
    if len(value) != 2:
        raise InvalidArgument(f"{shown(name, value)} has {len(value)} elements: (left, right) is needed")
    for end in value:
        if end is not None and (isinstance(end, (bool, np.bool_)) or not isinstance(end, (int, np.integer))):
            raise InvalidType(
                f"{shown(name, value)} holds a {describe(end)}: two ints are needed, -1 or None for unlimited"
            )
        if end is not None and end < -1:
            raise InvalidArgument(f"{shown(name, value)} is not supported: -1 is unlimited, and nothing is below it")
    # Of a length that torch.compile does not know yet, int() would make no number: options are part of a graph.
    left, right = (-1 if end is None else operator.index(end) for end in value)
    return left, right
