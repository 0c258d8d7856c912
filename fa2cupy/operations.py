"""What can be called: the names of an operation's arrays, in the order in which the kernels take their pointers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BACKWARD", "FORWARD", "FORWARD_OUT", "Operation"]


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """The forward or the backward: its array arguments, in the order in which the kernels take their pointers.

    scratch: outputs that nobody gets unless they are given, so that memory is enough for them.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scratch: frozenset[str] = frozenset()

    def names(self) -> tuple[str, ...]:
        """Of all its arrays."""
        return self.inputs + self.outputs

    @property
    def is_backward(self) -> bool:
        return self.name == "attention_backward"


FORWARD = Operation("attention", ("q", "k", "v"), ("out", "lse_out"))
FORWARD_OUT = Operation("attention", ("q", "k", "v"), ("out", "lse_out"), frozenset({"lse_out"}))
BACKWARD = Operation("attention_backward", ("dout", "q", "k", "v", "out", "lse"), ("dq", "dk", "dv"))
