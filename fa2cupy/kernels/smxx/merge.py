"""Pieces of attention become the whole: cuda_src/smxx/merge.cu, and merge_bwd.cu for the gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import common
from fa2cupy.kernels.launch import CompileJob, KernelLaunch, Pointer
from fa2cupy.kernels.params import MergeBwdParams, MergeParams, pack_strides
from fa2cupy.problem import Strides

__all__ = ["MergeProblem", "compile_jobs", "launch"]

_WARPS = 16
_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
_INPUTS = ("outs", "lses")
# Direction -> source, kernel, struct, names of the arrays in the order of a call; plural: one for each piece.
_KERNELS = {
    False: ("smxx/merge.cu", "merge", MergeParams, (*_INPUTS, "out", "lse")),
    True: (
        "smxx/merge_bwd.cu",
        "merge_bwd",
        MergeBwdParams,
        (*_INPUTS, "out", "lse", "dout", "dlse", "douts", "dlses"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MergeProblem:
    """What is merged: `pieces` of out (batch, rows, num_heads, cols) and lse (batch, num_heads, rows).

    strides: in elements, by the names of the kernel's struct, along batch, rows and heads, of lse along batch, heads
    and rows. aligned: rows of what is like out start at multiples of 16 bytes, and are as long. backward: its
    gradients.
    """

    pieces: int
    batch: int
    rows: int
    num_heads: int
    cols: int
    dtype: str
    strides: tuple[tuple[str, Strides], ...]
    aligned: bool
    backward: bool = False


def launch(problem: MergeProblem, device: DeviceInfo) -> KernelLaunch:
    """Its pointers: outs, lses, then out and lse, which the forward writes; of a backward then dout, dlse, and douts
    and dlses, which it writes.
    """
    source, name, struct, names = _KERNELS[problem.backward]
    params = struct(batch=problem.batch, num_rows=problem.rows, num_heads=problem.num_heads, cols=problem.cols)
    for array, strides in problem.strides:
        setattr(params, f"{array}_strides", pack_strides("lse" if "lse" in array else array, strides))
    pointers: list[Pointer] = []
    for array in names:
        for piece in range(problem.pieces if array.endswith("s") else 1):
            pointers.append(Pointer(getattr(struct, array).offset + 8 * piece, len(pointers), 0))
    defines = _defines(problem.dtype, problem.pieces, problem.cols, problem.aligned, struct)
    rows = 8 * -(-problem.rows // 8) * problem.num_heads * problem.batch  # eight neighbours go together
    config = LaunchConfig((-(-rows // int(defines["FA2_BLOCK_M"])), 1, 1), (32 * _WARPS, 1, 1))
    return KernelLaunch(source, name, common.arch_of(device), defines, config, bytes(params), tuple(pointers))


def _defines(
    dtype: str, pieces: int, cols: int, aligned: bool, struct: type[ctypes.Structure]
) -> Mapping[str, int | str]:
    """FA2_BLOCK_M: rows of a thread block, each for as many lanes as have 16 bytes of it, 32 at most."""
    chunks = -(-cols * _ITEMSIZE[dtype] // 16)
    lanes = min(32, 1 << (chunks - 1).bit_length())
    return common.common_defines(dtype, 16, 0, aligned) | {
        "FA2_BLOCK_M": 32 * _WARPS // lanes,
        "FA2_BLOCK_N": 16,
        "FA2_NUM_WARPS": _WARPS,
        "FA2_CAUSAL": 0,
        "FA2_PIECES": pieces,
        "FA2_FLOAT32": int(dtype == "float32"),
        "FA2_PARAMS_BYTES": ctypes.sizeof(struct),
    }


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Of two pieces and of four, of head_dim_v 64 and 128; in float32 beside bfloat16."""
    jobs: list[CompileJob] = []
    dtypes: Sequence[str] = (dtype, "float32") if dtype == "bfloat16" else (dtype,)
    for each in dtypes:
        for pieces, cols in ((2, 64), (4, 128)):
            for source, name, struct, *_ in _KERNELS.values():
                label = f"{name} {each} {pieces} pieces head_dim {cols}"
                jobs.append(CompileJob(source, name, arch, _defines(each, pieces, cols, True, struct), label, 0, 0))
    return jobs
