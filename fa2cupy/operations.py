"""What can be called: the names of an operation's arrays, in the order in which the kernels take their pointers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from fa2cupy import dynamo

__all__ = ["ASKED", "BACKWARD", "FORWARD", "FORWARD_OUT", "STRAIGHT", "Operation"]


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """The forward or the backward: its array arguments, in the order in which the kernels take their pointers.

    further: of the outputs those beyond the dense ones, gradients of extra inputs, the last ones.
    scratch: outputs that nobody gets unless they are given, so that memory is enough for them.
    extra: further inputs, of the keywords beyond dense attention that a call was given, in the keyword table's order.
    They stand behind the outputs, so that the pointers of dense attention keep their places.
    asked: whoever calls has asked what a framework's `check_call` asks.
    swapped: new outputs, but for lse, lie in memory as in the other layout.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scratch: frozenset[str] = frozenset()
    further: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    asked: bool = False
    swapped: bool = False

    def names(self) -> tuple[str, ...]:
        """Of all its arrays."""
        return self.inputs + self.outputs + self.extra

    @property
    def is_backward(self) -> bool:
        return self.name == "attention_backward"

    @property
    def dense(self) -> tuple[str, ...]:
        """Of its arrays those of dense attention."""
        return self.inputs + self.outputs[: len(self.outputs) - len(self.further)]

    def extended(self, extra: tuple[str, ...], further: tuple[str, ...] = ()) -> Operation:
        """The operation with these further inputs and outputs; the same object for the same names, as a part of a
        call's key.
        """
        return _extended(self, extra, further) if extra or further else self


@dynamo.constant
def _extended(operation: Operation, extra: tuple[str, ...], further: tuple[str, ...]) -> Operation:
    return _known(operation, extra, further)


@functools.cache
def _known(operation: Operation, extra: tuple[str, ...], further: tuple[str, ...]) -> Operation:
    outputs, all_further = operation.outputs + further, operation.further + further
    return replace(operation, extra=operation.extra + extra, outputs=outputs, further=all_further)


FORWARD = Operation("attention", ("q", "k", "v"), ("out", "lse_out"))
FORWARD_OUT = Operation("attention", ("q", "k", "v"), ("out", "lse_out"), frozenset({"lse_out"}))
BACKWARD = Operation("attention_backward", ("dout", "q", "k", "v", "out", "lse"), ("dq", "dk", "dv"))
# The same for a caller that has asked.
ASKED = {operation: replace(operation, asked=True) for operation in (FORWARD, FORWARD_OUT, BACKWARD)}

# The way of a call that is no detour: to the launch, which need not ask again what the door has asked.
STRAIGHT: Any = "straight"
