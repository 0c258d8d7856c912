"""Calls under autograd that come again: one question to C recognises them, one function launches them.

What `calls.py` asks of every tensor in Python (type, shape, strides, dtype, device) torch's own guards, with which
compiled functions recognise their inputs, ask in one call; they compare too what dispatch modes, torch.func, autocast
and inference mode set for the thread. What they do not see is asked as ever: addresses, the current device. A call that
is not recognised goes the long way, which is slower and right.

Some of these functions are torch's own and not documented. Of a torch that lacks one, or whose guards tell no
difference where there is one, every call goes the long way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fa2cupy.frameworks.torch import LOW, TORCH
from fa2cupy.locks import Lock
from fa2cupy.operations import Operation
from fa2cupy.prepared import PREPARED, PreparedCall, signature_key

__all__ = ["KINDS", "NO_KIND", "Kind"]

# (inputs) -> results; None: not a call of this kind, or one that has to go the long way
Run = Callable[..., Any]
# (inputs) -> whether they are like those that it was made of
Check = Callable[..., bool]


class _Tools(NamedTuple):
    """What torch's C++ offers below its public functions, at a third of their time.

    device: the current one. stream: the current one of a device. empty: (shape, strides, dtype), on the current device.
    allocate: (bytes, stream) -> address, on the current device; free: (address). guards: of tensors.
    """

    device: Callable[[], int]
    stream: Callable[[int], int]
    empty: Callable[[tuple[int, ...], tuple[int, ...], Any], Any]
    allocate: Callable[[int, int], int]
    free: Callable[[int], None]
    guards: Callable[..., Any]

    def check(self, tensors: Sequence[Any]) -> Check:
        check: Check = self.guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return check


@functools.cache
def torch_tools() -> _Tools | None:
    """Those of this torch; asked for when the first call is to be learned from, where no mode is at work."""
    names = (
        "_cuda_getDevice",
        "_cuda_getCurrentRawStream",
        "_dynamo.guards._empty_strided_cuda",
        "_cuda_cudaCachingAllocator_raw_alloc",
        "_cuda_cudaCachingAllocator_raw_delete",
        "_dynamo.guards.TensorGuards",
    )
    found = []
    for name in names:
        function: Any = torch._C
        for part in name.split("."):
            function = getattr(function, part, None)
        found.append(function)
    if None in found:
        return None
    tools = _Tools(*found)
    return tools if guards_tell_all(tools) else None


def guards_tell_all(tools: _Tools) -> bool:
    """Whether a check says yes to what is alike and no to everything else that a prepared call depends on."""
    try:
        with torch.inference_mode(False):
            x, alike = (torch.empty(2, 4, 4, 4, dtype=torch.float16, device="cpu") for _ in range(2))
            check = tools.check([x])
            others = (
                x[:1],
                torch.empty(2, 4, 4, 8, dtype=torch.float16, device="cpu")[..., :4],
                x.transpose(1, 2),
                x.bfloat16(),
                torch.empty(2, 4, 4, 4, dtype=torch.float16, device="meta"),
                torch.nn.Parameter(x, requires_grad=False),
                x._neg_view(),
            )
            told = check(x) and check(alike) and not any(map(check, others))
        with torch.inference_mode():
            return bool(told) and not check(x)
    except Exception:  # whatever another torch says to arguments that it does not expect
        return False


class Kind:
    """The calls of one operation with the same options and the same shapes of q and k, as far as they are known.

    runs: of those that came before. backwards: the kinds of their gradients, without and with `deterministic`.
    """

    __slots__ = ("_left", "backwards", "runs")

    def __init__(self, attempts: int = 32, of_gradients: bool = False) -> None:
        self.runs: tuple[Run, ...] = ()
        self.backwards = () if of_gradients else (Kind(attempts, True), Kind(attempts, True))
        self._left = attempts

    def find(self, *inputs: Any) -> Any:
        """The results of a call like one that came before, or None; where a frame matters, callers have this loop."""
        for run in self.runs:
            results = run(*inputs)
            if results is not None:
                return results
        return None

    def learn(
        self,
        operation: Operation,
        inputs: Sequence[Any],
        results: Sequence[Any],
        options: Any,
        given: Sequence[Any] | None = None,
    ) -> None:
        """From a call that has just gone the long way, so that the next ones like it need not.

        results: new tensors that are like its results; after them others that a run is to allocate. given: what runs
        will be given, where that is not `inputs` but the same memory.
        """
        if self._left <= 0 or len(self.runs) >= _MAX_RUNS:
            return
        self._left -= 1
        tools = torch_tools()
        run = _run(tools, operation, inputs, results, options, inputs if given is None else given) if tools else None
        if run is not None:
            self.runs = (*self.runs, run)


class _Kinds(dict[Any, Kind]):
    """By all that a launch depends on but the tensors; what is not there yet is made. TypeError: unhashable."""

    def __missing__(self, key: Any) -> Kind:
        with _lock:
            while len(self) >= _MAX_KINDS:
                del self[next(iter(self))]
            return self.setdefault(key, Kind())


_MAX_RUNS = 4  # of a kind
_MAX_KINDS = 1024  # the oldest are dropped
_lock = Lock()
KINDS = _Kinds()
NO_KIND = Kind(0)  # of calls that nothing is learned from


def _run(
    tools: _Tools,
    operation: Operation,
    inputs: Sequence[Any],
    results: Sequence[Any],
    options: Any,
    given: Sequence[Any],
) -> Run | None:
    try:
        signature, pointers = TORCH.signature([*inputs, *[None] * len(operation.outputs)])
        prepared = PREPARED.get(signature_key(operation, signature, options))
    except Exception:  # one that the long way knew how to copy
        return None
    if not isinstance(prepared, PreparedCall) or prepared.framework is not TORCH or prepared.shared:
        return None
    if operation.extra or any(pointer & _MISALIGNED for pointer in pointers):
        return None
    make = _backward_run if operation.is_backward else _forward_run
    return make(tools, tools.check(given), prepared, [(tuple(x.shape), x.stride(), x.dtype) for x in results])


_MISALIGNED = 15  # the bits of an address that are 0 in the only prepared call which a run stands for


# Each of these is one frame between autograd's function and the launch: in the thread of autograd's engine a frame of
# Python takes twice what it takes in a loop.


def _forward_run(tools: _Tools, check: Check, prepared: PreparedCall, specs: Sequence[Any]) -> Run | None:
    if prepared.takes_workspace:
        return None
    device, stream, empty, *_ = tools
    index, launch = prepared.device_index, prepared.launchable
    of_out, of_lse, *more = specs

    def run(q: Any, k: Any, v: Any) -> Any:
        if not check(q, k, v):
            return None
        at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if (at_q | at_k | at_v) & _MISALIGNED or at_q < LOW or at_k < LOW or at_v < LOW or device() != index:
            return None
        out, lse = empty(*of_out), empty(*of_lse)
        launch((at_q, at_k, at_v, out.data_ptr(), lse.data_ptr()), stream(index))
        return (out, lse, *[empty(*each) for each in more]) if more else (out, lse)

    return run


def _backward_run(tools: _Tools, check: Check, prepared: PreparedCall, specs: Sequence[Any]) -> Run:
    device, current_stream, empty, allocate, free, _ = tools
    index, launch, workspace_bytes = prepared.device_index, prepared.launchable, prepared.workspace_bytes
    of_dq, of_dk, of_dv = specs

    def run(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any) -> Any:
        if not check(dout, q, k, v, out, lse):
            return None
        at_dout, at_q, at_k, at_v = dout.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()
        at_out, at_lse = out.data_ptr(), lse.data_ptr()
        if (
            (at_dout | at_q | at_k | at_v | at_out | at_lse) & _MISALIGNED
            or min(at_dout, at_q, at_k, at_v, at_out, at_lse) < LOW
            or device() != index
        ):
            return None
        dq, dk, dv = empty(*of_dq), empty(*of_dk), empty(*of_dv)
        pointers = at_dout, at_q, at_k, at_v, at_out, at_lse, dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
        stream = current_stream(index)
        if not workspace_bytes:
            launch((*pointers, 0), stream)
            return dq, dk, dv
        # As with any tensor that is freed: whoever gets this memory next on this stream comes after these launches.
        workspace = allocate(workspace_bytes, stream)
        try:
            launch((*pointers, workspace), stream)
        finally:
            free(workspace)
        return dq, dk, dv

    return run
