"""Tensor maps (CUtensorMap): how the bulk tensor copies of sm_90 address an array. Encoded by the driver, and kept."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field

from fa2cupy.errors import LaunchError
from fa2cupy.jit import driver

__all__ = ["ALIGNMENT", "SIZE", "TensorMapSpec", "encode", "objection"]

SIZE = 128  # bytes of a map
ALIGNMENT = 16  # bytes: of an array's first element, and of all strides

# A driver needs 1-2 us to encode a map, and a map depends on its array's address: one entry each (about 0.5 KB).
MAX_ENCODED = 1024

_BUFFER_ALIGNMENT = 128  # the driver wants 64, cuda.h of CUDA 13 says 128
_MAX_DIM, _STRIDE_END = 2**32, 2**40

# CUtensorMapSwizzle, CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapFloatOOBfill
_SWIZZLE_NONE, _SWIZZLE_128B = 0, 3
_INTERLEAVE_NONE = 0
_L2_PROMOTION_256B = 3
_OOB_FILL_ZEROS = 0

# CUtensorMapDataType, swizzle, bytes of an element
_DTYPES = {"float16": (6, _SWIZZLE_128B, 2), "bfloat16": (9, _SWIZZLE_128B, 2), "float32": (7, _SWIZZLE_NONE, 4)}

_DIMENSIONS = ("row", "head", "batch")  # those that have a stride


@dataclass(frozen=True, slots=True)
class TensorMapSpec:
    """All of a map but the address: an array, and the box that one copy moves.

    dims: (columns, rows, heads, batch), shifted (columns, rows, heads, ends, batch). strides_bytes: between neighbours
    in each but the columns, which are contiguous. box: (columns, rows), of one head. Shared memory has rows of 128
    bytes, swizzled, or for float32 the box as it is; what lies outside the array reads as zeros and is not written.
    """

    dims: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    box: tuple[int, int]
    dtype: str
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Kept, since each look into the cache needs it; of numbers alone, so that it is the same in another process.
        object.__setattr__(self, "_hash", hash((self.dims, self.strides_bytes, self.box)))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(cls, dims: Sequence[int], strides: Sequence[int], box: tuple[int, int], dtype: str) -> TensorMapSpec:
        """With strides in elements. Those of dimensions of size 1 mean nothing, but the driver looks at them too."""
        columns, rows, heads, batch = dims
        *_, itemsize = _DTYPES[dtype]
        legal = -(-columns * itemsize // ALIGNMENT) * ALIGNMENT
        row, head, group = (
            stride * itemsize if n > 1 else legal for n, stride in zip((rows, heads, batch), strides, strict=True)
        )
        return cls((columns, rows, heads, batch), (row, head, group), box, dtype)

    def shifted(self) -> tuple[TensorMapSpec, int]:
        """The map of the same array for copies that end with a sequence, and the bytes from the array to its address.

        Rows run up to the end of the array whatever the sequence, which one more dimension moves to where the sequence
        ends: of `length` rows up to row `end` the coordinates are rows - length + row and end. So all rows past its
        last one, and no others, lie outside. The address lies as many rows in front of the array as it has.
        """
        columns, rows, heads, batch = self.dims
        row, head, group = self.strides_bytes
        spec = TensorMapSpec((columns, rows, heads, rows + 1, batch), (row, head, row, group), self.box, self.dtype)
        return spec, -rows * row


def objection(dims: Sequence[int], strides: Sequence[int]) -> str:
    """What of an array of 16-bit elements a map cannot express ("row stride is negative"), or the empty string.

    dims and strides (elements) as for `TensorMapSpec.of`. That the array starts at a multiple of ALIGNMENT is the
    caller's to see to.
    """
    for what, n in zip(("column", *_DIMENSIONS), dims, strict=True):
        if n > _MAX_DIM:
            return f"{what} count of {n} is above 2**32"
    for what, n, stride in zip(_DIMENSIONS, dims[1:], strides, strict=True):
        size = 2 * stride
        if n < 2:
            continue
        if size % ALIGNMENT:
            return f"{what} stride is {size} bytes, not a multiple of {ALIGNMENT} bytes"
        if size < 0:
            return f"{what} stride is negative"
        if size >= _STRIDE_END:
            return f"{what} stride is {size} bytes, not below 2**40"
    return ""


@functools.lru_cache(maxsize=MAX_ENCODED)
def encode(spec: TensorMapSpec, pointer: int) -> bytes:
    """The map of the array at `pointer`: SIZE bytes. LaunchError if the driver refuses it; any thread may call.

    The cache is CPython's own: the least recently used map goes first, and a hit is a look into a dictionary.
    """
    buffer = ctypes.create_string_buffer(SIZE + _BUFFER_ALIGNMENT)
    address = -(-ctypes.addressof(buffer) // _BUFFER_ALIGNMENT) * _BUFFER_ALIGNMENT
    data_type, swizzle, _ = _DTYPES[spec.dtype]
    rank = len(spec.dims)
    try:
        driver.call(
            "cuTensorMapEncodeTiled",
            c_void_p(address),
            c_uint32(data_type),
            c_uint32(rank),
            c_void_p(pointer),
            (c_uint64 * rank)(*spec.dims),
            (c_uint64 * (rank - 1))(*spec.strides_bytes),
            (c_uint32 * rank)(*spec.box, *(1,) * (rank - 2)),
            (c_uint32 * rank)(*(1,) * rank),
            c_uint32(_INTERLEAVE_NONE),
            c_uint32(swizzle),
            c_uint32(_L2_PROMOTION_256B),
            c_uint32(_OOB_FILL_ZEROS),
        )
    except LaunchError as error:
        raise LaunchError(f"{error}, encoding {spec} at address {pointer:#x}") from None
    return ctypes.string_at(address, SIZE)
