"""Elements of 8 bits as numbers and back, and the rotation of keys and queries by their positions. In NumPy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

__all__ = ["dequantised", "numbers", "quantised", "rotated", "rounded"]

_LARGEST = 448.0  # of e4m3
_NAN = 0x7F


def numbers(x: Array) -> Array:
    """float32 of 16-bit elements, of bfloat16 by its bits in uint16; others as they are."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32) if x.dtype == np.float16 else x


def rounded(x: Array, dtype: npt.DTypeLike) -> Array:
    """The inverse: to nearest, ties to even."""
    if dtype != np.uint16:
        return x.astype(dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest_even = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest_even).astype(np.uint16)


@functools.cache
def _e4m3_values() -> Array:
    """What the 256 codes of float8_e4m3fn mean, in float32: exact."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[codes & _NAN == _NAN] = np.nan
    values = np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)
    values.flags.writeable = False
    return values


def dequantised(x: Array, dtype: str, scale: Array | float, wide: type = np.float32) -> Array:
    """The numbers, of type `wide`, of elements of 8 bits; `scale` is float32 and broadcast."""
    values = _e4m3_values()[x.view(np.uint8)] if dtype == "float8_e4m3fn" else x.view(np.int8).astype(np.float32)
    product: Array = values * np.asarray(scale, wide)
    return product


def quantised(x: Array, dtype: str, scale: Array | float) -> Array:
    """x / scale in 8 bits, as uint8: to nearest, ties to even; what is too large becomes the largest there is. NaN
    stays NaN in float8_e4m3fn and is 0 in int8.
    """
    x = (x.astype(np.float32) / np.asarray(scale, np.float32)).astype(np.float32)
    if dtype == "int8":
        finite = np.nan_to_num(x, nan=0.0, posinf=127, neginf=-128)
        codes: Array = np.clip(np.rint(finite), -128, 127).astype(np.int8).view(np.uint8)
        return codes
    magnitude = np.minimum(np.abs(np.where(np.isnan(x), 0, x)), _LARGEST).astype(np.float64)
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, -6)  # of the last place of a number: 2^(exponent - 3)
    steps = np.rint(magnitude / 2.0 ** (exponent - 3.0)).astype(np.int64)  # 16 of them are 8 of the next exponent
    code = np.where(steps < 8, steps, (exponent + 7) * 8 + steps - 8)
    code = np.minimum(code, _NAN - 1)
    return np.where(np.isnan(x), _NAN, code | np.signbit(x) * 0x80).astype(np.uint8)


def rotated(x: Array, cos: Array, sin: Array, style: str) -> Array:
    """x (rows, heads, head_dim) with its first columns turned: cos and sin are (rows, rotary_dim / 2), of x's dtype.

    Pair i is columns 2i and 2i + 1 ("interleaved") or i and i + rotary_dim / 2 ("neox").
    """
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    if style == "neox":
        first, second = slice(0, half), slice(half, 2 * half)
    turned: Array = x.copy()
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., first] * sin + x[..., second] * cos
    return turned
