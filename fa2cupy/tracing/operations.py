"""The operations of traced functions, in one table: what they take and give, in CUDA and in NumPy.

Values are bool, int (of 32 bits, which wraps) or float. Python's and NumPy's meaning holds where C++ has another one:
cuda_src/common/user.cuh has the functions that the text calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BOOL", "FLOAT", "FUNCTIONS", "INT", "OPERATIONS", "TYPES", "UFUNCS", "Operation", "common_type"]

BOOL, INT, FLOAT = "bool", "int", "float"
TYPES = (BOOL, INT, FLOAT)  # each can be made the next


def common_type(types: tuple[str, ...]) -> str:
    return max(types, key=TYPES.index)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: its operands are made of one type, the least that all can be and that it takes.

    sign: how an error calls it. takes: types of operands. gives: the result's type, None for that of the operands.
    cuda: by the operands' type, or for all of them. numpy: likewise a function of arrays of that type.
    """

    sign: str
    takes: tuple[str, ...]
    gives: str | None
    cuda: str | dict[str, str]
    numpy: Callable[..., Any] | dict[str, Callable[..., Any]]

    def text(self, kind: str) -> str:
        return self.cuda if isinstance(self.cuda, str) else self.cuda[kind]

    def function(self, kind: str) -> Callable[..., Any]:
        return self.numpy[kind] if isinstance(self.numpy, dict) else self.numpy


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _wrapped(function: str, sign: str) -> dict[str, str]:
    """Of ints by a function, since C++ has no result that does not fit."""
    return {INT: f"{function}({{0}}, {{1}})", FLOAT: f"({{0}} {sign} {{1}})"}


_NUMBERS = (INT, FLOAT)
_BITS = (BOOL, INT)


def _comparison(sign: str, function: Callable[..., Any]) -> Operation:
    return Operation(sign, TYPES, BOOL, f"({{0}} {sign} {{1}})", function)


def _real(name: str, function: Callable[..., Any]) -> Operation:
    return Operation(name, (FLOAT,), FLOAT, f"{name}({{0}})", function)


OPERATIONS = {
    "add": Operation("+", _NUMBERS, None, _wrapped("add", "+"), np.add),
    "sub": Operation("-", _NUMBERS, None, _wrapped("sub", "-"), np.subtract),
    "mul": Operation("*", _NUMBERS, None, _wrapped("mul", "*"), np.multiply),
    "div": Operation("/", (FLOAT,), None, "({0} / {1})", np.divide),
    "floor_div": Operation("//", _NUMBERS, None, "floor_div({0}, {1})", np.floor_divide),
    "floor_mod": Operation("%", _NUMBERS, None, "floor_mod({0}, {1})", np.remainder),
    "neg": Operation("-", _NUMBERS, None, {INT: "neg({0})", FLOAT: "(-{0})"}, np.negative),
    "abs": Operation("abs", _NUMBERS, None, "abs({0})", np.abs),
    "min": Operation("minimum", _NUMBERS, None, "min({0}, {1})", np.minimum),
    "max": Operation("maximum", _NUMBERS, None, "max({0}, {1})", np.maximum),
    "and": Operation("&", _BITS, None, {BOOL: "({0} && {1})", INT: "({0} & {1})"}, np.bitwise_and),
    "or": Operation("|", _BITS, None, {BOOL: "({0} || {1})", INT: "({0} | {1})"}, np.bitwise_or),
    "xor": Operation("^", _BITS, None, {BOOL: "({0} != {1})", INT: "({0} ^ {1})"}, np.bitwise_xor),
    "invert": Operation("~", _BITS, None, {BOOL: "!{0}", INT: "(~{0})"}, np.invert),
    "shift_left": Operation("<<", (INT,), None, "shift_left({0}, {1})", np.left_shift),
    "shift_right": Operation(">>", (INT,), None, "shift_right({0}, {1})", np.right_shift),
    "lt": _comparison("<", np.less),
    "le": _comparison("<=", np.less_equal),
    "gt": _comparison(">", np.greater),
    "ge": _comparison(">=", np.greater_equal),
    "eq": _comparison("==", np.equal),
    "ne": _comparison("!=", np.not_equal),
    "exp": _real("exp", np.exp),
    "log": _real("log", np.log),
    "tanh": _real("tanh", np.tanh),
    "sqrt": _real("sqrt", np.sqrt),
    "sigmoid": _real("sigmoid", _sigmoid),
    "floor": _real("floor", np.floor),
}

# NumPy's functions of elements that are operations, by their names. The logical ones are of bools here.
UFUNCS = {
    "add": "add",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "floor_divide": "floor_div",
    "remainder": "floor_mod",
    "mod": "floor_mod",
    "negative": "neg",
    "absolute": "abs",
    "fabs": "abs",
    "minimum": "min",
    "maximum": "max",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "invert": "invert",
    "logical_and": "and",
    "logical_or": "or",
    "logical_xor": "xor",
    "logical_not": "invert",
    "left_shift": "shift_left",
    "right_shift": "shift_right",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "equal": "eq",
    "not_equal": "ne",
    "exp": "exp",
    "log": "log",
    "tanh": "tanh",
    "sqrt": "sqrt",
    "floor": "floor",
}

# What an error offers: functions of NumPy, or of fa2cupy.functions, that can be traced.
FUNCTIONS = "where, minimum, maximum, clip, abs, exp, log, tanh, sqrt, square, floor"
