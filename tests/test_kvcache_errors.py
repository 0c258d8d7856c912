"""What a KV cache refuses: by name, and before anything is written. And its signatures."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fa2cupy
from fa2cupy.errors import Fa2Error, InvalidArgument, InvalidType
from fa2cupy.keywords import CACHE_FUNCTIONS, KEYWORDS
from fa2cupy.kvcache import KVCache, attention_with_kvcache

F16 = np.float16
STUB = Path(fa2cupy.__file__).with_name("kvcache.pyi")
FUNCTIONS = {"KVCache": KVCache, "KVCache.attend": KVCache.attend, "attention_with_kvcache": attention_with_kvcache}


def zeros(*shape: int, dtype: Any = F16) -> np.ndarray:
    return np.zeros(shape, dtype)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def good(**changes: Any) -> dict[str, Any]:
    """A right call: three sequences, pages of 4 keys, all keywords that go together; with these changes."""
    table = np.arange(15, dtype=np.int32).reshape(3, 5)
    call = {
        "q": zeros(3, 2, 4, 32), "k_cache": zeros(16, 4, 2, 32), "v_cache": zeros(16, 4, 2, 24),
        "k": zeros(3, 2, 2, 32), "v": zeros(3, 2, 2, 24), "block_table": table, "cache_seqlens": ints(3, 0, 18),
        "leftpad_k": ints(1, 0, 3), "cache_batch_idx": ints(2, 0, 1), "rotary": (zeros(20, 8), zeros(20, 8), "neox"),
        "causal": True,
    }  # fmt: skip
    call |= changes
    return {name: value for name, value in call.items() if value is not None}


def call(arguments: dict[str, Any]) -> Any:
    return attention_with_kvcache(**arguments)


def test_the_good_call_is_good() -> None:
    assert call(good()).shape == (3, 2, 4, 24)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": [1]}, "q is a list"),
        ({"q": zeros(3, 4, 32)}, "head_dim) is needed; for one query each pass q[:, None]"),
        ({"q": zeros(3, 2, 4, 16)}, "q has head_dim 16 but the cache has 32"),
        ({"q": zeros(3, 2, 5, 32)}, "q has 5 heads and the cache has 2"),
        ({"q": zeros(2, 2, 4, 32)}, "k has shape (3, 2, 2, 32): (2, 2, 2, 32) is needed"),
        ({"q": zeros(3, 2, 4, 32, dtype=np.int32)}, "q has dtype int32"),
        ({"q": zeros(3, 2, 4, 32, dtype=np.float32)}, "the cache has dtype float16 but q has float32"),
        ({"k_cache": zeros(16, 4, 32)}, "shape (16, 4, 32): (pages, page_size, num_heads_k, head_dim) is needed"),
        ({"k_cache": zeros(16, 5, 2, 32)}, "v_cache has seqlen 4 but k_cache has 5"),
        ({"k_cache": zeros(17, 4, 2, 32)}, "v_cache has first dimension 16 but k_cache has 17"),
        ({"v_cache": zeros(16, 4, 1, 24)}, "v_cache has num_heads 1 but k_cache has 2"),
        ({"v_cache": zeros(16, 4, 2, 24, dtype=np.float32)}, "v_cache has dtype float32 but k_cache has float16"),
        ({"k_cache": zeros(16, 4, 2, 257)}, "k_cache has head_dim 257"),
        ({"k_cache": zeros(16, 0, 2, 32), "v_cache": zeros(16, 0, 2, 24)}, "k_cache has pages of 0 keys"),
        ({"v": None}, "k is given without v"),
        ({"k": None, "rotary": None}, "v is given without k"),
        ({"k": None, "v": None}, "rotary is given without k and v"),
        ({"k": zeros(3, 2, 2, 16)}, "k has shape (3, 2, 2, 16): (3, 2, 2, 32) is needed"),
        ({"v": zeros(3, 1, 2, 24)}, "v has shape (3, 1, 2, 24): (3, 2, 2, 24) is needed"),
        ({"k": zeros(3, 2, 2, 32, dtype=np.float32)}, "k has dtype float32: float16 is needed"),
        ({"cache_seqlens": None}, "k is given without cache_seqlens or seqused_k"),
        ({"cache_seqlens": ints(1, 2)}, "cache_seqlens has shape (2,): (batch,) is needed, here (3,)"),
        ({"cache_seqlens": zeros(3)}, "cache_seqlens has dtype float16: int32 or int64 is needed"),
        ({"cache_seqlens": -1}, "cache_seqlens=-1 is not supported: 0 to "),
        ({"cache_seqlens": True}, "cache_seqlens=True is a bool"),
        ({"cache_seqlens": 1.0}, "cache_seqlens=1.0 is a float"),
        ({"seqused_k": ints(3, 2, 1)}, "cache_seqlens is given beside seqused_k"),
        ({"cache_seqlens": None, "seqused_k": ints(3)}, "seqused_k has shape (1,)"),
        ({"leftpad_k": zeros(3, 1, dtype=np.int32)}, "leftpad_k has shape (3, 1)"),
        ({"cache_batch_idx": ints(1)}, "cache_batch_idx has shape (1,)"),
        ({"cache_batch_idx": None, "block_table": zeros(4, 5, dtype=np.int32)},
         "the cache has 4 rows in the table of pages but q is a batch of 3"),
        ({"block_table": ints(1, 2, 3)}, "block_table has shape (3,): (batch, pages of the longest) is needed"),
        ({"block_table": zeros(3, 5)}, "block_table has dtype float16"),
        ({"indptr": ints(0, 1)}, "indptr is given without indices"),
        ({"indices": ints(0, 1)}, "indices is given without indptr"),
        ({"indptr": ints(0, 1), "indices": ints(0)}, "block_table is given beside indptr"),
        ({"block_table": None, "indptr": ints(), "indices": ints(0)}, "indptr has shape (0,)"),
        ({"block_table": None, "indptr": ints(0, 1, 2, 3), "indices": ints(0, 1, 2), "k": None, "v": None,
          "rotary": None, "cache_seqlens": None}, "indptr is given without cache_seqlens or seqused_k"),
        ({"rotary": zeros(3, 8)}, "rotary, a numpy.ndarray, is a numpy.ndarray: (cos, sin, "),
        ({"rotary": (zeros(3, 8), zeros(3, 8))}, "rotary has 2 elements"),
        ({"rotary": (zeros(3, 8), zeros(3, 8), True)}, "rotary ends with a bool"),
        ({"rotary": (zeros(3, 8), zeros(3, 8), "half")}, "rotary ends with 'half'"),
        ({"rotary": (None, zeros(3, 8), "neox")}, "the cos of rotary is a NoneType"),
        ({"rotary": (zeros(20, 17), zeros(20, 17), "neox")}, "rotary_dim 34: at most head_dim 32"),
        ({"rotary": (zeros(20, 0), zeros(20, 0), "neox")}, "rotary_dim 0"),
        ({"rotary": (zeros(0, 8), zeros(0, 8), "neox")}, "the cos of rotary has no rows"),
        ({"rotary": (zeros(20, 8), zeros(19, 8), "neox")}, "the sin of rotary has shape (19, 8) but its cos (20, 8)"),
        ({"rotary": (zeros(20, 8), zeros(20, 8, dtype=np.float32), "neox")}, "the sin of rotary has dtype float32"),
        ({"rotary": (zeros(20, 8, dtype=np.float64), zeros(20, 8, dtype=np.float64), "neox")}, "dtype float64"),
        ({"rotary": (zeros(20), zeros(20), "neox")}, "the cos of rotary has shape (20,)"),
        ({"k_scale": 2.0}, "k_scale is given, but k_cache has dtype float16"),
        ({"kv_dtype": "int4"}, "kv_dtype='int4' is not supported"),
        ({"kv_dtype": 8}, "kv_dtype=8 is a int"),
        ({"kv_dtype": "int8"}, "kv_dtype='int8' but k_cache has dtype float16: int8 is needed"),
        ({"split_size": 100}, "split_size=100 is not supported: a positive multiple of 64"),
        ({"split_size": 64.0}, "split_size=64.0 is a float"),
        ({"split_size": True}, "split_size=True is a bool"),
        ({"window_size": (3, 1)}, "window_size=(3, 1) with causal=True"),
        ({"window_size": 128}, "window_size=128 is one number"),
        ({"causal": 1}, "causal=1 is a int"),
        ({"layout": "sbhd"}, "layout='sbhd' is unknown"),
        ({"softmax_scale": np.inf}, "softmax_scale=inf"),
        ({"page_table": ints(1)}, "did you mean 'block_table'"),
        ({"cu_seqlens_k": ints(1)}, "'cu_seqlens_k' is a keyword of attention()"),
        ({"dropout_p": 0.1}, "dropout_p=0.1 is not for a KVCache: leave it out"),
        ({"cu_seqlens_q": ints(0, 1, 2, 3)}, "q has 4 dimensions, shape (3, 2, 4, 32): (total, num_heads, head_dim)"),
        ({"cu_seqlens_q": ints(0, 1, 2, 6), "q": zeros(6, 4, 32), "k": zeros(5, 2, 32), "v": zeros(5, 2, 24)},
         "k has 5 rows but q has 6"),
        ({"cu_seqlens_q": ints(), "q": zeros(6, 4, 32), "k": zeros(6, 2, 32), "v": zeros(6, 2, 24)},
         "cu_seqlens_q has shape (0,)"),
        ({"out": zeros(3, 2, 4, 32)}, "out has shape (3, 2, 4, 32): (3, 2, 4, 24) is needed"),
        ({"out": zeros(3, 2, 4, 24, dtype=np.float32)}, "out has dtype float32: float16 is needed"),
        ({"lse_out": zeros(3, 4, 2)}, "lse_out has dtype float16: float32 is needed"),
        ({"lse_out": zeros(3, 2, 4, dtype=np.float32)}, "lse_out has shape (3, 2, 4): (3, 4, 2) is needed"),
        ({"workspace": [1]}, "workspace is a list"),
        ({"softcap": -1.0}, "softcap=-1.0 is not supported"),
        ({"sinks": zeros(3)}, "sinks has shape (3,): (num_heads,) is needed, here (4,)"),
        ({"sinks": zeros(4, dtype=np.float64)}, "sinks has dtype float64"),
        ({"alibi_slopes": zeros(2, 4, dtype=np.float32)}, "alibi_slopes has shape (2, 4)"),
        ({"alibi_slopes": zeros(4)}, "alibi_slopes has dtype float16"),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], words: str) -> None:
    """In words, and the caches are as they were."""
    arguments = good(**changes)
    before = [np.array(arguments[name], copy=True) for name in ("k_cache", "v_cache")]
    with pytest.raises(Fa2Error) as caught:
        call(arguments)
    assert words in str(caught.value), str(caught.value)
    assert isinstance(caught.value, (InvalidArgument, InvalidType))
    for one, other in zip(before, (arguments["k_cache"], arguments["v_cache"]), strict=True):
        assert (one == other).all()


def test_memory_that_is_written_is_the_callers_to_be_written() -> None:
    cache = zeros(16, 4, 2, 56)
    shared = good(k_cache=cache[..., :32], v_cache=cache[..., 32:])
    assert call(shared).shape == (3, 2, 4, 24)  # interleaved: no element in common
    for changes, words in (
        ({"k_cache": cache[..., :32], "v_cache": cache[..., 31:55]}, "k_cache shares memory with v_cache"),
        ({"k_cache": np.broadcast_to(zeros(1, 4, 2, 32), (16, 4, 2, 32))}, "k_cache is read-only"),
        ({"k_cache": zeros(16, 4, 2, 64)[..., ::2]}, "k_cache has strides"),
        ({"k_cache": np.lib.stride_tricks.as_strided(zeros(4, 2, 32), (16, 4, 2, 32), (0, 128, 64, 2))},
         "what is written must not hold an element twice"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=words):
            call(good(**changes))
    q = zeros(3, 2, 4, 32)
    with pytest.raises(InvalidArgument, match="out shares memory with q"):
        call(good(q=q, out=q[..., :24]))
    # Read alone, a cache may be anything.
    few = good(k_cache=np.broadcast_to(zeros(1, 4, 2, 32), (16, 4, 2, 32)), k=None, v=None, rotary=None)
    assert call(few).shape == (3, 2, 4, 24)


def test_scales_and_dtypes_of_8_bits() -> None:
    def quantised(dtype: Any = np.uint8, **changes: Any) -> dict[str, Any]:
        caches = {"k_cache": zeros(16, 4, 2, 32, dtype=dtype), "v_cache": zeros(16, 4, 2, 24, dtype=dtype)}
        return good(**{**caches, "kv_dtype": "float8_e4m3fn", **changes})

    call(quantised())
    for shape in ((2,), (3, 2), (16, 1, 2)):
        call(quantised(k_scale=np.ones(shape, np.float32), v_scale=np.float32(2)))
    for arguments, words in (
        (quantised(kv_dtype=None), "k_cache has dtype uint8: say what it holds"),
        (quantised(np.int8), "kv_dtype='float8_e4m3fn' but k_cache has dtype int8"),
        (quantised(k_scale=0.0), "k_scale=0.0 is not supported: a positive, finite number"),
        (quantised(v_scale=float("nan")), "v_scale=nan"),
        (quantised(v_scale=True), "v_scale=True is a bool"),
        (quantised(k_scale=np.ones(3, np.float32)), "k_scale has shape (3,): a number, (num_heads_k,), "),
        (quantised(k_scale=np.ones((4, 2), np.float32)), "k_scale has shape (4, 2): (batch, num_heads_k) is needed"),
        (quantised(k_scale=np.ones((15, 1, 2), np.float32)), "here 2 heads and 16 pages"),
        (quantised(k_scale=np.ones((), np.float32)), "k_scale has shape ()"),
        (quantised(k_scale=np.ones(2)), "k_scale has dtype float64: float32 is needed"),
    ):
        with pytest.raises(Fa2Error) as caught:
            call(arguments)
        assert words in str(caught.value), str(caught.value)
    with pytest.raises(InvalidArgument, match="by page, but the cache has no pages"):
        KVCache(zeros(3, 9, 2, 8, dtype=np.uint8), zeros(3, 9, 2, 8, dtype=np.uint8), kv_dtype="float8_e4m3fn",
                k_scale=np.ones((3, 1, 2), np.float32))  # fmt: skip


def test_a_cache_says_what_it_is_and_checks_at_once() -> None:
    assert repr(KVCache(zeros(3, 9, 2, 8), zeros(3, 9, 2, 8))) == (
        "KVCache(3 x 9 keys, 2 heads of 8, float16, NumPy on the CPU)"
    )
    paged = KVCache(zeros(7, 4, 2, 8), zeros(7, 4, 2, 16), block_table=zeros(2, 3, dtype=np.int32))
    assert repr(paged) == "KVCache(7 pages of 4 keys, 2 heads of 8 and 16, float16, NumPy on the CPU)"
    with pytest.raises(InvalidArgument, match=r"^v has seqlen 8 but k has 9"):
        KVCache(zeros(3, 9, 2, 8), zeros(3, 8, 2, 8))
    with pytest.raises(InvalidType, match=r"KVCache\(\) has no keyword 'causal': 'causal' is a keyword of attention"):
        KVCache(zeros(3, 9, 2, 8), zeros(3, 9, 2, 8), causal=True)
    with pytest.raises(InvalidType, match=r"KVCache.attend\(\) takes 1 arrays by position, q"):
        paged.attend(zeros(2, 1, 2, 8), zeros(2, 1, 2, 8))
    with pytest.raises(InvalidType, match=r"KVCache.attend\(\) has no keyword 'block_table'"):
        paged.attend(zeros(2, 1, 2, 8), block_table=None)


# ----------------------------------------------------------------------------------------------------------------------
# Lengths, looked at


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache_seqlens": ints(3, -1, 2)}, "cache_seqlens of sequence 1 is -1: 0 to 18 is needed"),
        ({"cache_seqlens": ints(3, 0, 19)}, "cache_seqlens of sequence 2 is 19: 0 to 18 is needed"),
        ({"cache_seqlens": 19}, "cache_seqlens of sequence 0 is 19"),
        ({"cache_seqlens": None, "seqused_k": ints(5, 1, 4)}, "seqused_k of sequence 1 is 1: 2 to 20 is needed"),
        ({"leftpad_k": ints(1, 3, 0)}, "leftpad_k of sequence 1 is 3: 0 to 2 is needed"),
        ({"cache_batch_idx": ints(0, 1, 3)}, "cache_batch_idx of sequence 2 is 3: 0 to 2 is needed"),
        ({"block_table": np.full((3, 5), 16, np.int32)}, "block_table has no page of the cache at place 0 of"),
        ({"rotary": (zeros(19, 8), zeros(19, 8), "neox")}, "rotary has 19 positions, and sequence 2 has 20 keys"),
        ({"block_table": None, "indptr": ints(0, 5, 4, 15), "indices": ints(*range(15))}, "indptr must rise"),
        ({"block_table": None, "indptr": ints(0, 5, 10, 16), "indices": ints(*range(15))}, "indptr must rise"),
        ({"cu_seqlens_q": ints(0, 4, 3, 6), "q": zeros(6, 4, 32), "k": zeros(6, 2, 32), "v": zeros(6, 2, 24)},
         "cu_seqlens_q must rise"),
    ],
)  # fmt: skip
def test_wrong_lengths_are_found_when_asked_for(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without being asked they are clamped."""
    assert np.isfinite(call(good(**changes))).all()
    monkeypatch.setenv("FA2CUPY_CHECK", "1")
    assert call(good()) is not None
    arguments = good(**changes)
    with pytest.raises(InvalidArgument, match=r"^" + words.replace("(", r"\(")):
        call(arguments)
    assert not arguments["k_cache"].any()


