# The public functions as type checkers see them; `attention.py` has their docstrings and takes more, to refuse it well.
# The dtype in the type of an array is not followed: lse has the type of q here, and float32 elements.

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar, overload

__all__ = [
    "attention",
    "attention_backward",
    "attention_vjp",
    "backward_workspace_bytes",
    "forward_workspace_bytes",
]

class Array(Protocol):
    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...

A = TypeVar("A", bound=Array)  # arrays of one library

@overload
def attention(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    return_lse: Literal[False] = False,
    out: A | None = None,
    lse_out: A | None = None,
    workspace: A | None = None,
) -> A: ...
@overload
def attention(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    return_lse: Literal[True],
    out: A | None = None,
    lse_out: A | None = None,
    workspace: A | None = None,
) -> tuple[A, A]: ...
@overload
def attention(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out: A | None = None,
    lse_out: A | None = None,
    workspace: A | None = None,
) -> A | tuple[A, A]: ...
@overload
def attention_vjp(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    return_lse: Literal[False] = False,
    out: A | None = None,
    lse_out: A | None = None,
    workspace: A | None = None,
) -> tuple[A, Callable[..., tuple[A, A, A]]]: ...
@overload
def attention_vjp(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    return_lse: Literal[True],
    out: A | None = None,
    lse_out: A | None = None,
    workspace: A | None = None,
) -> tuple[tuple[A, A], Callable[..., tuple[A, A, A]]]: ...
@overload
def attention_vjp(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out: A | None = None,
    lse_out: A | None = None,
    workspace: A | None = None,
) -> tuple[A | tuple[A, A], Callable[..., tuple[A, A, A]]]: ...
def attention_backward(
    dout: A,
    q: A,
    k: A,
    v: A,
    out: A,
    lse: A,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    dlse: A | None = None,
    dq: A | None = None,
    dk: A | None = None,
    dv: A | None = None,
    workspace: A | None = None,
) -> tuple[A, A, A]: ...
def forward_workspace_bytes(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
) -> int: ...
def backward_workspace_bytes(
    q: A,
    k: A,
    v: A,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
) -> int: ...
