"""Whose a mask's arrays are, and where: the framework and the device of what it was made of."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from fa2cupy.block_mask.lists import BlockLists
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import JAX, NUMPY, TORCH, framework_of
from fa2cupy.frameworks.base import Device, Framework, describe

__all__ = ["Home", "home_of", "in_kind", "moved"]


@dataclass(frozen=True, slots=True)
class Home:
    framework: Framework
    device: Device

    def __str__(self) -> str:
        return f"{self.device} ({self.framework.name})"

    def array(self, array: Any) -> np.ndarray:
        """An array of it in NumPy."""
        return np.asarray(array) if self.framework is JAX else self.framework.to_numpy(array)

    def own(self, array: np.ndarray) -> Any:
        """The inverse."""
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
    if device.kind != "cpu":
        raise InvalidArgument(f"{name} is on {device}: a BlockMask is not supported on a GPU yet, only on the CPU")
    return Home(framework, device)


def in_kind(arrays: list[Any], like: Any) -> list[Any]:
    """A BlockMask's arrays in the framework of `like`, which they share memory with on the CPU."""
    framework, own = framework_of(like), framework_of(arrays[0])
    if framework is None or own is framework or own is None:
        return arrays
    device = framework.device(like, "q")
    if device.kind != "cpu" or own.device(arrays[0], "mask").kind != "cpu":
        raise InvalidArgument(f"q is on {device}: a BlockMask is not supported on a GPU yet, only on the CPU")
    home, there = Home(own, Device("cpu", 0)), Home(framework, device)
    return [there.own(home.array(array)) for array in arrays]


def moved(lists: BlockLists, home: Home, device: Any) -> tuple[BlockLists, Home]:
    """The lists on a device of the framework: "cpu", or its own object."""
    if str(device) != "cpu" and getattr(device, "platform", None) != "cpu":
        raise InvalidArgument(f"device={device!r} is not supported yet: a BlockMask lives on the CPU, 'cpu'")
    if home.framework is not JAX or isinstance(device, str) or device.id == home.device.index:
        return lists, home
    there = dataclasses.replace(home, device=Device("cpu", int(device.id)))
    return there.take(home.to_numpy(lists)), there