# ----------------------------------------------------------------------------------------------------------------------
# Signatures


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_help_shows(name: str) -> None:
    parameters = dict(inspect.signature(FUNCTIONS[name]).parameters)
    assert (parameters.pop("self", None) is not None) == (name == "KVCache.attend")
    shown = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert shown == {k.name: k.default for k in KEYWORDS.values() if name in k.functions and k.since}
    assert tuple(parameters)[: len(CACHE_FUNCTIONS[name][0])] == CACHE_FUNCTIONS[name][0]
    text = (KVCache.__doc__ or "") + (KVCache.attend.__doc__ or "")
    for keyword in shown:
        assert f" {keyword}:" in text or f"{keyword}," in text, keyword
    first, second = (FUNCTIONS[name].__doc__ or "").splitlines()[:2]
    assert 'Layout "bshd"' in first
    assert name == "KVCache" or "bottom-right" in (FUNCTIONS[name].__doc__ or "")
    assert second


def test_what_type_checkers_see() -> None:
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    found: dict[str, list[ast.FunctionDef]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.ClassDef):
            for each in node.body:
                assert isinstance(each, ast.FunctionDef)
                found.setdefault("KVCache" if each.name == "__init__" else f"KVCache.{each.name}", []).append(each)
    assert found.keys() == FUNCTIONS.keys()
    for name, overloads in found.items():
        expected = {n: p for n, p in inspect.signature(FUNCTIONS[name]).parameters.items() if n != "self"}
        for function in overloads:
            arguments = [a for a in (*function.args.args, *function.args.kwonlyargs) if a.arg != "self"]
            assert [a.arg for a in arguments] == list(expected)
            for argument in arguments:
                if argument.arg != "return_lse":
                    assert argument.annotation is not None
                    assert ast.unparse(argument.annotation) == expected[argument.arg].annotation, argument.arg
            for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
                if argument.arg != "return_lse":
                    assert default is not None and ast.literal_eval(default) == expected[argument.arg].default
