"""The table of keywords is what the functions take, say and refuse; what is to come is known, absent is absent."""

from __future__ import annotations

import ast
import fractions
import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fa2cupy
from fa2cupy import cpu, doors, keywords, problem
from fa2cupy.checks import check_scale
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import CUPY
from fa2cupy.kernels import planner
from fa2cupy.keywords import FUNCTIONS, KEYWORDS, OTHER_NAMES, Keyword
from fa2cupy.options import given
from fa2cupy.prepared import PREPARED
from fa2cupy.problem import ArrayRule, AttentionProblem
from fa2cupy.spec import Spec
from tests.dlpack_producer import Producer
from tests.fake_gpu import FakeGpu, cupy_array, host_view

PACKAGE = Path(fa2cupy.__file__).parent
TO_COME = [name for name, keyword in KEYWORDS.items() if not keyword.since]
Q = np.ones((1, 3, 2, 8), np.float16)


def arguments(function: str) -> list[Any]:
    lse = np.ones((1, 2, 3), np.float32)
    return [lse if name == "lse" else Q for name in FUNCTIONS[function][0]]


def call(function: str, *more: Any, **given: Any) -> Any:
    return getattr(fa2cupy, function)(*arguments(function), *more, **given)


# ----------------------------------------------------------------------------------------------------------------------
# Signatures


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_help_shows(function: str) -> None:
    parameters = inspect.signature(getattr(fa2cupy, function)).parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    shown = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    table = [keyword for keyword in KEYWORDS.values() if function in keyword.functions and keyword.since]
    assert list(shown) == [keyword.name for keyword in table]
    assert list(shown.values()) == [keyword.default for keyword in table]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_runs_takes_what_help_shows(function: str) -> None:
    """A keyword with a name in the code has the table's default; any other keyword goes through `given`."""
    code = getattr(fa2cupy, function)
    names = code.__code__.co_varnames[: code.__code__.co_argcount + code.__code__.co_kwonlyargcount]
    assert [name for name in inspect.signature(code).parameters if name in names] == list(names)
    assert code.__kwdefaults__ == {name: KEYWORDS[name].default for name in code.__kwdefaults__}


def _stub() -> dict[str, list[ast.FunctionDef]]:
    tree = ast.parse((PACKAGE / "attention.pyi").read_text(encoding="utf-8"))
    functions: dict[str, list[ast.FunctionDef]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            functions.setdefault(node.name, []).append(node)
    return functions


def test_what_type_checkers_see() -> None:
    """attention.pyi has the table's keywords, types and defaults; of return_lse each overload has its own."""
    stub = _stub()
    assert list(stub) == list(FUNCTIONS)
    for name, overloads in stub.items():
        expected = inspect.signature(getattr(fa2cupy, name)).parameters
        for function in overloads:
            assert function.args.vararg is None and function.args.kwarg is None
            arrays = [(a.arg, ast.unparse(a.annotation)) for a in function.args.args if a.annotation]
            assert arrays == [(array, "A") for array in FUNCTIONS[name][0]]
            names = [argument.arg for argument in function.args.kwonlyargs]
            assert names == [n for n, p in expected.items() if p.kind is p.KEYWORD_ONLY]
            for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
                if argument.arg in ("return_lse", "grad_of") and len(overloads) > 1:
                    continue
                assert argument.annotation is not None and default is not None
                assert ast.unparse(argument.annotation) == expected[argument.arg].annotation, argument.arg
                assert ast.literal_eval(default) == expected[argument.arg].default, argument.arg
        results = {ast.unparse(function.returns) for function in overloads if function.returns}
        assert FUNCTIONS[name][1] in results


@pytest.mark.parametrize("function", FUNCTIONS)
def test_docstrings_name_every_keyword(function: str) -> None:
    text = getattr(fa2cupy, function).__doc__
    if "Args:" in text:
        for name in inspect.signature(getattr(fa2cupy, function)).parameters:
            assert f"{name}:" in text or f"{name}," in text, name


# ----------------------------------------------------------------------------------------------------------------------
# What is to come


@pytest.mark.parametrize("name", TO_COME)
def test_neutral_values_mean_absent(name: str, gpu: FakeGpu) -> None:
    """The same plan, the same key, the same bits."""
    gpu.compute = False
    q = cupy_array((2, 5, 4, 16), np.float16)
    lse = cupy_array((2, 4, 5), np.float32)
    fa2cupy.attention(q, q, q)
    fa2cupy.attention_backward(q, q, q, q, q, lse)
    known, plans = len(PREPARED), len(gpu.plans)
    for value in KEYWORDS[name].neutral:
        if "attention" in KEYWORDS[name].functions:
            fa2cupy.attention(q, q, q, **{name: value})
        if "attention_backward" in KEYWORDS[name].functions:
            fa2cupy.attention_backward(q, q, q, q, q, lse, **{name: value})
    assert (len(PREPARED), len(gpu.plans)) == (known, plans)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", TO_COME)
def test_other_values_are_not_supported_yet(name: str, function: str) -> None:
    keyword = KEYWORDS[name]
    for value in ("x", 7, np.ones(3), (5, 0), True, object()):
        if function in keyword.functions:
            with pytest.raises(InvalidArgument) as caught:
                call(function, **{name: value})
            assert str(caught.value).startswith(name)
            assert f" is not supported yet: leave it out, {function}() takes " in str(caught.value)
        else:
            with pytest.raises(InvalidType, match=rf"{function}\(\) has no keyword '{name}': "):
                call(function, **{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("window_size", [None, -1, (-1, -1), [-1, -1], (None, None), (-1, None), np.int64(-1), -1.0]),
        ("softcap", [None, 0.0, 0, np.float32(0)]),
        ("dropout_p", [None, 0.0, 0]),
        ("batch_invariant", [False, np.False_, None]),
        ("grad_of", [(), [], None]),
    ],
)
def test_neutral(name: str, values: list[Any]) -> None:
    assert all(keywords.is_neutral(KEYWORDS[name], value) for value in values)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("window_size", [0, False, (0, 0), (-1, 0), (False, -1), ("-1", -1), np.array(-1), [np.ones(2), -1]]),
        ("softcap", [False, np.False_, 1e-30, float("nan"), np.zeros(())]),
        ("dropout_p", [False, np.array(0.0), "0"]),
        ("batch_invariant", [0, 0.0, np.True_, np.array(False)]),
        ("mask", [False, 0, np.zeros(3)]),
        ("grad_of", [0, "", ("bias",)]),
    ],
)
def test_not_neutral(name: str, values: list[Any]) -> None:
    assert not any(keywords.is_neutral(KEYWORDS[name], value) for value in values)


