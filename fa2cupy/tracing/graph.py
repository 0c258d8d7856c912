"""What is left of a function that was traced: operations, each on results of earlier ones."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import numpy as np

from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.tracing.operations import BOOL, FLOAT, INT, OPERATIONS, common_type

__all__ = ["MAX_NODES", "Graph", "Node"]

MAX_NODES = 2000  # a loop that is unrolled to more takes NVRTC minutes
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One value. op: a key of `OPERATIONS`, or one of these; what `payload` is then:

    literal: a number. argument: the name of a parameter. number: of a captured number. read: the name of a captured
    array, whose indices are the operands. size: (name of a captured array, axis). where, convert: nothing.
    of_score: whether it depends on the score, so that its derivative is of interest.
    """

    number: int
    op: str
    type: str
    args: tuple[Node, ...] = ()
    payload: Hashable = None
    of_score: bool = False


@dataclass(slots=True)
class Graph:
    """The nodes in the order in which they were made: operands come before what is made of them. Equal ones are one.

    name: of the function, for errors.
    """

    name: str
    nodes: list[Node] = field(default_factory=list)
    result: Node | None = None
    _known: dict[Hashable, Node] = field(default_factory=dict)

    def literal(self, value: bool | int | float) -> Node:
        kind = BOOL if isinstance(value, bool) else INT if isinstance(value, int) else FLOAT
        if kind == INT and not _INT32.min <= value <= _INT32.max:
            raise InvalidArgument(f"{self.name} uses the number {value}: integers of 32 bits are needed")
        return self._node("literal", kind, (), value if kind != FLOAT else float(value))

    def argument(self, name: str, kind: str, of_score: bool = False) -> Node:
        return self._node("argument", kind, (), name, of_score)

    def number(self, name: str, kind: str) -> Node:
        return self._node("number", kind, (), name)

    def size(self, name: str, axis: int) -> Node:
        return self._node("size", INT, (), (name, axis))

    def read(self, name: str, kind: str, indices: tuple[Node, ...]) -> Node:
        return self._node("read", kind, indices, name)

    def where(self, condition: Node, a: Node, b: Node) -> Node:
        if condition.type != BOOL:
            raise InvalidType(f"{self.name}: the condition of where is {_a(condition.type)}: a bool is needed")
        kind = common_type((a.type, b.type))
        a, b = self.convert(a, kind), self.convert(b, kind)
        return self._node("where", kind, (condition, a, b), None, a.of_score or b.of_score)

    def convert(self, node: Node, kind: str) -> Node:
        if node.type == kind:
            return node
        if node.op == "literal":
            assert isinstance(node.payload, (bool, int, float))
            return self.literal({BOOL: bool, INT: int, FLOAT: float}[kind](node.payload))
        return self._node("convert", kind, (node,), None, node.of_score and kind == FLOAT)

    def apply(self, op: str, *args: Node) -> Node:
        """An operation of the table. InvalidType for operands that it does not take."""
        operation = OPERATIONS[op]
        kind = common_type(tuple(arg.type for arg in args))
        if kind == BOOL and BOOL not in operation.takes and op in ("add", "sub", "neg", "min", "max", "abs"):
            # NumPy's sum of bools is a bool, Python's an int; they agree about everything else.
            raise InvalidType(f"{self.name} has {operation.sign} of bools only: use & | ~, or numpy.where for numbers")
        if kind == BOOL and op == "mul":
            return self.apply("and", *args)
        if op == "floor" and kind != FLOAT:
            return args[0]
        wider = [each for each in operation.takes if common_type((each, kind)) == each]
        if not wider:
            raise InvalidType(f"{self.name} has {operation.sign} of {_a(kind)}: {_a(operation.takes[-1])} is needed")
        args = tuple(self.convert(arg, wider[0]) for arg in args)
        gives = operation.gives or wider[0]
        return self._node(op, gives, args, None, gives == FLOAT and any(arg.of_score for arg in args))

    def used(self) -> Iterator[Node]:
        """Those that the result depends on, in order."""
        assert self.result is not None
        needed = {self.result.number}
        for node in reversed(self.nodes):
            if node.number in needed:
                needed.update(arg.number for arg in node.args)
        return (node for node in self.nodes if node.number in needed)

    def _node(
        self, op: str, kind: str, args: tuple[Node, ...], payload: Hashable = None, of_score: bool = False
    ) -> Node:
        # With the text of a literal, since 0.0 == -0.0 == False.
        key = (op, kind, tuple(arg.number for arg in args), repr(payload))
        node = self._known.get(key)
        if node is None:
            if len(self.nodes) >= MAX_NODES:
                raise InvalidArgument(
                    f"{self.name} has more than {MAX_NODES} operations: a Python loop is traced once for each round"
                )
            node = Node(len(self.nodes), op, kind, args, payload, of_score)
            self.nodes.append(node)
            self._known[key] = node
        return node


def _a(kind: str) -> str:
    return f"an {kind}" if kind == INT else f"a {kind}"
