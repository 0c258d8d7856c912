"""JAX arrays: XLA owns outputs and workspaces, chooses the stream, and calls back for the launch.

Outside `jax.jit` a call runs a `jax.jit` of a `buffer_callback`, cached per configuration. JAX arrays cannot be
written, so that `out=` and its like do not exist here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from fa2cupy.errors import InvalidArgument, InvalidType, UnsupportedDevice
from fa2cupy.frameworks.base import WORKSPACE_ALIGNMENT, Device, Framework, contiguous_strides, describe
from fa2cupy.frameworks.dlpack import read

__all__ = ["JAX", "Configuration", "compiled", "run"]


class _Jax(Framework):
    name = "JAX"

    def check(self, array: Any, argument: str) -> None:
        if any(base.__name__ == "Tracer" for base in type(array).__mro__):
            raise InvalidType(
                f"{argument} is a JAX tracer ({describe(array)}): fa2cupy works outside jax.jit, jax.grad and "
                "jax.vmap; call it with concrete arrays, and fa2cupy.attention_backward for the gradients"
            )
        if array.is_deleted():
            raise InvalidArgument(f"{argument} was deleted or donated: its memory is gone")
        if not array.is_fully_addressable or len(array.devices()) != 1:
            raise UnsupportedDevice(
                f"{argument} is sharded over {len(array.devices())} devices: one device is supported"
            )
        if not isinstance(array.dtype, np.dtype):
            raise InvalidType(f"{argument} has dtype {array.dtype}, which is not supported")

    def device(self, array: Any, argument: str) -> Device:
        (device,) = array.devices()
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
        return 0  # known to the callback only; XLA aligns its buffers to 64 bytes or more

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def from_numpy(self, array: np.ndarray, dtype: str, like: Any) -> Any:
        import jax

        (device,) = like.devices()
        # float64 arrays outlive the scope of 64-bit types that made them, and JAX would round outside it.
        with _x64(jax) if array.dtype == np.float64 else contextlib.nullcontext():
            return jax.device_put(array.view(like.dtype) if dtype == "bfloat16" else array, device)


def _x64(jax: Any) -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64(True)


JAX = _Jax()


@dataclass(frozen=True)
class Configuration:
    """One compiled JAX function: the (shape, dtype) of its outputs and what it launches.

    workspace_bytes: None if the kernels take no workspace pointer at all.
    dense_inputs: how many inputs stand in front of the outputs in the kernels' pointers; the others stand behind them.
    """

    outputs: tuple[tuple[tuple[int, ...], str], ...]
    workspace_bytes: int | None
    device_index: int
    launchable: Callable[[tuple[int, ...], int], None]
    dense_inputs: int


def run(configuration: Configuration, inputs: tuple[Any, ...]) -> list[Any]:
    """The outputs as JAX arrays on the inputs' device; returns before they are computed."""
    return list(compiled(configuration)(*inputs))


@functools.lru_cache(maxsize=256)
def compiled(configuration: Configuration) -> Callable[..., Any]:
    import jax
    from jax.experimental.buffer_callback import buffer_callback

    from fa2cupy.jit import driver

    def launch(context: Any, outputs: Any, *inputs: Any) -> None:
        dense, results = configuration.dense_inputs, len(configuration.outputs)
        buffers = *inputs[:dense], *outputs[:results], *inputs[dense:], *outputs[results:]
        pointers = [read(buffer.__dlpack__()).ptr for buffer in buffers]
        if configuration.workspace_bytes:
            pointers[-1] += -pointers[-1] % WORKSPACE_ALIGNMENT
        elif configuration.workspace_bytes == 0:
            pointers.append(0)
        with driver.device_guard(configuration.device_index):
            configuration.launchable(tuple(pointers), _stream(context))

    types = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in configuration.outputs]
    if configuration.workspace_bytes:
        # XLA promises less than our alignment: room to round the pointer up.
        types.append(jax.ShapeDtypeStruct((configuration.workspace_bytes + WORKSPACE_ALIGNMENT - 1,), "uint8"))
    call = buffer_callback(launch, types)
    return cast("Callable[..., Any]", jax.jit(lambda *inputs: call(*inputs)[: len(configuration.outputs)]))


def _stream(context: Any) -> int:
    """Handle of XLA's stream."""
    return int(context.stream)
