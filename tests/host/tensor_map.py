"""What stands for a CUtensorMap in a launch on the CPU: the same 16 words of 8 bytes, with a layout of our own.

word      what                                        cuda/async.cpp reads them
0         address of the first element
1-4       dimensions: columns, rows, heads, batches, of five starts instead of batches
5-7       bytes between rows, heads, batches or starts
8, 9      columns and rows of the box
10        bytes of an element
11        a magic number
12, 13    of five dimensions: batches, and bytes between them; of four 1 and 0
14        how many dimensions
15        0
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

BYTES = 128
_MAGIC = 0x3270614D726F7354
_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def pack(pointer: int, dims: Sequence[int], strides_bytes: Sequence[int], box: Sequence[int], dtype: str) -> bytes:
    """The words of a map of four or five dimensions, columns first; ValueError as the driver would.

    Of 16-bit elements with 128-byte swizzle, of float32 without.
    """
    item = _ELEMENT_BYTES[dtype]
    rank = len(dims)
    box = (*box, *(1,) * (rank - len(box)))
    if rank not in (4, 5) or not all(1 <= n <= 1 << 32 for n in dims):
        raise ValueError(f"four or five dimensions of 1 to 2^32 are needed, not {dims}")
    if len(strides_bytes) != rank - 1 or not all(s % 16 == 0 and 0 <= s < 1 << 40 for s in strides_bytes):
        raise ValueError(
            f"a stride for each dimension but one is needed, multiples of 16 below 2^40, not {strides_bytes}"
        )
    if pointer % 16:
        raise ValueError(f"{pointer:#x} is not 16-byte aligned")
    if not 1 <= box[1] <= 256 or any(n != 1 for n in box[2:]):
        raise ValueError(f"a box has 1 to 256 rows of one head, not {box}")
    if (box[0] * item != 128) if item == 2 else (box[0] % 4 or not 4 <= box[0] <= 256):
        raise ValueError(f"a row of a box has 128 bytes, or 4 to 256 floats in fours, not {box[0]} of {item} bytes")
    fifth = (dims[4], strides_bytes[3]) if rank == 5 else (1, 0)
    four = (pointer, *dims[:4], *strides_bytes[:3])
    return struct.pack("<16Q", *four, box[0], box[1], item, _MAGIC, *fifth, rank, 0)


def encode(spec: Any, pointer: int) -> bytes:
    """What the driver does with a TensorMapSpec of fa2cupy.jit.tensor_map."""
    return pack(pointer, spec.dims, spec.strides_bytes, spec.box, spec.dtype)
