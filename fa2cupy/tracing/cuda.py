"""A traced function as the body of a device function, in CUDA C++."""

from __future__ import annotations

import math

import numpy as np

from fa2cupy.tracing.graph import Graph, Node
from fa2cupy.tracing.operations import BOOL, FLOAT, INT, OPERATIONS

__all__ = ["body_of"]

_MAX_LENGTH = 200  # characters of one expression; a longer one is named
_LEAVES = ("literal", "argument", "number", "size")


def body_of(graph: Graph) -> str:
    """Statements; the last returns. What is used more than once, or is long, has a name: x0, x1, ..."""
    nodes = list(graph.used())
    uses = dict.fromkeys((node.number for node in nodes), 0)
    for node in nodes:
        for arg in node.args:
            uses[arg.number] += 1
    texts: dict[int, str] = {}
    lines: list[str] = []
    for node in nodes:
        text = _expression(node, texts)
        if node is not graph.result and node.op not in _LEAVES and (uses[node.number] > 1 or len(text) > _MAX_LENGTH):
            # What depends on the score may be a number with its derivative.
            kind = "auto" if node.of_score else node.type
            lines.append(f"const {kind} x{len(lines)} = {_bare(text)};")
            text = f"x{len(lines) - 1}"
        texts[node.number] = text
    assert graph.result is not None
    return "\n".join([*lines, f"return {_bare(texts[graph.result.number])};"])


def _expression(node: Node, texts: dict[int, str]) -> str:
    args = [texts[arg.number] for arg in node.args]
    payload = node.payload
    if node.op == "literal":
        return _literal(payload)
    if node.op in ("argument", "number"):
        return str(payload)
    if node.op == "size":
        assert isinstance(payload, tuple)
        return f"{payload[0]}.size({payload[1]})"
    if node.op == "read":
        return f"{payload}({', '.join(map(_bare, args))})"
    if node.op == "where":
        return f"where({', '.join(map(_bare, args))})"
    if node.op == "convert":
        return f"({args[0]} != 0)" if node.type == BOOL else f"{node.type}({_bare(args[0])})"
    template = OPERATIONS[node.op].text(node.args[0].type)
    return template.format(*(map(_bare, args) if not template.startswith(("(", "!")) else args))


def _bare(text: str) -> str:
    """Without the parentheses around all of it."""
    if not text.startswith("("):
        return text
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[1:-1] if place == len(text) - 1 else text
    return text


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        if value == -(2**31):
            return "(-2147483647 - 1)"
        return f"({value})" if value < 0 else str(value)
    assert isinstance(value, float)
    if not math.isfinite(value):
        return "not_a_number()" if math.isnan(value) else "kInfinity" if value > 0 else "(-kInfinity)"
    with np.errstate(over="ignore"):
        nearest = np.float32(value)
    if not np.isfinite(nearest):
        return _literal(float(nearest))
    text = str(nearest)
    return f"({text}f)" if text.startswith("-") else f"{text}f"


# What types are called in the text.
assert {BOOL, INT, FLOAT} == {"bool", "int", "float"}
