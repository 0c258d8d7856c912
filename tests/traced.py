"""Traced functions beside their NumPy twins: random ones, and their CUDA text compiled by g++."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fa2cupy import functions
from fa2cupy.frameworks.base import Device, TensorRef
from fa2cupy.tracing.function import SCORE, UserFunction
from fa2cupy.tracing.params import captures_of
from tests.host import build

BATCH, HEADS, SEQLEN = 2, 3, 40


def as_read(value: Any) -> np.ndarray:
    """A captured array, or a number, of the types that functions compute with."""
    array = np.atleast_1d(value)
    return array.astype({"i": np.int32, "f": np.float32}.get(array.dtype.kind, array.dtype))


@dataclass(frozen=True)
class Random:
    """A function's text in Python, for its parameters by their usual names, and its arrays."""

    text: str
    arrays: dict[str, Any]

    def function(self, is_score: bool, **names: Any) -> Any:
        """It; with `names` as its arrays where it is not traced."""
        places = "b, h, q_idx, kv_idx, q_pos"
        scope = {"np": np, "functions": functions, **names}
        return eval(f"lambda {'score, ' * is_score}{places}: {self.text}", scope)


class _Writer:
    """Expressions of depth `depth`, whose values are of moderate size, and whose floats meet no bound exactly."""

    def __init__(self, rng: np.random.Generator, is_score: bool) -> None:
        self.rng, self.is_score = rng, is_score

    def of(self, kind: str, depth: int) -> str:
        return {"bool": self.bool, "int": self.int, "float": self.float}[kind](depth)

    def pick(self, *choices: str) -> str:
        return choices[self.rng.integers(len(choices))]

    def bool(self, depth: int) -> str:
        if depth == 0:
            return self.pick("(q_idx >= kv_idx)", "(flags[kv_idx] == flags[q_idx])", "flags[q_idx]", "(h == 1)")
        a, b, c = self.int(depth - 1), self.int(depth - 1), self.bool(depth - 1)
        sign = self.pick("<", "<=", ">", ">=", "==", "!=")
        return self.pick(
            f"({a} {sign} {b})",
            f"({a} {sign} {self.rng.integers(-9, 9)})",
            f"({c} {self.pick('&', '|', '^', '!=', '==')} {self.bool(depth - 1)})",
            f"(~{c})",
            f"np.logical_not({c})",
            f"np.logical_and({c}, {self.bool(depth - 1)})",
            f"np.where({c}, {self.bool(depth - 1)}, {self.bool(depth - 1)})",
            f"({self.float(depth - 1)} {self.pick('<', '>=')} {self.rng.normal():.9f})",
        )

    def int(self, depth: int) -> str:
        if depth == 0:
            return self.pick(
                "q_idx", "kv_idx", "b", "h", "q_pos", "doc[b, q_idx]", "doc[b, kv_idx]", "wide[kv_idx]", "count"
            )
        a, b = self.int(depth - 1), self.int(depth - 1)
        small = self.rng.integers(1, 9) * self.rng.choice([-1, 1])
        return self.pick(
            f"({a} {self.pick('+', '-', '&', '|', '^')} {b})",
            f"({a} {self.pick('//', '%')} {small})",
            f"({a} {self.pick('//', '%')} {b})",
            f"({small} - {a})",
            f"({a} % 100 * ({b} % 100))",
            f"({a} {self.pick('<<', '>>')} {self.rng.integers(0, 4)})",
            f"abs({a})",
            f"(-{a})",
            f"np.{self.pick('minimum', 'maximum')}({a}, {b})",
            f"np.clip({a}, {-abs(small)}, 7)",
            f"np.where({self.bool(depth - 1)}, {a}, {b})",
            f"(({a}) % 7) ** {self.rng.integers(0, 4)}",
            f"doc[b, ({a}) % doc.shape[1]]",
            f"(~({a}))",
            f"(({self.bool(depth - 1)}) * ({a}))",
        )

    def float(self, depth: int) -> str:
        if depth == 0:
            return self.pick(
                *["score"] * self.is_score, "table[h, q_idx]", "table[h, kv_idx]", "temperature", "half[b, kv_idx]"
            )
        a, b = self.float(depth - 1), self.float(depth - 1)
        return self.pick(
            f"({a} {self.pick('+', '-', '*')} {b})",
            f"({a} / (1.5 + abs({b})))",
            f"({a} * {self.rng.normal():.3f})",
            f"({self.int(depth - 1)} / 16 + {a})",
            f"np.{self.pick('minimum', 'maximum')}({a}, {b})",
            f"np.where({self.bool(depth - 1)}, {a}, {b})",
            f"np.exp(-abs({a}))",
            f"np.log(1 + abs({a}))",
            f"np.tanh({a})",
            f"np.sqrt(abs({a}))",
            f"(abs({a}) ** 0.5)",
            f"functions.sigmoid({a})",
            f"(np.tanh({a}) ** 3)",
            f"(np.tanh({a}) * 3 {self.pick('%', '//')} {self.pick('0.7', '-0.7')})",
            f"table[h, ({self.int(depth - 1)}) % {SEQLEN}]",
        )


