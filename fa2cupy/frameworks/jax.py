"""JAX arrays, concrete or traced. XLA owns their memory, outputs and workspaces and chooses the stream: `fa2cupy.xla`
computes with them. They cannot be written, so that `out=` and its like do not exist here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from fa2cupy.errors import InvalidArgument, InvalidType, UnsupportedDevice
from fa2cupy.frameworks.base import Device, Framework, contiguous_strides

__all__ = ["JAX", "immutable", "in_host_memory", "is_movable", "is_traced", "words_of_key"]


def is_traced(array: Any) -> bool:
    return any(base.__name__ == "Tracer" for base in type(array).__mro__)


def is_movable(array: Any) -> bool:
    """Whether JAX computes with an array where the others are: it is traced, or not committed to a device."""
    return is_traced(array) or not getattr(array, "committed", True)


def in_host_memory(array: Any) -> bool:
    """Whether an array, concrete or traced, says that it is in a GPU's host memory. JAX before 0.7 does not say."""
    return getattr(getattr(array.aval, "memory_space", None), "name", "") == "Host"


def words_of_key(key: Any) -> Any:
    """Of a typed key, concrete or traced, its words: uint32."""
    return sys.modules["jax"].random.key_data(key)


def immutable(name: str) -> InvalidArgument:
    """The error for an output or a workspace that was given."""
    return InvalidArgument(
        f"{name} cannot be given for JAX arrays, which are immutable: leave it out, a new one comes back"
    )


class _Jax(Framework):
    name = "JAX"
    namespace = "jax.numpy"

    def check(self, array: Any, argument: str) -> None:
        if not isinstance(array.dtype, np.dtype):
            raise InvalidType(f"{argument} has dtype {array.dtype}, which is not supported")
        if not is_traced(array) and array.is_deleted():
            raise InvalidArgument(f"{argument} was deleted or donated: its memory is gone")

    def signature(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], list[int]]:
        """Types and dtypes, and no pointers: the rest is the signature of a `jax.jit`."""
        return tuple([None if array is None else (type(array), array.dtype) for array in arrays]), []

    def device(self, array: Any, argument: str) -> Device:
        """Of this process's devices that an array is sharded over the first; of a traced array, of which nobody knows,
        the CPU.
        """
        if is_traced(array):
            return Device("cpu", 0)
        device = min(array.sharding.addressable_devices or array.devices(), key=lambda each: each.id)
        if device.platform == "cpu":
            return Device("cpu", int(device.id))
        if device.platform not in ("gpu", "cuda"):
            raise UnsupportedDevice(f"{argument} is on a {device.platform} device: CUDA GPUs and the CPU are supported")
        kind = array.sharding.memory_kind
        if kind not in (None, "device"):
            raise UnsupportedDevice(f"{argument} is in {kind!r} memory: jax.device_put it into 'device' memory")
        return Device("cuda", int(device.local_hardware_id))

    def dtype(self, array: Any) -> str:
        return str(array.dtype.name)

    def itemsize(self, array: Any) -> int:
        return int(array.dtype.itemsize)

    def byte_strides(self, array: Any) -> tuple[int, ...]:
        # What a jitted function receives, whatever the layout of the array is.
        return tuple(stride * array.dtype.itemsize for stride in contiguous_strides(array.shape))

    def pointer(self, array: Any, argument: str) -> int:
        return 0  # known to XLA's callback only, which aligns buffers to 64 bytes or more

    def to_host(self, array: Any) -> np.ndarray:
        return np.array(array)

    def from_host(self, array: np.ndarray, like: Any) -> Any:
        jax = sys.modules["jax"]
        return jax.numpy.asarray(array) if is_traced(like) else jax.device_put(array, next(iter(like.devices())))

    def seed(self, numbers: tuple[int, int], like: Any) -> Any:
        words = np.array(numbers, "<i8").view("<u4")  # JAX may have no numbers of 64 bits
        return sys.modules["jax"].numpy.asarray(words)

    def to_numpy(self, array: Any) -> np.ndarray:
        raise TypeError("JAX arrays are computed by XLA's call into fa2cupy.xla")

    def from_numpy(self, array: np.ndarray, dtype: str, like: Any) -> Any:
        raise TypeError("JAX arrays are computed by XLA's call into fa2cupy.xla")


JAX = _Jax()
