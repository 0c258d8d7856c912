"""Functions of the user's own: their CUDA text, compiled by g++, and their NumPy evaluation against the functions
themselves; what cannot be traced, and how that is said.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fa2cupy import functions
from fa2cupy.errors import CompilationError, Fa2Error, InvalidArgument, InvalidType
from fa2cupy.jit import compiler, source
from fa2cupy.tracing import function as function_module
from fa2cupy.tracing.function import MASK, SCORE, UserFunction
from tests import traced

SEED = 20
COUNT = 50


def places_of(seed: int, count: int = 1600) -> tuple[np.ndarray, np.ndarray]:
    """b, h, q_idx, kv_idx, q_pos (count, 5), and scores."""
    rng = np.random.default_rng(seed)
    ends = (traced.BATCH, traced.HEADS, traced.SEQLEN, traced.SEQLEN)
    places = np.stack([rng.integers(0, end, count) for end in ends], axis=1)
    places = np.concatenate([places, places[:, 2:3] + 5], axis=1).astype(np.int32)
    return places, (2 * rng.standard_normal(count)).astype(np.float32)


def arguments(places: np.ndarray, score: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(("b", "h", "q_idx", "kv_idx", "q_pos"), places.T, strict=True), score=score)


def same(got: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    if got.dtype == np.bool_:
        return bool((got == expected).all())
    return bool(np.allclose(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True))


@functools.cache
def random_ones(is_score: bool) -> tuple[list[traced.Random], list[UserFunction]]:
    texts = traced.random_functions(SEED, COUNT, is_score)
    kind = SCORE if is_score else MASK
    return texts, [UserFunction.of(kind, each.function(is_score), each.arrays) for each in texts]


@pytest.mark.parametrize("is_score", [False, True])
def test_random_functions_agree(is_score: bool) -> None:
    """By g++, by `evaluate`, and the function itself on NumPy arrays."""
    print(f"seed {SEED}")
    texts, made = random_ones(is_score)
    library = traced.compiled(made)
    places, score = places_of(SEED)
    some = 0
    for n, (text, each) in enumerate(zip(texts, made, strict=True)):
        by_gpp = traced.run(library, n, each, text.arrays, places, score)
        by_numpy = each.evaluate(arguments(places, score), each.on_host(text.arrays))
        plain = {name: traced.as_read(value) for name, value in text.arrays.items()}
        with np.errstate(all="ignore"):
            itself = text.function(is_score, **plain)(*[score] * is_score, *places.T)
        said = f"seed {SEED}, {text.text}\n{each.body}"
        assert same(by_gpp, np.broadcast_to(by_numpy, by_gpp.shape), 3e-5), said
        assert same(by_gpp, np.broadcast_to(itself, by_gpp.shape), 1e-4), said
        some += by_gpp.std() > 0
    assert some > COUNT / 2  # they are no constants


def test_nvrtc_takes_them() -> None:
    """All in one file; C++ for a GPU has other functions than g++'s."""
    parts = ['#include "common/user.cuh"\n']
    for is_score in (False, True):
        for n, each in enumerate(random_ones(is_score)[1]):
            name = f"f{n}_{is_score}"
            parts.append(each.header(name).replace("#pragma once", ""))
            result = "float" if is_score else "bool"
            head = f'extern "C" __global__ void run_{name}'
            parts.append(
                f"{head}(fa2_user::Captures_{name} captures, {result}* out, float x) {{\n"
                f"  out[threadIdx.x] = fa2_user::{name}({'x, ' * is_score}0, 1, threadIdx.x, 3, 4, captures);\n}}\n"
            )
    names = ("user", "ptx", "types")
    headers = {f"common/{name}.cuh": (source.root() / "common" / f"{name}.cuh").read_bytes() for name in names}
    whole = source.Source("user.cu", "".join(parts).encode(), tuple(sorted(headers.items())))
    assert compiler.compile(whole, "sm_80", {}).warnings == ()


