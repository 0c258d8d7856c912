"""What each NVRTC release may make of wgmma kernels, and what the driver's assembler makes in its place.

NVRTC 12.5 to 12.9.0 serialise wgmma when they assemble it (ptxas C7515), and some were reported to make wrong code of
it; their PTX is good. So where the driver is of CUDA 13.0 or newer, they stop at PTX, and the driver assembles it when
it is loaded. docs/debugging.md has what was measured.
"""

from __future__ import annotations

from fa2cupy.errors import MissingDependency
from fa2cupy.jit import driver

__all__ = ["target", "wgmma_objection"]

_WGMMA_ARCH, _WGMMA_PTX = "sm_90a", "compute_90a"
_BAD_ASSEMBLERS = (12, 5), (12, 9, 86)  # from, up to (CUDA 12.9.1)
_GOOD_DRIVER = (13, 0)
# Serialised, but run on an H200 and found right (docs/debugging.md).
_SLOW_BUT_RIGHT = ((12, 8, 93),)


def target(arch: str, build: str) -> str:
    """What NVRTC `build` is asked for on behalf of `arch`: itself, or PTX for the driver to assemble."""
    return _WGMMA_PTX if arch == _WGMMA_ARCH and _assembles_badly(build) and _driver_assembles() else arch


def wgmma_objection(build: str) -> str:
    """Why an NVRTC (its `nvrtc_build`) is not to compile wgmma kernels on this machine, or the empty string."""
    version = _version(build)
    if version < (12, 0):
        return f"NVRTC {build} does not know sm_90a"
    if _assembles_badly(build) and not _driver_assembles() and version not in _SLOW_BUT_RIGHT:
        supported = ".".join(map(str, driver.driver_version()))
        return (
            f"NVRTC {build} may make wrong code of wgmma loops, and this machine's driver (CUDA {supported}, 13.0 is "
            "needed) cannot make it in NVRTC's place"
        )
    return ""


def _version(build: str) -> tuple[int, ...]:
    return tuple(int(number) for number in build.split()[0].split("."))


def _assembles_badly(build: str) -> bool:
    first, end = _BAD_ASSEMBLERS
    return first <= _version(build) < end


def _driver_assembles() -> bool:
    """Without a driver: yes, since what is compiled there is for another machine."""
    try:
        return driver.driver_version() >= _GOOD_DRIVER
    except MissingDependency:
        return True
