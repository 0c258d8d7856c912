"""The public functions. Their docstrings are the specification; `calls.py` does the work."""

from __future__ import annotations

import sys
from typing import Any

from fa2cupy import calls, dynamo, operations
from fa2cupy.problem import check_flag, unexpected_keyword

__all__ = ["attention", "attention_backward", "backward_workspace_bytes"]

_FORWARD_KEYWORDS = ("causal", "softmax_scale", "layout", "dtype", "return_lse", "out", "lse_out", "workspace")
_BACKWARD_KEYWORDS = ("causal", "softmax_scale", "layout", "dtype", "deterministic", "dq", "dk", "dv", "workspace")
_SIZE_KEYWORDS = ("causal", "softmax_scale", "layout", "dtype", "deterministic")


@dynamo.leave
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    return_lse: bool = False,
    out: Any = None,
    lse_out: Any = None,
    workspace: Any = None,
    **unexpected: object,
) -> Any:
    """softmax(softmax_scale * q k^T) v, exactly. Layout "bshd": q is (batch, seqlen_q, num_heads, head_dim).
    causal=True is bottom-right aligned: query i sees keys j <= i + seqlen_k - seqlen_q (torch SDPA, JAX: top-left).

    A (batch, heads, seqlen, head_dim) tensor, as torch's SDPA takes it, is also a valid (batch, seqlen, heads,
    head_dim) tensor: say layout="bhsd" for it, nothing can tell the two apart.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim). A CuPy, PyTorch, JAX or NumPy array, or one of another library with
            `__dlpack__` (on a GPU it is asked for CuPy's current stream). All arrays are of one framework and on one
            device. float16 or bfloat16; on the CPU also float32 and float64. head_dim is 1 to 256, odd ones included.
        k: (batch, seqlen_k, num_heads_k, head_dim). num_heads must be a multiple of num_heads_k (GQA, MQA): query
            head h uses key head h // (num_heads // num_heads_k).
        v: (batch, seqlen_k, num_heads_k, head_dim_v). head_dim_v is 1 to 256; it need not be head_dim.
        causal: mask the keys that come after the query. A bool.
        softmax_scale: a finite number, of either sign or 0; None is head_dim ** -0.5. An array is a TypeError, because
            reading it from a GPU would wait for it.
        layout: "bshd", or "bhsd" for (batch, num_heads, seqlen, head_dim). Any strides will do, 0 and negative ones
            too. One copy is made of an input whose last dimension is not contiguous (or whose strides are not
            multiples of its item size).
        dtype: "bfloat16" says what uint16 arrays hold; the results are then uint16 too. Otherwise None.
        return_lse: also return the log-sum-exp, which `attention_backward` needs.
        out: where to put the result: of the inputs' framework, device and dtype, of out's shape, the last dimension
            contiguous, no element twice, no element shared with another argument (interleaved slices of one buffer
            are fine). Not for JAX, whose arrays are immutable.
        lse_out: where to put the log-sum-exp; likewise.
        workspace: one contiguous block of memory of the same framework and device. The forward needs none today.

    Returns:
        out, (batch, seqlen_q, num_heads, head_dim_v) in the layout and dtype of q; with return_lse=True (out, lse).
        lse is the natural logarithm of sum(exp(scores)): (batch, num_heads, seqlen_q) in either layout, float32
        (float64 for float64 inputs). The kind of array that went in comes back (CuPy or NumPy for other `__dlpack__`
        producers), new ones C-contiguous. A row that sees no key has out = 0 and lse = -inf. Same inputs, same bits.

    Where and when:
        On the arrays' device, queued on the current stream of that device (JAX: XLA's), whichever device is current.
        Nothing is synchronised and inputs are never written. NumPy arrays, and torch's and JAX's on the CPU, are
        computed on the CPU before the call returns, by the same algorithm; no GPU, CuPy or CUDA is needed.
        The first call of a kind plans and, if need be, compiles: before a CUDA graph capture call once with the same
        shapes. With CuPy arrays give out= and lse_out= inside a capture, where CuPy's memory pool cannot be used.

    Raises:
        ValueError or TypeError (from `fa2cupy.errors`), before anything is launched, for arguments that are not as
        described; also for a torch tensor that requires grad while grad mode is on (autograd does not see this call:
        use torch.no_grad() and `attention_backward`), a FakeTensor, a JAX tracer. UnsupportedDevice below sm_80,
        MissingDependency without CuPy, NVRTC or a driver, CompilationError, LaunchError.
    """
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    if unexpected:
        raise unexpected_keyword("attention", unexpected, _FORWARD_KEYWORDS)
    if return_lse is not False:
        return_lse = check_flag("return_lse", return_lse)
    options = (causal, softmax_scale, layout, dtype)
    operation = operations.FORWARD if return_lse else operations.FORWARD_OUT
    out, lse = calls.call(operation, [q, k, v, out, lse_out], workspace, options)
    return (out, lse) if return_lse else out


@dynamo.leave
def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    workspace: Any = None,
    **unexpected: object,
) -> tuple[Any, Any, Any]:
    """The gradients dq, dk, dv of `attention`. Layout "bshd": dout is (batch, seqlen_q, num_heads, head_dim_v).
    causal=True is bottom-right aligned: query i sees keys j <= i + seqlen_k - seqlen_q (torch SDPA, JAX: top-left).

    Args:
        dout: gradient of the loss with respect to out; out's shape and dtype, any strides (one copy is made if its
            last dimension is not contiguous).
        q, k, v: what `attention` was called with.
        out, lse: what it returned; lse is (batch, num_heads, seqlen_q), float32 (float64 for float64 inputs).
        causal, softmax_scale, layout, dtype: as they were given to `attention`.
        deterministic: same inputs, same bits, at some cost; otherwise a GPU adds the parts of dq up in any order.
        dq, dk, dv: where to put the results, of the shapes of q, k and v; the rules are those of `attention`'s out.
        workspace: one contiguous block of at least `backward_workspace_bytes` bytes, 256-byte aligned, any contents,
            of the inputs' framework and device. None allocates it. Needed with CuPy arrays inside a graph capture.

    Returns:
        dq, dk, dv with the shapes and dtype of q, k and v. With GQA dk and dv have num_heads_k heads: the sum over
        the query heads is taken inside. Rows that see no key have gradient 0.

    Where and when, Raises: as `attention`.
    """
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    if unexpected:
        raise unexpected_keyword("attention_backward", unexpected, _BACKWARD_KEYWORDS)
    options = (causal, softmax_scale, layout, dtype, deterministic)
    dq, dk, dv = calls.call(operations.BACKWARD, [dout, q, k, v, out, lse, dq, dk, dv], workspace, options)
    return dq, dk, dv


@dynamo.leave
def backward_workspace_bytes(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    **unexpected: object,
) -> int:
    """Bytes that `attention_backward` needs as workspace= for these arguments. Layout "bshd"; 0 for arrays on the CPU.
    causal=True is aligned bottom-right. Shapes, dtype, device and options count, not what the arrays hold.
    """
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    if unexpected:
        raise unexpected_keyword("backward_workspace_bytes", unexpected, _SIZE_KEYWORDS)
    from fa2cupy.first_call import workspace_bytes

    return workspace_bytes((q, k, v), (causal, softmax_scale, layout, dtype, deterministic))