def test_nvrtc_points_at_the_text() -> None:
    """At its line, whether it is an expression or has statements."""
    names = ("user", "ptx", "types")
    headers = {f"common/{name}.cuh": (source.root() / "common" / f"{name}.cuh").read_bytes() for name in names}
    for text, line in (("kv_idx <= q_idx ||\n  tabel[q_idx]", 2), ("int x = 3;\n\nreturn tabel[x];", 3)):
        code = UserFunction.of(MASK, text, None).header().encode()
        whole = source.Source("user.cu", code, tuple(sorted(headers.items())))
        with pytest.raises(CompilationError, match=rf'mask_mod\({line}\): error: identifier "tabel" is undefined'):
            compiler.compile(whole, "sm_80", {})


# ----------------------------------------------------------------------------------------------------------------------
# Where C++ has another meaning

INTS = (-(2**31), -(2**31) + 1, -100, -8, -7, -1, 0, 1, 2, 7, 8, 31, 32, 33, 2**30, 2**31 - 1)


def test_integers_are_pythons() -> None:
    """Division and its rest by any number, shifts, sums that wrap: as NumPy's of 32 bits, by g++ too."""
    operations: dict[str, Callable[[Any, Any], Any]] = {
        "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod,
        "<<": operator.lshift, ">>": operator.rshift, "min": np.minimum, "max": np.maximum,
        "abs": lambda a, b: abs(a) + b, "neg": lambda a, b: -a ^ b,
    }  # fmt: skip
    made = []
    for each in operations.values():
        function = (lambda operation: lambda b, h, q_idx, kv_idx: operation(q_idx, kv_idx) == b)(each)
        made.append(UserFunction.of(MASK, function, None))
    library = traced.compiled(made)
    a, b = (each.ravel() for each in np.meshgrid(np.array(INTS, np.int32), np.array(INTS, np.int32)))
    for n, each in enumerate(operations.values()):
        with np.errstate(all="ignore"):
            expected = each(a, b)
        assert expected.dtype == np.int32
        places = np.stack([expected, a, a, b, b], axis=1)
        score = np.zeros(len(a), np.float32)
        assert traced.run(library, n, made[n], {}, places, score).all(), list(operations)[n]
        assert made[n].evaluate(arguments(places, score), {}).all(), list(operations)[n]


FLOATS = (0.0, -0.0, 0.5, -0.5, 1.0, 3.0, -3.0, 7.25, 1e30, math.inf, -math.inf, math.nan)


def test_floats_are_pythons() -> None:
    """Division rounded down, its rest, the least and the largest, with zeros, infinities and NaN."""
    operations: dict[str, Callable[[Any, Any], Any]] = {
        "//": operator.floordiv, "%": operator.mod, "min": np.minimum, "max": np.maximum, "/": operator.truediv,
    }  # fmt: skip
    b = np.array(FLOATS, np.float32)
    made = [
        UserFunction.of(SCORE, (lambda f: lambda s, b, h, q, k: f(s, other[q]))(each), {"other": b})
        for each in operations.values()
    ]
    library = traced.compiled(made)
    places = np.array([[0, 0, i, 0, 0] for i in range(len(b))] * len(b), np.int32)
    score = np.repeat(b, len(b))
    for n, (sign, each) in enumerate(operations.items()):
        with np.errstate(all="ignore"):
            expected = np.array([each(x, y) for x, y in zip(score, np.tile(b, len(b)), strict=True)], np.float32)
        for got in (
            traced.run(library, n, made[n], {"other": b}, places, score),
            made[n].evaluate(arguments(places, score), {"other": b}),
        ):
            assert np.array_equal(got, expected, equal_nan=True), sign
            if sign in ("//", "%"):  # which of two zeros
                assert (np.signbit(got) == np.signbit(expected))[~np.isnan(expected)].all(), sign


other: Any = None  # rebound


