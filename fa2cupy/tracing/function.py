"""A function of the user's own, as the kernels and the CPU take it: without the values of its arrays."""

from __future__ import annotations

import inspect
import keyword
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fa2cupy import env
from fa2cupy.checks import shown
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import JAX, framework_of
from fa2cupy.frameworks.base import Framework, GpuFramework, describe
from fa2cupy.tracing import cuda, evaluate, rebind, text
from fa2cupy.tracing.graph import Graph
from fa2cupy.tracing.operations import BOOL, FLOAT, INT
from fa2cupy.tracing.values import CapturedArray, Value, node_of

__all__ = ["MASK", "SCORE", "Capture", "Kind", "UserFunction"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a function is for. parameters: (name, type) of those that it has by position; gives: the type of its result.

    One more parameter may be named q_pos: q_idx + seqlen_k - seqlen_q, the key that the query stands beside.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    gives: str


_PLACES = tuple((name, INT) for name in ("b", "h", "q_idx", "kv_idx"))
MASK = Kind("mask_mod", _PLACES, BOOL)
SCORE = Kind("score_mod", (("score", FLOAT), *_PLACES), FLOAT)

# By dtype of a captured array: what an element is in CUDA, and as what it is read.
_DTYPES = {
    "bool": ("bool", BOOL),
    "int8": ("signed char", INT),
    "uint8": ("unsigned char", INT),
    "int16": ("short", INT),
    "int32": ("int", INT),
    "int64": ("int64_t", INT),
    "float16": ("half_t", FLOAT),
    "bfloat16": ("bf16_t", FLOAT),
    "float32": ("float", FLOAT),
    "float64": ("double", FLOAT),
}
_MAX_RANK = 8


@dataclass(frozen=True, slots=True)
class Capture:
    """An array of `arrays=`, or a number, whose dtype is bool, int or float and whose rank is None."""

    name: str
    dtype: str
    rank: int | None

    @property
    def type(self) -> str:
        return self.dtype if self.rank is None else _DTYPES[self.dtype][1]

    @property
    def declaration(self) -> str:
        """Its field in the struct of a function's captures."""
        kind = self.dtype if self.rank is None else f"Captured<{_DTYPES[self.dtype][0]}, {self.rank}>"
        return f"{kind} {self.name};"

    @classmethod
    def of(cls, function: str, name: str, value: object) -> Capture:
        if isinstance(value, (bool, np.bool_)):
            return cls(name, BOOL, None)
        if isinstance(value, (int, np.integer)):
            return cls(name, INT, None)
        if isinstance(value, (float, np.floating)):
            return cls(name, FLOAT, None)
        framework = framework_of(value)
        if framework is None:
            raise InvalidType(
                f"arrays={{{name!r}: ...}} of {function} is a {describe(value)}: an array of CuPy, PyTorch, JAX or "
                "NumPy, or a number, is needed"
            )
        framework.check(value, name)
        dtype, shape = framework.dtype(value), framework.shape(value)
        if dtype not in _DTYPES:
            raise InvalidType(f"{name} of {function} has dtype {dtype}: {', '.join(_DTYPES)} are supported")
        if len(shape) > _MAX_RANK:
            raise InvalidArgument(
                f"{name} of {function} has {len(shape)} dimensions: at most {_MAX_RANK} are supported"
            )
        if 0 in shape:
            raise InvalidArgument(f"{name} of {function} has shape {tuple(shape)}: an array with elements is needed")
        return cls(name, dtype, len(shape))


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function that was traced, or a text.

    Equal where the CUDA is the same: by the text and the captures' names, dtypes and ranks, in the order of the names.
    graph: None of a text.
    """

    kind: Kind
    body: str
    captures: tuple[Capture, ...]
    graph: Graph | None = field(compare=False, repr=False)

    @classmethod
    def of(cls, kind: Kind, function: Callable[..., Any] | str, arrays: Mapping[str, Any] | None) -> UserFunction:
        """Trace a function, or check a text. InvalidArgument or InvalidType for what is not supported."""
        values = _checked_arrays(kind, arrays)
        captures = tuple(Capture.of(kind.name, name, values[name]) for name in sorted(values))
        if isinstance(function, str):
            _check_uses(kind, "the text", values, text.words_of(function))
            return cls(kind, text.checked_body(kind.name, function), captures, None)
        graph = _traced(kind, function, captures)
        return cls(kind, cuda.body_of(graph), captures, graph)

    def header(self, name: str | None = None) -> str:
        """What a kernel includes as user/<kind>.cuh: the struct of the captures and the function.

        The function is called `name`, or as its kind, and gets places as ints, q_pos among them, and the captures.
        """
        name = name or self.kind.name
        fields = "".join(f"  {capture.declaration}\n" for capture in self.captures)
        own = "".join(f"  [[maybe_unused]] const auto& {each.name} = captures.{each.name};\n" for each in self.captures)
        score = "T score, " if self.kind is SCORE else ""
        head = "template <typename T>\nFA2_DEVICE T" if self.kind is SCORE else f"FA2_DEVICE {self.kind.gives}"
        return (
            "// A function of the user's own: what fa2cupy/tracing has made of it, or the text that was given.\n"
            "#pragma once\n"
            '#include "common/user.cuh"\n\n'
            "namespace fa2_user {\n\n"
            f"struct Captures_{name} {{\n{fields}}};\n\n"
            f"{head} {name}({score}[[maybe_unused]] int b, [[maybe_unused]] int h, [[maybe_unused]] int q_idx,\n"
            "    [[maybe_unused]] int kv_idx, [[maybe_unused]] int q_pos,\n"
            f"    [[maybe_unused]] const Captures_{name}& captures) {{\n{own}"
            f'#line 1 "{self.kind.name}"\n{self.body}\n'
            "}\n\n}  // namespace fa2_user\n"
        )

    def evaluate(
        self, arguments: Mapping[str, npt.NDArray[Any]], arrays: Mapping[str, Any], real: npt.DTypeLike = np.float32
    ) -> npt.NDArray[Any]:
        """By NumPy. arguments: by the names of the parameters and q_pos. arrays: from `on_host`."""
        if self.graph is None:
            raise InvalidArgument(
                f"{self.kind.name} is a text, which only a GPU computes: give a Python function for arrays on the CPU"
            )
        return evaluate.evaluate(self.graph, arguments, arrays, real, check=env.check())

    def on_host(self, arrays: Mapping[str, Any], real: npt.DTypeLike = np.float32) -> dict[str, Any]:
        """The captures' values as `evaluate` takes them. Waits for arrays on a GPU."""
        found: dict[str, Any] = {}
        for capture in self.captures:
            value = arrays[capture.name]
            if capture.rank is not None:
                framework = framework_of(value)
                assert framework is not None
                value = evaluate.held(_on_host(framework, value, capture), capture.dtype == "bfloat16", real)
            found[capture.name] = value
        return found


def _on_host(framework: Framework, value: Any, capture: Capture) -> np.ndarray:
    if framework is JAX:
        return np.asarray(value)
    device = framework.device(value, capture.name)
    if device.kind == "cpu":
        return framework.to_numpy(value)
    from fa2cupy.jit import driver

    assert isinstance(framework, GpuFramework)
    is_bfloat16: bool = capture.dtype == "bfloat16"  # torch's, which NumPy has no dtype for
    with driver.device_guard(device.index):
        host = framework.to_host(value.view(sys.modules["torch"].int16) if is_bfloat16 else value)
    return host.view(np.uint16) if is_bfloat16 else host


def _checked_arrays(kind: Kind, arrays: Mapping[str, Any] | None) -> dict[str, Any]:
    if arrays is None:
        return {}
    if not isinstance(arrays, Mapping):
        raise InvalidType(f"{shown('arrays', arrays)} is a {describe(arrays)}: a dict of names and arrays is needed")
    for name in arrays:
        if not isinstance(name, str) or not name.isidentifier() or not name.isascii() or keyword.iskeyword(name):
            raise InvalidArgument(f"arrays has {name!r}, which is no name of a variable")
        if name in text.RESERVED or "__" in name or (name[0] == "x" and name[1:].isdigit()):
            raise InvalidArgument(f"arrays has {name!r}, a name that {kind.name} cannot use: give it another")
    return dict(arrays)


def _check_uses(kind: Kind, what: str, values: Mapping[str, Any], names: set[str]) -> None:
    for name in values:
        if name not in names:
            raise InvalidArgument(f"arrays has {name!r}, which {what} of {kind.name} does not use")


def _takes_q_pos(kind: Kind, function: Callable[..., Any]) -> bool:
    """Whether a function has q_pos beside the parameters of its kind. InvalidType for other ones."""
    names = [name for name, _ in kind.parameters]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InvalidType(f"{kind.name} is a {describe(function)}, whose parameters nobody knows") from error
    by_position = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if any(each.kind is each.VAR_POSITIONAL for each in parameters) and len(by_position) <= len(names):
        return False
    count = len(by_position)
    has_more = count > len(names) and by_position[len(names)].name == "q_pos"
    required = [each for each in by_position[len(names) + has_more :] if each.default is each.empty]
    needed = [each for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is each.empty]
    if count < len(names) or required or needed:
        got = ", ".join(each.name for each in parameters)
        raise InvalidType(
            f"{kind.name} has the parameters ({got}): ({', '.join(names)}) are needed, and q_pos if you like"
        )
    return has_more


def _traced(kind: Kind, function: Callable[..., Any], captures: tuple[Capture, ...]) -> Graph:
    if not callable(function):
        raise InvalidType(f"{shown(kind.name, function)} is a {describe(function)}: a function, or text, is needed")
    if any(capture.name in ("b", "h") for capture in captures):
        raise AssertionError("names of parameters are reserved")
    takes_q_pos = _takes_q_pos(kind, function)
    graph = Graph(kind.name)
    values: dict[str, object] = {}
    for each in captures:
        if each.rank is None:
            values[each.name] = Value(graph, graph.number(each.name, each.type))
        elif each.rank == 0:
            values[each.name] = Value(graph, graph.read(each.name, each.type, ()))
        else:
            values[each.name] = CapturedArray(graph, each.name, each.type, each.rank)
    _check_uses(kind, "the function", values, rebind.free_names(function))
    arguments = [
        Value(graph, graph.argument(name, of_type, of_score=name == "score")) for name, of_type in kind.parameters
    ]
    if takes_q_pos:
        arguments.append(Value(graph, graph.argument("q_pos", INT)))
    result = rebind.rebound(function, values)(*arguments)
    if result is None:
        raise InvalidType(f"{kind.name} returns nothing: a {kind.gives} is needed")
    node = node_of(graph, result)
    if node.type != kind.gives:
        if kind.gives == BOOL or node.type == BOOL:
            hint = "; compare, as in x != 0" if kind.gives == BOOL else "; use numpy.where to choose between numbers"
            raise InvalidType(f"{kind.name} returns a value of type {node.type}: a {kind.gives} is needed{hint}")
        node = graph.convert(node, kind.gives)
    graph.result = node
    return graph
