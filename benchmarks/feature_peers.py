"""Ours and the peers on the cells of features, each as one call without arguments.

fa2: torch's FlashAttention-2 kernels, by the operator beneath its public functions; eff: torch's memory-efficient
kernels; cudnn: torch SDPA's; flex: FlexAttention, compiled; fa3 and fa4: the wheels ``fa3-fwd`` (no backward, no
windows) and ``flash-attn-4``; vfa3: vLLM's build of FA3 (no backward), for windows; jax: jax.nn's cuDNN. A peer that
has no such feature says so (`UnableError`); unfused: torch's products and softmax, in float32 or tf32 as the cell is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import peers, results
from benchmarks.feature_cells import DENSE, Cell, reference
from benchmarks.feature_inputs import (
    Call,
    MissingError,
    Tensors,
    UnableError,
    as_given,
    make_tensors,
    ours,
    ours_dense,
    starts_of,
)

__all__ = [
    "COMPILED",
    "FORMULA",
    "OTHERS",
    "MissingError",
    "Queued",
    "Tensors",
    "UnableError",
    "as_given",
    "make",
    "make_tensors",
    "ours",
    "probe",
]

FORMULA = "formula"  # the plain formula, who ours is set beside in a rehearsal
OTHERS = ("fa2", "eff", "cudnn", "fa3", "vfa3", "fa4", "flex", "jax", "unfused")
WIDE = ("eff", "flex", "unfused")  # that know float32 or float64
COMPILED = ("fa4", "flex")  # take long to compile, and keep what they compile on disk
VLLM = ("vllm_so/_vllm_fa3_C.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")


def _formula(cell: Cell, t: Tensors, mode: str) -> Call:
    _no_scores(cell, "softcap", "alibi", "sinks")
    import numpy as np

    def call() -> Any:
        flat = t.flat()
        found = [np.zeros_like(x) for x in (flat[0], *flat[:3])]
        group = cell.num_heads // cell.num_heads_k
        for sequence in (s for s in cell.sequences() if s[1]):
            rows = slice(sequence[0], sequence[0] + sequence[1])
            for head in range(cell.num_heads_k):
                heads = slice(head * group, (head + 1) * group)
                out, dq, dk, dv = reference(np, cell, flat, sequence, head, t.sinks)
                found[0][rows, heads], found[1][rows, heads] = out, dq
                found[2][rows, head], found[3][rows, head] = dk, dv
        return found[0] if mode == "fwd" else found[1:]

    return call


def _forward_only(mode: str) -> None:
    if mode == "bwd":
        raise UnableError("it has no backward")


def _no_window(cell: Cell) -> None:
    if cell.windowed:
        raise UnableError("it has no windows")


def _no_scores(cell: Cell, *but: str) -> None:
    """UnableError where scores are changed in a way that is not among `but`."""
    for name, what in (("softcap", "softcap"), ("alibi", "ALiBi"), ("sinks", "sinks"), ("dropout", "dropout")):
        if getattr(cell, name) and name not in but:
            raise UnableError(f"it has no {what}")


def _sides(cell: Cell) -> tuple[int, int]:
    """The window as FlashAttention's libraries count it, causal included."""
    left, right = cell.window
    return left, (0 if cell.causal else right)


def _fa2(cell: Cell, t: Tensors, mode: str) -> Call:
    _no_scores(cell, "dropout")
    import torch

    attend, (left, right) = torch.ops.aten._flash_attention_forward, cell.window
    options: dict[str, Any] = {"window_size_left": left, "window_size_right": right}
    longest = max(cell.lengths, default=cell.seqlen)
    if t.used is not None:  # padded keys: sequences that are packed without being shortened
        if mode == "bwd":
            raise UnableError("torch's operator for the gradient takes no lengths in use")
        starts = torch.tensor(starts_of(cell), dtype=torch.int32, device=t.q.device)
        q, k, v, _ = t.flat()
        return lambda: attend(
            q, k, v, starts, starts, longest, longest, 0.0, cell.causal, False, seqused_k=t.used, **options
        )[0]
    return peers.torch_call(
        mode, t,
        lambda: attend(
            t.q, t.k, t.v, t.starts, t.starts, longest, longest, cell.dropout, cell.causal, False, **options
        )[0],
    )  # fmt: skip