def test_arrays_of_every_dtype() -> None:
    import ml_dtypes

    arrays: dict[str, np.ndarray] = {}
    for dtype in function_module._DTYPES:
        numbers = np.array([0, 1, 1, 0, 1] if dtype == "bool" else [3, 0, 2.5, 100, 7])
        values = numbers.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        arrays[dtype] = np.stack([values, values[::-1], values])
    made = [
        UserFunction.of(
            SCORE,
            (lambda s, b, h, q, k: s * np.where(array[q, k], 1, 0))
            if dtype == "bool"
            else (lambda s, b, h, q, k: s * array[q, k]),
            {"array": each},
        )
        for dtype, each in arrays.items()
    ]
    places = np.array([[0, 0, q, k, 0] for q in range(3) for k in range(5)], np.int32)
    score = np.ones(15, np.float32)
    library = traced.compiled(made)
    for n, each in enumerate(arrays.values()):
        expected = np.asarray(each, np.float32).ravel()
        assert np.array_equal(traced.run(library, n, made[n], {"array": each}, places, score), expected)
        assert np.array_equal(made[n].evaluate(arguments(places, score), made[n].on_host({"array": each})), expected)


def test_large_integers_become_the_ends_of_int32() -> None:
    array = np.array([2**40, -(2**40), 5])
    made = UserFunction.of(MASK, lambda b, h, q, k: array[q] == np.where(q == 0, 2**31 - 1, np.where(q == 1, least, 5)),
                           {"array": array, "least": -(2**31)})  # fmt: skip
    places = np.array([[0, 0, q, 0, 0] for q in range(3)], np.int32)
    values = {"array": array, "least": -(2**31)}
    assert traced.run(traced.compiled([made]), 0, made, values, places, np.zeros(3, np.float32)).all()
    assert made.evaluate(arguments(places, np.zeros(3)), made.on_host(values)).all()


least = 0


