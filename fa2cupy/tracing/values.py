"""What a function computes with while it is traced: its parameters, and the arrays that it captured.

They take Python's operators and NumPy's functions. Whatever cannot be traced raises, and says what to use instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from fa2cupy.checks import shown
from fa2cupy.errors import Fa2Error, InvalidArgument, InvalidType
from fa2cupy.frameworks.base import describe
from fa2cupy.tracing.graph import Graph, Node
from fa2cupy.tracing.operations import BOOL, FLOAT, FUNCTIONS, INT, UFUNCS

__all__ = ["CapturedArray", "Value", "node_of", "where"]

_MOST_FACTORS = 64


class _Traced:
    """The operators. `_node` says what value it is, or why it is none."""

    __slots__ = ("_graph",)
    _graph: Graph

    def _node(self) -> Node:
        raise NotImplementedError

    def _apply(self, op: str, *args: object) -> Value:
        return Value(self._graph, self._graph.apply(op, *(node_of(self._graph, arg) for arg in args)))

    def _refuse(self, what: str, instead: str) -> Fa2Error:
        return InvalidType(f"{self._graph.name} {what}, which cannot be traced: {instead}")

    # NumPy's functions, and other libraries'

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: object, **keywords: object) -> Value:
        name = ufunc.__name__
        if method != "__call__" or keywords:
            how = f"numpy.{name}.{method}" if method != "__call__" else f"numpy.{name} with {next(iter(keywords))}="
            raise self._refuse(f"calls {how}", "elements by themselves are needed")
        if name == "power":
            return _power(self._graph, *inputs)
        if name == "square":
            return self._apply("mul", inputs[0], inputs[0])
        if name == "positive":
            return self._apply("add", inputs[0], 0)
        if name not in UFUNCS:
            raise self._refuse(f"calls numpy.{name}", f"of NumPy's functions {FUNCTIONS} can be")
        if name.startswith("logical"):
            for each in inputs:
                if node_of(self._graph, each).type != BOOL:
                    raise InvalidType(f"{self._graph.name}: numpy.{name} is of bools here: compare first, as in x != 0")
        return self._apply(UFUNCS[name], *inputs)

    def __array_function__(
        self, function: Callable[..., Any], kinds: object, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Value:
        if function is np.where and len(args) == 3 and not keywords:
            return where(self._graph, *args)
        if function is np.clip and len(args) == 3 and not keywords:
            return self._apply("min", self._apply("max", args[0], args[1]), args[2])
        how = f"numpy.{function.__name__}"
        if function in (np.where, np.clip):
            raise self._refuse(f"calls {how} otherwise than with three arguments", "give it three")
        raise self._refuse(f"calls {how}", f"of NumPy's functions {FUNCTIONS} can be")

    def __array__(self, *args: object, **keywords: object) -> NoReturn:
        raise self._refuse(
            "makes an array of a value, or indexes an array with it",
            "arrays= names the arrays that may be indexed, where the function itself uses them",
        )

    @classmethod
    def __torch_function__(cls, function: Any, *args: object, **keywords: object) -> NoReturn:
        raise InvalidType(
            f"the function gives a traced value to torch's {getattr(function, '__name__', function)}: arrays= has to "
            "name its tensors, and functions are numpy's, or those of fa2cupy.functions"
        )

    # What needs to know a value

    def __bool__(self) -> NoReturn:
        raise self._refuse(
            "asks whether a value is true (if, while, and, or, not, in, min, max, a chain of comparisons)",
            "use & | ~, numpy.where, numpy.minimum, numpy.maximum",
        )

    def __index__(self) -> NoReturn:
        raise self._refuse(
            "takes a value as an index of something, or counts to it",
            "arrays= names the arrays that may be indexed, where the function itself uses them",
        )

    def _as_number(self, *args: object) -> NoReturn:
        raise self._refuse(
            "makes a Python number of a value (int, float, round, a function of math)",
            "use numpy's functions, and .astype(int) or .astype(float)",
        )

    __int__ = __float__ = __complex__ = __round__ = __trunc__ = __floor__ = __ceil__ = _as_number

    def __iter__(self) -> NoReturn:
        raise self._refuse("goes through a value's elements", "elements by themselves are needed")

    def __len__(self) -> NoReturn:
        raise self._refuse("asks for len()", "use .shape[0] of a captured array")

    def __contains__(self, item: object) -> NoReturn:
        raise self._refuse("looks for something in a value", "compare with ==")

    def __hash__(self) -> int:
        raise self._refuse("looks a value up in a dict or a set", "index a captured array")

    def __divmod__(self, other: object) -> NoReturn:
        raise self._refuse("calls divmod", "use // and %")

    def __matmul__(self, other: object) -> NoReturn:
        raise self._refuse("multiplies matrices", "elements by themselves are needed")

    __rdivmod__, __rmatmul__ = __divmod__, __matmul__

    def __setitem__(self, key: object, value: object) -> NoReturn:
        raise self._refuse("writes to an element", "arrays are read only")

    def __pow__(self, other: object) -> Value:
        return _power(self._graph, self, other)

    def __rpow__(self, other: object) -> Value:
        return _power(self._graph, other, self)

    def __pos__(self) -> Value:
        return self._apply("add", self, 0)


def _operators() -> None:
    """The rest of them, all alike. (x += y is x = x + y where there is no __iadd__.)"""
    for name, op in (("neg", "neg"), ("abs", "abs"), ("invert", "invert")):
        setattr(_Traced, f"__{name}__", lambda self, op=op: self._apply(op, self))
    for name, op in (("lt", "lt"), ("le", "le"), ("gt", "gt"), ("ge", "ge"), ("eq", "eq"), ("ne", "ne")):
        setattr(_Traced, f"__{name}__", lambda self, other, op=op: self._apply(op, self, other))
    for name, op in (
        *(("add", "add"), ("sub", "sub"), ("mul", "mul"), ("truediv", "div"), ("floordiv", "floor_div")),
        *(("mod", "floor_mod"), ("and", "and"), ("or", "or"), ("xor", "xor")),
        *(("lshift", "shift_left"), ("rshift", "shift_right")),
    ):
        setattr(_Traced, f"__{name}__", lambda self, other, op=op: self._apply(op, self, other))
        setattr(_Traced, f"__r{name}__", lambda self, other, op=op: self._apply(op, other, self))


_operators()


class Value(_Traced):
    """A bool, an int or a float of one element."""

    __slots__ = ("_of",)

    def __init__(self, graph: Graph, node: Node) -> None:
        self._graph, self._of = graph, node

    def _node(self) -> Node:
        return self._of

    def astype(self, dtype: object) -> Value:
        """As a bool, an int of 32 bits, or a float; towards 0."""
        try:
            kind = np.dtype(dtype).kind  # type: ignore[call-overload]
        except TypeError:
            kind = "?"
        if kind not in "biuf":
            raise InvalidType(f"{self._graph.name}: {shown('astype', dtype)} is unknown: bool, int or float is needed")
        return Value(self._graph, self._graph.convert(self._of, {"b": BOOL, "f": FLOAT}.get(kind, INT)))

    def __getitem__(self, key: object) -> NoReturn:
        raise self._refuse("indexes a value", "only arrays that arrays= names have elements")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what libraries ask for
            raise AttributeError(name)
        raise self._refuse(f"asks a value for .{name}", f"a value has .astype; {FUNCTIONS} are functions of numpy")

    def __repr__(self) -> str:
        return f"<{self._of.type} while {self._graph.name} is traced>"


class CapturedArray(_Traced):
    """An array of `arrays=`, some of whose indices are there already."""

    __slots__ = ("_indices", "_name", "_rank", "_type")

    def __init__(self, graph: Graph, name: str, kind: str, rank: int, indices: tuple[Node, ...] = ()) -> None:
        self._graph, self._name, self._type, self._rank, self._indices = graph, name, kind, rank, indices

    def _node(self) -> Node:
        if self.ndim:
            raise InvalidType(
                f"{self._graph.name} computes with {self._name} as a whole, whose {self.ndim} dimensions are not "
                f"indexed: an element is needed, as in {self._name}[{', '.join(['q_idx'] * self._rank)}]"
            )
        return self._graph.read(self._name, self._type, self._indices)

    @property
    def ndim(self) -> int:
        return self._rank - len(self._indices)

    @property
    def shape(self) -> tuple[Value, ...]:
        """Values: arrays of other shapes need not be traced again."""
        axes = range(len(self._indices), self._rank)
        return tuple(Value(self._graph, self._graph.size(self._name, axis)) for axis in axes)

    def __getitem__(self, key: object) -> CapturedArray | Value:
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > self.ndim:
            raise InvalidArgument(
                f"{self._graph.name} indexes {self._name} with {len(keys)} indices: it has {self.ndim} dimensions"
            )
        indices = (*self._indices, *(self._index(each) for each in keys))
        if len(indices) == self._rank:
            return Value(self._graph, self._graph.read(self._name, self._type, indices))
        return CapturedArray(self._graph, self._name, self._type, self._rank, indices)

    def _index(self, key: object) -> Node:
        if key is None or key is Ellipsis or isinstance(key, (slice, list, np.ndarray)):
            raise InvalidType(
                f"{self._graph.name} indexes {self._name} with {_shown(key)}: an int for each dimension is needed"
            )
        node = node_of(self._graph, key)
        if node.type != INT:
            hint = "; use .astype(int)" if node.type == FLOAT else "; use numpy.where to choose"
            raise InvalidType(f"{self._graph.name} indexes {self._name} with a {node.type}: an int is needed{hint}")
        if node.op == "literal" and isinstance(node.payload, int) and node.payload < 0:
            raise InvalidArgument(
                f"{self._graph.name} indexes {self._name} with {node.payload}: indices count from 0; "
                f"{self._name}.shape is there to count from the end"
            )
        return node

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refuse(
            f"asks {self._name} for .{name}", "an array has .shape and .ndim, and elements, as in name[b, q_idx]"
        )

    def __repr__(self) -> str:
        return f"<{self._name} while {self._graph.name} is traced>"


def _shown(key: object) -> str:
    return repr(key) if key is None or key is Ellipsis else f"a {describe(key)}"


def node_of(graph: Graph, value: object) -> Node:
    """A traced value, or a number, as a node. InvalidType for anything else."""
    if isinstance(value, _Traced):
        if value._graph is not graph:
            raise InvalidArgument(f"{graph.name} uses a value of another traced function: return values instead")
        return value._node()
    if isinstance(value, (bool, np.bool_)):
        return graph.literal(bool(value))
    if isinstance(value, (int, np.integer)):
        return graph.literal(int(value))
    if isinstance(value, (float, np.floating)):
        return graph.literal(float(value))
    if hasattr(value, "ndim") or hasattr(value, "__dlpack__"):
        raise InvalidType(
            f"{graph.name} computes with a {describe(value)} that arrays= does not name: pass arrays={{name: array}}, "
            "by the name of the variable"
        )
    what = "None" if value is None else f"a {describe(value)}"
    raise InvalidType(f"{graph.name} computes with {what}: a number, or an array that arrays= names, is needed")


def where(graph: Graph, condition: object, a: object, b: object) -> Value:
    return Value(graph, graph.where(node_of(graph, condition), node_of(graph, a), node_of(graph, b)))


def _power(graph: Graph, base: object, exponent: object) -> Value:
    """Whole powers by products, 0.5 by a root."""
    x = Value(graph, node_of(graph, base))
    if isinstance(exponent, (float, np.floating)) and exponent == 0.5:
        return Value(graph, graph.apply("sqrt", x._of))
    if isinstance(exponent, (bool, np.bool_)) or not isinstance(exponent, (int, np.integer)) or exponent < 0:
        raise InvalidType(
            f"{graph.name} has a power other than 0.5 and whole numbers from 0 on: use numpy.exp and numpy.log"
        )
    if exponent > _MOST_FACTORS:
        raise InvalidArgument(f"{graph.name} has a power of {exponent}: at most {_MOST_FACTORS} is supported")
    if x._of.type == BOOL:
        raise InvalidType(f"{graph.name} has a power of a bool: an int or a float is needed")
    product: Any = None
    square: Any = x
    rest = int(exponent)
    while rest:
        if rest % 2:
            product = square if product is None else product * square
        rest //= 2
        square = square * square if rest else square
    return product if product is not None else Value(graph, graph.convert(graph.literal(1), x._of.type))
