"""Plans: how a problem is computed, as values that can be printed, compared and bound to a device."""

from __future__ import annotations

from dataclasses import dataclass

from fa2cupy.kernels import launch
from fa2cupy.kernels.backward import BwdRow
from fa2cupy.kernels.launch import KernelLaunch, Launchable
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import Row

__all__ = ["BackwardPlan", "ForwardPlan", "Plan"]


@dataclass(frozen=True)
class Plan:
    """How a problem is computed: the launches, in stream order, and the workspace that they share.

    tile: the main kernel's. objection: what speaks against the families of kernels that would have been better; empty
    where there is none, or the tile was given.
    """

    problem: AttentionProblem
    launches: tuple[KernelLaunch, ...]
    workspace_bytes: int
    tile: Row
    objection: str

    @property
    def family(self) -> str:
        """'sm80' or 'sm90', as FA2CUPY_KERNEL calls them."""
        return self.tile.family

    def __str__(self) -> str:
        kernel = f"  sm_{self.family[2:]} kernel"
        lines = [
            f"{type(self).__name__}({self.problem}",
            f"  workspace: {self.workspace_bytes} bytes",
            f"{kernel}: {self.objection}" if self.objection else kernel,
            f"  {self.tile}",
        ]
        for each in self.launches:
            defines = " ".join(f"{key[4:].lower()}={value}" for key, value in each.defines.items())
            lines.append(f"  {each.name} {each.arch} {each.config} {defines}")
        return "\n".join(lines) + ")"

    def bind(self, device_index: int) -> Launchable:
        """What launches all kernels, compiled and loaded on a device: `launch.bind`."""
        return launch.bind(self.launches, device_index, str(self))


@dataclass(frozen=True)
class ForwardPlan(Plan):
    """Pointers: q, k, v, out, lse, the arrays of specs, and the workspace if there is one."""


@dataclass(frozen=True)
class BackwardPlan(Plan):
    """Pointers: dout, q, k, v, out, lse, dq, dk, dv, the results and arrays of specs, workspace.

    splits: thread blocks among which the queries that meet a key block, of all its query heads, are shared out.
    """

    tile: BwdRow
    deterministic: bool
    splits: int