def _eff(cell: Cell, t: Tensors, mode: str) -> Call:
    _no_scores(cell)  # dropout too: a third of the others' speed, and for a path of its own
    if t.used is not None:
        return _sdpa("EFFICIENT_ATTENTION")(cell, t, mode)
    if cell.num_heads != cell.num_heads_k:
        raise UnableError("it takes as many key heads as query heads")
    if cell.windowed and not cell.causal:
        raise UnableError("it has windows of causal masks only")
    import torch

    aten, causal = torch.ops.aten, int(cell.causal)
    q, k, v, dout = (x if x.ndim == 4 else x[None] for x in (t.q.detach(), t.k.detach(), t.v.detach(), t.dout))
    window = cell.window[0] + 1 if cell.windowed else None  # it counts the query itself
    longest = max(cell.lengths) if cell.lengths else None

    def forward(with_lse: bool) -> Any:
        return aten._efficient_attention_forward(
            q, k, v, None, t.starts, t.starts, longest, longest, 0.0, causal, with_lse, window_size=window
        )

    if mode == "fwd":
        return lambda: forward(False)[0]
    out, lse, seed, offset, max_q, max_k = forward(True)
    return lambda: aten._efficient_attention_backward(
        dout, q, k, v, None, out, t.starts, t.starts, max_q, max_k, lse, 0.0, seed, offset, causal, False,
        window_size=window,
    )  # fmt: skip


def _sdpa(backend: str) -> Callable[[Cell, Tensors, str], Call]:
    def make_call(cell: Cell, t: Tensors, mode: str) -> Call:
        if cell.lengths:
            raise UnableError("torch keeps its packed sequences switched off")
        _no_window(cell)
        _no_scores(cell, "dropout")
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        kind, mask = SDPBackend.__members__[backend], None
        if t.used is not None:
            mask = (torch.arange(cell.seqlen, device=t.q.device) < t.used[:, None])[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (t.q, t.k, t.v))
        gqa = cell.num_heads != cell.num_heads_k

        def forward() -> Any:
            with sdpa_kernel(kind):
                out = scaled_dot_product_attention(q, k, v, mask, cell.dropout, cell.causal, enable_gqa=gqa)
            return out.transpose(1, 2)

        return peers.torch_call(mode, t, forward)

    return make_call


def _fa3(cell: Cell, t: Tensors, mode: str) -> Call:
    _no_window(cell)
    _no_scores(cell, "softcap")
    _forward_only(mode)
    from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func

    q, k, v = t.q.detach(), t.k.detach(), t.v.detach()
    longest = max(cell.lengths, default=None)

    def forward() -> Any:
        if t.starts is not None:
            out = flash_attn_varlen_func(q, k, v, t.starts, t.starts, longest, longest, causal=cell.causal)
        elif t.used is not None:
            out = flash_attn_varlen_func(q, k, v, None, None, None, None, seqused_k=t.used, causal=cell.causal)
        else:
            out = flash_attn_func(q, k, v, causal=cell.causal, softcap=cell.softcap)
        return out[0] if isinstance(out, tuple) else out

    return forward


def _vllm_library() -> Path:
    """The library of vLLM's FA3. ImportError where there is none."""
    for folder in sys.path:
        for name in VLLM:
            if (path := Path(folder or ".", name)).is_file():
                return path
    raise ImportError(f"no {VLLM[0].rpartition('/')[2]} in vllm_so or vllm/vllm_flash_attn on the path of imports")


def _vfa3(cell: Cell, t: Tensors, mode: str) -> Call:
    _forward_only(mode)
    if cell.group != "window":
        raise UnableError("it is measured on windows only")
    import torch

    torch.ops.load_library(str(_vllm_library()))
    attend, (left, right) = torch.ops._vllm_fa3_C.fwd, _sides(cell)
    # As vLLM calls it: the batch as packed sequences.
    starts = torch.tensor(starts_of(cell), dtype=torch.int32, device=t.q.device)
    q, k, v, _ = t.flat()
    longest, scale = cell.seqlen, cell.head_dim**-0.5

    def forward() -> Any:
        return attend(
            q, k, v,
            None, None, None, None,  # new keys and values, qv, out
            starts, starts, None,  # of queries, keys, new keys
            None, None, longest, longest,  # queries and keys in use, the longest of each
            None, None, None,  # pages, cache rows, left padding
            None, None, None, None, None, None,  # rotation and its lengths, scales of FP8
            scale, cell.causal, left, right, 0.0,  # and softcap
            True, None, 1, None, 0,  # interleaved rotation, schedule, splits, grouped heads, spared SMs
            None, 1, 0, None,  # sinks, context parallelism
        )[0]  # fmt: skip

    return forward


