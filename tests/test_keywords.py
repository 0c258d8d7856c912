"""The table of keywords is what the functions take, say and refuse; what is to come is known, absent is absent."""

from __future__ import annotations

import ast
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
from fa2cupy.keywords import FUNCTIONS, KEYWORDS, OTHER_NAMES, Keyword
from fa2cupy.prepared import PREPARED
from fa2cupy.problem import ArrayRule, AttentionProblem
from fa2cupy.spec import Spec
from tests.fake_gpu import FakeGpu, cupy_array

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
    with pytest.raises(InvalidArgument, match=r"^mask, a numpy.ndarray, is not supported yet: leave it out"):
        call("attention", mask=np.ones((3, 3), bool))


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
        ("attention", "attn_mask", "did you mean 'mask' or 'bias', not supported yet? (mask is for booleans"),
        ("attention", "block_mask", "did you mean 'mask', not supported yet?"),
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
    assert hint.partition("?")[0] == {"outt": "'out'", "mas": "'mask', not supported yet"}.get(name, "")


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
