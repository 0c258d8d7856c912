"""Combinations that are refused on purpose, all of them: code raises them from here, docs/usage.md lists them.

What is not in this table either works or is "not supported yet".
"""

from __future__ import annotations

from dataclasses import dataclass

from fa2cupy.errors import Fa2Error, InvalidArgument, UnsupportedDevice

__all__ = [
    "BESIDE_BLOCK_MASK",
    "BHSD_OF_PACKED",
    "DECLARED",
    "DROPOUT_OF_CACHE",
    "GPU_TOO_OLD",
    "PRECISION_OF_OTHERS",
    "RIGHT_OF_CAUSAL",
    "SEGMENTS_OF_PACKED",
    "TOO_WIDE",
    "Declared",
]


@dataclass(frozen=True, slots=True)
class Declared:
    """One declared error.

    what: is refused; why: or what to do instead; message: a format string.
    """

    what: str
    why: str
    kind: type[Fa2Error]
    message: str

    def error(self, **values: object) -> Fa2Error:
        return self.kind(self.message.format(**values))


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
PRECISION_OF_OTHERS = Declared(
    "`precision=` with other arrays than float32",
    "it chooses how float32 is computed",
    InvalidArgument,
    "precision={value!r} is for float32 arrays, and {name} has dtype {dtype}: leave it out",
)
TOO_WIDE = Declared(
    "the backward of float32 above head_dim 224 and of float64 above 160 on GPUs with 99 KB of shared memory "
    "(sm_86, sm_89, sm_120), and of float64 above 192 on those with 163 KB (sm_80, sm_87)",
    "its tiles do not fit into shared memory; sm_90 and sm_100 have room for all",
    InvalidArgument,
    "{name} {width} of {dtype} arrays needs more shared memory than the {kilobytes} KB of this GPU: {most} is the most",
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

DECLARED = (
    GPU_TOO_OLD, RIGHT_OF_CAUSAL, BHSD_OF_PACKED, SEGMENTS_OF_PACKED, PRECISION_OF_OTHERS, TOO_WIDE, BESIDE_BLOCK_MASK,
    DROPOUT_OF_CACHE,
)  # fmt: skip