def random_functions(seed: int, count: int, is_score: bool) -> list[Random]:
    """`count` different ones, with the arrays that they use."""
    rng = np.random.default_rng(seed)
    arrays = {
        "doc": rng.integers(0, 6, (BATCH, SEQLEN)).astype(np.int64),
        "wide": rng.integers(-(2**20), 2**20, SEQLEN).astype(np.int32),
        "flags": rng.integers(0, 2, SEQLEN).astype(bool),
        "table": rng.standard_normal((HEADS, SEQLEN)).astype(np.float32),
        "half": rng.standard_normal((BATCH, SEQLEN)).astype(np.float16),
        "count": 5,
        "temperature": 0.625,
    }
    writer = _Writer(rng, is_score)
    found: dict[str, Random] = {}
    while len(found) < count:
        text = writer.of("float" if is_score else "bool", int(rng.integers(2, 5)))
        if "idx" in text or "score" in text:
            found[text] = Random(text, {name: each for name, each in arrays.items() if name in text})
    return list(found.values())


_DRIVER = """
extern "C" __attribute__((visibility("default"))) void run_{n}(
    const void* captures, const float* score, const int* places, {out}* out, int count) {{
  for (int i = 0; i < count; ++i) {{
    const int* at = places + 5 * i;
    out[i] = fa2_user::f{n}({score}at[0], at[1], at[2], at[3], at[4],
                            *static_cast<const fa2_user::Captures_f{n}*>(captures));
  }}
}}
"""


def compiled(functions: Sequence[UserFunction]) -> ctypes.CDLL:
    """A library of their CUDA text as plain C++, run_0, run_1, ...: the twin of common/ptx.cuh is all that it needs."""
    parts = []
    for n, each in enumerate(functions):
        is_score = each.kind is SCORE
        parts.append(each.header(f"f{n}").replace("#pragma once", ""))
        parts.append(_DRIVER.format(n=n, out="float" if is_score else "bool", score="score[i], " * is_score))
    text = '#include "cuda_world.h"\n' + "\n".join(parts)
    key = hashlib.sha256((text + "".join(path.read_text() for path in _sources())).encode()).hexdigest()[:20]
    target = build.BUILD / f"traced-{key}.so"
    if not target.exists():
        build.BUILD.mkdir(parents=True, exist_ok=True)
        folders = [f"-I{folder}" for folder in (build.WORLD, build.source_module.root())]
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Werror=return-type"]
        unfinished = target.with_suffix(f".{id(text)}")
        command = [build.CXX, *flags, *folders, "-x", "c++", "-", "-o", str(unfinished)]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-6000:]
        unfinished.replace(target)
    return ctypes.CDLL(str(target))


def _sources() -> list[Any]:
    root = build.source_module.root() / "common"
    return [root / "user.cuh", root / "types.cuh", build.WORLD / "common" / "ptx.cuh", build.WORLD / "cuda_world.h"]


def run(
    library: ctypes.CDLL,
    n: int,
    function: UserFunction,
    arrays: Mapping[str, Any],
    places: np.ndarray,
    score: np.ndarray,
) -> np.ndarray:
    """Results of function n at places (count, 5): b, h, q_idx, kv_idx, q_pos."""
    refs = {
        name: TensorRef(
            each.ctypes.data, each.shape, tuple(s // each.itemsize for s in each.strides), each.dtype.name,
            Device("cpu", 0), each,
        )
        for name, each in arrays.items()
        if isinstance(each, np.ndarray)
    }  # fmt: skip
    captures = captures_of(function.captures, arrays, refs)
    places, score = np.ascontiguousarray(places, np.int32), np.ascontiguousarray(score, np.float32)
    out = np.zeros(len(places), np.float32 if function.kind is SCORE else np.bool_)
    pointers = [ctypes.c_void_p(each.ctypes.data) for each in (score, places, out)]
    getattr(library, f"run_{n}")(captures, *pointers, len(places))
    return out
