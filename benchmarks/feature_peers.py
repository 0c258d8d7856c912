"""Ours and the peers on the cells of features, each as one call without arguments.

fa2: torch's FlashAttention-2 kernels, by the operator beneath its public functions; eff: torch's memory-efficient
kernels; cudnn: torch SDPA's; flex: FlexAttention, compiled; fa3 and fa4: the wheels ``fa3-fwd`` (no backward, no
windows) and ``flash-attn-4``; vfa3: vLLM's build of FA3 (no backward), for windows; jax: jax.nn's cuDNN. A peer that
has no such feature says so (`UnableError`).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import peers, results
from benchmarks.feature_cells import CELLS, DENSE, Cell, reference, slope

__all__ = [
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
    "warm",
]

Call = Callable[[], Any]
FORMULA = "formula"  # the plain formula, who ours is set beside in a rehearsal
OTHERS = ("fa2", "eff", "cudnn", "fa3", "vfa3", "fa4", "flex", "jax")
COMPILED = ("fa4", "flex")  # take long to compile, and keep what they compile on disk
VLLM = ("vllm_so/_vllm_fa3_C.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")


class UnableError(Exception):
    """The library has no such thing."""


class MissingError(Exception):
    """Ours has no such thing yet."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """(batch, seqlen, heads, head_dim) or (rows, heads, head_dim); starts (sequences + 1,), used (batch,): int32;
    slopes (num_heads,) float32; sinks (num_heads,) as q, with a gradient."""

    q: Any
    k: Any
    v: Any
    dout: Any
    starts: Any = None
    used: Any = None
    slopes: Any = None
    sinks: Any = None

    @property
    def differentiated(self) -> tuple[Any, ...]:
        return (self.q, self.k, self.v) if self.sinks is None else (self.q, self.k, self.v, self.sinks)

    def flat(self) -> list[Any]:
        """q, k, v and dout as (rows, heads, head_dim)."""
        given = [t.detach() if hasattr(t, "detach") else t for t in (self.q, self.k, self.v, self.dout)]
        return [t.reshape(-1, t.shape[-2], t.shape[-1]) for t in given]


def _shapes(cell: Cell) -> list[tuple[int, ...]]:
    lead = (cell.seqlen,) if cell.lengths else (cell.batch, cell.seqlen)
    return [
        (*lead, heads, cell.head_dim) for heads in (cell.num_heads, cell.num_heads_k, cell.num_heads_k, cell.num_heads)
    ]


def _starts(cell: Cell) -> list[int]:
    """Where each sequence begins, and where the last ends."""
    sequences = cell.sequences()
    return [*(start for start, _, _ in sequences), sequences[-1][0] + sequences[-1][1]]


def make_tensors(cell: Cell, device: str = "cuda", seed: int = 0) -> Tensors:
    """bfloat16 on a GPU, float32 on a CPU by torch ("cpu") or NumPy ("numpy"); q, k and v of torch require grad."""
    if device == "numpy":
        import numpy as np

        normal = np.random.default_rng(seed).standard_normal
        arrays = [normal(shape, np.float32) for shape in _shapes(cell)]
        arrays[0] *= _spread(cell)
        starts, used = (np.asarray(x, np.int32) for x in (_starts(cell), cell.used))
        slopes = np.asarray([slope(cell, head) for head in range(cell.num_heads)], np.float32)
        sinks = normal(cell.num_heads, np.float32)
    else:
        import torch

        generator = torch.Generator(device).manual_seed(seed)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        shapes = (*_shapes(cell), (cell.num_heads,))
        *arrays, sinks = (torch.randn(s, device=device, dtype=dtype, generator=generator) for s in shapes)
        arrays[0] *= _spread(cell)
        for array in (*arrays[:3], sinks):
            array.requires_grad_()
        starts, used = (torch.tensor(x, dtype=torch.int32, device=device) for x in (_starts(cell), cell.used))
        slopes = torch.tensor([slope(cell, head) for head in range(cell.num_heads)], device=device)
    return Tensors(
        *arrays,
        starts=starts if cell.lengths else None,
        used=used if cell.used else None,
        slopes=slopes if cell.alibi else None,
        sinks=sinks if cell.sinks else None,
    )


def _spread(cell: Cell) -> float:
    """Of the scores, so that a cap is felt."""
    return cell.softcap / 4 if cell.softcap else 1.0


def as_given(found: Any, tensors: Tensors, mode: str) -> list[Any]:
    """What a call returned, of the inputs' own framework and shapes."""
    shaped = (tensors.q,) if mode == "fwd" else (tensors.q, tensors.k, tensors.v)
    found = [found] if mode == "fwd" else list(found)[:3]
    if hasattr(tensors.q, "detach"):
        import torch

        found = [x.detach() if isinstance(x, torch.Tensor) else torch.from_dlpack(x.block_until_ready()) for x in found]
    return [x.reshape(like.shape) for x, like in zip(found, shaped, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Ours


def ours(cell: Cell, t: Tensors, mode: str, package: Any = None) -> Call:
    """A call of `package`: fa2cupy, or the same of another commit."""
    keywords: dict[str, Any] = {"causal": cell.causal}
    if cell.windowed:
        keywords["window_size"] = cell.window
    if cell.softcap:
        keywords["softcap"] = cell.softcap
    if t.slopes is not None:
        keywords["alibi_slopes"] = t.slopes
    if t.sinks is not None:
        keywords["sinks"] = t.sinks.detach() if hasattr(t.sinks, "detach") else t.sinks
    if cell.dropout:
        keywords |= {"dropout_p": cell.dropout, "dropout_seed": (42, 0)}
    if t.starts is not None:
        keywords |= {"cu_seqlens_q": t.starts, "cu_seqlens_k": t.starts}
    if t.used is not None:
        keywords["seqused_k"] = t.used
    return _ours_with(t, mode, keywords, package)


def _ours_dense(cell: Cell, t: Tensors, mode: str) -> Call:
    """Sequences of one length as a batch."""
    (length,) = set(cell.lengths)
    q, k, v, dout = (x.reshape(-1, length, *x.shape[-2:]) for x in t.flat())
    return _ours_with(Tensors(q, k, v, dout), mode, {"causal": cell.causal})


def _ours_with(t: Tensors, mode: str, keywords: dict[str, Any], package: Any = None) -> Call:
    if package is None:
        import fa2cupy as package

    q, k, v = (x.detach() if hasattr(x, "detach") else x for x in (t.q, t.k, t.v))
    try:
        out, lse = package.attention(q, k, v, **keywords, return_lse=True)
    except package.InvalidArgument as error:
        if "not supported yet" in str(error):
            raise MissingError(str(error)) from None
        raise
    if mode == "fwd":
        return lambda: package.attention(q, k, v, **keywords, return_lse=True)[0]
    if t.sinks is not None:
        keywords["grad_of"] = ("sinks",)
    return lambda: package.attention_backward(t.dout, q, k, v, out, lse, **keywords)


# ----------------------------------------------------------------------------------------------------------------------
# The others


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
        starts = torch.tensor(_starts(cell), dtype=torch.int32, device=t.q.device)
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
    starts = torch.tensor(_starts(cell), dtype=torch.int32, device=t.q.device)
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
    return forward if mode == "fwd" else peers.torch_call(mode, t, forward)


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
    DENSE: _ours_dense,
    FORMULA: _formula,
    "fa2": _fa2,
    "eff": _eff,
    "cudnn": _sdpa("CUDNN_ATTENTION"),
    "fa3": _fa3,
    "vfa3": _vfa3,
    "fa4": _fa4,
    "flex": _flex,
    "jax": _jax,
}


def make(name: str, cell: Cell, tensors: Tensors, mode: str) -> Call:
    """The call of a library. UnableError or MissingError where it has no such feature; else its own errors."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Compiling beforehand


def warm(names: Iterable[str], cells: Sequence[Cell], processes: int, seconds: float) -> Callable[[], None]:
    """Have processes compile the libraries' kernels of the cells into their caches on disk; the result waits for them.

    One that fails is repeated, and reported, where it is measured.
    """
    jobs = [f"{name}:{cell.name}" for name in names if name in COMPILED for cell in cells if cell.group != "equal"]
    shares = [share for share in (jobs[n::processes] for n in range(processes)) if share]
    running = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *share],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for share in shares
    ]
    for process in running:
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()

    def wait() -> None:
        for process in running:
            process.wait()

    return wait


def _compile(job: str) -> None:
    name, _, cell_name = job.partition(":")
    cell = CELLS[cell_name]
    tensors = make_tensors(cell)
    for mode in ("fwd", "bwd"):
        make(name, cell, tensors, mode)()


if __name__ == "__main__":  # a process of `warm`
    import contextlib

    probe(COMPILED)
    for _job in sys.argv[1:]:
        with contextlib.suppress(Exception):
            _compile(_job)
