"""CUDA C at run time: find the source, compile it with NVRTC, keep the binary, load it, launch it.

Nothing here knows about attention, and importing it imports neither CuPy nor any CUDA library.
"""

from fa2cupy.jit.batch import CompileResult, Job, compile_many
from fa2cupy.jit.compiler import Cubin, KernelResources
from fa2cupy.jit.driver import DeviceInfo, LaunchConfig, Launcher, device_guard, device_info, driver_version, launch
from fa2cupy.jit.kernel import Kernel, expected_nvrtc_build, kernel, kernels
from fa2cupy.jit.source import Source
from fa2cupy.jit.targets import serialises_wgmma, wgmma_objection
from fa2cupy.jit.tensor_map import TensorMapSpec

__all__ = [
    "CompileResult",
    "Cubin",
    "DeviceInfo",
    "Job",
    "Kernel",
    "KernelResources",
    "LaunchConfig",
    "Launcher",
    "Source",
    "TensorMapSpec",
    "compile_many",
    "device_guard",
    "device_info",
    "driver_version",
    "expected_nvrtc_build",
    "kernel",
    "kernels",
    "launch",
    "serialises_wgmma",
    "wgmma_objection",
]