def _fa4(cell: Cell, t: Tensors, mode: str) -> Call:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    _no_scores(cell, "softcap", "alibi", "sinks")
    options: dict[str, Any] = {"causal": cell.causal}
    if cell.windowed:
        options["window_size"] = cell.window
    if cell.softcap:
        options["softcap"] = cell.softcap
    if t.sinks is not None:
        options["learnable_sink"] = t.sinks
    if cell.alibi:
        options |= _fa4_alibi(cell.num_heads)
    longest = max(cell.lengths, default=cell.seqlen)
    if t.starts is not None:
        options |= {"cu_seqlens_q": t.starts, "cu_seqlens_k": t.starts}
    if t.used is not None:
        options["seqused_k"] = t.used
    if t.starts is None and t.used is None:
        return peers.torch_call(mode, t, lambda: flash_attn_func(t.q, t.k, t.v, **options)[0])
    options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return peers.torch_call(mode, t, lambda: flash_attn_varlen_func(t.q, t.k, t.v, **options)[0])


def _fa4_alibi(num_heads: int) -> dict[str, Any]:
    """As functions of a score, for causal masks. FA4 goes by the names of their arguments."""
    import cutlass
    import cutlass.cute as cute

    step = -8.0 / num_heads

    @cute.jit
    def score_mod(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        head = (h + cute.full_like(h, 1)).to(cutlass.Float32)
        return score - cute.math.exp2(head * cute.full_like(score, step)) * (q_idx - kv_idx).to(cutlass.Float32)

    @cute.jit
    def score_mod_bwd(gradient, score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        return gradient

    return {"score_mod": score_mod, "score_mod_bwd": score_mod_bwd}


def _flex(cell: Cell, t: Tensors, mode: str) -> Call:
    """Packed sequences as one row whose mask knows the sequences."""
    _no_scores(cell, "softcap", "alibi")
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    left, right = _sides(cell)
    lengths = torch.tensor(cell.lengths or [cell.seqlen], device=t.q.device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=t.q.device), lengths)
    rules: list[Callable[..., Any]] = []
    if right >= 0:
        rules.append(lambda b, h, i, j: j <= i + right)
    if left >= 0:
        rules.append(lambda b, h, i, j: j >= i - left)
    if cell.lengths:
        rules.append(lambda b, h, i, j: sequence[i] == sequence[j])
    if t.used is not None:
        rules.append(lambda b, h, i, j: j < t.used[b])

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        answer = rules[0](b, h, i, j)
        for rule in rules[1:]:
            answer = answer & rule(b, h, i, j)
        return answer

    batch = cell.batch if t.used is not None else None
    mask = create_block_mask(seen, batch, None, cell.seqlen, cell.seqlen, device=t.q.device) if rules else None
    gqa = cell.num_heads != cell.num_heads_k
    if t.q.is_cuda:
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False  # a graph's gradient is asked for again and again
        torch._dynamo.reset()  # the cells before are not variants of this one
        attend = torch.compile(flex_attention, dynamic=False)
    else:
        attend = flex_attention

    def changed(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return cell.softcap * torch.tanh(score / cell.softcap) if cell.softcap else score - t.slopes[h] * (i - j).abs()

    options = {"score_mod": changed} if cell.softcap or cell.alibi else {}

    def forward() -> Any:
        q, k, v = (x.reshape(cell.batch, cell.seqlen, *x.shape[-2:]).transpose(1, 2) for x in (t.q, t.k, t.v))
        return attend(q, k, v, block_mask=mask, enable_gqa=gqa, **options).transpose(1, 2).reshape(t.q.shape)

    # With a graph in both modes, so that one compilation serves both.
    forward = _of_precision(cell, forward)
    return _of_precision(cell, forward if mode == "fwd" else peers.torch_call(mode, t, forward))


def _unfused(cell: Cell, t: Tensors, mode: str) -> Call:
    import torch

    if cell.dtype == "bfloat16":
        raise UnableError("it is measured in float32 and float64 only")
    hidden = torch.ones(cell.seqlen, cell.seqlen, dtype=torch.bool, device=t.q.device).triu(1)

    def forward() -> Any:
        q, k, v = (x.transpose(1, 2) for x in (t.q, t.k, t.v))
        scores = (q @ k.transpose(2, 3)) * cell.head_dim**-0.5
        scores = scores.masked_fill(hidden, -torch.inf) if cell.causal else scores
        return (scores.softmax(-1) @ v).transpose(1, 2)

    forward = _of_precision(cell, forward)
    return _of_precision(cell, peers.torch_call(mode, t, forward))


def _of_precision(cell: Cell, call: Call) -> Call:
    """With torch's products of float32 in tf32 or not, as the cell says: compiled code asks when it is compiled, cuBLAS
    with each call."""
    import torch

    if cell.dtype != "float32":
        return call

    def with_precision() -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if cell.precision == "tf32" else "highest")
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision(before)

    return with_precision


class Queued:
    """A call whose work is not on torch's stream: timed by the clock on the wall, over calls that queue up."""

    def __init__(self, call: Call, wait: Callable[[Any], object]) -> None:
        self.call, self.wait = call, wait

    def __call__(self) -> Any:
        return self.call()


def _jax(cell: Cell, t: Tensors, mode: str) -> Call:
    """jax.nn's cuDNN; packed sequences by the function below it."""
    _no_scores(cell)
    if cell.windowed and not cell.causal:
        raise UnableError("cuDNN has windows of causal masks only")
    import jax
    import torch

    def of_jax(x: Any) -> Any:
        return jax.dlpack.from_dlpack(x.detach().contiguous())

    torch.cuda.synchronize()
    q, k, v, dout = (of_jax(x if x.ndim == 4 else x[None]) for x in (t.q, t.k, t.v, t.dout))
    used = None if t.used is None else of_jax(t.used)
    window = (cell.window[0], 0) if cell.windowed else None
    if t.starts is not None:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

        starts, lengths = of_jax(t.starts[None]), of_jax(t.starts.diff()[None])
        options = {
            "scale": cell.head_dim**-0.5,
            "mask_type": MaskType.PADDING_CAUSAL if cell.causal else MaskType.PADDING,
        }

    def attend(q: Any, k: Any, v: Any) -> Any:
        if t.starts is not None:
            return dot_product_attention(q, k, v, None, None, lengths, lengths, starts, starts, **options)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=cell.causal, key_value_seq_lengths=used, local_window_size=window, implementation="cudnn"
        )

    if mode == "fwd":
        run = jax.jit(attend)
        return Queued(lambda: run(q, k, v), jax.block_until_ready)
    _, pullback = jax.vjp(attend, q, k, v)
    gradient = jax.jit(lambda pull, seed: pull(seed))
    return Queued(lambda: gradient(pullback, dout), jax.block_until_ready)


