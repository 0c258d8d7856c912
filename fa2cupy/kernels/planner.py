"""From a problem and a device to a plan: the first kernel that nothing speaks against. And plans that are ready to run.

`FORWARD` and `BACKWARD` list the main kernels, the best first, and each says for itself what it cannot do (`objection`)
and which of its rows it would take (`rows`). A row may be refused by a `Spec` of the problem, and a whole kernel by the
compiler that is at hand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

from fa2cupy import env, jit, log
from fa2cupy.errors import InvalidArgument
from fa2cupy.jit import driver
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import backward, block_lists, common
from fa2cupy.kernels.backward import Backward, Defines, Order, Work
from fa2cupy.kernels.launch import CompileJob, KernelLaunch, Launchable
from fa2cupy.kernels.listed import Lists, Segments, Shorts
from fa2cupy.kernels.plan import BackwardPlan, ForwardPlan, Plan
from fa2cupy.kernels.sm80 import flash_bwd as bwd_sm80
from fa2cupy.kernels.sm80 import flash_fwd as fwd_sm80
from fa2cupy.kernels.sm90 import flash_bwd as bwd_sm90
from fa2cupy.kernels.sm90 import flash_bwd_wide as bwd_sm90_wide
from fa2cupy.kernels.sm90 import flash_fwd as fwd_sm90
from fa2cupy.kernels.sm90 import tma
from fa2cupy.kernels.smxx import (
    fill_unseen,
    find_segments,
    flash_bwd_postprocess,
    flash_bwd_preprocess,
    flash_bwd_sinks,
    list_tiles,
)
from fa2cupy.problem import MAX_LENGTH, AttentionProblem
from fa2cupy.spec import Row

__all__ = ["BACKWARD", "FORWARD", "bound_plan", "plan_backward", "plan_call", "plan_forward"]

Compiler = Callable[[str, Row], str]  # what is wrong with compiling a row for an architecture, or the empty string


class MainKernel(Protocol):
    """The host of a main kernel: a module of sm80/ or sm90/. ROW: the class of its rows, which say its family."""

    ROW: Any

    def arch(self, device: DeviceInfo) -> str: ...
    def objection(self, problem: AttentionProblem, device: DeviceInfo) -> str: ...
    def rows(self, problem: AttentionProblem, device: DeviceInfo) -> Sequence[Row]: ...


class ForwardKernel(MainKernel, Protocol):
    def launch(
        self, problem: AttentionProblem, device: DeviceInfo, tile: Any, empty: int, lists: Lists | None
    ) -> KernelLaunch: ...
    def compile_jobs(self, arch: str, dtype: str) -> list[CompileJob]: ...


class BackwardKernel(MainKernel, Protocol):
    def head_dims(self, problem: AttentionProblem, tile: Any) -> tuple[int, int]: ...
    def order(self, work: Work) -> Order: ...
    def launch(self, whole: Backward, tile: Any) -> KernelLaunch: ...
    def cleared(self, causal: bool, n_blocks: int, deterministic: bool, partial: bool) -> bool: ...
    def rows_ahead(self, arch: str) -> Iterable[tuple[Any, int, int]]: ...
    def compile_jobs(
        self, arch: str, label: str, tile: Any, head_dim: int, head_dim_v: int, side: Defines
    ) -> list[CompileJob]: ...


FORWARD: tuple[ForwardKernel, ...] = (fwd_sm90, fwd_sm80)
BACKWARD: tuple[BackwardKernel, ...] = (bwd_sm90, bwd_sm90_wide, bwd_sm80)

_Kernel = TypeVar("_Kernel", bound=MainKernel)


def any_compiler(arch: str, row: Row) -> str:
    """Of a `Compiler` that nothing is wrong with."""
    return ""


def plan_forward(
    problem: AttentionProblem,
    device: DeviceInfo,
    tile: Row | None = None,
    family: str | None = None,
    *,
    compiler: Compiler = any_compiler,
) -> ForwardPlan:
    """How to compute `problem` on `device`. Needs no GPU.

    tile: in place of the tables', for tuning. family: 'sm80' or 'sm90' (FA2CUPY_KERNEL), or None for the best;
    InvalidArgument if it is impossible. compiler: asked about the kernel that would be taken, unless nothing is to do.
    """
    _check_segments(problem)
    empty = problem.empty_rows
    busy = (problem.seqlen_q - empty) * problem.num_heads * problem.batch > 0
    if problem.lengths is not None:  # then there need not be a key
        busy = busy and problem.seqlen_k > 0
    kernel, tile, objection = _choose(FORWARD, problem, device, tile, family, compiler if busy else any_compiler)
    names = common.pointer_names(problem, common.FORWARD_ARRAYS)
    launches: tuple[KernelLaunch, ...] = ()
    lists, workspace_bytes = None, 0
    if problem.lengths is not None and common.query_rows(problem) * problem.num_heads > 0:  # some may be nobody's
        lists = Lists.of(problem, tile.block_m, tile.block_n, has_keys=False)
        segments = Segments(problem.batch, lists) if problem.lengths.segments else None
        workspace_bytes = (segments or lists).end
        launches += _listing(problem, device, lists, segments, ("out", "lse"), names)
    if problem.mask is not None:
        workspace_bytes = problem.mask.offsets["end"]
        launches += block_lists.launches_of_call(problem, common.arch_of(device), names)
    if busy:
        launches += (kernel.launch(problem, device, tile, empty, lists),)
    launches += fill_unseen.launches(problem, device, "out", empty, names, with_lse=True)
    return ForwardPlan(problem, launches, workspace_bytes, tile, objection)


def plan_backward(
    problem: AttentionProblem,
    device: DeviceInfo,
    deterministic: bool,
    tile: backward.BwdRow | None = None,
    family: str | None = None,
    *,
    compiler: Compiler = any_compiler,
) -> BackwardPlan:
    """How to compute the gradients of `problem` on `device`; the rest as `plan_forward`."""
    _check_segments(problem)
    empty = problem.empty_rows
    heads = problem.num_heads * problem.batch
    busy = (problem.seqlen_q - empty) * heads > 0  # then there are keys, unless lengths are data
    kernel, row, objection = _choose(BACKWARD, problem, device, tile, family, compiler if busy else any_compiler)
    work = Work(problem, device, deterministic, row, empty, _short_keys(problem, device, row))
    names = common.pointer_names(problem, backward.ARRAYS)
    launches: tuple[KernelLaunch, ...] = ()
    workspace_bytes, splits = 0, 1
    lists = work.tile_lists
    if lists is not None:
        busy = busy and problem.seqlen_k > 0
        if max(problem.seqlen_q, problem.seqlen_k) * problem.num_heads > 0:  # some rows may be nobody's
            workspace_bytes = work.end_of_lists
            launches += _listing(problem, device, lists, work.segments, ("dq", "dk", "dv"), names, deterministic)
    if problem.mask is not None:
        workspace_bytes = work.end_of_lists
        launches += block_lists.launches_of_call(problem, common.arch_of(device), names)
    whole = shorts = None
    if busy:
        whole = Backward.of(work, kernel.order(work), kernel.head_dims(problem, row))
        workspace_bytes, splits = whole.workspace_bytes, whole.order.splits
        launches += (
            flash_bwd_preprocess.launch(whole),
            kernel.launch(whole, row),
            flash_bwd_postprocess.launch(whole),
        )
        shorts = _shorts(work, whole)
        if shorts is not None:
            launches += (flash_bwd_preprocess.launch(shorts), bwd_sm80.launch(shorts, _short_row(problem, device)))
    if problem.mask is None or not busy:
        launches += fill_unseen.launches(problem, device, "dq", empty, names)
    unseen = problem.seqlen_k if problem.seqlen_q == empty and lists is None else problem.empty_keys
    for name in ("dk", "dv"):
        launches += fill_unseen.launches(problem, device, name, unseen, names)
    launches += flash_bwd_sinks.launches(work, names, whole, shorts)
    return BackwardPlan(problem, launches, workspace_bytes, row, objection, deterministic, splits)


def _check_segments(problem: AttentionProblem) -> None:
    tokens = problem.batch * max(problem.seqlen_q, problem.seqlen_k)
    if problem.lengths is not None and problem.lengths.segments and tokens > MAX_LENGTH:  # they are counted in 32 bits
        raise InvalidArgument(
            f"segment_ids of {tokens} tokens (batch {problem.batch}) are not supported on a GPU: at most {MAX_LENGTH}"
        )


def _listing(
    problem: AttentionProblem,
    device: DeviceInfo,
    lists: Lists,
    segments: Segments | None,
    results: Sequence[str],
    names: Sequence[str],
    in_order: bool = False,
) -> tuple[KernelLaunch, ...]:
    """What comes before all others where lengths are data."""
    found = () if segments is None else (find_segments.launch(problem, device, segments, names),)
    return *found, list_tiles.launch(problem, device, lists, results, names, in_order=in_order, segments=segments)


def _short_keys(problem: AttentionProblem, device: DeviceInfo, row: backward.BwdRow) -> int:
    """Of segments that are listed by themselves should there be more tiles than a backward has room for; 0 if it always
    has. One thread block takes all keys of such a segment.
    """
    if problem.lengths is None or not problem.lengths.segments:
        return 0
    short_keys = _short_row(problem, device).block_n
    blocks = row.block_m, row.cluster * row.block_n
    most, usual = (
        Lists.of(problem, *blocks, has_keys=True, short_keys=number).tiles_of_head_q for number in (0, short_keys)
    )
    return short_keys if usual < most else 0


def _short_row(problem: AttentionProblem, device: DeviceInfo) -> bwd_sm80.BwdTile:
    """Of the kernel that computes such segments."""
    row, objection = _row(bwd_sm80, problem, device)
    assert row is not None, objection
    return cast(bwd_sm80.BwdTile, row)


def _shorts(work: Work, whole: Backward) -> Backward | None:
    """Of segments that are listed by themselves, if there can be any; in the memory that `whole` needs no more."""
    if not work.short_keys:
        return None
    assert work.segments is not None
    row = _short_row(work.problem, work.device)
    own = dataclasses.replace(work, deterministic=False, tile=row, shorts=Shorts(work.segments))
    shorts = Backward.of(own, Order(1, own.key_heads, cleared=False), bwd_sm80.head_dims(work.problem, row))
    kept = [offset for _, offset in whole.sink_sums.values()]
    assert shorts.workspace_bytes <= min([whole.workspace_bytes, *kept])
    return shorts


def _choose(
    kernels: Sequence[_Kernel],
    problem: AttentionProblem,
    device: DeviceInfo,
    tile: Row | None,
    family: str | None,
    compiler: Compiler,
) -> tuple[_Kernel, Any, str]:
    """The kernel, its row, and what speaks against the families in front of it."""
    if tile is not None:
        return next(kernel for kernel in kernels if isinstance(tile, kernel.ROW)), tile, ""
    objections: dict[str, str] = {}
    for kernel in kernels:
        own = kernel.ROW.family
        if family not in (None, own):
            objections[own] = f"{env.KERNEL.name}={family}"
            continue
        row, objection = _row(kernel, problem, device)
        if row is not None:
            objection = compiler(kernel.arch(device), row)
            if not objection:
                return kernel, row, "; ".join(why for other, why in objections.items() if other != own)
        if objection:
            objections.setdefault(own, objection)
    if family is None:
        said = "; ".join(f"{own}: {why}" for own, why in objections.items())
        raise InvalidArgument(f"no kernel can compute this: {said}")
    other = next(own for own in objections if own != family)
    raise InvalidArgument(
        f"{env.KERNEL.name}={family} is impossible here: {objections[family]}; use {other}, or unset it"
    )


def _row(kernel: MainKernel, problem: AttentionProblem, device: DeviceInfo) -> tuple[Row | None, str]:
    """The first row that no spec objects to; or None and what speaks against the kernel, if not merely that it has no
    rows for this, but another kernel of its family has."""
    objection = kernel.objection(problem, device)
    if objection:
        return None, objection
    for row in kernel.rows(problem, device):
        objections = [why for spec in problem.specs if (why := spec.objection(row))]
        if not objections:
            return row, ""
        objection = objection or objections[0]  # the best row's
    return None, objection


@functools.lru_cache(maxsize=1024)
def bound_plan(
    operation: str, problem: AttentionProblem, device_index: int, deterministic: bool, family: str | None
) -> tuple[Launchable, int]:
    """(what launches the problem, bytes of workspace). `family`: FA2CUPY_KERNEL, which chooses the plan."""
    plan = plan_call(operation, problem, device_index, deterministic, family)
    launchable = _bind(plan, device_index)
    if family is None and any(launch.arch == tma.ARCH for launch in plan.launches):
        # Binding may have loaded NVRTC, and found another one than the cache remembered.
        again = plan_call(operation, problem, device_index, deterministic, family)
        if again != plan:
            plan, launchable = again, _bind(again, device_index)
    return launchable, plan.workspace_bytes


def _bind(plan: Plan, device_index: int) -> Launchable:
    if env.debug():
        log.debug(plan)
    return plan.bind(device_index)


def plan_call(
    operation: str, problem: AttentionProblem, device_index: int, deterministic: bool, family: str | None
) -> Plan:
    """The plan of a call ('attention' or 'attention_backward') on a GPU of this machine, with its NVRTC."""
    device = driver.device_info(device_index)
    is_backward = operation == "attention_backward"
    compiler = functools.partial(_nvrtc_objection, family, is_backward)
    if is_backward:
        return plan_backward(problem, device, deterministic, family=family, compiler=compiler)
    return plan_forward(problem, device, family=family, compiler=compiler)


_UPGRADE = (
    "A driver of CUDA 13.0 or newer ends that, and so does NVRTC 12.9.86 or newer, where torch does not pin an older "
    "one: pip install 'nvidia-cuda-nvrtc-cu12>=12.9.86' (of CUDA 13: nvidia-cuda-nvrtc)"
)


# Serialised, the forward of sm_90 is slower than that of sm_80 up to this head_dim (measured: docs/debugging.md).
_SLOW_SERIALISED = 64


def _nvrtc_objection(family: str | None, is_backward: bool, arch: str, row: Row) -> str:
    """What is wrong with this process's NVRTC as far as wgmma goes, said once; nothing if the family was asked for.

    Without loading NVRTC if the cache knows which one it is.
    """
    if arch != tma.ARCH:
        return ""
    build = jit.expected_nvrtc_build()
    objection = jit.wgmma_objection(build)
    if not objection:
        if family is None and not is_backward and row.head_dim <= _SLOW_SERIALISED and jit.serialises_wgmma(build):
            objection = f"NVRTC {build} serialises wgmma, which makes sm_90's forward of head_dim {row.head_dim} slower"
            log.warn_once(f"{objection} than that of sm_80, which is used. {_UPGRADE}")
        return objection
    if family is not None:
        log.warn_once(f"{objection}, but {env.KERNEL.name}={family} asks for it. {_UPGRADE}")
        return ""
    log.warn_once(f"{objection}, so the sm_80 kernels are used, which are slower on this GPU. {_UPGRADE}")
    return objection
