"""What of each block of a mask is seen, and the bits of partial ones: cuda_src/smxx/classify_blocks.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

from fa2cupy.block_mask.lists import BLOCK, blocks_of
from fa2cupy.frameworks.base import TensorRef
from fa2cupy.jit import source as source_module
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.jit.source import Source
from fa2cupy.kernels import common
from fa2cupy.kernels.common import Where
from fa2cupy.kernels.launch import KernelLaunch, Pointer
from fa2cupy.kernels.params import composed
from fa2cupy.tracing import UserFunction
from fa2cupy.tracing.params import captures_of, struct_of

__all__ = ["BITS", "KINDS", "BlockGrid", "Seeing", "launch"]

_KERNEL = ("smxx/classify_blocks.cu", "classify_blocks")
_WARPS = 4
_SHARED_BYTES = 16 * BLOCK + 4 * 2 * _WARPS  # of `SharedMemory` there
KINDS, BITS = 0, 1  # the steps


class BlockGrid(ctypes.Structure):
    """The twin of the struct in cuda_src/common/blocks.cuh, as that below."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("masks", "query_blocks", "key_blocks"))


class ClassifyBlocksParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("kinds", "numbers", "bits")),
        ("grid", BlockGrid),
        *((name, ctypes.c_int32) for name in ("num_heads", "seqlen_q", "seqlen_k", "step")),
    )


_STRIDES = ("batch_stride", "head_stride", "row_stride", "key_stride")


class SeenArrayParams(ctypes.Structure):
    """The twin of the struct in cuda_src/common/seen.cuh, as that below."""

    _fields_ = (("seen", ctypes.c_uint64), *((name, ctypes.c_int64) for name in _STRIDES))


class SeenBlocksParams(ctypes.Structure):
    _fields_ = (
        ("seen", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_int32) for name in ("block_q", "block_k", "first", "last")),
    )


@dataclass(frozen=True, slots=True)
class Seeing:
    """What says which keys queries see: its block of parameters, and where in it pointers are (offset, position among
    the pointers of the call, bytes to add). function: of a mask function, None of an array.
    """

    block: ctypes.Structure
    pointers: tuple[Pointer, ...]
    function: UserFunction | None = None

    @property
    def kind(self) -> int:
        """FA2_SEEN_BY."""
        return 2 if self.function is not None else int(isinstance(self.block, SeenBlocksParams))

    @classmethod
    def by_array(cls, strides: tuple[int, int, int, int], position: int) -> Seeing:
        """A bool array, of these strides in elements."""
        return cls(SeenArrayParams(0, *strides), (Pointer(0, position, 0),))

    @classmethod
    def by_blocks(
        cls, strides: tuple[int, int, int, int], size: tuple[int, int], band: tuple[int, int], position: int
    ) -> Seeing:
        """Bools of blocks of that size; query i sees none but the keys from i + band[0] to i + band[1]."""
        return cls(SeenBlocksParams(0, *strides, *size, *band), (Pointer(0, position, 0),))

    @classmethod
    def by_function(
        cls, function: UserFunction, values: dict[str, object], refs: dict[str, TensorRef], first: int
    ) -> Seeing:
        """A function of the user's own, whose arrays, in the order of their names, are at positions from `first` on."""
        struct = struct_of(function.captures)
        block = struct.from_buffer_copy(captures_of(function.captures, values, refs))
        pointers: list[Pointer] = []
        for each in function.captures:
            if each.rank is not None:
                getattr(block, each.name).data = 0
                pointers.append(Pointer(getattr(struct, each.name).offset, first + len(pointers), 0))
        return cls(block, tuple(pointers), function)


def launch(
    arch: str, seeing: Seeing, shape: tuple[int, int, int, int], step: int, places: Mapping[str, Where]
) -> KernelLaunch:
    """shape: (batch, num_heads, seqlen_q, seqlen_k) of the mask. places: of kinds, numbers and bits."""
    batch, heads, seqlen_q, seqlen_k = shape
    grid = BlockGrid(batch * heads, blocks_of(seqlen_q), blocks_of(seqlen_k))
    own = ClassifyBlocksParams(grid=grid, num_heads=heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k, step=step)
    has_block = ctypes.sizeof(seeing.block) > 0
    struct = composed(ClassifyBlocksParams, (type(seeing.block),)) if has_block else ClassifyBlocksParams
    params = struct(own, seeing.block) if has_block else own
    start = getattr(struct, type(seeing.block).__name__).offset if has_block else 0
    pointers = [Pointer(getattr(ClassifyBlocksParams, name).offset, *where) for name, where in places.items()]
    pointers += [Pointer(start + offset, position, add) for offset, position, add in seeing.pointers]
    source: str | Source = _KERNEL[0]
    if seeing.function is not None:
        source = source_module.load(_KERNEL[0], headers={"user/mask_mod.cuh": seeing.function.header().encode()})
    defines = common.common_defines("float16", 16, 0, True) | {
        "FA2_BLOCK_M": BLOCK,
        "FA2_BLOCK_N": BLOCK,
        "FA2_NUM_WARPS": _WARPS,
        "FA2_SEEN_BY": seeing.kind,
        "FA2_PARAMS_BYTES": ctypes.sizeof(struct),
        "FA2_SHARED_BYTES": _SHARED_BYTES,
    }
    config = LaunchConfig(
        (grid.masks * grid.query_blocks * grid.key_blocks, 1, 1), (32 * _WARPS, 1, 1), shared_mem_bytes=_SHARED_BYTES
    )
    return KernelLaunch(source, _KERNEL[1], arch, defines, config, bytes(params), tuple(pointers))
