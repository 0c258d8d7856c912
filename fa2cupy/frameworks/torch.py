"""PyTorch tensors, on a GPU or on the CPU."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from fa2cupy.errors import InvalidArgument, InvalidType, UnsupportedDevice
from fa2cupy.frameworks.base import Device, GpuFramework, describe, swap

__all__ = ["LOW", "TORCH"]

# No memory lies below, so that only what has none needs a closer look: its address is its offset.
LOW = 1 << 40


def fx_tracing() -> Callable[[], bool]:
    """What says whether torch.fx is tracing. torch's public function logs a warning at every call.

    A torch that has neither name counts as tracing: calls are then asked about once more, and are right.
    """
    module = importlib.import_module("torch.fx._symbolic_trace")
    since_214: Callable[[], bool] | None = getattr(module, "_get_is_fx_tracing", None)
    return since_214 or functools.partial(getattr, module, "_is_fx_tracing_flag", True)


class _Torch(GpuFramework):
    name = "PyTorch"
    namespace = "torch"

    def check(self, array: Any, argument: str) -> None:
        torch = sys.modules["torch"]
        kind = type(array)
        if any(base.__name__ == "FakeTensor" for base in kind.__mro__):
            raise InvalidType(
                f"{argument} is a FakeTensor, which has no memory: what can be traced is fa2cupy.attention without "
                "out=, lse_out= and workspace="
            )
        if kind.__torch_dispatch__ not in (
            torch.Tensor.__torch_dispatch__,
            torch._C._disabled_torch_dispatch_impl,
        ):
            raise InvalidType(
                f"{argument} is a {describe(array)}, a wrapper without memory of its own: pass a torch.Tensor"
            )
        if array.is_nested:
            raise InvalidType(f"{argument} is a nested tensor: pass a torch.Tensor with one length")
        if array.layout is not torch.strided:
            raise InvalidType(f"{argument} has layout {array.layout}: only torch.strided is supported")
        if array.is_neg():  # float16 parts of a conjugated complex tensor: the sign is not in memory yet
            raise InvalidType(f"{argument} is a lazily negated view: pass {argument}.resolve_neg()")
        if array.device.type in ("cpu", "cuda"):
            self._check_memory(array, argument)

    def _check_memory(self, array: Any, argument: str) -> None:
        pointer = self.pointer(array, argument)
        if not array.numel():
            return
        if pointer == array.storage_offset() * array.element_size():
            raise InvalidArgument(
                f"{argument} has no memory: its storage was freed (resize_(0), as FSDP does), or it is a functional "
                "tensor of torch.func.functionalize; a tensor with its values in memory is needed"
            )
        last = sum((n - 1) * step for n, step in zip(array.shape, array.stride(), strict=True))
        needed = (array.storage_offset() + last + 1) * array.element_size()
        held = array.untyped_storage().nbytes()
        if held < needed:
            raise InvalidArgument(
                f"{argument} reaches beyond its memory: its storage was resized to {held} bytes, {needed} are needed"
            )

    def device(self, array: Any, argument: str) -> Device:
        kind = array.device.type
        if kind == "cpu":
            return Device("cpu", 0)
        if kind == "cuda":
            return Device("cuda", array.get_device())
        raise UnsupportedDevice(f"{argument} is on device {array.device}: 'cuda' and 'cpu' are supported")

    def dtype(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def byte_strides(self, array: Any) -> tuple[int, ...]:
        itemsize = array.element_size()
        return tuple(stride * itemsize for stride in array.stride())

    def itemsize(self, array: Any) -> int:
        return int(array.element_size())

    def pointer(self, array: Any, argument: str) -> int:
        try:
            return int(array.data_ptr())
        except RuntimeError as error:  # torch.func wrappers, functional tensors
            raise InvalidType(
                f"{argument} is a {describe(array)} without memory of its own (inside torch.func or torch.compile?): "
                f"pass a plain torch.Tensor"
            ) from error

    def contiguous(self, array: Any) -> Any:
        torch = sys.modules["torch"]
        return array.detach().clone(memory_format=torch.contiguous_format)

    def as_int32(self, array: Any) -> Any:
        torch = sys.modules["torch"]
        clipped = array.detach().clamp(-(2**31), 2**31 - 1)
        return clipped.to(torch.int32, memory_format=torch.contiguous_format)

    def signature(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], list[int]]:
        key: list[Any] = []
        pointers = []
        low = LOW
        for array in arrays:
            if array is None:
                key.append(None)
                pointers.append(0)
            else:
                pointer = array.data_ptr()
                if pointer < low and pointer == array.storage_offset() * array.element_size() and array.numel():
                    raise InvalidArgument("no memory")  # the first call's checks say whose
                # Strides that follow from the shape are not asked for: a bool is cheaper to make, hash and compare.
                strides = array.is_contiguous() or array.stride()
                key.append((type(array), array.shape, strides, array.dtype, array.get_device(), pointer & 15))
                pointers.append(pointer)
        return tuple(key), pointers

    def to_host(self, array: Any) -> np.ndarray:
        return cast("np.ndarray", array.detach().cpu().numpy())

    def from_host(self, array: np.ndarray, like: Any) -> Any:
        return sys.modules["torch"].from_numpy(array).to(like.device)

    @functools.cached_property
    def _watchers(self) -> tuple[Callable[[], bool], Callable[[], bool], Callable[[], bool], Any]:
        """Whether torch.jit.trace is at work; whether torch.fx is; whether grad mode is on; forward-mode autograd."""
        torch = sys.modules["torch"]
        return torch._C._is_tracing, fx_tracing(), torch.is_grad_enabled, torch.autograd.forward_ad

    def _refuse_tracing(self, function: str) -> None:
        torch = sys.modules["torch"]
        if torch.jit.is_tracing():
            tracer = "torch.jit.trace"
        elif importlib.import_module("torch.fx.experimental.proxy_tensor").get_proxy_mode() is not None:
            tracer = "make_fx"
        else:  # torch.fx.symbolic_trace: tensors are its constants
            return
        raise InvalidType(
            f"{tracer} does not see fa2cupy.{function} and would keep this one result for every input: call it outside "
            "the traced function"
        )

    def check_call(self, arrays: Sequence[Any], function: str, names: Callable[[], tuple[str, ...]]) -> None:
        is_jit_tracing, is_fx_tracing, is_grad_enabled, forward_ad = self._watchers
        if is_jit_tracing() or is_fx_tracing():
            self._refuse_tracing(function)
        if is_grad_enabled():
            for array in arrays:
                if array is not None and array.requires_grad:
                    i = next(i for i, each in enumerate(arrays) if each is array)
                    name = names()[i]
                    is_own = function == "attention" and name in ("q", "k", "v")
                    hint = " leave out=, lse_out= and workspace= out, or" if is_own else ""
                    raise InvalidArgument(
                        f"{name} requires grad, but what fa2cupy.{function} writes here has no graph:{hint} use "
                        "torch.no_grad() or .detach()"
                    )
        if forward_ad._current_level >= 0:
            for i, array in enumerate(arrays):
                if array is not None and forward_ad.unpack_dual(array).tangent is not None:
                    raise InvalidArgument(
                        f"{names()[i]} has a tangent, but forward-mode autograd does not see fa2cupy.{function}: "
                        "pass its primal"
                    )

    def written(self, array: Any) -> None:
        # As torch's own out= does: autograd then notices that a tensor it saved has changed.
        if not array.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(array)

    @property
    def address(self) -> Callable[[Any], int]:
        return cast("Callable[[Any], int]", sys.modules["torch"].Tensor.data_ptr)

    def is_capturing(self, stream: int, device_index: int) -> bool:
        torch = sys.modules["torch"]
        with torch.cuda.device(device_index):
            return bool(torch.cuda.is_current_stream_capturing())

    def allocator(self, shape: tuple[int, ...], dtype: str, like: Any, swapped: bool = False) -> Callable[[], Any]:
        torch = sys.modules["torch"]
        # empty_like is twice as fast as empty or new_empty. What it copies is a tensor that gave its memory back.
        # It keeps the model's strides, whatever their order.
        model = torch.empty(swap(shape) if swapped else shape, dtype=getattr(torch, dtype), device=like.device)
        model = model.transpose(1, 2) if swapped else model
        model.untyped_storage().resize_(0)
        return functools.partial(torch.empty_like, model)

    def stream(self, device_index: int) -> Callable[[int], int]:
        torch = sys.modules["torch"]
        raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        return raw_stream or (lambda index: torch.cuda.current_stream(index).cuda_stream)

    def seed(self, numbers: tuple[int, int], like: Any) -> Any:
        """Without a copy from the host, which would wait."""
        torch = sys.modules["torch"]
        self.device(like, "q")
        array = torch.full((2,), numbers[0], dtype=torch.int64, device=like.device)
        array[1:].fill_(numbers[1])
        return array

    def to_numpy(self, array: Any) -> np.ndarray:
        torch = sys.modules["torch"]
        array = array.detach()
        if array.dtype is torch.bfloat16:
            return cast("np.ndarray", array.view(torch.int16).numpy().view(np.uint16))
        return cast("np.ndarray", array.numpy())

    def from_numpy(self, array: np.ndarray, dtype: str, like: Any) -> Any:
        torch = sys.modules["torch"]
        if dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(like.dtype)
        return torch.from_numpy(array)


TORCH = _Torch()
