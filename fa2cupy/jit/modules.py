"""Load a binary on a device and find a kernel in it: through CuPy where that is installed, else by the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fa2cupy.errors import LaunchError
from fa2cupy.jit import driver
from fa2cupy.jit.cupy import cupy_or_none

__all__ = ["ImageError", "load"]


class ImageError(LaunchError):
    """The driver does not take a binary, or has no memory for it."""


def load(image: bytes, path: Path | None, name: str, device_index: int) -> tuple[int, object]:
    """(CUfunction, what keeps its module loaded). `path`: the cubin's file, if it has one; None for PTX.

    The driver assembles PTX here, which takes seconds the first time (its own cache keeps the code).
    """
    cupy = cupy_or_none()
    return _by_driver(image, name, device_index) if cupy is None else _by_cupy(cupy, image, path, name, device_index)


def _by_cupy(cupy: Any, image: bytes, path: Path | None, name: str, device_index: int) -> tuple[int, object]:
    try:
        with cupy.cuda.Device(device_index):
            if path is not None:
                module = cupy.RawModule(path=str(path))
                function = module.get_function(name).kernel
            else:
                module = cupy.cuda.function.Module()
                module.load(image)
                function = module.get_function(name)
    except cupy.cuda.driver.CUDADriverError as error:
        raise ImageError(str(error)) from error
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise LaunchError(str(error)) from error
    return int(function.ptr), (module, function)


def _by_driver(image: bytes, name: str, device_index: int) -> tuple[int, object]:
    with driver.device_guard(device_index):
        try:
            return driver.load_function(image, name), None  # loaded for the life of the process
        except LaunchError as error:
            raise ImageError(str(error)) from error
