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

_RANK = 4  # of a map that is not shifted
_MAX_SHIFT = 2**33  # bytes: no driver gives out an address below that, so that a shifted map has one too

_DIMENSIONS = ("row", "head", "batch")  # those that have a stride


@dataclass(frozen=True, slots=True)
class TensorMapSpec:
    """All of a map but the address: an array, and the box that one copy moves.

    dims: (columns, rows, heads, batch). strides_bytes: between neighbouring (rows, heads, batches); columns are
    contiguous. box: (columns, rows), of one head. Shared memory has rows of 128 bytes, swizzled, or for float32 the box
    as it is; what lies outside the array reads as zeros and is not written.

    Shifted, (columns, rows, heads, rows + 1, batch): the array of sequences that a copy is told the ends of, as the
    fourth coordinate, with the stride of rows. The rows of a sequence of n then are the last n of the second dimension,
    and the map begins `shift_bytes` in front of the array.
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

    @property
    def shifted(self) -> TensorMapSpec:
        """Of the same array."""
        (columns, rows, heads, batch), (row, head, group) = self.dims, self.strides_bytes
        return TensorMapSpec((columns, rows, heads, rows + 1, batch), (row, head, row, group), self.box, self.dtype)

    @property
    def shift_bytes(self) -> int:
        """How far in front of the array the map begins."""
        return self.dims[1] * self.strides_bytes[0] if len(self.dims) > _RANK else 0


def objection(dims: Sequence[int], strides: Sequence[int], *, shifted: bool = False) -> str:
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
    if shifted and dims[1] > 1 and dims[1] * 2 * strides[0] >= _MAX_SHIFT:
        return f"rows take {dims[1] * 2 * strides[0]} bytes, not below 2**33"
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