_MAKERS: dict[str, Callable[[Cell, Tensors, str], Call]] = {
    results.OURS: ours,
    DENSE: ours_dense,
    FORMULA: _formula,
    "fa2": _fa2,
    "eff": _eff,
    "cudnn": _sdpa("CUDNN_ATTENTION"),
    "fa3": _fa3,
    "vfa3": _vfa3,
    "fa4": _fa4,
    "flex": _flex,
    "jax": _jax,
    "unfused": _unfused,
}


def make(name: str, cell: Cell, tensors: Tensors, mode: str) -> Call:
    """The call of a library. UnableError or MissingError where it has no such feature; else its own errors."""
    if cell.dtype != "bfloat16" and name in OTHERS and name not in WIDE:
        raise UnableError("it has no such type")
    return _MAKERS[name](cell, tensors, mode)


def probe(names: Iterable[str]) -> dict[str, str]:
    """name -> why it is not here, of those that are not."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is torch's too
    names = list(names)
    absent = peers.probe(names)
    try:
        if "vfa3" in names:
            _vllm_library()
    except ImportError as error:
        absent["vfa3"] = str(error)
    if "jax" in names:
        try:
            import jax

            jax.devices("gpu")
        except Exception as error:  # not installed, or without a GPU
            absent["jax"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if "flex" in names and importlib.util.find_spec("triton") is None:
        absent["flex"] = "triton is not installed"
    return absent
