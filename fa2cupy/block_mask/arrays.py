"""Whose a mask's arrays are, and where: the framework and the device of what it was made of."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from fa2cupy.block_mask.lists import BlockLists
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import CUPY, JAX, NUMPY, TORCH, framework_of
from fa2cupy.frameworks.base import Device, Framework, GpuFramework, describe

__all__ = ["Home", "home_of", "in_kind", "moved"]


@dataclass(frozen=True, slots=True)
class Home:
    framework: Framework
    device: Device

    def __str__(self) -> str:
        return f"{self.device} ({self.framework.name})"

    def array(self, array: Any) -> np.ndarray:
        """An array of it in NumPy. Waits for a GPU."""
        if self.device.kind == "cuda":
            return _to_host(self.framework, array, self.device.index)
        return np.asarray(array) if self.framework is JAX else self.framework.to_numpy(array)

    def own(self, array: np.ndarray) -> Any:
        """The inverse."""
        if self.device.kind == "cuda":
            return _from_host(self.framework, array, self.device.index)
        if self.framework is NUMPY:
            return array
        if self.framework is TORCH:
            return sys.modules["torch"].from_numpy(array if array.flags.writeable else array.copy())
        jax = sys.modules["jax"]
        return jax.device_put(array, jax.devices("cpu")[self.device.index])

    def to_numpy(self, lists: BlockLists) -> BlockLists:
        return BlockLists(*(self.array(array) for array in lists.arrays()))

    def take(self, lists: BlockLists) -> BlockLists:
        return BlockLists(*(self.own(array) for array in lists.arrays()))


def home_of(name: str, array: Any) -> Home:
    """InvalidType for what is no array, InvalidArgument for one where no mask can be made yet."""
    framework = framework_of(array)
    if framework is None:
        raise InvalidType(f"{name} is a {describe(array)}: an array of CuPy, PyTorch, JAX or NumPy is needed")
    framework.check(array, name)
    device = framework.device(array, name)
    if device.kind != "cpu" and framework is JAX:
        raise InvalidArgument(f"{name} is on {device}: a BlockMask of JAX's arrays is not supported on a GPU yet")
    return Home(framework, device)


def _to_host(framework: Framework, array: Any, index: int) -> np.ndarray:
    from fa2cupy.jit import driver

    assert isinstance(framework, GpuFramework)
    with driver.device_guard(index):
        return framework.to_host(array)


def _from_host(framework: Framework, array: np.ndarray, index: int) -> Any:
    if framework is CUPY:
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(index):
            return cupy.asarray(array)
    torch = sys.modules["torch"]
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(f"cuda:{index}")


def in_kind(arrays: list[Any], like: Any) -> list[Any]:
    """A BlockMask's arrays in the framework of `like`, which they share memory with on the CPU."""
    framework, own = framework_of(like), framework_of(arrays[0])
    if framework is None or own is framework or own is None:
        return arrays
    device, place = framework.device(like, "q"), own.device(arrays[0], "mask")
    if device.kind != "cpu" or place.kind != "cpu":
        raise InvalidArgument(
            f"mask is on {place} ({own.name}) but q is on {device} ({framework.name}): make the BlockMask of arrays of "
            f"{framework.name} on {device}, or with like=q"
        )
    home, there = Home(own, Device("cpu", 0)), Home(framework, device)
    return [there.own(home.array(array)) for array in arrays]


def moved(lists: BlockLists, home: Home, device: Any) -> tuple[BlockLists, Home]:
    """The lists on a device of the framework: "cpu", "cuda", "cuda:1", or its own object. NumPy's become CuPy's on a
    GPU, and the other way round.
    """
    kind, _, number = str(device).partition(":")
    if kind == "cuda" and home.framework is not JAX and (number.isdigit() or not number):
        framework = CUPY if home.framework is NUMPY else home.framework
        if framework is CUPY:
            import cupy  # noqa: F401 - then it is there for `_from_host`
        there = Home(framework, Device("cuda", int(number or 0)))
        return (lists, home) if there == home else (there.take(home.to_numpy(lists)), there)
    if kind == "cpu" and home.device.kind == "cuda":
        there = Home(NUMPY if home.framework is CUPY else home.framework, Device("cpu", 0))
        return there.take(home.to_numpy(lists)), there
    if str(device) != "cpu" and getattr(device, "platform", None) != "cpu":
        raise InvalidArgument(f"device={device!r} is not supported: 'cpu', 'cuda' or 'cuda:1' (of JAX's arrays 'cpu')")
    if home.framework is not JAX or isinstance(device, str) or device.id == home.device.index:
        return lists, home
    there = dataclasses.replace(home, device=Device("cpu", int(device.id)))
    return there.take(home.to_numpy(lists)), there
