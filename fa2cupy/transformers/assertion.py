"""What must hold of numbers that only the device knows, as an operator: one node in a graph that hands them on."""

from __future__ import annotations

from typing import Any

import torch

from fa2cupy.errors import InvalidArgument

__all__ = ["asserted"]

_library = torch.library.Library("fa2cupy", "FRAGMENT")
_library.define("asserted(Tensor data, Tensor holds, str message) -> Tensor")
_operator = torch.ops.fa2cupy.asserted.default


def asserted(data: Any, holds: Any, message: str) -> Any:
    """A copy of data. holds: a bool on the device; if it is False InvalidArgument on the CPU, and on a GPU, for which
    nobody waits, the assertion that torch._assert_async is, after which nothing runs there any more.
    """
    return _operator(data, holds, message)


def _on_cpu(data: Any, holds: Any, message: str) -> Any:
    if not holds:
        raise InvalidArgument(message)
    return data.clone()


def _on_gpu(data: Any, holds: Any, message: str) -> Any:
    torch._assert_async(holds, message)
    return data.clone()


_library.impl("asserted", _on_cpu, "CPU")
_library.impl("asserted", _on_gpu, "CUDA")


@torch.library.register_fake("fa2cupy::asserted", lib=_library)
def _shape(data: Any, holds: Any, message: str) -> Any:
    return torch.empty_like(data)