def test_strides_and_places_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place outside is that of the last element of its dimension: nothing else is read. Checked, it is an error."""
    whole = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    array = whole[::-1, 1::2, :4]
    made = UserFunction.of(SCORE, lambda s, b, h, q, k: array[b, h][q] + 0 * s, {"array": array})
    assert "array(b, h, q_idx)" in made.body
    places = np.array([[0, 0, 0, 0, 0], [2, 1, 3, 0, 0], [3, 1, -1, 0, 0], [-(2**31), 2, 2**31 - 1, 0, 0]], np.int32)
    expected = [array[0, 0, 0], array[2, 1, 3], array[2, 1, 3], array[2, 1, 3]]
    score = np.zeros(4, np.float32)
    assert traced.run(traced.compiled([made]), 0, made, {"array": array}, places, score).tolist() == expected
    assert made.evaluate(arguments(places, score), {"array": array}).tolist() == expected
    monkeypatch.setenv("FA2CUPY_CHECK", "1")
    made.evaluate(arguments(places[:2], score[:2]), {"array": array})
    with pytest.raises(InvalidArgument, match=r"array is read at index 3 of dimension 0: 0 to 2 are there"):
        made.evaluate(arguments(places, score), {"array": array})


def test_functions_by_their_names() -> None:
    x = np.linspace(-2, 2, 9, dtype=np.float32)
    made = UserFunction.of(
        SCORE, lambda s, b, h, q, k: functions.sigmoid(functions.clip(s, -1, 1)) + s**2 - np.square(s), None
    )
    expected = 1 / (1 + np.exp(-np.clip(x, -1, 1)))
    places = np.zeros((9, 5), np.int32)
    assert np.allclose(made.evaluate(arguments(places, x), {}), expected, atol=1e-6)
    assert np.allclose(functions.sigmoid(np.clip(x, -1, 1)), expected, atol=1e-6)
    assert np.allclose(traced.run(traced.compiled([made]), 0, made, {}, places, x), expected, atol=1e-6)


def test_float64_is_computed_as_it_is() -> None:
    made = UserFunction.of(SCORE, lambda s, b, h, q, k: s + other[q] / 3, {"other": np.array([1.0, 1e-9])})
    assert made.captures[0].dtype == "float64"
    places, score = np.array([[0, 0, 1, 0, 0]], np.int32), np.ones(1)
    arrays = made.on_host({"other": np.array([1.0, 1e-9])}, np.float64)
    assert made.evaluate(arguments(places, score), arrays, np.float64)[0] == 1 + 1e-9 / 3


# ----------------------------------------------------------------------------------------------------------------------
# Arrays by their names


def helper(q: Any, k: Any) -> Any:
    return other[q] == other[k]


def two(first: Callable[..., Any], *more: Callable[..., Any]) -> Callable[..., Any]:
    def both(b: Any, h: Any, q: Any, k: Any) -> Any:
        result = first(b, h, q, k)
        for each in more:
            result = result & each(b, h, q, k)
        return result

    return both


class Held:
    def __init__(self, first: int) -> None:
        self.first = first

    def method(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return other[k] > self.first

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return other[q] > self.first


def test_names_are_global_or_of_a_closure() -> None:
    inside = np.arange(8)
    ids = np.arange(8) // 2
    before = helper.__globals__["other"]
    bodies = [
        UserFunction.of(MASK, each, arrays).body
        for each, arrays in (
            (lambda b, h, q, k: other[q] == other[k], {"other": ids}),
            (lambda b, h, q, k: inside[q] == inside[k], {"inside": ids}),
            (lambda b, h, q, k: helper(q, k), {"other": ids}),
            (lambda b, h, q, k: [helper(q, k) for _ in (0, 1)][1], {"other": ids}),
            (two(lambda b, h, q, k: q >= k, lambda b, h, q, k: inside[q] == inside[k]), {"inside": ids}),
            (two(lambda b, h, q, k: helper(q, k)), {"other": ids}),
            (lambda b, h, q, k: nowhere[q] == nowhere[k], {"nowhere": ids}),  # noqa: F821
            (Held(3).method, {"other": ids}),
            (Held(4), {"other": ids}),
            (functools.partial(lambda first, b, h, q, k: other[q] > first, 5), {"other": ids}),
        )
    ]
    assert bodies == [
        "return other(q_idx) == other(kv_idx);",
        "return inside(q_idx) == inside(kv_idx);",
        "return other(q_idx) == other(kv_idx);",
        "return other(q_idx) == other(kv_idx);",
        "return (q_idx >= kv_idx) && (inside(q_idx) == inside(kv_idx));",
        "return other(q_idx) == other(kv_idx);",
        "return nowhere(q_idx) == nowhere(kv_idx);",
        "return other(kv_idx) > 3;",
        "return other(q_idx) > 4;",
        "return other(q_idx) > 5;",
    ]
    assert helper.__globals__["other"] is before and (inside == np.arange(8)).all()


def test_a_function_that_calls_itself() -> None:
    def until(n: int, q: Any) -> Any:
        return other[q] if n == 0 else until(n - 1, q) + 1

    made = UserFunction.of(MASK, lambda b, h, q, k: until(2, q) > k, {"other": np.arange(4)})
    assert made.body == "return add(add(other(q_idx), 1), 1) > kv_idx;"


def test_numbers_are_no_part_of_the_text() -> None:
    def of(value: object) -> UserFunction:
        return UserFunction.of(MASK, lambda b, h, q, k: q - k < width, {"width": value})

    assert of(5) == of(7) and hash(of(5)) == hash(of(7)) and of(5) != of(5.0)
    assert of(np.zeros((), np.int32)).body == "return sub(q_idx, kv_idx) < width();"


width = 3


def test_equal_by_text_and_dtypes() -> None:
    ids = np.arange(6, dtype=np.int32)

    def of(array: np.ndarray, extra: int = 0) -> UserFunction:
        return UserFunction.of(MASK, lambda b, h, q, k: other[q] == other[k] + extra, {"other": array})

    assert of(ids) == of(ids[:3] + 1) and hash(of(ids)) == hash(of(ids[:3] + 1))
    assert of(ids) != of(ids.astype(np.int64)) and of(ids) != of(ids, 1)
    assert len({of(ids), of(ids), of(ids[:2]), of(ids, 2)}) == 2
    text = UserFunction.of(MASK, "other[q_idx] == other[kv_idx]", {"other": ids})
    assert text == UserFunction.of(MASK, "other[q_idx] == other[kv_idx]", {"other": ids}) and text != of(ids)


def test_what_is_used_twice_is_computed_once() -> None:
    def function(b: Any, h: Any, q: Any, k: Any) -> Any:
        x = q - k
        for _ in range(40):
            x = x * x
        return x > 0

    body = UserFunction.of(MASK, function, None).body
    assert body.count("mul(") == 40 and len(body) < 2000


def test_q_pos_is_a_sixth_parameter() -> None:
    made = UserFunction.of(MASK, lambda b, h, q_idx, kv_idx, q_pos: kv_idx <= q_pos, None)
    assert made.body == "return kv_idx <= q_pos;"
    made = UserFunction.of(SCORE, lambda s, b, h, q, k, q_pos: s - abs(q_pos - k), None)
    assert made.body == "return score - float(abs(sub(q_pos, kv_idx)));"


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be traced

array = np.arange(12).reshape(3, 4)
unnamed = np.arange(3)


def _branches(b: Any, h: Any, q: Any, k: Any) -> Any:
    if q > k:
        return True
    return b == 0


REFUSED: dict[str, tuple[Any, str]] = {
    "if": (_branches, r"asks whether a value is true .*numpy.where"),
    "and": (lambda b, h, q, k: q > k and b == 0, "asks whether a value is true"),
    "not": (lambda b, h, q, k: not q > k, "asks whether a value is true"),
    "chain": (lambda b, h, q, k: 0 <= q - k < 5, "asks whether a value is true"),
    "in": (lambda b, h, q, k: q in (1, 2), "asks whether a value is true"),
    "builtin min": (lambda b, h, q, k: min(q, k) > 3, "numpy.minimum"),
    "range": (lambda b, h, q, k: sum(range(q)) > 3, "counts to it"),
    "list": (lambda b, h, q, k: [1, 2, 3][q] > 1, "as an index of something"),
    "unnamed array": (lambda b, h, q, k: unnamed[q] > 1, "indexes an array with it.*arrays= names"),
    "unnamed array, computed": (lambda b, h, q, k: unnamed + q > 1, "a numpy.ndarray that arrays= does not"),
    "int": (lambda b, h, q, k: int(q) > 1, r"\.astype\(int\)"),
    "math": (lambda b, h, q, k: math.exp(q) > 1, "a function of math"),
    "round": (lambda b, h, q, k: round(q / 2) > 1, "makes a Python number"),
    "attribute": (lambda b, h, q, k: q.sum() > 1, r"asks a value for \.sum.*\.astype"),
    "item": (lambda b, h, q, k: q[0] > 1, "indexes a value"),
    "cumsum": (lambda b, h, q, k: np.cumsum(q) > 1, "calls numpy.cumsum.*where, minimum"),
    "sin": (lambda b, h, q, k: np.sin(q) > 1, "calls numpy.sin"),
    "reduce": (lambda b, h, q, k: np.add.reduce(q) > 1, "calls numpy.add.reduce"),
    "out": (lambda b, h, q, k: np.add(q, 1, dtype=np.int64) > 1, "calls numpy.add with dtype="),
    "asarray": (lambda b, h, q, k: np.asarray(q) > 1, "makes an array of a value"),
    "where of one": (lambda b, h, q, k: np.where(q > k), "three arguments"),
    "where of an int": (lambda b, h, q, k: np.where(q, k, 1) > 0, "the condition of where is an int: a bool is needed"),
    "iteration": (lambda b, h, q, k: list(q) == [], "goes through a value's elements"),
    "len": (lambda b, h, q, k: len(q) > 1, r"\.shape\[0\]"),
    "dict": (lambda b, h, q, k: {1: 2}[q] > 1, "in a dict or a set"),
    "divmod": (lambda b, h, q, k: divmod(q, 3)[0] > 1, "use // and %"),
    "matmul": (lambda b, h, q, k: q @ k > 1, "multiplies matrices"),
    "power": (lambda b, h, q, k: q**k > 1, r"a power other than 0\.5"),
    "large power": (lambda b, h, q, k: q**65 > 1, "at most 64"),
    "of bools": (lambda b, h, q, k: (q > k) + (k > q), r"\+ of bools only: use & \| ~"),
    "bits of a float": (lambda b, h, q, k: (q / 2) & 1 > 0, "& of a float: an int is needed"),
    "wide": (lambda b, h, q, k: q > 2**31, "uses the number 2147483648: integers of 32 bits"),
    "text in it": (lambda b, h, q, k: q == "q", "computes with a str"),
    "None in it": (lambda b, h, q, k: q == None, "computes with None"),  # noqa: E711
    "nothing": (lambda b, h, q, k: None, "returns nothing: a bool is needed"),
    "an int": (lambda b, h, q, k: q & 1, "returns a value of type int: a bool is needed; compare"),
    "loop": (lambda b, h, q, k: sum(q * n for n in range(3000)) > 1, "more than 2000 operations"),
    "parameters": (lambda b, h, q: q > 1, r"has the parameters \(b, h, q\)"),
    "fifth": (lambda b, h, q, k, other: q > 1, r"\(b, h, q_idx, kv_idx\) are needed, and q_pos"),
    "keyword": (lambda b, h, q, k, *, other: q > 1, "has the parameters"),
    "no function": (3, "is a int: a function, or text, is needed"),
    "logical": (lambda b, h, q, k: np.logical_not(q), "is of bools here"),
    "astype": (lambda b, h, q, k: q.astype(complex) > 1, "bool, int or float is needed"),
}  # fmt: skip
REFUSED_OF_ARRAYS: dict[str, tuple[Any, str]] = {
    "whole": (lambda b, h, q, k: array + 1 > q, r"array as a whole.*as in array\[q_idx, q_idx\]"),
    "part": (lambda b, h, q, k: array[q] > 1, "whose 1 dimensions are not indexed"),
    "more": (lambda b, h, q, k: array[b, q, k] > 1, "with 3 indices: it has 2 dimensions"),
    "slice": (lambda b, h, q, k: array[b, :] > 1, "with a slice: an int"),
    "none": (lambda b, h, q, k: array[b, None] > 1, "with None"),
    "negative": (lambda b, h, q, k: array[b, -1] > 1, "indexes array with -1: indices count from 0"),
    "float": (lambda b, h, q, k: array[b, q / 2] > 1, r"with a float: an int is needed; use \.astype\(int\)"),
    "bool": (lambda b, h, q, k: array[b, q > 2] > 1, "with a bool: an int is needed; use numpy.where"),
    "attribute": (lambda b, h, q, k: array.T[q, b] > 1, r"asks array for \.T"),
    "len": (lambda b, h, q, k: len(array) > q, r"\.shape\[0\]"),
    "write": (lambda b, h, q, k: array.__setitem__((b, q), 1), "arrays are read only"),
    "unused": (lambda b, h, q, k: q > k, "arrays has 'array', which the function of mask_mod does not use"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(Fa2Error, match=message) as error:
        UserFunction.of(MASK, function, None)
    assert "mask_mod" in str(error.value)


@pytest.mark.parametrize("name", REFUSED_OF_ARRAYS)
def test_what_cannot_be_done_with_arrays(name: str) -> None:
    function, message = REFUSED_OF_ARRAYS[name]
    with pytest.raises(Fa2Error, match=message):
        UserFunction.of(MASK, function, {"array": array})


def test_a_value_of_another_trace() -> None:
    kept = []
    UserFunction.of(MASK, lambda b, h, q, k: kept.append(q) or q > k, None)
    with pytest.raises(InvalidArgument, match="a value of another traced function"):
        UserFunction.of(MASK, lambda b, h, q, k: kept[0] > q, None)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([1], "arrays=.* is a list: a dict"),
        ({"a b": 1}, "no name of a variable"),
        ({"lambda": 1}, "no name of a variable"),
        ({"double": 1}, "cannot use: give it another"),
        ({"kv_idx": 1}, "cannot use"),
        ({"x3": 1}, "cannot use"),
        ({"array": [1, 2]}, "is a list: an array of CuPy"),
        ({"array": np.zeros(3, np.complex64)}, "dtype complex64: bool, int8"),
        ({"array": np.zeros(3, np.uint16)}, "dtype uint16"),
        ({"array": np.zeros((1,) * 9)}, "has 9 dimensions: at most 8"),
        ({"array": np.zeros((3, 0))}, r"shape \(3, 0\): an array with elements"),
    ],
)
def test_wrong_arrays(arrays: Any, message: str) -> None:
    with pytest.raises(Fa2Error, match=message):
        UserFunction.of(MASK, lambda b, h, q, k: array[q] > 1, arrays)


# ----------------------------------------------------------------------------------------------------------------------
# Text


def test_text_is_an_expression_or_statements() -> None:
    ids = np.array([0, 0, 1, 1, 2], np.int32)
    made = [
        UserFunction.of(MASK, "ids[q_idx] == ids[kv_idx] // of one document", {"ids": ids}),
        UserFunction.of(
            MASK,
            "const int own = ids(q_idx);\nif (own < 0) { return false; }\nreturn own == ids[kv_idx];",
            {"ids": ids},
        ),
        UserFunction.of(MASK, lambda b, h, q, k: ids[q] == ids[k], {"ids": ids}),
    ]
    library = traced.compiled(made)
    places = np.array([[0, 0, q, k, 0] for q in range(5) for k in range(5)], np.int32)
    results = [traced.run(library, n, each, {"ids": ids}, places, np.zeros(25)) for n, each in enumerate(made)]
    assert all((each == results[2]).all() for each in results) and results[2].any()
    with pytest.raises(InvalidArgument, match="a text, which only a GPU computes"):
        made[0].evaluate({}, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty text"),
        ("q_idx > 1; }", "closes nothing"),
        ("return (q_idx > 1;", r"\( in its text that is never closed"),
        ("#include <x>", "directives are not supported"),
        ('asm("exit;")', "strings are not supported"),
        ("asm(1)", "has asm in its text"),
        ("__syncthreads(), true", "names with two underscores"),
        ("goto done; return true", "has goto in its text"),
        ("extern int x; return x", "has extern"),
        ("q_idx > 1 /* never ends", "does not end"),
        ("int x = 3;", "statements without a return"),
        ("q_idx > \\\n 1", "continued lines"),
        ("q_idx > 1" + " " * 4096, "at most 4096"),
        ("ids[q_idx] > 0 // __syncthreads() is a comment", ""),
    ],
)  # fmt: skip
def test_text_is_looked_at(text: str, message: str) -> None:
    ids = {"ids": np.zeros(3, np.int32)} if "ids" in text else None
    if not message:
        UserFunction.of(MASK, text, ids)
        return
    with pytest.raises(InvalidArgument, match=message):
        UserFunction.of(MASK, text, ids)
    with pytest.raises(InvalidArgument, match="arrays has 'unused', which the text"):
        UserFunction.of(MASK, "q_idx > kv_idx // unused", {"unused": 1})


def test_errors_are_of_the_right_kind() -> None:
    for function, kind in ((REFUSED["if"][0], InvalidType), (REFUSED["loop"][0], InvalidArgument)):
        with pytest.raises(kind):
            UserFunction.of(MASK, function, None)
