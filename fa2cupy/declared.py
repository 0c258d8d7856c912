"""Combinations that are refused on purpose, all of them: code raises them from here, docs/usage.md lists them.

What is not in this table either works or is "not supported yet".
"""

from __future__ import annotations

from dataclasses import dataclass

from fa2cupy.errors import Fa2Error, InvalidArgument, InvalidType, UnsupportedDevice

__all__ = [
    "BESIDE_BLOCK_MASK",
    "BHSD_OF_PACKED",
    "DECLARED",
    "DROPOUT_OF_CACHE",
    "FLOAT32_ON_GPU",
    "GPU_TOO_OLD",
    "RIGHT_OF_CAUSAL",
    "SEGMENTS_OF_PACKED",
    "Declared",
]


@dataclass(frozen=True, slots=True)
class Declared:
    """One declared error.

    what: is refused; why: or what to do instead; message: a format string.
    keyword: the keyword of `keywords.py` with which it comes, None if it is there already.
    """

    what: str
    why: str
    kind: type[Fa2Error]
    message: str
    keyword: str | None = None

    def error(self, **values: object) -> Fa2Error:
        return self.kind(self.message.format(**values))


FLOAT32_ON_GPU = Declared(
    "float32 or float64 arrays on a GPU",
    "for now; on the CPU they work",
    InvalidType,
    "{name} has dtype {dtype}, which is not supported: on a GPU (for now) float16, bfloat16",
)
GPU_TOO_OLD = Declared(
    "a GPU below sm_80",
    "the kernels need its tensor core and copy instructions",
    UnsupportedDevice,
    "device {index} ({name}) has compute capability {major}.{minor}: "
    "8.0 or newer is needed (A100, RTX 30 series, or later)",
)
RIGHT_OF_CAUSAL = Declared(
    "a positive right window with `causal=True`",
    "causal makes right 0",
    InvalidArgument,
    "window_size={value} with causal=True: causal makes the right end 0, so -1 or 0 is needed",
)
BHSD_OF_PACKED = Declared(
    '`layout="bhsd"` with packed sequences',
    "packed arrays are (total, heads, head_dim)",
    InvalidArgument,
    "layout='bhsd' is not for packed sequences, whose arrays are (total, heads, head_dim): leave it out",
)
SEGMENTS_OF_PACKED = Declared(
    "`segment_ids` with packed sequences",
    "cu_seqlens say where they are already",
    InvalidArgument,
    "segment_ids is given beside cu_seqlens, which say where sequences are already: give one of them",
)
BESIDE_BLOCK_MASK = Declared(
    "a BlockMask with `causal=` or `window_size=`",
    "it has its own: give them to the BlockMask",
    InvalidArgument,
    "{name}={value} is given beside a BlockMask, which has its own: give it to the BlockMask",
)
DROPOUT_OF_CACHE = Declared(
    "dropout with a KVCache",
    "a cache serves inference",
    InvalidArgument,
    "dropout_p={value} is not for a KVCache: leave it out",
)
_TO_COME = (
    Declared(
        "`precision=` with other arrays than float32",
        "it chooses how float32 is computed",
        InvalidArgument,
        "precision={value!r} is for float32 arrays, and {name} has dtype {dtype}: leave it out",
        "precision",
    ),
)

DECLARED = (
    FLOAT32_ON_GPU, GPU_TOO_OLD, RIGHT_OF_CAUSAL, BHSD_OF_PACKED, SEGMENTS_OF_PACKED, BESIDE_BLOCK_MASK,
    DROPOUT_OF_CACHE,
    *_TO_COME,
)  # fmt: skip
