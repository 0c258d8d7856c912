"""Every keyword of the public functions, in one table: signatures, checks, errors, hints and docs come from it.

A keyword to come (`since` is None) is known already: its neutral values are accepted and mean "absent", any other is
"not supported yet". docs/recipes.md says how a keyword is added.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fa2cupy.checks import (
    WINDOWS,
    check_dropout,
    check_dtype,
    check_flag,
    check_grad_of,
    check_hint,
    check_kv_dtype,
    check_layout,
    check_pair,
    check_scale,
    check_seed,
    check_softcap,
    check_split_size,
    check_window,
    shown,
)
from fa2cupy.errors import Fa2Error, InvalidArgument, InvalidType
from fa2cupy.spec import MASK_ARRAYS

__all__ = [
    "CACHE_FUNCTIONS",
    "FUNCTIONS",
    "KEYWORDS",
    "OTHER_NAMES",
    "Keyword",
    "arrays_in_order",
    "asked",
    "is_neutral",
    "not_supported",
    "not_through_torch",
    "public",
    "signature",
    "too_many_by_position",
    "unknown",
]

_FORWARD = ("attention", "attention_vjp")
_BACKWARD = ("attention_backward",)
_SIZES = ("forward_workspace_bytes", "backward_workspace_bytes")
_ALL = (*_FORWARD, *_BACKWARD, *_SIZES)
_CACHE = ("KVCache", "attention_with_kvcache")
_ATTEND = ("KVCache.attend", "attention_with_kvcache")
_PROBABILITIES = ("attention_probabilities",)

# Functions that are there: their arrays, and what they return.
FUNCTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "attention": (("q", "k", "v"), "A | tuple[A, A]"),
    "attention_vjp": (("q", "k", "v"), "tuple[A | tuple[A, A], Callable[..., tuple[A, ...]]]"),
    "attention_backward": (("dout", "q", "k", "v", "out", "lse"), "tuple[A, ...]"),
    "forward_workspace_bytes": (("q", "k", "v"), "int"),
    "backward_workspace_bytes": (("q", "k", "v"), "int"),
}
# Those of caches, likewise.
CACHE_FUNCTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "KVCache": (("k", "v"), "None"),
    "KVCache.attend": (("q",), "A | tuple[A, A]"),
    "attention_with_kvcache": (("q", "k_cache", "v_cache", "k", "v"), "A | tuple[A, A]"),
}


@dataclass(frozen=True, slots=True)
class Keyword:
    """One keyword.

    type: its annotation. functions: those that take it. meaning: one line, for the table in docs/usage.md.
    since: the version that has it, None for one to come. neutral: values that mean the same as leaving it out.
    check: makes of (name, value) what the call goes on with, None for nothing, or raises; None for an array, which is
    checked as one. arrays: names of the arrays that it is for, which `check` makes of the value. hint: checked, and
    then forgotten: nothing depends on it.
    """

    name: str
    type: str
    default: object
    functions: tuple[str, ...]
    meaning: str
    since: str | None = None
    neutral: tuple[object, ...] = (None,)
    check: Callable[[str, Any], Any] | None = None
    arrays: tuple[str, ...] = ()
    hint: bool = False


_NO_WINDOW = (None, -1, (-1, -1), (None, None), (-1, None), (None, -1))

_TABLE = (
    Keyword(
        "causal", "bool", False, (*_ALL, *_ATTEND, *_PROBABILITIES),
        "query i sees keys j <= i + seqlen_k - seqlen_q (bottom-right aligned)", "0.1", (False,), check_flag,
    ),
    Keyword(
        "window_size", "tuple[int, int] | None", None, (*_ALL, *_ATTEND, *_PROBABILITIES),
        "(left, right): keys up to so many before and after the query; -1 is unlimited",
        "0.2", _NO_WINDOW, check_window,
    ),
    Keyword(
        "softmax_scale", "float | None", None, (*_ALL, *_ATTEND, *_PROBABILITIES),
        "a finite number, of either sign or 0; None is head_dim ** -0.5", "0.1", (None,), check_scale,
    ),
    Keyword(
        "softcap", "float | None", None, (*_ALL, *_ATTEND, *_PROBABILITIES),
        "scores become softcap * tanh(score / softcap)", "0.2", (None, 0.0), check_softcap,
    ),
    Keyword("score_mod", "ScoreMod | None", None, (*_ALL, *_PROBABILITIES), "a function of each score"),
    Keyword(
        "alibi_slopes", "A | None", None, (*_ALL, *_ATTEND, *_PROBABILITIES),
        "slope * distance is taken off each score; (num_heads,) or (batch, num_heads), float32", "0.2",
    ),
    Keyword(
        "bias", "A | None", None, (*_ALL, *_PROBABILITIES),
        "added to the scores; each of (batch, num_heads, seqlen_q, seqlen_k) or 1",
    ),
    Keyword(
        "mask", "A | BlockMask | None", None, (*_ALL, *_PROBABILITIES),
        "True where a query attends to a key, broadcastable to (batch, num_heads, seqlen_q, seqlen_k), or a BlockMask",
        "0.2", arrays=("mask", *MASK_ARRAYS),
    ),
    Keyword(
        "sinks", "A | None", None, (*_ALL, *_ATTEND), "logits that take part in the softmax only; (num_heads,)", "0.2"
    ),
    Keyword(
        "dropout_p", "float", 0.0, (*_ALL, "dropout_mask"),
        "probability of dropping a P; what is left of it is divided by 1 - dropout_p", "0.2", (None, 0.0),
        check_dropout,
    ),
    Keyword(
        "dropout_seed", "A | tuple[int, int] | None", None, (*_ALL, "dropout_mask"),
        "what is dropped: (seed, offset), an array of them, or a JAX key", "0.2", check=check_seed,
        arrays=("dropout_seed",),
    ),
    Keyword(
        "cu_seqlens_q", "Array | None", None, (*_ALL, *_PROBABILITIES, *_ATTEND),
        "q is packed, (total, num_heads, head_dim): where its sequences start, and the last ends; (batch + 1,)", "0.2",
    ),
    Keyword("cu_seqlens_k", "Array | None", None, (*_ALL, *_PROBABILITIES), "likewise of k and v", "0.2"),
    Keyword(
        "seqused_q", "Array | None", None, (*_ALL, *_PROBABILITIES), "queries in use of a sequence; (batch,)", "0.2"
    ),
    Keyword(
        "seqused_k", "Array | None", None, (*_ALL, *_ATTEND, *_PROBABILITIES),
        "keys in use of a sequence; (batch,)", "0.2",
    ),
    Keyword(
        "leftpad_k", "Array | None", None, (*_ALL, *_ATTEND, *_PROBABILITIES),
        "first key in use of a sequence; (batch,)", "0.2",
    ),
    Keyword(
        "segment_ids", "Array | tuple[Array, Array] | None", None, _ALL,
        "(batch, seqlen), or one for queries and one for keys: a query sees the keys of its own id, negative ones are "
        "padding", "0.2", check=check_pair, arrays=("segment_ids_q", "segment_ids_k"),
    ),
    Keyword(
        "max_seqlen_q", "int | Array | None", None, _ALL, "a hint, which is never read: the longest query sequence",
        "0.2", check=check_hint, hint=True,
    ),
    Keyword(
        "max_seqlen_k", "int | Array | None", None, _ALL, "a hint, which is never read: the longest key sequence",
        "0.2", check=check_hint, hint=True,
    ),
    Keyword(
        "layout", "str", "bshd", (*_ALL, *_CACHE, *_PROBABILITIES),
        '"bshd" or "bhsd": the order of batch, seqlen, num_heads, head_dim', "0.1", (), check_layout,
    ),
    Keyword(
        "dtype", "str | None", None, (*_ALL, *_PROBABILITIES),
        '"bfloat16" says what uint16 arrays hold', "0.1", (None,), check_dtype,
    ),
    Keyword("precision", "str | None", None, _ALL, 'of float32 arrays on a GPU: "float32" or "tf32"'),
    Keyword(
        "deterministic", "bool", False, _ALL,
        "same inputs, same gradients, bit for bit; the forward always repeats its bits", "0.1", (False,), check_flag,
    ),
    Keyword(
        "batch_invariant", "bool", False, _ALL, "no bit depends on the other sequences", neutral=(False, None)
    ),
    Keyword(
        "return_lse", "bool", False, (*_FORWARD, *_ATTEND), "also return the log-sum-exp", "0.1", (False,), check_flag
    ),
    Keyword("out", "A | None", None, (*_FORWARD, *_ATTEND), "where to put the result", "0.1"),
    Keyword("lse_out", "A | None", None, (*_FORWARD, *_ATTEND), "where to put the log-sum-exp", "0.1"),
    Keyword("dlse", "A | None", None, _BACKWARD, "gradient of the loss with respect to lse", "0.2"),
    Keyword(
        "grad_of", "tuple[str, ...]", (), _BACKWARD, '"sinks": further gradients to return', "0.2", (None, ()),
        check_grad_of,
    ),
    Keyword("dq", "A | None", None, _BACKWARD, "where to put the gradient of q", "0.1"),
    Keyword("dk", "A | None", None, _BACKWARD, "where to put the gradient of k", "0.1"),
    Keyword("dv", "A | None", None, _BACKWARD, "where to put the gradient of v", "0.1"),
    Keyword("dbias", "A | None", None, _BACKWARD, "where to put the gradient of bias"),
    Keyword("dsinks", "A | None", None, _BACKWARD, "where to put the gradient of sinks", "0.2"),
    Keyword(
        "workspace", "A | None", None, (*_FORWARD, *_BACKWARD, *_ATTEND),
        "one block of memory of at least `forward_workspace_bytes`, `backward_workspace_bytes`", "0.1",
    ),
    Keyword("block_table", "Array | None", None, _CACHE, "pages of each sequence; (batch, pages)", "0.2"),
    Keyword("indptr", "Array | None", None, _CACHE, "where the pages of each start in `indices`; (batch + 1,)", "0.2"),
    Keyword("indices", "Array | None", None, _CACHE, "pages of all sequences, one behind the other", "0.2"),
    Keyword(
        "kv_dtype", "str | None", None, _CACHE,
        '"float8_e4m3fn" (uint8 arrays) or "int8": what a cache of 8 bits holds', "0.2", (None,), check_kv_dtype,
    ),
    Keyword(
        "k_scale", "Array | float | None", None, _CACHE,
        "what keys of 8 bits are multiplied by: (num_heads_k,), (batch, num_heads_k) or (pages, 1, num_heads_k)", "0.2",
    ),
    Keyword("v_scale", "Array | float | None", None, _CACHE, "likewise of values", "0.2"),
    Keyword(
        "cache_seqlens", "Array | int | None", None, _ATTEND, "keys in the cache before the new ones; (batch,)", "0.2"
    ),
    Keyword("cache_batch_idx", "Array | None", None, _ATTEND, "the cache's row of each sequence; (batch,)", "0.2"),
    Keyword("k", "A | None", None, ("KVCache.attend",), "new keys, which are written to the cache", "0.2"),
    Keyword("v", "A | None", None, ("KVCache.attend",), "new values, likewise", "0.2"),
    Keyword(
        "rotary", "tuple[A, A, str] | None", None, _ATTEND,
        '(cos, sin, "neox" or "interleaved"): turns q and the new k by their positions', "0.2",
    ),
    Keyword(
        "split_size", "int | None", None, _ATTEND,
        "keys of one part, a multiple of 64, for bits that do not depend on the batch", "0.2",
        check=check_split_size,
    ),
    Keyword("reduce", "str | None", None, _PROBABILITIES, '"received", "entropy", "max" or "mean_heads"'),
    Keyword("source", "str", None, ("convert_lse",), "whose convention lse follows", "0.2", ()),
    Keyword("target", "str", None, ("convert_lse",), "whose convention the result follows", "0.2", ()),
    Keyword(
        "like", "A | None", None, ("dropout_mask", "BlockMask.from_mask_mod"),
        "an array whose framework and device are taken", "0.2",
    ),
    Keyword(
        "arrays", "dict[str, A] | None", None, ("BlockMask.from_mask_mod", "ScoreMod"),
        "arrays and numbers that a function uses, by the names of its variables", "0.2",
    ),
    Keyword(
        "max_partial", "int | None", None,
        ("BlockMask.from_dense", "BlockMask.from_blocks", "BlockMask.from_mask_mod"),
        "room for so many blocks that are seen in part; more are an error", "0.2",
    ),
)  # fmt: skip

KEYWORDS = {keyword.name: keyword for keyword in _TABLE}


def arrays_in_order() -> list[str]:
    """Names of keywords, or of the arrays that one is for, in the table's order: that of a call's pointers."""
    return [name for keyword in KEYWORDS.values() for name in keyword.arrays or (keyword.name,)]


def asked(array: str) -> str:
    """The keyword by which a call asks for what an array of this name belongs to."""
    if array == "dropout_seed":
        return "dropout_p"
    return next(keyword.name for keyword in KEYWORDS.values() if array in (keyword.arrays or (keyword.name,)))


# What keywords are called elsewhere: (ours, a remark). Hints, not aliases.
_EITHER = "mask is for booleans, bias for numbers that are added"
OTHER_NAMES: dict[str, tuple[tuple[str, ...], str]] = {
    "is_causal": (("causal",), ""),
    "scale": (("softmax_scale",), ""),
    "sm_scale": (("softmax_scale",), ""),
    "scaling": (("softmax_scale",), ""),
    "return_softmax_lse": (("return_lse",), ""),
    "return_attn_probs": (("return_lse",), ""),
    "return_residual": (("return_lse",), ""),
    "lse": (("lse_out",), ""),
    "softmax_lse": (("lse_out",), ""),
    "attn_mask": (("mask", "bias"), _EITHER),
    "attention_mask": (("mask", "bias"), _EITHER),
    "attn_bias": (("bias",), ""),
    "block_mask": (("mask",), ""),
    "key_padding_mask": (("seqused_k", "mask"), "seqused_k counts the keys in use of each sequence"),
    "learnable_sink": (("sinks",), ""),
    "s_aux": (("sinks",), ""),
    "logits_soft_cap": (("softcap",), ""),
    "local_window_size": (("window_size",), WINDOWS),
    "sliding_window": (("window_size",), WINDOWS),
    "window": (("window_size",), WINDOWS),
    "dropout": (("dropout_p",), ""),
    "dropout_rate": (("dropout_p",), ""),
    "query_seq_lengths": (("seqused_q",), ""),
    "key_value_seq_lengths": (("seqused_k",), ""),
    "page_table": (("block_table",), ""),
}
_NOT_NEEDED = {
    "enable_gqa": "grouped heads need none, k and v may have fewer heads than q",
    "num_splits": "how the work is split is chosen for each GPU",
}


def is_neutral(keyword: Keyword, value: object) -> bool:
    """Whether `value` means the same as leaving the keyword out. No array is compared."""
    if isinstance(value, (tuple, list)):
        value = tuple(value)
        if not all(item is None or _is_number(item) for item in value):
            return False
    elif isinstance(value, (bool, np.bool_)):
        return any(neutral is bool(value) for neutral in keyword.neutral)
    elif isinstance(value, np.generic):
        value = value.item()  # beside a tuple NumPy's own would be an array
    elif value is not None and not _is_number(value):
        return False
    return any(neutral is not False and neutral == value for neutral in keyword.neutral)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


# ----------------------------------------------------------------------------------------------------------------------
# Signatures

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _functions() -> dict[str, tuple[tuple[str, ...], str]]:
    return FUNCTIONS | CACHE_FUNCTIONS


def signature(function: str) -> inspect.Signature:
    """What help() shows of a public function: its arrays, and the keywords that are there."""
    arrays, result = _functions()[function]
    positional = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="A") for name in arrays]
    if function == "KVCache.attend":
        positional.insert(0, inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY))
    if function == "attention_with_kvcache":
        positional[3:] = [each.replace(default=None, annotation="A | None") for each in positional[3:]]
    keywords = [
        inspect.Parameter(k.name, inspect.Parameter.KEYWORD_ONLY, default=k.default, annotation=k.type)
        for k in KEYWORDS.values()
        if function in k.functions and k.since
    ]
    return inspect.Signature([*positional, *keywords], return_annotation=result)


def public(function: _Function) -> _Function:
    """Show the signature of a public function: at run time it takes anything, to say what is wrong with it."""
    setattr(function, "__signature__", signature(function.__name__))  # noqa: B010 - unknown to mypy
    return function


# ----------------------------------------------------------------------------------------------------------------------
# Errors


def too_many_by_position(function: str, positional: tuple[object, ...]) -> Fa2Error:
    """The error for more arguments by position than there are arrays."""
    arrays = _functions()[function][0]
    first = shown("one more", positional[0]).rstrip(",")
    hint = ""
    if hasattr(positional[0], "ndim"):
        hint = " (the fourth of torch's SDPA is mask= or bias= here)" if function == "attention" else ""
    return InvalidType(
        f"{function}() takes {len(arrays)} arrays by position, {', '.join(arrays)}, and got {first}: "
        f"everything else is given by name, as in causal=True{hint}"
    )


def not_supported(function: str, keyword: Keyword, value: object) -> Fa2Error:
    """The error for a value other than a neutral one of a keyword to come."""
    allowed = " or ".join(repr(neutral) for neutral in keyword.neutral[:3])
    return InvalidArgument(
        f"{shown(keyword.name, value)} is not supported yet: leave it out, {function}() takes {allowed} only"
    )


def not_through_torch(name: str) -> Fa2Error:
    """The error for an array that torch's autograd and operators do not carry; without it it would be dropped."""
    return InvalidArgument(
        f"{name} is not supported yet for tensors that require grad or are traced: "
        "use torch.no_grad(), and attention_backward for gradients"
    )


