"""What a plan is made of: kernel launches as values, and how they become something that can be called."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from fa2cupy import env, jit
from fa2cupy.errors import InvalidArgument
from fa2cupy.jit import tensor_map
from fa2cupy.jit.driver import DeviceInfo, Launcher
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.jit.tensor_map import TensorMapSpec
from fa2cupy.kernels.params import FillParams, Shape, pack_strides
from fa2cupy.kernels.tiles import BwdTile, BwdTileSm90, FwdTile, FwdTileSm90, padded_head_dim
from fa2cupy.problem import AttentionProblem

__all__ = [
    "BLOCKS_PER_SM",
    "CompileJob",
    "KernelLaunch",
    "Plan",
    "TensorMapArgument",
    "architecture",
    "choose_tile",
    "common_defines",
    "fill_empty",
    "head_dim_label",
    "heads_per_section",
    "map_dims",
    "padded_head_dims",
]

Launchable = Callable[[tuple[int, ...], int], None]
_TileSm80 = TypeVar("_TileSm80", FwdTile, BwdTile)
_TileSm90 = TypeVar("_TileSm90", FwdTileSm90, BwdTileSm90)

SM90_ARCH = "sm_90a"  # of the kernels with wgmma and bulk copies

BLOCKS_PER_SM = 4  # thread blocks for each multiprocessor that a section of a causal problem is to have
_FILL_THREADS = 256
_SHORT_SECTION = 16  # tiles
_ROUNDS = 64


@dataclass(frozen=True, slots=True)
class CompileJob:
    """One binary to compile: a row of a tile table for one architecture and one choice of defines."""

    source: str
    name: str
    arch: str
    defines: Mapping[str, int | str]
    label: str
    shared_mem_bytes: int
    allowed_spill_bytes: int


class TensorMapArgument(NamedTuple):
    """A tensor map in a params struct: its byte offset there, and of what array (position among the call's pointers,
    bytes to add)."""

    offset: int
    position: int
    add_bytes: int
    spec: TensorMapSpec


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One kernel of a plan.

    params: the packed struct. It starts with its tensor maps, then come its pointers. pointers: for each of these
    (position among the call's pointers, bytes to add), position -1 for a null pointer.
    """

    source: str
    name: str
    arch: str
    defines: Mapping[str, int | str]
    config: LaunchConfig
    params: bytes = field(repr=False)
    pointers: tuple[tuple[int, int], ...]
    tensor_maps: tuple[TensorMapArgument, ...] = ()

    def pack(
        self, pointers: tuple[int, ...], encode: Callable[[TensorMapSpec, int], bytes] = tensor_map.encode
    ) -> bytearray:
        """The struct with its maps and pointers; what binding does, for those who launch by other means.

        `encode` makes the maps: the driver, unless it is replaced.
        """
        packed = bytearray(self.params)
        for offset, position, add_bytes, spec in self.tensor_maps:
            packed[offset : offset + tensor_map.SIZE] = encode(spec, pointers[position] + add_bytes)
        words = memoryview(packed).cast("Q")
        for place, (position, offset) in enumerate(self.pointers, len(self.tensor_maps) * tensor_map.SIZE // 8):
            words[place] = pointers[position] + offset if position >= 0 else 0
        return packed


@dataclass(frozen=True)
class Plan:
    """How a problem is computed: the launches, in stream order, and the workspace that they share.

    tile: the main kernel's. why_not_sm90: why the sm_80 kernel was chosen; empty where the sm_90 kernel, or a tile,
    was.
    """

    problem: AttentionProblem
    launches: tuple[KernelLaunch, ...]
    workspace_bytes: int
    tile: FwdTile | FwdTileSm90 | BwdTile | BwdTileSm90
    why_not_sm90: str

    @property
    def family(self) -> str:
        """'sm80' or 'sm90', as FA2CUPY_KERNEL calls them."""
        return "sm90" if isinstance(self.tile, (FwdTileSm90, BwdTileSm90)) else "sm80"

    def __str__(self) -> str:
        kernel = f"  sm_{self.family[2:]} kernel"
        lines = [
            f"{type(self).__name__}({self.problem}",
            f"  workspace: {self.workspace_bytes} bytes",
            f"{kernel}: {self.why_not_sm90}" if self.why_not_sm90 else kernel,
        ]
        for launch in self.launches:
            defines = " ".join(f"{key[4:].lower()}={value}" for key, value in launch.defines.items())
            lines.append(f"  {launch.name} {launch.arch} {launch.config} {defines}")
        return "\n".join(lines) + ")"

    def bind(self, device_index: int) -> Launchable:
        """Compile and load every kernel on a device; then launching takes only pointers and a stream.

        pointers: of the call's arrays in the plan's order, the workspace last. Errors: CompilationError, LaunchError.
        """
        jit.kernels([(each.source, each.name, each.arch, each.defines) for each in self.launches], context=str(self))
        bound = tuple(
            (_BoundWithMaps if launch.tensor_maps else _Bound)(launch, device_index, str(self))
            for launch in self.launches
        )
        if len(bound) == 1:
            return bound[0]

        def launch_all(pointers: tuple[int, ...], stream: int) -> None:
            for launch in bound:
                launch(pointers, stream)

        return launch_all


class _Bound:
    """A KernelLaunch on a device. Each thread packs a copy of the params; the driver copies them at the launch."""

    def __init__(self, launch: KernelLaunch, device_index: int, context: str) -> None:
        kernel = jit.kernel(launch.source, launch.name, launch.arch, launch.defines, context=context)
        function = kernel.function(device_index, launch.config.shared_mem_bytes)
        self._launcher = Launcher(function, launch.config)
        self._params, self._pointers, self._count = launch.params, launch.pointers, len(launch.pointers)
        self._as_given = launch.pointers == tuple((place, 0) for place in range(self._count))
        self._local = threading.local()

    def __call__(self, pointers: tuple[int, ...], stream: int) -> None:
        try:
            words, address = self._local.packed
        except AttributeError:
            words, address = self._pack()
        if not self._as_given:
            pointers = tuple([pointers[at] + offset if at >= 0 else 0 for at, offset in self._pointers])
        words[: self._count] = pointers
        self._launcher(address, stream)

    def _pack(self) -> tuple[ctypes.Array[ctypes.c_uint64], int]:
        words = (ctypes.c_uint64 * (len(self._params) // 8)).from_buffer_copy(self._params)
        self._local.packed = words, ctypes.addressof(words)
        return self._local.packed  # type: ignore[no-any-return]


class _BoundWithMaps(_Bound):
    """A KernelLaunch whose struct has tensor maps. Those of arrays that the thread's last call had too are still there.

    Most calls have new outputs at most, and the allocator gives them the same workspace again; a map that is needed
    again is found in the cache of `tensor_map.encode`.
    """

    def __init__(self, launch: KernelLaunch, device_index: int, context: str) -> None:
        super().__init__(launch, device_index, context)
        self._maps = tuple(
            (index, slice(offset, offset + tensor_map.SIZE), position, add_bytes, spec)
            for index, (offset, position, add_bytes, spec) in enumerate(launch.tensor_maps)
        )
        first = len(self._maps) * tensor_map.SIZE // 8
        self._plain = tuple((first + place, *pointer) for place, pointer in enumerate(launch.pointers))

    def __call__(self, pointers: tuple[int, ...], stream: int) -> None:
        try:
            words, content, address, last = self._local.with_maps
        except AttributeError:
            words, content, address, last = self._pack_with_maps()
        for index, place, position, add_bytes, spec in self._maps:
            pointer = pointers[position]
            if pointer != last[index]:
                content[place] = tensor_map.encode(spec, pointer + add_bytes)
                last[index] = pointer
        for word, position, add_bytes in self._plain:
            words[word] = pointers[position] + add_bytes if position >= 0 else 0
        self._launcher(address, stream)

    def _pack_with_maps(self) -> tuple[ctypes.Array[ctypes.c_uint64], memoryview, int, list[int]]:
        buffer = bytearray(self._params)
        words = (ctypes.c_uint64 * (len(buffer) // 8)).from_buffer(buffer)
        self._local.with_maps = words, memoryview(buffer), ctypes.addressof(words), [-1] * len(self._maps)
        return self._local.with_maps  # type: ignore[no-any-return]


def architecture(device: DeviceInfo) -> str:
    major, minor = device.cc
    return f"sm_{major}{minor}"


def common_defines(dtype: str, head_dim: int, head_dim_v: int, aligned: bool) -> dict[str, int | str]:
    """What every source reads, of `padded_head_dims`."""
    defines: dict[str, int | str] = {"FA2_BF16": int(dtype == "bfloat16"), "FA2_HEAD_DIM": head_dim}
    if head_dim_v:
        defines["FA2_HEAD_DIM_V"] = head_dim_v
    return defines | {"FA2_ALIGNED": int(aligned)}


def padded_head_dims(problem: AttentionProblem, split: int = 1) -> tuple[int, int]:
    """head_dim and head_dim_v that kernels are compiled for. If the problem's are the same, head_dim_v is 0."""
    head_dim_v = 0 if problem.head_dim_v == problem.head_dim else padded_head_dim(problem.head_dim_v, split)
    return padded_head_dim(problem.head_dim, split), head_dim_v


def head_dim_label(head_dim: int, head_dim_v: int) -> str:
    """'head_dim 128', or 'head_dim 192/128'."""
    return f"head_dim {head_dim}" + (f"/{head_dim_v}" if head_dim_v else "")


def map_dims(problem: AttentionProblem, name: str, rows: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int]]:
    """(columns, rows, heads, batch) of an array and the strides of its rows, heads and batches, as `TensorMapSpec.of`
    takes them; of the queries the last `rows`."""
    p = problem
    columns = p.head_dim_v if name in ("v", "dv", "out", "dout") else p.head_dim
    length, heads = (p.seqlen_k, p.num_heads_k) if name in ("k", "v", "dk", "dv") else (rows, p.num_heads)
    batch, row, head = dict(p.strides)[name]
    return (columns, length, heads, p.batch), (row, head, batch)


def choose_tile(
    problem: AttentionProblem,
    device: DeviceInfo,
    family: str | None,
    tile_sm80: _TileSm80,
    tile_sm90: _TileSm90,
    mapped: Sequence[str],
    why_not_sm90: str,
) -> tuple[_TileSm80 | _TileSm90, str]:
    """The tile to use, and what speaks against the sm_90 kernel's, or the empty string.

    family: 'sm80' or 'sm90' (FA2CUPY_KERNEL), or None for the best; InvalidArgument if it asks for the impossible.
    mapped: arrays that the sm_90 kernel reaches by bulk tensor copies. why_not_sm90: what speaks against it beside all
    that.
    """
    why_not_sm90 = _why_not_sm90(problem, device, family, mapped) or why_not_sm90
    return (tile_sm80 if why_not_sm90 else tile_sm90), why_not_sm90


def _why_not_sm90(problem: AttentionProblem, device: DeviceInfo, family: str | None, mapped: Sequence[str]) -> str:
    if family == "sm80":
        return f"{env.KERNEL.name}=sm80"
    objection = ""
    if device.cc != (9, 0):
        named = f" ({device.name})" if device.name else ""
        objection = f"device {device.index}{named} has compute capability {device.cc[0]}.{device.cc[1]}, not 9.0"
    elif problem.head_dim % 8:
        objection = f"head_dim {problem.head_dim} is not a multiple of 8"
    elif problem.head_dim_v % 8:
        objection = f"head_dim_v {problem.head_dim_v} is not a multiple of 8"
    else:
        objections = ((name, tensor_map.objection(*map_dims(problem, name, problem.seqlen_q))) for name in mapped)
        objection = next((f"{name}'s {why}" for name, why in objections if why), "")
        if not objection and not problem.aligned:  # head dims and strides are
            objection = f"an array starts at an address that is not a multiple of {tensor_map.ALIGNMENT} bytes"
    if objection and family == "sm90":
        raise InvalidArgument(f"{env.KERNEL.name}=sm90 is impossible here: {objection}; use sm80, or unset it")
    return objection


def heads_per_section(device: DeviceInfo, causal: bool, heads: int, blocks_per_head: int, bytes_per_head: int) -> int:
    """Heads whose blocks are interleaved, so that a causal problem's long blocks start first.

    As many as fit the L2 cache, but at least `BLOCKS_PER_SM` blocks for each multiprocessor. All sections are of about
    the same size: the last one's long blocks, if few, would leave most of the GPU idle in the end.
    """
    if not causal:
        return 1
    fitting = device.l2_bytes // max(1, bytes_per_head)
    wanted = max(1, fitting, math.ceil(BLOCKS_PER_SM * device.sm_count / blocks_per_head))
    return -(-heads // max(1, heads // wanted))


def heads_per_even_section(workers: int, causal: bool, heads: int, tiles_per_head: int) -> int:
    """The same where `workers` (thread blocks, one for each multiprocessor, or clusters of them) take tiles from a
    list: as few as give each a tile and a half, and if possible as many in every section, since sections alternate in
    direction.

    Of short sequences as few as have `_SHORT_SECTION` tiles, if that shares them out as well: then the tiles that need
    a head's keys run at the same time, and memory is read evenly.
    """
    if not causal:
        return 1
    least = math.ceil(1.5 * workers / tiles_per_head)
    even = (n for n in range(least, min(2 * least, heads) + 1) if heads % n == 0)
    usual = next(even, -(-heads // max(1, heads // least)))
    if tiles_per_head > _SHORT_SECTION:
        return usual
    enough = _largest_share(workers, heads, tiles_per_head, usual) + 0.005
    fewer = (n for n in range(-(-_SHORT_SECTION // tiles_per_head), usual) if heads % n == 0)
    return next((n for n in fewer if _largest_share(workers, heads, tiles_per_head, n) <= enough), usual)


def _largest_share(workers: int, heads: int, tiles_per_head: int, section: int) -> float:
    """Of the work of the thread blocks the largest, relative to the mean.

    `Schedule` in sm90/flash_fwd.cu shares it out. A tile's work is taken to grow by one from tile to tile of a head.
    Enough rounds are looked at to tell.
    """
    tiles, blocks = heads * tiles_per_head, min(workers, heads * tiles_per_head)
    linear = np.arange(min(tiles, _ROUNDS * blocks))
    rounds, place = np.divmod(linear, blocks)
    block = np.where(rounds % 2 == 0, place, blocks - 1 - place)
    sections = linear // (section * tiles_per_head)
    long_first = ((heads - 1) // section - sections) % 2 == 0
    index = linear % (section * tiles_per_head) // np.minimum(section, heads - sections * section)
    work = np.bincount(block, np.where(long_first, tiles_per_head - index, index + 1))
    return float(work.max() / work.mean())


def empty_rows(problem: AttentionProblem) -> int:
    """Leading query rows that see no key. The kernels never see them."""
    if problem.seqlen_k == 0:
        return problem.seqlen_q
    return max(0, problem.seqlen_q - problem.seqlen_k) if problem.causal else 0


def shape_params(problem: AttentionProblem, seqlen_q: int, section: int) -> Shape:
    return Shape(
        problem.batch,
        problem.num_heads,
        problem.num_heads_k,
        seqlen_q,
        problem.seqlen_k,
        problem.head_dim,
        section,
    )


def fill_empty(
    problem: AttentionProblem, arch: str, name: str, position: int, rows: int, heads: int, lse_position: int = -1
) -> tuple[KernelLaunch, ...]:
    """Zeros in the first `rows` rows of a result, -inf in its lse; nothing to launch where there are none."""
    head_dim = problem.head_dim_v if name in ("out", "dv") else problem.head_dim
    pieces = -(-head_dim // 16)
    threads = problem.batch * rows * heads * pieces
    if threads == 0:
        return ()
    strides = dict(problem.strides)
    params = FillParams(
        0,
        0,
        pack_strides(name, strides[name]),
        pack_strides("lse", strides["lse"]),
        problem.batch,
        rows,
        heads,
        head_dim,
    )
    defines = common_defines(problem.dtype, 16, 0, False)
    defines |= {"FA2_FILL_THREADS": _FILL_THREADS, "FA2_PARAMS_BYTES": len(bytes(params))}
    config = LaunchConfig((-(-threads // _FILL_THREADS), 1, 1), (_FILL_THREADS, 1, 1))
    launch = KernelLaunch(
        "smxx/fill_empty.cu", "fill_empty", arch, defines, config, bytes(params), ((position, 0), (lse_position, 0))
    )
    return (launch,)
