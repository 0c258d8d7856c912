"""From a problem and a device to a plan: which kernels, which tiles, which launches. Nothing here sees an array.

One module for each kernel of cuda_src, of the same name in the same folder: its rows, which of them a problem gets, its
parameters, its launch.
"""

from fa2cupy.kernels.jobs import compile_jobs
from fa2cupy.kernels.launch import CompileJob, KernelLaunch
from fa2cupy.kernels.plan import BackwardPlan, ForwardPlan, Plan
from fa2cupy.kernels.planner import plan_backward, plan_forward

__all__ = [
    "BackwardPlan",
    "CompileJob",
    "ForwardPlan",
    "KernelLaunch",
    "Plan",
    "compile_jobs",
    "plan_backward",
    "plan_forward",
]
