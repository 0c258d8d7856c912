"""Plans for attention on a cache."""

from __future__ import annotations

from dataclasses import dataclass

from fa2cupy.cached.problem import CacheProblem
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import launch as launching
from fa2cupy.kernels.launch import KernelLaunch, Launchable
from fa2cupy.kernels.sm80 import flash_decode
from fa2cupy.kernels.sm80.flash_decode import DecodeTile, Parts
from fa2cupy.kernels.smxx import append_keys

__all__ = ["DecodePlan", "plan_decode"]

# New keys of a sequence beyond which a kernel of its own writes them: each tile that sees them would turn them again.
_MANY_NEW_KEYS = 64


@dataclass(frozen=True)
class DecodePlan:
    """How a problem is computed: launches in stream order. Pointers: those of `cached.call.ARRAYS`, the workspace, and
    `counters` ints that are 0 before and after.
    """

    problem: CacheProblem
    launches: tuple[KernelLaunch, ...]
    workspace_bytes: int
    counters: int
    tile: DecodeTile

    def __str__(self) -> str:
        lines = [
            f"{type(self).__name__}({self.problem}",
            f"  workspace: {self.workspace_bytes} bytes, {self.counters} counters",
            f"  {self.tile}",
        ]
        for each in self.launches:
            defines = " ".join(f"{key[4:].lower()}={value}" for key, value in each.defines.items())
            lines.append(f"  {each.name} {each.arch} {each.config} {defines}")
        return "\n".join(lines) + ")"

    def bind(self, device_index: int) -> Launchable:
        """What launches all kernels, compiled and loaded on a device: `launch.bind`."""
        return launching.bind(self.launches, device_index, str(self))


def plan_decode(problem: CacheProblem, device: DeviceInfo, tile: DecodeTile | None = None) -> DecodePlan:
    """How to compute `problem` on `device`. Needs no GPU. tile: in place of the tables', for tuning."""
    tile = tile or flash_decode.rows(problem, device)[0]
    new = problem.seqlen_new or 0
    mean = new // max(1, problem.batch) if problem.is_packed else new
    alone = mean > _MANY_NEW_KEYS  # who computes with them reads them in the cache
    launches: tuple[KernelLaunch, ...] = ()
    if new > 0 and (alone or problem.num_heads == 0):
        launches += (append_keys.launch(problem, device),)
    if problem.seqlen_q * problem.num_heads > 0 or (new > 0 and not launches):
        launches += (flash_decode.launch(problem, device, tile, new_keys=new > 0 and not launches),)
    workspace = Parts.of(problem, device, tile).bytes if launches else 0
    return DecodePlan(problem, launches, workspace, device.sm_count, tile)