def test_an_int_window_is_told_how_windows_are_counted() -> None:
    for value in (128, np.int64(128), 0):
        with pytest.raises(InvalidType, match=r"^window_size=.* is one number.*\(127, 0\) sees 128 keys.*Mistral"):
            call("attention", window_size=value)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ((-2, 0), InvalidArgument, r"window_size=\(-2, 0\) is not supported: -1 is unlimited"),
        ((0, -(2**70)), InvalidArgument, "nothing is below it"),
        (-2, InvalidType, "window_size=-2 is one number"),
        ((1,), InvalidArgument, "has 1 elements"),
        ((1, 2, 3), InvalidArgument, "has 3 elements"),
        ((1.0, 2), InvalidType, "holds a float: two ints are needed"),
        ((True, 0), InvalidType, "holds a bool"),
        ((0, "1"), InvalidType, "holds a str"),
        ("12", InvalidType, "window_size='12' is a str"),
        (True, InvalidType, "is a bool"),
        (np.ones(2, int), InvalidType, "window_size, a numpy.ndarray, is a numpy.ndarray"),
        ((np.ones(2), -1), InvalidType, "holds a numpy.ndarray"),
    ],
    ids=repr,
)
def test_windows_that_are_none(value: Any, kind: type[Exception], words: str, function: str) -> None:
    with pytest.raises(kind, match=words):
        call(function, window_size=value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_causal_makes_the_right_end_of_a_window(function: str) -> None:
    message = r"^window_size=\(2, 1\) with causal=True: causal makes the right end 0, so -1 or 0 is needed$"
    for causal in (True, np.True_):
        with pytest.raises(InvalidArgument, match=message):
            call(function, causal=causal, window_size=(2, 1))
    for window in ((2, -1), [2, 0], (np.int32(2), None)):
        call(function, causal=True, window_size=window)


_NONE_OF_IT: dict[str, list[tuple[Any, type[Exception], str]]] = {
    "softcap": [
        (-1.0, InvalidArgument, "softcap=-1.0 is not supported: a number above 0, or None or 0.0 for none"),
        (float("nan"), InvalidArgument, "softcap=nan is not supported: it must be finite"),
        (float("inf"), InvalidArgument, "it must be finite"),
        (True, InvalidType, "softcap=True is a bool"),
        ("30", InvalidType, "softcap='30' is a str"),
        (np.ones(1), InvalidType, "softcap is a numpy.ndarray: a Python number is needed"),
    ],
    "dropout_p": [
        (-1e-9, InvalidArgument, "dropout_p=-1e-09 is not supported: at least 0 and, rounded to a"),
        (1.0, InvalidArgument, "dropout_p=1.0 is not supported"),
        (1 - 2**-17, InvalidArgument, "below 1"),
        (1.5, InvalidArgument, "dropout_p=1.5 is not supported"),
        (float("nan"), InvalidArgument, "dropout_p=nan is not supported"),
        (-float("inf"), InvalidArgument, "dropout_p=-inf is not supported"),
        (True, InvalidType, "dropout_p=True is a bool"),
        ("0.1", InvalidType, "dropout_p='0.1' is a str"),
        (np.ones(1), InvalidType, "dropout_p is a numpy.ndarray"),
        (0.1, InvalidArgument, "dropout_p=0.1 is given without dropout_seed=(seed, offset), which"),
    ],
    "dropout_seed": [
        (7, InvalidType, "dropout_seed=7 is a int: (seed, offset), two ints, or an array of them"),
        ((1,), InvalidType, "dropout_seed=(1,) is a tuple"),
        ((1, 2, 3), InvalidType, "is a tuple: (seed, offset)"),
        ((1.0, 2), InvalidType, "holds a float"),
        ((True, 2), InvalidType, "holds a bool"),
        ((1, 2**64), InvalidArgument, "holds a number of more than 64 bits"),
        ((-(2**63) - 1, 0), InvalidArgument, "holds a number of more than 64 bits"),
        ("12", InvalidType, "dropout_seed='12' is a str"),
        (np.ones(3, np.int64), InvalidArgument, "dropout_seed has shape (3,) and dtype int64: (seed, offset)"),
        (np.ones((), np.int64), InvalidArgument, "dropout_seed has shape () and dtype int64"),
        (np.ones(2, np.int32), InvalidType, "dropout_seed has shape (2,) and dtype int32"),
        (np.ones(2), InvalidType, "dtype float64"),
    ],
    "alibi_slopes": [
        (np.ones(3, np.float32), InvalidArgument, "(num_heads,) or (batch, num_heads) is needed, here (2,) or (1, 2)"),
        (np.ones((2, 2), np.float32), InvalidArgument, "alibi_slopes has shape (2, 2)"),
        (np.ones(2), InvalidType, "alibi_slopes has dtype float64: float32 is needed"),
        (np.ones(2, np.float16), InvalidType, "alibi_slopes has dtype float16: float32 is needed"),
        (0.5, InvalidType, "alibi_slopes is a float: an array of CuPy, PyTorch, JAX or NumPy"),
    ],
    "sinks": [
        (np.ones(3, np.float32), InvalidArgument, "sinks has shape (3,): (num_heads,) is needed, here (2,)"),
        (np.ones((1, 2), np.float32), InvalidArgument, "sinks has shape (1, 2)"),
        (np.ones(2), InvalidType, "sinks has dtype float64: float32 or float16 is needed"),
        (np.ones(2, ml_dtypes.bfloat16), InvalidType, "sinks has dtype bfloat16: float32 or float16 is needed"),
        (1.0, InvalidType, "sinks is a float"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", _NONE_OF_IT)
def test_features_that_are_none(name: str, function: str) -> None:
    """A seed is looked at, too, where nothing is dropped."""
    for value, kind, words in _NONE_OF_IT[name]:
        with pytest.raises(kind) as caught:
            call(function, **{name: value})
        assert words in str(caught.value), value


def test_values_become_what_the_rest_goes_on_with() -> None:
    q = [Q, Q, Q]
    plain = (False, None, "bshd", None, False, ())

    def features(**keywords: Any) -> tuple[Any, ...]:
        names, arrays, options = given("attention", q, plain, (), keywords)
        return names, arrays[3:], options[5]

    for value in (30, np.float32(30), np.int64(30), fractions.Fraction(30)):
        names, _, ((name, softcap),) = features(softcap=value)
        assert (names, name, type(softcap), softcap) == ((), "softcap", float, 30.0)
    for p, steps in (
        (0.1, 3277),
        (np.float32(0.5), 16384),
        (1 / 65536 + 1e-9, 1),
        (1 - 2**-15, 32767),
        (1.5 / 2**15, 2),
    ):
        names, arrays, features_ = features(dropout_p=p, dropout_seed=(2**64 - 1, -(2**63)))
        assert (names, arrays) == (("dropout_seed",), [(-1, -(2**63))]) and features_ == (("dropout_p", steps / 2**15),)
    nothing = ((), [], ())
    for p in (None, 0.0, 1e-6, 1 / 65536, np.float16(0)):
        assert features(dropout_p=p, dropout_seed=(1, 2)) == nothing
    assert features(dropout_seed=np.ones(2, np.int64)) == nothing
    seed = np.ones(4, np.uint32)
    names, arrays, _ = features(sinks=Q, dropout_seed=seed, dropout_p=0.5, alibi_slopes=seed, seqused_k=Q)
    assert names == ("alibi_slopes", "sinks", "dropout_seed", "seqused_k") and arrays[2] is seed


@pytest.mark.parametrize(
    ("keywords", "kind", "words"),
    [
        ({"grad_of": "sinks"}, InvalidType, "grad_of='sinks' is a str: a tuple of names, as ('sinks',), is needed"),
        ({"grad_of": ("q",)}, InvalidArgument, "grad_of=('q',) names 'q': 'sinks' is possible"),
        ({"grad_of": ("bias",)}, InvalidArgument, "names 'bias': 'sinks' is possible"),
        ({"grad_of": (1,)}, InvalidType, "grad_of=(1,) is a tuple"),
        ({"grad_of": ("sinks", "sinks"), "sinks": 1}, InvalidArgument, "names 'sinks' twice"),
        ({"grad_of": ("sinks",)}, InvalidArgument, "grad_of=('sinks',) names 'sinks', and sinks is not given"),
        ({"grad_of": ["sinks"], "sinks": None}, InvalidArgument, "and sinks is not given"),
        ({"dsinks": np.ones(2, np.float32)}, InvalidArgument, "dsinks is given, and grad_of does not name 'sinks'"),
        ({"dsinks": np.ones(2), "sinks": np.ones(2)}, InvalidArgument, "dsinks is given, and grad_of does not"),
    ],
)
def test_gradients_that_are_none(keywords: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        call("attention_backward", **keywords)
    assert words in str(caught.value)


def test_where_the_gradient_of_sinks_may_go() -> None:
    sinks = np.ones(2, np.float32)
    for wrong, kind, words in (
        (np.ones(3, np.float32), InvalidArgument, r"dsinks has shape \(3,\): \(2,\) is needed"),
        (np.ones(2, np.float16), InvalidType, "dsinks has dtype float16 but sinks has float32: they must be the same"),
        (sinks, InvalidArgument, "dsinks shares memory with sinks"),
        ([1.0, 2.0], InvalidType, "dsinks is a list"),
    ):
        with pytest.raises(kind, match=words):
            call("attention_backward", sinks=sinks, grad_of=("sinks",), dsinks=wrong)
    own = np.ones(2, np.float32)
    assert call("attention_backward", sinks=sinks, grad_of=("sinks",), dsinks=own)[3] is own
    assert len(call("attention_backward", sinks=sinks)) == len(call("attention_backward", grad_of=[])) == 3


def test_sinks_in_the_bits_of_bfloat16() -> None:
    """uint16, as q, k and v may be: in and out."""
    bits = np.full((1, 3, 2, 8), 0x3F80, np.uint16)
    sinks = np.array([0x3F80, 0xC000], np.uint16)  # 1, -2
    out, lse = fa2cupy.attention(bits, bits, bits, dtype="bfloat16", sinks=sinks, return_lse=True)
    wide = np.array([1, -2], np.float32)
    _, expected = fa2cupy.attention(bits, bits, bits, dtype="bfloat16", sinks=wide, return_lse=True)
    assert (lse == expected).all()
    *_, dsinks = fa2cupy.attention_backward(
        bits, bits, bits, bits, out, lse, dtype="bfloat16", sinks=sinks, grad_of=("sinks",)
    )
    *_, same = fa2cupy.attention_backward(
        bits, bits, bits, bits, out, lse, dtype="bfloat16", sinks=wide, grad_of=("sinks",)
    )
    assert dsinks.dtype == np.uint16
    np.testing.assert_allclose((dsinks.astype(np.uint32) << 16).view(np.float32), same, rtol=2**-8)


def test_a_window_is_counted_from_the_last_key() -> None:
    rng = np.random.default_rng(5)
    q, k, v = rng.standard_normal((1, 2, 1, 8)), *rng.standard_normal((2, 1, 5, 1, 8))
    out, lse = fa2cupy.attention(q, k, v, window_size=(1, 0), return_lse=True)
    for i, keys in enumerate((slice(2, 4), slice(3, 5))):
        row, row_lse = fa2cupy.attention(q[:, i : i + 1], k[:, keys], v[:, keys], return_lse=True)
        np.testing.assert_allclose(out[:, i], row[:, 0], rtol=1e-12)
        np.testing.assert_allclose(lse[..., i], row_lse[..., 0], rtol=1e-12)


def test_the_pullback_has_the_window() -> None:
    rng = np.random.default_rng(6)
    q, k, v, dout = rng.standard_normal((4, 1, 6, 2, 8))
    out, pullback = fa2cupy.attention_vjp(q, k, v, causal=True, window_size=(2, -1))
    _, lse = fa2cupy.attention(q, k, v, window_size=(2, 0), return_lse=True)
    expected = fa2cupy.attention_backward(dout, q, k, v, out, lse, window_size=(2, 0))
    for found, wanted in zip(pullback(dout), expected, strict=True):
        assert (found == wanted).all()


def test_no_array_is_printed() -> None:
    """repr of an array on a GPU would wait for it, and be long."""
    with pytest.raises(InvalidArgument, match=r"^bias, a numpy.ndarray, is not supported yet: leave it out"):
        call("attention", bias=np.ones((1, 1, 3, 3)))


def test_deterministic_concerns_gradients(gpu: FakeGpu) -> None:
    gpu.compute = False
    q = cupy_array((2, 5, 4, 16), np.float16)
    for value in (False, True, np.True_):
        fa2cupy.attention(q, q, q, deterministic=value)
    assert len(gpu.plans) == len(PREPARED) == 1
    for function in ("attention", "forward_workspace_bytes", "backward_workspace_bytes"):
        with pytest.raises(InvalidType, match="deterministic=1 is a int: True or False is needed"):
            call(function, deterministic=1)


# ----------------------------------------------------------------------------------------------------------------------
# Hints


@pytest.mark.parametrize(
    ("function", "name", "words"),
    [
        ("attention", "is_causal", "did you mean 'causal'?"),
        ("attention", "scale", "did you mean 'softmax_scale'?"),
        ("attention", "sm_scale", "did you mean 'softmax_scale'?"),
        ("attention", "softmax_scal", "did you mean 'softmax_scale'?"),
        ("attention", "lse", "did you mean 'lse_out'?"),
        ("attention", "dropout", "did you mean 'dropout_p'?"),
        ("attention", "dropout_rate", "did you mean 'dropout_p'?"),
        ("attention", "attn_mask", "did you mean 'mask' or 'bias'? (mask is for booleans"),
        ("attention", "block_mask", "did you mean 'mask'?"),
        ("attention", "key_padding_mask", "did you mean 'seqused_k' or 'mask'"),
        ("attention", "s_aux", "did you mean 'sinks'"),
        ("attention", "learnable_sink", "did you mean 'sinks'"),
        ("attention", "logits_soft_cap", "did you mean 'softcap'"),
        ("attention", "sliding_window", "did you mean 'window_size'? ((127, 0) sees 128 keys"),
        ("attention", "local_window_size", "did you mean 'window_size'"),
        ("attention", "enable_gqa", "k and v may have fewer heads"),
        ("attention", "block_table", "'block_table' is a keyword of KVCache()"),
        ("attention", "page_table", "'block_table' is a keyword of KVCache()"),
        ("attention", "dq", "'dq' is a keyword of attention_backward()"),
        ("attention", "zzz", "it takes causal, "),
        ("attention_backward", "is_causal", "did you mean 'causal'?"),
        ("attention_backward", "return_lse", "'return_lse' is a keyword of attention()"),
        ("attention_backward", "lse_out", "'lse_out' is a keyword of attention()"),
        ("backward_workspace_bytes", "is_causal", "did you mean 'causal'?"),
        ("forward_workspace_bytes", "zzz", "it takes causal, "),
    ],
)  # fmt: skip
def test_hints(function: str, name: str, words: str) -> None:
    with pytest.raises(InvalidType) as caught:
        call(function, **{name: None})  # a hint is no alias: a neutral value is refused too
    assert str(caught.value).startswith(f"{function}() has no keyword {name!r}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["doubt", "mas", "outt", "window_left", "kv", "p"])
def test_no_hint_is_better_than_a_wrong_one(name: str) -> None:
    with pytest.raises(InvalidType) as caught:
        call("attention", **{name: 1})
    hint = str(caught.value).partition("did you mean ")[2]
    assert hint.partition("?")[0] == {"outt": "'out'", "mas": "'mask'"}.get(name, "")


def test_other_names_are_not_ours() -> None:
    assert not set(OTHER_NAMES) & {name for name, keyword in KEYWORDS.items() if "attention" in keyword.functions}
    assert {ours for names, _ in OTHER_NAMES.values() for ours in names} <= set(KEYWORDS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_argument_too_many_by_position(function: str) -> None:
    arrays = ", ".join(FUNCTIONS[function][0])
    for value in (True, 0.125, None, Q):
        with pytest.raises(InvalidType) as caught:
            call(function, value)
        message = str(caught.value)
        assert message.startswith(
            f"{function}() takes {len(FUNCTIONS[function][0])} arrays by position, {arrays}, and "
        )
        assert "given by name, as in causal=True" in message
        assert ("torch's SDPA" in message) == (value is Q and function == "attention")


# ----------------------------------------------------------------------------------------------------------------------
# What a keyword beyond dense attention goes through


@dataclass(frozen=True)
class Lift(Spec):
    value: float


@dataclass(frozen=True)
class Offsets(Spec):
    heads: int

    def arrays(self) -> tuple[str, ...]:
        return ("offsets",)


@dataclass(frozen=True, slots=True)
class Problem(AttentionProblem):
    lift: Lift | None = None
    offsets: Offsets | None = None

    @classmethod
    def having(cls, problem: AttentionProblem, **specs: Spec) -> Problem:
        values = {field.name: getattr(problem, field.name) for field in fields(problem)}
        return cls(**{**values, **specs})


@pytest.fixture
def dummies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two keywords: `lift`, a number, and `offsets`, an array (num_heads,) float32."""
    functions = tuple(FUNCTIONS)
    number = Keyword("lift", "float | None", None, functions, "a dummy", "0.2", (None, 0.0), check_scale)
    array = Keyword("offsets", "A | None", None, functions, "a dummy", "0.2")
    rule = ArrayRule("(num_heads,)", lambda sizes: {(sizes.num_heads,)}, lambda dtype: ("float32",))
    monkeypatch.setitem(KEYWORDS, "offsets", array)
    monkeypatch.setitem(KEYWORDS, "lift", number)
    monkeypatch.setitem(problem.ARRAY_RULES, "offsets", rule)
    monkeypatch.setitem(problem.SPECS, "lift", lambda p, value: Problem.having(p, lift=Lift(value)))
    monkeypatch.setitem(problem.SPECS, "offsets", lambda p, ref: Problem.having(p, offsets=Offsets(ref.shape[0])))


@pytest.mark.usefixtures("dummies")
def test_a_feature_reaches_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    forward = cpu.forward

    def recorded(*arrays: Any, lift: Any = None, offsets: Any = None, **known: Any) -> Any:
        seen.append({"lift": lift, "offsets": offsets})
        return forward(*arrays, **known)

    monkeypatch.setattr(cpu, "forward", recorded)
    offsets = np.array([1, 2], np.float32)
    call("attention", lift=2)
    call("attention", offsets=offsets, lift=None)
    call("attention", lift=0.0)
    assert [list(s.values()) for s in seen[::2]] == [[2.0, None], [None, None]]
    assert seen[1]["lift"] is None and (seen[1]["offsets"] == offsets).all()
    bits = np.full((1, 3, 2, 8), 0x3F80, np.uint16)
    fa2cupy.attention(bits, bits, bits, dtype="bfloat16", layout="bhsd", offsets=np.ones(3, np.float32))
    assert seen[-1]["offsets"].tolist() == [1, 1, 1]


@pytest.mark.usefixtures("dummies")
def test_a_feature_is_not_dropped_on_torchs_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd and the operators carry options; arrays beyond q, k and v they do not carry yet."""
    monkeypatch.setattr(doors, "has_torch", lambda: True)
    monkeypatch.setattr(doors, "torch_way", lambda *tensors: lambda q, k, v, options, return_lse: options)
    assert call("attention") == call("attention", lift=0.0) == (False, None, "bshd", None, False, ())
    assert call("attention", lift=2, causal=True, deterministic=True) == (
        True, None, "bshd", None, True, (("lift", 2.0),),
    )  # fmt: skip
    with pytest.raises(InvalidArgument, match=r"^offsets is not supported yet for tensors that"):
        call("attention", offsets=np.ones(2, np.float32), lift=2.0)


@pytest.mark.usefixtures("dummies")
def test_the_array_of_a_feature_is_checked() -> None:
    for wrong, kind, words in (
        (np.ones(3, np.float32), InvalidArgument, r"offsets has shape \(3,\): \(num_heads,\) is needed"),
        (np.ones(2, np.float16), InvalidType, "offsets has dtype float16: float32 is needed"),
        (np.ones(2, ml_dtypes.bfloat16), InvalidType, "offsets has dtype bfloat16"),
        (cupy_array((2,), np.float32), InvalidType, "the same framework"),
        ([1.0, 2.0], InvalidType, "offsets is a list"),
    ):
        for function in FUNCTIONS:
            with pytest.raises(kind, match=words):
                call(function, offsets=wrong)
    with pytest.raises(InvalidType, match="lift='x' is a str"):
        call("attention", lift="x")


@pytest.mark.usefixtures("dummies")
def test_a_feature_has_a_signature_of_its_own(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its option is in the key, its array in the signature and behind the outputs in the pointers."""
    gpu.compute = False
    q = cupy_array((2, 5, 4, 16), np.float16)
    offsets = [cupy_array((4,), np.float32) for _ in range(2)]
    for array in (*offsets, offsets[0]):
        fa2cupy.attention(q, q, q, offsets=array)
    assert len(PREPARED) == 1
    assert [launch.pointers["offsets"] for launch in gpu.launches] == [offsets[i].data.ptr for i in (0, 1, 0)]
    fa2cupy.attention(q, q, q, offsets=cupy_array((4,), np.float32, offset=4))
    fa2cupy.attention(q, q, q, lift=1, offsets=offsets[0])
    fa2cupy.attention(q, q, q, offsets=offsets[0], lift=1.0)
    fa2cupy.attention(q, q, q, offsets=offsets[0], lift=2.0)
    assert len(PREPARED) == 4
    assert [plan.problem.specs for plan in gpu.plans] == [(*lift, Offsets(4)) for lift in ((), (Lift(1),), (Lift(2),))]
    with pytest.raises(InvalidArgument, match="out shares memory with offsets"):
        out = cupy_array((2, 5, 4, 16), np.float16)
        fa2cupy.attention(q, q, q, offsets=out.view(np.float32).reshape(-1)[:4], out=out)
    strided = cupy_array((8,), np.float32)[::2]
    fa2cupy.attention(q, q, q, offsets=strided)
    assert gpu.last.pointers["offsets"] != strided.data.ptr  # a copy
    monkeypatch.delitem(problem.SPECS, "lift")
    with pytest.raises(InvalidArgument, match="lift is not supported on a GPU yet"):
        fa2cupy.attention(q, q, q, lift=2.0)


@pytest.mark.usefixtures("dummies")
def test_a_forward_may_need_a_workspace(gpu: FakeGpu) -> None:
    gpu.compute = False
    gpu.forward_workspace_bytes = 512
    q = cupy_array((2, 5, 4, 16), np.float16)
    assert fa2cupy.forward_workspace_bytes(q, q, q) == 512
    fa2cupy.attention(q, q, q)
    assert gpu.last.pointers["workspace"] == gpu.allocations[-1].data.ptr
    own = cupy_array((512,), np.uint8)
    fa2cupy.attention(q, q, q, workspace=own)
    assert gpu.last.pointers["workspace"] == own.data.ptr
    with pytest.raises(InvalidArgument, match="workspace has 256 bytes: at least 512 are needed"):
        fa2cupy.attention(q, q, q, workspace=own[:256])
    gpu.capturing = True
    with pytest.raises(InvalidArgument, match=r"out=, workspace= must be given \(workspace: 512 bytes\)"):
        fa2cupy.attention(q, q, q)
    assert fa2cupy.forward_workspace_bytes(Q, Q, Q) == 0  # on the CPU


# ----------------------------------------------------------------------------------------------------------------------
# softcap, ALiBi, sinks and dropout on the way to a GPU


def _on_a_gpu(gpu: FakeGpu) -> dict[str, Any]:
    gpu.compute = False
    q, lse = cupy_array((2, 5, 4, 16), np.float16), cupy_array((2, 4, 5), np.float32)
    return {"dout": q, "q": q, "k": q, "v": q, "out": q, "lse": lse}


@pytest.mark.parametrize(
    "keywords",
    [
        {"softcap": 2.0}, {"alibi_slopes": (4,)}, {"sinks": (4,)},
        {"dropout_p": 0.1, "dropout_seed": np.int64}, {"grad_of": ("sinks",), "sinks": (4,)},
    ],
    ids=lambda keywords: next(iter(keywords)),
)  # fmt: skip
def test_on_a_gpu_they_are_refused_until_kernels_have_them(
    keywords: dict[str, Any], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a name that SPECS may have: whatever it has not, no plan is made without."""
    arrays = _on_a_gpu(gpu)
    for name in ("softcap", "alibi_slopes", "sinks", "dropout_p", "dropout_seed", "dsinks"):
        monkeypatch.delitem(problem.SPECS, name, raising=False)
    for name, value in list(keywords.items()):
        if isinstance(value, tuple) and name != "grad_of":
            keywords = keywords | {name: cupy_array(value, np.float32)}
        elif value is np.int64:
            keywords = keywords | {name: cupy_array((2,), np.int64)}
    with pytest.raises(InvalidArgument, match=r"^(softcap|alibi_slopes|sinks|dropout_p) is not supported on a GPU yet"):
        if "grad_of" in keywords:
            fa2cupy.attention_backward(**arrays, **keywords)
        else:
            fa2cupy.attention(arrays["q"], arrays["k"], arrays["v"], **keywords)
    assert not gpu.plans and not gpu.launches


def test_neutral_values_make_no_other_plan(gpu: FakeGpu) -> None:
    arrays = _on_a_gpu(gpu)
    q = arrays["q"]
    fa2cupy.attention(q, q, q)
    fa2cupy.attention_backward(**arrays)
    known, plans = len(PREPARED), len(gpu.plans)
    for neutral in (
        {"softcap": 0.0},
        {"dropout_p": 0.0, "dropout_seed": (1, 2)},
        {"dropout_p": 1e-9},
        {"sinks": None},
    ):
        fa2cupy.attention(q, q, q, **neutral)
        fa2cupy.attention_backward(**arrays, **neutral)
    fa2cupy.attention_backward(**arrays, grad_of=(), dsinks=None)
    assert (len(PREPARED), len(gpu.plans)) == (known, plans)


def test_pointers_of_a_further_gradient(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind dv, in front of the extra inputs: given, and allocated."""
    arrays = _on_a_gpu(gpu)
    seen: list[tuple[int, ...]] = []
    plans: list[Any] = []

    def bound_plan(name: str, problem: AttentionProblem, *rest: Any) -> tuple[Any, int]:
        plans.append(problem)
        return lambda pointers, stream: seen.append(pointers), 512

    bound_plan.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(planner, "bound_plan", bound_plan)

    def with_sinks(problem: AttentionProblem, ref: Any) -> AttentionProblem:
        return Problem.having(problem, offsets=Sinks(ref.dtype))

    def with_gradient(problem: AttentionProblem, ref: Any) -> AttentionProblem:
        assert (ref.shape, ref.strides, ref.dtype) == ((4,), (1,), "float32")
        return problem

    monkeypatch.setitem(problem.SPECS, "sinks", with_sinks)
    monkeypatch.setitem(problem.SPECS, "dsinks", with_gradient)
    sinks, own = cupy_array((4,), np.float32), cupy_array((4,), np.float32)
    for given_array in (None, own):
        *dense, dsinks = fa2cupy.attention_backward(**arrays, sinks=sinks, grad_of=("sinks",), dsinks=given_array)
        inputs = [arrays[name].data.ptr for name in ("dout", "q", "k", "v", "out", "lse")]
        outputs = [x.data.ptr for x in (*dense, dsinks)]
        assert list(seen[-1][:-1]) == [*inputs, *outputs, sinks.data.ptr]
        assert (dsinks.shape, dsinks.dtype) == ((4,), np.float32) and (given_array is None or dsinks is own)
        assert "dsinks" not in dict(plans[-1].strides)
    assert len(plans) == 2
    strided = cupy_array((8,), np.float32)[::2]
    fa2cupy.attention_backward(**arrays, sinks=strided, grad_of=("sinks",))
    assert seen[-1][10] != strided.data.ptr  # a copy without gaps


@dataclass(frozen=True)
class Sinks(Spec):
    dtype: str

    def arrays(self) -> tuple[str, ...]:
        return ("sinks",)


def test_two_numbers_become_an_array_on_the_device(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.compute = False
    q = cupy_array((2, 5, 4, 16), np.float16, 1)
    made: list[Any] = []

    def seed(numbers: tuple[int, int], like: Any) -> Any:
        assert like is q
        made.append(cupy_array((2,), np.int64, 1))
        host_view(made[-1])[:] = numbers
        return made[-1]

    def with_p(problem: AttentionProblem, p: float) -> AttentionProblem:
        return Problem.having(problem, lift=Lift(p))

    def with_seed(problem: AttentionProblem, ref: Any) -> AttentionProblem:
        return Problem.having(problem, lift=problem.lift, offsets=Seed(ref.dtype))  # type: ignore[attr-defined]

    monkeypatch.setattr(CUPY, "seed", seed)
    monkeypatch.setitem(problem.SPECS, "dropout_p", with_p)
    monkeypatch.setitem(problem.SPECS, "dropout_seed", with_seed)
    for numbers in ((5, 2**64 - 1), (6, 7)):
        fa2cupy.attention(q, q, q, dropout_p=0.5, dropout_seed=numbers)
        assert gpu.last.pointers["dropout_seed"] == made[-1].data.ptr
    assert host_view(made[0]).tolist() == [5, -1] and len(PREPARED) == len(gpu.plans) == 1
    own = cupy_array((4,), np.uint32, 1)
    fa2cupy.attention(q, q, q, dropout_p=0.5, dropout_seed=own)
    assert gpu.last.pointers["dropout_seed"] == own.data.ptr and len(gpu.plans) == 2
    _, pullback = fa2cupy.attention_vjp(q, q, q, dropout_p=0.5, dropout_seed=(1, 2))
    before = len(made)
    pullback(q)
    assert len(made) == before  # the forward's


@dataclass(frozen=True)
class Seed(Spec):
    dtype: str

    def arrays(self) -> tuple[str, ...]:
        return ("dropout_seed",)


def test_two_numbers_inside_a_capture(gpu: FakeGpu) -> None:
    q = cupy_array((2, 5, 4, 16), np.float16)
    gpu.capturing = True
    with pytest.raises(
        InvalidArgument,
        match=r"^dropout_seed=\(1, 2\) becomes an array, which CuPy cannot allocate inside a CUDA graph",
    ):
        fa2cupy.attention(q, q, q, out=q, dropout_p=0.5, dropout_seed=(1, 2))


def test_two_numbers_beside_arrays_of_another_library() -> None:
    """Of which nothing is known but __dlpack__: they become NumPy's, and the seed too."""
    q = np.random.default_rng(0).standard_normal((1, 3, 2, 8))
    out = fa2cupy.attention(*(Producer(x) for x in (q, q, q)), dropout_p=0.5, dropout_seed=(1, 2))
    assert (out == fa2cupy.attention(q, q, q, dropout_p=0.5, dropout_seed=(1, 2))).all()
