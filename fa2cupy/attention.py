"""The public functions. Their docstrings are the specification; `calls.py` does the work.

Their signatures are in `attention.pyi` for type checkers and in `keywords.py` for help(). At run time dense attention's
keywords have names here and everything else that is given lands in two more, so that a dense call, whatever the number
of features, finds with one test that there are none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fa2cupy import doors, dynamo, prepared
from fa2cupy.calls import call, with_mask, with_seed
from fa2cupy.checks import check_flag
from fa2cupy.frameworks.jax import is_traced
from fa2cupy.keywords import asked, not_through_torch, public
from fa2cupy.operations import ASKED, BACKWARD, FORWARD, FORWARD_OUT, STRAIGHT, Operation
from fa2cupy.options import RawOptions, given, gradients
from fa2cupy.spec import CARRIED, MASK_ARRAYS

__all__ = [
    "attention",
    "attention_backward",
    "attention_vjp",
    "backward_workspace_bytes",
    "forward_workspace_bytes",
]


@public
def attention(
    q: Any,
    k: Any,
    v: Any,
    *positional: object,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out: Any = None,
    lse_out: Any = None,
    workspace: Any = None,
    **keywords: Any,
) -> Any:
    """softmax(softmax_scale * q k^T) v, exactly. Layout "bshd": q is (batch, seqlen_q, num_heads, head_dim).
    causal=True is bottom-right aligned: query i sees keys j <= i + seqlen_k - seqlen_q (torch SDPA, JAX: top-left).

    A (batch, heads, seqlen, head_dim) tensor, as torch's SDPA takes it, is also a valid (batch, seqlen, heads,
    head_dim) tensor: say layout="bhsd" for it, nothing can tell the two apart.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim). A CuPy, PyTorch, JAX or NumPy array, or one of another library with
            `__dlpack__` (on a GPU it is asked for CuPy's current stream). All arrays are of one framework and on one
            device. float16, bfloat16, float32 or float64. head_dim is 1 to 256, odd ones included.
        k: (batch, seqlen_k, num_heads_k, head_dim). num_heads must be a multiple of num_heads_k (GQA, MQA): query
            head h uses key head h // (num_heads // num_heads_k).
        v: (batch, seqlen_k, num_heads_k, head_dim_v). head_dim_v is 1 to 256; it need not be head_dim.
        causal: mask the keys that come after the query. A bool.
        window_size: (left, right): query i, which stands beside key p = i + seqlen_k - seqlen_q, sees keys j with
            p - left <= j <= p + right. -1 (or None) is unlimited, below that is an error. (127, 0) are 128 keys, the
            query's own among them. With causal=True right is 0: a positive one is an error.
        softmax_scale: a finite number, of either sign or 0; None is head_dim ** -0.5. An array is a TypeError, because
            reading it from a GPU would wait for it.
        softcap: scores, which are softmax_scale * q_i . k_j, become softcap * tanh(score / softcap). A finite number
            above 0; 0.0 is None.
        alibi_slopes: (num_heads,) or (batch, num_heads) float32 (float64 too beside float64 inputs): slope * |p - j| is
            taken off the score of query i, which stands beside key p = i + seqlen_k - seqlen_q, and key j; after
            softcap, lse included. Of packed sequences batch is their number, and p is aligned in each by its lengths.
        sinks: (num_heads,), float32 or of the inputs' dtype: logits that take part in the softmax of each row of their
            head like a key without a value: lse is log(sum(exp(scores)) + exp(sink)).
        dropout_p: probability with which each P is dropped, 0 is none; those kept are divided by 1 - dropout_p, and lse
            knows nothing of it. Rounded to a multiple of 2^-15, and then below 1. It needs dropout_seed.
        dropout_seed: (seed, offset), two ints of 64 bits (negative ones as two's complement), or an array on the
            inputs' device, which a captured graph reads anew: int64 or uint64 (2,), uint32 (4,), the words of both, low
            ones first, or uint32 (2,), a seed alone. Or a key of JAX, whose words are a seed. What is dropped depends
            on these, the number of the sequence, the query head, i and j only, counted from a sequence's first stored
            row (of segments, the batch row's): `dropout_mask` says what. Without dropout_p it is not used.
        mask: bool, broadcastable to (batch, num_heads, seqlen_q, seqlen_k), True where a query sees a key; with causal,
            windows and lengths. Or a `BlockMask`, of these lengths, which has its own causal and window. With a packed
            q either is over the packed rows, and its batch is 1.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32: packed sequences. q is then (total_q, num_heads, head_dim), and
            k and v are (total_k, num_heads_k, ...). Sequence b has the rows from cu_seqlens[b] on that come before
            cu_seqlens[b + 1]. With one of the two the other side is dense, a row of the batch for each sequence.
            Causal and windows are aligned in each sequence by its own lengths. Rows of no sequence, in front, in gaps
            (by seqused) and behind, are not read; they get out 0, lse -inf and gradients 0. layout is "bshd".
        seqused_q, seqused_k: (batch,) int32: rows in use of each sequence, packed or dense, counted from its first.
            Further ones are rows of no sequence, and seqlen_q and seqlen_k of causal and windows are these.
        leftpad_k: (batch,) int32: the keys in use of each sequence begin there, counted from its first row: keys
            [leftpad_k, seqused_k) are seen. It changes nobody's place, only whom queries see.
        segment_ids: (batch, seqlen) int32, or a pair, (batch, seqlen_q) and (batch, seqlen_k): queries see the keys of
            their own id, whose rows are a sequence each. Equal ids are neighbours, negative ones are rows of no
            sequence. Not beside cu_seqlens.
        max_seqlen_q, max_seqlen_k: hints, numbers or arrays: never read, and free to be wrong.
        layout: "bshd", or "bhsd" for (batch, num_heads, seqlen, head_dim). Any strides will do, 0 and negative ones
            too. One copy is made of an input whose last dimension is not contiguous (or whose strides are not
            multiples of its item size).
        dtype: "bfloat16" says what uint16 arrays hold; the results are then uint16 too. Otherwise None.
        precision: of float32 arrays, and an error beside others. None and "float32" are float32's own accuracy. "tf32"
            makes products on a GPU of 10 bits behind the point, several times as fast: an error of about 5e-4. It is
            never chosen by a setting of a framework's.
        deterministic: as in `attention_backward`, for gradients that are taken through this call; the forward always
            repeats its bits.
        return_lse: also return the log-sum-exp, which `attention_backward` needs.
        out: where to put the result: of the inputs' framework, device and dtype, of out's shape, the last dimension
            contiguous, no element twice, no element shared with another argument (interleaved slices of one buffer
            are fine). Not for JAX, whose arrays are immutable.
        lse_out: where to put the log-sum-exp; likewise.
        workspace: one contiguous block of memory of the same framework and device, of at least
            `forward_workspace_bytes` bytes, which is 0 unless lengths are given.

    Returns:
        out, (batch, seqlen_q, num_heads, head_dim_v) in the layout and dtype of q; with return_lse=True (out, lse).
        lse is the natural logarithm of sum(exp(scores)): (batch, num_heads, seqlen_q) in either layout, float32
        (float64 for float64 inputs). Of a packed q they are (total_q, num_heads, head_dim_v) and (num_heads, total_q).
        The kind of array that went in comes back (CuPy or NumPy for other `__dlpack__`
        producers), new ones C-contiguous. A row that sees no key has out = 0 and lse = -inf, or the sink.
        Same inputs, same bits.

    torch:
        Differentiable, in q, k and v, through out and lse; under torch.compile, torch.export, torch.func, checkpointing
        and DTensor (batch and heads may be sharded) too. Autocast casts as it does for torch's SDPA. Nested tensors of
        layout torch.jagged are packed sequences: out is one too, with q's offsets, and lse is (num_heads, total_q).

    JAX:
        Differentiable, in q, k, v and sinks, through out and lse, once and in reverse mode; under jit, vmap, scan,
        remat, export and shard_map, and on meshes (batch and heads may be sharded) too. The arrays in keywords are
        operands, keys too. No masks yet, and no dropout under vmap.

    Where and when:
        On the arrays' device, queued on the current stream of that device (JAX: XLA's), whichever device is current.
        Nothing is synchronised and inputs are never written. NumPy arrays, and torch's and JAX's on the CPU, are
        computed on the CPU before the call returns, by the same algorithm; no GPU, CuPy or CUDA is needed.
        The first call of a kind plans and, if need be, compiles: before a CUDA graph capture call once with the same
        shapes. With CuPy arrays give out= and lse_out= inside a capture, where CuPy's memory pool cannot be used.

    Lengths:
        The arrays that say where sequences lie are on the inputs' device and stay there: nothing waits for them, and a
        captured graph serves other lengths. int64 will do, at the cost of a copy. They are clamped: wrong ones give
        wrong numbers, never an access beyond the arrays. With FA2CUPY_CHECK=1 a call waits for them, and wrong ones
        are a ValueError that names the argument and the sequence.

    Raises:
        ValueError or TypeError (from `fa2cupy.errors`), before anything is launched, for arguments that are not as
        described; also for a torch tensor that requires grad beside out=, lse_out= or workspace= while grad mode is on.
        Differentiating twice and forward-mode autograd raise. UnsupportedDevice below sm_80, MissingDependency without
        CuPy, NVRTC or a driver, CompilationError, LaunchError.
    """
    if return_lse is not False:
        return_lse = check_flag("return_lse", return_lse)
    if deterministic is not False:
        deterministic = check_flag("deterministic", deterministic)
    alone, kind = out is None and lse_out is None and workspace is None, type(q)
    # JAX's arrays, here and without a further frame: after a launch each costs a microsecond, not a tenth of one, and a
    # tuple with its hash half of that.
    if kind is prepared.plain_type and kind is type(k) and kind is type(v) and alone and not (positional or keywords):
        which: Any = causal
        if softmax_scale is not None or dtype is not None or layout != "bshd" or return_lse or type(causal) is not bool:
            which = return_lse, causal, softmax_scale, layout, dtype, type(causal), type(softmax_scale)
        try:
            return prepared.PLAIN[q.aval.dtype][which](q, k, v)  # q.dtype is a frame
        except Exception:  # not known yet, or something is wrong: `call` says what
            pass
    operation, arrays = FORWARD if return_lse else FORWARD_OUT, [q, k, v, out, lse_out]
    options: RawOptions = (causal, softmax_scale, layout, dtype, False, ())
    if positional or keywords:
        extra, arrays, options = given("attention", arrays, options, positional, keywords)
        if extra:
            return _with_extra(operation, extra, arrays, workspace, options, return_lse, deterministic)
    if doors.has_torch() and alone:
        way = doors.torch_way(q, k, v)
        if way is STRAIGHT:
            operation = ASKED[operation]
        elif way is not None:
            return way(q, k, v, (*options[:4], deterministic, options[5]), return_lse)
    if deterministic and any(map(is_traced, (q, k, v))):  # who takes the gradients gets no other word
        options = (*options[:4], True, options[5])
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    out, lse = call(operation, arrays, workspace, options)
    return (out, lse) if return_lse else out


def _with_extra(
    operation: Operation,
    extra: tuple[str, ...],
    arrays: list[Any],
    workspace: Any,
    options: RawOptions,
    return_lse: bool,
    deterministic: bool,
) -> Any:
    """`attention` with arrays beyond q, k, v and outputs, the last ones, called `extra`."""
    if MASK_ARRAYS[0] in extra:
        arrays = with_mask(arrays, extra, arrays[0])
    q, k, v, out, lse_out, *more = arrays
    if doors.has_torch() and out is None and lse_out is None and workspace is None:
        way, others = doors.torch_way(q, k, v), [name for name in extra if name not in CARRIED]
        if way is not None and not others:
            way, carried = doors.torch_extra(way, q, dict(zip(extra, more, strict=True)))
            arrays = [q, k, v, out, lse_out, *carried.values()]
        if way is STRAIGHT:
            if not others:  # of these a gradient may be wanted: `call` asks
                operation = ASKED[operation]
        elif way is not None:
            if others:
                raise not_through_torch(asked(others[0]))
            options = (*options[:4], deterministic, options[5])
            return way(q, k, v, options, return_lse, carried)
    if deterministic and any(map(is_traced, (q, k, v, *more))):
        options = (*options[:4], True, options[5])
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    out, lse = call(operation.extended(extra), with_seed(arrays, extra, q), workspace, options)
    return (out, lse) if return_lse else out


@public
@dynamo.leave
def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *positional: object,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    workspace: Any = None,
    **keywords: Any,
) -> tuple[Any, ...]:
    """The gradients dq, dk, dv of `attention`. Layout "bshd": dout is (batch, seqlen_q, num_heads, head_dim_v).
    causal=True is bottom-right aligned: query i sees keys j <= i + seqlen_k - seqlen_q (torch SDPA, JAX: top-left).

    Args:
        dout: gradient of the loss with respect to out; out's shape and dtype, any strides (one copy is made if its
            last dimension is not contiguous).
        q, k, v: what `attention` was called with.
        out, lse: what it returned; lse is (batch, num_heads, seqlen_q), float32 (float64 for float64 inputs); of a
            packed q (num_heads, total_q).
        causal, window_size, softmax_scale, softcap, alibi_slopes, mask, sinks, dropout_p, dropout_seed, layout, dtype,
            precision: as they were given to `attention`.
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, segment_ids, max_seqlen_q, max_seqlen_k: likewise.
        deterministic: same inputs, same bits, at some cost; otherwise a GPU adds the parts of dq up in any order.
        dlse: gradient of the loss with respect to lse, of lse's shape and dtype; None is 0.
        grad_of: names of further arrays whose gradients are wanted: ("sinks",), or none of them.
        dsinks: where to put the gradient of sinks, of its shape and dtype, if grad_of names it.
        dq, dk, dv: where to put the results, of the shapes of q, k and v; the rules are those of `attention`'s out.
        workspace: one contiguous block of at least `backward_workspace_bytes` bytes, 256-byte aligned, any contents,
            of the inputs' framework and device. None allocates it. Needed with CuPy arrays inside a graph capture.

    Returns:
        dq, dk, dv with the shapes and dtype of q, k and v, and behind them one array for each name of grad_of. With GQA
        dk and dv have num_heads_k heads: the sum over the query heads is taken inside. Rows that see no key have
        gradient 0 (their sink takes dlse), and so have those of no sequence.

    Where and when, Raises: as `attention`.
    """
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    operation, arrays = BACKWARD, [dout, q, k, v, out, lse, dq, dk, dv]
    options: RawOptions = (causal, softmax_scale, layout, dtype, deterministic, ())
    if positional or keywords:
        further, outputs = gradients(keywords)
        extra, arrays, options = given("attention_backward", [*arrays, *outputs], options, positional, keywords)
        operation = operation.extended(extra, further)
        return tuple(call(operation, with_seed(arrays, extra, q), workspace, options))
    dq, dk, dv = call(operation, arrays, workspace, options)
    return dq, dk, dv


@public
@dynamo.leave
def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    *positional: object,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out: Any = None,
    lse_out: Any = None,
    workspace: Any = None,
    **keywords: Any,
) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """`attention` and its pullback, for arrays without autograd. Layout "bshd", as in `attention`.
    causal=True is bottom-right aligned: query i sees keys j <= i + seqlen_k - seqlen_q (torch SDPA, JAX: top-left).

        out, pullback = fa2cupy.attention_vjp(q, k, v, causal=True)
        dq, dk, dv = pullback(dout)

    Args, Where and when, Raises: as `attention`; a torch tensor must not require grad.

    Returns:
        What `attention` returns, (batch, seqlen_q, num_heads, head_dim_v) or with lse, and a function pullback(dout,
        dlse=None, grad_of=()) that returns what `attention_backward` does; dlse, of lse's shape and dtype, is the
        gradient of lse.
        The pullback holds q, k, v, out and lse, reads them when it is called, and may be called again.
    """
    return_lse = check_flag("return_lse", return_lse)
    deterministic = check_flag("deterministic", deterministic)
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    options: RawOptions = (causal, softmax_scale, layout, dtype, False, ())
    arrays = [q, k, v, out, lse_out]
    extra, arrays, options = given("attention_vjp", arrays, options, positional, keywords)
    arrays = with_seed(arrays, extra, q)
    out, lse = call(FORWARD.extended(extra), arrays, workspace, options)
    if "dropout_seed" in extra:  # made once
        keywords["dropout_seed"] = arrays[len(arrays) - len(extra) + extra.index("dropout_seed")]

    def pullback(dout: Any, dlse: Any = None, grad_of: tuple[str, ...] = ()) -> tuple[Any, ...]:
        results: tuple[Any, ...] = attention_backward(
            dout, q, k, v, out, lse, causal=causal, softmax_scale=softmax_scale, layout=layout, dtype=dtype,
            deterministic=deterministic, dlse=dlse, grad_of=grad_of, **keywords,
        )  # fmt: skip
        return results

    return (out, lse) if return_lse else out, pullback


@public
@dynamo.leave
def forward_workspace_bytes(
    q: Any,
    k: Any,
    v: Any,
    *positional: object,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    **keywords: Any,
) -> int:
    """Bytes that `attention` needs as workspace= for these arguments; 0 without lengths. Layout "bshd", as in
    `attention`; causal=True is aligned bottom-right. Shapes, dtype, device and options count, not what the arrays hold.
    """
    check_flag("deterministic", deterministic)
    options = (causal, softmax_scale, layout, dtype, False, ())
    return _workspace_bytes("forward_workspace_bytes", FORWARD, [q, k, v], options, positional, keywords)


@public
@dynamo.leave
def backward_workspace_bytes(
    q: Any,
    k: Any,
    v: Any,
    *positional: object,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    deterministic: bool = False,
    **keywords: Any,
) -> int:
    """Bytes that `attention_backward` needs as workspace= for these arguments. Layout "bshd"; 0 for arrays on the CPU.
    causal=True is aligned bottom-right. Shapes, dtype, device and options count, not what the arrays hold.
    """
    options = (causal, softmax_scale, layout, dtype, deterministic, ())
    return _workspace_bytes("backward_workspace_bytes", BACKWARD, [q, k, v], options, positional, keywords)


def _workspace_bytes(
    function: str,
    operation: Operation,
    arrays: list[Any],
    options: RawOptions,
    positional: tuple[object, ...],
    keywords: dict[str, Any],
) -> int:
    from fa2cupy.first_call import workspace_bytes

    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    extra, arrays, options = given(function, arrays, options, positional, keywords)
    return workspace_bytes(operation.extended(extra), with_seed(arrays, extra, arrays[0]), options)
