"""What each NVRTC release may make of wgmma kernels, and what the driver's assembler makes in its place.

NVRTC before 12.9.86 (CUDA 12.9.1) serialises wgmma when it assembles it (ptxas C7515), and from 12.5 on it was reported
to make slow or wrong code of it; its PTX is good. So where the driver is of CUDA 13.0 or newer, such an NVRTC stops at
PTX, and the driver assembles that when it is loaded. docs/debugging.md has what was measured.
"""

from __future__ import annotations

from fa2cupy.errors import MissingDependency
from fa2cupy.jit import driver

__all__ = ["serialises_wgmma", "target", "wgmma_objection"]

_WGMMA_ARCH, _WGMMA_PTX = "sm_90a", "compute_90a"
_KNOWS_WGMMA, _SUSPECT, _GOOD_ASSEMBLER = (12, 0), (12, 5), (12, 9, 86)  # first releases
_GOOD_DRIVER = (13, 0)
_SLOW_BUT_RIGHT = ((12, 6, 77), (12, 8, 93))  # suspect, but run on an H200 and found right


def target(arch: str, build: str) -> str:
    """What NVRTC `build` is asked for on behalf of `arch`: itself, or PTX for the driver to assemble."""
    if arch == _WGMMA_ARCH and _KNOWS_WGMMA <= _version(build) < _GOOD_ASSEMBLER and _driver_assembles():
        return _WGMMA_PTX
    return arch


def wgmma_objection(build: str) -> str:
    """Why an NVRTC (its `nvrtc_build`) is not to compile wgmma kernels on this machine, or the empty string."""
    version = _version(build)
    if version < _KNOWS_WGMMA:
        return f"NVRTC {build} does not know sm_90a"
    if _SUSPECT <= version < _GOOD_ASSEMBLER and version not in _SLOW_BUT_RIGHT and not _driver_assembles():
        supported = ".".join(map(str, driver.driver_version()))
        return (
            f"NVRTC {build} may make wrong code of wgmma loops, and this machine's driver (CUDA {supported}, 13.0 is "
            "needed) cannot make it in NVRTC's place"
        )
    return ""


def serialises_wgmma(build: str) -> bool:
    """Whether what an NVRTC makes of wgmma kernels on this machine is slow: cubins of a release that serialises."""
    return _KNOWS_WGMMA <= _version(build) < _GOOD_ASSEMBLER and not _driver_assembles()


def _version(build: str) -> tuple[int, ...]:
    return tuple(int(number) for number in build.split()[0].split("."))


def _driver_assembles() -> bool:
    """Without a driver: yes, since what is compiled there is for another machine."""
    try:
        return driver.driver_version() >= _GOOD_DRIVER
    except MissingDependency:
        return True