def unknown(function: str, name: str) -> Fa2Error:
    """The error for a keyword that `function` does not have."""
    return InvalidType(f"{function}() has no keyword {name!r}: {_hint(function, name)}")


def _hint(function: str, name: str) -> str:
    own = [keyword.name for keyword in KEYWORDS.values() if function in keyword.functions]
    if name in _NOT_NEEDED:
        return _NOT_NEEDED[name]
    ours, remark = OTHER_NAMES.get(name, ((), ""))
    targets = [target for target in ours if target in own]
    if ours and not targets:
        return _elsewhere(ours[0])
    if not targets and name in KEYWORDS:
        return _elsewhere(name)
    targets = targets or difflib.get_close_matches(name, own, 1, 0.8)
    if not targets:
        return f"it takes {', '.join(name for name in own if KEYWORDS[name].since)}"
    later = "" if any(KEYWORDS[target].since for target in targets) else ", not supported yet"
    return f"did you mean {' or '.join(map(repr, targets))}{later}?" + (f" ({remark})" if remark else "")


def _elsewhere(name: str) -> str:
    """Whose keyword it is."""
    functions = KEYWORDS[name].functions
    there = [function for function in functions if function in _functions()]
    if KEYWORDS[name].since:
        return f"{name!r} is a keyword of {(there or functions)[0]}()"
    return f"{name!r} is for {KEYWORDS[name].functions[-1]}(), which is not supported yet"
