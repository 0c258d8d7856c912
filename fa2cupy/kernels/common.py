"""What all kernels are told of a problem: defines, parameters, pointers. And a KernelLaunch, with what specs add."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels.launch import KernelLaunch, Pointer, TensorMapArgument
from fa2cupy.kernels.listed import Block
from fa2cupy.kernels.params import Shape, composed
from fa2cupy.kernels.tiles import padded_head_dim
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import Row

__all__ = [
    "FORWARD_ARRAYS",
    "Where",
    "arch_of",
    "common_defines",
    "forward_label",
    "head_dim_label",
    "kernel_launch",
    "mean_seqlen_q",
    "padded_head_dims",
    "pointer_names",
    "query_rows",
    "shape_params",
    "skipped_bytes",
]

FORWARD_ARRAYS = ("q", "k", "v", "out", "lse")

Where = tuple[int, int]  # position among the call's pointers, bytes to add


def arch_of(device: DeviceInfo) -> str:
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


def forward_label(dtype: str, head_dim: int, head_dim_v: int, causal: bool, tile: Row) -> str:
    """Of a `CompileJob`."""
    kind = "causal" if causal else "full"
    shape = f"{tile.block_m}x{tile.block_n}x{tile.num_warps}"
    return f"forward {dtype} {head_dim_label(head_dim, head_dim_v)} {kind} {shape}"


def skipped_bytes(problem: AttentionProblem, empty: int) -> dict[str, int]:
    """Bytes that `empty` query rows take, of each array that has query rows; of keys, those that no query sees."""
    sizes = {}
    for name, (_, first, second) in problem.strides:
        if name == "lse":
            sizes[name] = empty * 4 * second
        else:
            sizes[name] = (problem.empty_keys if name in ("k", "v", "dk", "dv") else empty) * 2 * first
    return sizes


def shape_params(problem: AttentionProblem, seqlen_q: int, section: int) -> Shape:
    return Shape(
        problem.batch,
        problem.num_heads,
        problem.num_heads_k,
        seqlen_q,
        problem.seqlen_k - problem.empty_keys,
        problem.head_dim,
        section,
    )


def query_rows(problem: AttentionProblem) -> int:
    """Rows of q, of all sequences or of the whole batch."""
    is_packed = problem.lengths is not None and problem.lengths.packed_q
    return problem.seqlen_q * (1 if is_packed else problem.batch)


def mean_seqlen_q(problem: AttentionProblem) -> int:
    """Query rows of a sequence that see a key; of packed ones, whose lengths nobody knows here, if all were as long."""
    if problem.lengths is not None and problem.lengths.packed_q:
        return -(-problem.seqlen_q // max(1, problem.batch))
    return problem.seqlen_q - problem.empty_rows


def pointer_names(problem: AttentionProblem, dense: Iterable[str]) -> tuple[str, ...]:
    """Of the arrays of a call, in the order of its pointers; `dense`: those that every call has."""
    return *dense, *problem.extra_results, *problem.extra_arrays


def kernel_launch(
    problem: AttentionProblem,
    kernel: tuple[str, str],
    arch: str,
    defines: Mapping[str, int | str],
    config: LaunchConfig,
    params: ctypes.Structure,
    pointers: Mapping[str, Where],
    names: Sequence[str],
    tensor_maps: tuple[TensorMapArgument, ...] = (),
    listed: tuple[Block | None, ...] = (),
) -> KernelLaunch:
    """A launch of a kernel (its source and name), with the defines, blocks of parameters and arrays of the specs that
    reach it, and with those of `listed`, such as the lists that it takes its tiles from (None: there are none).

    pointers: by the names of fields of `params` or of a block. names: `pointer_names` of the call.
    """
    source, name = kernel
    struct = type(params)
    reaching = [spec for spec in problem.specs if spec.reaches(source)]
    blocks = [(spec, block) for spec in reaching if (block := spec.params()) is not None]
    own = [(each, each.params()) for each in listed if each is not None]
    if blocks or own:
        parts = [block for _, block in (*blocks, *own)]
        struct = composed(struct, tuple(map(type, parts)))
        params = struct(params, *parts)
    placed = [Pointer(getattr(struct, field).offset, *where) for field, where in pointers.items()]
    for spec, block in blocks:
        start = getattr(struct, type(block).__name__).offset
        for field, where in spec.pointers(names).items():
            placed.append(Pointer(start + getattr(type(block), field).offset, *where))
    defines = dict(defines)
    for spec in reaching:
        defines |= spec.defines()
    for each, block in own:
        defines |= each.defines()
        start = getattr(struct, type(block).__name__).offset
        for field, offset in each.offsets.items():
            placed.append(Pointer(start + getattr(type(block), field).offset, len(names), offset))
    if reaching or own:
        defines["FA2_PARAMS_BYTES"] = ctypes.sizeof(struct)
    return KernelLaunch(source, name, arch, defines, config, bytes(params), tuple(placed), tensor_maps)
