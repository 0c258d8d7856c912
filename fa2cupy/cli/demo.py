"""demo: exact attention, forward and backward, computed, checked against float64, timed and drawn."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fa2cupy
from fa2cupy.cli import backends, byte_model
from fa2cupy.cli.arguments import at_least_one
from fa2cupy.cli.backends import Backend
from fa2cupy.cli.byte_model import AttentionCall
from fa2cupy.cli.progress import progress

Array = NDArray[Any]

SEQLEN, BATCH, STEPS = 128, 8, 60
TRAINING_SECONDS = 10.0  # a busy or slow machine trains less instead of longer
SNIPPET = 48
# Relative root-mean-square errors that the formats explain, with room. Rounding P, dS and the results to bfloat16 costs
# 2.5e-3 on random inputs; in a trained layer with sharp attention dS nearly cancels, and dq costs 2e-2.
LIMIT_RANDOM = {"bfloat16": 6e-3, "float16": 8e-4, "float32": 1e-5}
LIMIT_TRAINED = {"bfloat16": 6e-2, "float16": 8e-3, "float32": 1e-4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``demo``."""
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: the GPU if any")
    parser.add_argument("--output", type=Path, default=Path("fa2cupy-demo.png"), help="where the picture goes")
    parser.add_argument(
        "--steps", type=at_least_one, default=STEPS, help=f"training steps of the small model ({STEPS})"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when everything was computed and is as exact as it should be."""
    start = time.perf_counter()
    backend, why = choose_backend(args.device)
    print(f"fa2cupy {fa2cupy.__version__} on {backend.name}, {backend.dtype.name} inputs{why}\n")
    if backend.is_gpu:
        compile_kernels(backend)
    good, losses, call, text = byte_case(backend, args.steps)
    good &= grouped_query_case(backend)
    print(draw(args.output, losses, args.steps, call, text))
    print(f"done in {time.perf_counter() - start:.1f} s")
    if not good:
        print("An error is larger than the format explains. Please report it with the output of: python -m fa2cupy env")
    return 0 if good else 1


def choose_backend(device: str) -> tuple[Backend, str]:
    """The backend, and in words why it is not a GPU."""
    if device == "cpu":
        return backends.cpu(), ""
    found = backends.gpu()
    if isinstance(found, Backend):
        return found, ""
    if device == "gpu":
        raise fa2cupy.errors.UnsupportedDevice(f"--device gpu: {found}")
    return backends.cpu(), f"\n(no GPU: {found})"


def compile_kernels(backend: Backend) -> None:
    """Call each kernel of the demo once: the first time this compiles it, later it comes from the disk cache."""
    start = time.perf_counter()
    steps: list[tuple[int, Callable[..., object]]] = []
    for head_dim in (byte_model.HEAD_DIM, 128):
        steps += [(head_dim, backend.forward), (head_dim, backend.backward)]
    for head_dim, function in progress(steps, "compiling kernels"):
        x = np.ones((1, 128, 2, head_dim), np.float32)
        lse = np.zeros((1, 2, 128), np.float32)
        function(*((x, x, x) if function == backend.forward else (x, x, x, x, x, lse)))
    print(f"kernels ready in {time.perf_counter() - start:.1f} s (compiled, or read from the cache)\n")


def byte_case(backend: Backend, steps: int) -> tuple[bool, list[float], AttentionCall, bytes]:
    """Train the byte model on fa2cupy's own source and check its last attention calls."""
    source = np.frombuffer(Path(fa2cupy.attention.__code__.co_filename).read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    params = byte_model.init(SEQLEN, seed=0)
    optimiser = byte_model.Adam(params, rate=4e-3)
    print(f"1. Two-layer causal attention on {source.size:,} bytes of fa2cupy/attention.py")
    losses: list[float] = []
    calls: list[AttentionCall] = []
    text = source[None, : SEQLEN + 1]
    start = time.perf_counter()
    for _ in progress(range(steps), "training"):
        starts = rng.integers(0, source.size - SEQLEN, BATCH)
        text = np.stack([source[begin : begin + SEQLEN + 1] for begin in starts])
        bits, grads, calls = byte_model.loss_and_gradients(params, text, backend.forward, backend.backward)
        optimiser.step(params, grads)
        losses.append(bits)
        if time.perf_counter() - start > TRAINING_SECONDS:
            break
    elapsed = time.perf_counter() - start
    last = sum(losses[-5:]) / len(losses[-5:])
    change = f"{losses[0]:.2f} -> {last:.2f} bits per byte"
    print(f"   loss {change} in {done(losses, steps)}, {elapsed:.1f} s (a guess costs 8)")
    good = True
    for layer, call in enumerate(calls, 1):
        good &= report_error(f"layer {layer}", backend, call, LIMIT_TRAINED)
    print()
    return good, losses, calls[-1], text[0].tobytes()


def grouped_query_case(backend: Backend) -> bool:
    """head_dim 128, four query heads per key head, causal: checked and timed, forward and backward."""
    batch, seqlen, heads, heads_k, dim = (1, 4096, 32, 8, 128) if backend.is_gpu else (1, 1024, 8, 2, 128)
    shape = f"batch {batch}, seqlen {seqlen}, {heads} heads on {heads_k} key heads, head_dim {dim}"
    print(f"2. Grouped queries, causal: {shape}")
    rng = np.random.default_rng(1)
    q, k, v, dout = (
        rng.standard_normal((batch, seqlen, count, dim), dtype=np.float32).astype(backend.dtype)
        for count in (heads, heads_k, heads_k, heads)
    )
    q_, k_, v_, dout_ = (backend.to_device(x) for x in (q, k, v, dout))
    out, lse = fa2cupy.attention(q_, k_, v_, causal=True, return_lse=True)
    dq, dk, dv = fa2cupy.attention_backward(dout_, q_, k_, v_, out, lse, causal=True)
    # One key head with its query heads is enough to see an error, and quick in float64.
    few = heads // heads_k
    host_out, host_dq, host_dk, host_dv = (backend.to_host(x)[:1] for x in (out, dq, dk, dv))
    call = AttentionCall(
        q=q[:1, :, :few], k=k[:1, :, :1], v=v[:1, :, :1], out=host_out[:, :, :few], lse=backend.to_host(lse)[:1, :few],
        dout=dout[:1, :, :few], dq=host_dq[:, :, :few], dk=host_dk[:, :, :1], dv=host_dv[:, :, :1],
    )  # fmt: skip
    good = report_error("first key head", backend, call, LIMIT_RANDOM)

    flops = 0.5 * 4 * batch * heads * seqlen * seqlen * dim
    seconds = backend.seconds(lambda: fa2cupy.attention(q_, k_, v_, causal=True))
    print(timing("forward", seconds, flops))
    seconds_back = backend.seconds(lambda: fa2cupy.attention_backward(dout_, q_, k_, v_, out, lse, causal=True))
    print(timing("backward", seconds_back, 2.5 * flops))
    if backend.is_gpu:
        plain = backends.unfused(q, k, v)
        if isinstance(plain, str):
            print(f"   unfused forward  not timed: {plain}")
        else:
            print(timing("unfused forward", backend.seconds(plain), flops))
    print()
    return good


def timing(name: str, seconds: float, flops: float) -> str:
    """One line with the time and the rate, counting the causal half of the products."""
    rate = flops / seconds
    shown = f"{rate * 1e-12:.1f} TFLOP/s" if rate > 1e12 else f"{rate * 1e-9:.1f} GFLOP/s"
    return f"   {name:<16} {seconds * 1e3:9.3f} ms {shown:>15}"


def report_error(name: str, backend: Backend, call: AttentionCall, limit: dict[str, float]) -> bool:
    """Print the root-mean-square errors relative to the plain formula in float64; whether they are small enough."""
    rounded = [backend.round(x).astype(np.float64) for x in (call.q, call.k, call.v, call.dout)]
    references = plain_formula(*rounded)
    errors = {}
    for key, reference in zip(("out", "dq", "dk", "dv"), references, strict=True):
        difference = getattr(call, key).astype(np.float64) - reference
        errors[key] = float(np.sqrt(np.mean(difference**2) / np.mean(reference**2)))
    print(f"   {name:<16} error against float64: " + ", ".join(f"{key} {value:.1e}" for key, value in errors.items()))
    return all(value <= limit[backend.dtype.name] for value in errors.values())


def plain_formula(q: Array, k: Array, v: Array, dout: Array) -> tuple[Array, Array, Array, Array]:
    """out, dq, dk, dv of causal attention in float64, all scores in memory, one query head at a time."""
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    scale = q.shape[-1] ** -0.5
    visible = np.tri(q.shape[1], dtype=bool)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            here, shared = (b, slice(None), h), (b, slice(None), h // group)
            scores = np.where(visible, q[here] @ k[shared].T * scale, -np.inf)
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            out[here] = p @ v[shared]
            dp = dout[here] @ v[shared].T
            ds = p * (dp - np.sum(dout[here] * out[here], axis=-1, keepdims=True)) * scale
            dq[here] = ds @ k[shared]
            dk[shared] += ds.T @ q[here]
            dv[shared] += p.T @ dout[here]
    return out, dq, dk, dv


def done(losses: list[float], steps: int) -> str:
    """How much training there was, in words."""
    few = len(losses) < steps
    return f"{len(losses)} of {steps} steps" if few else f"{steps} step{'' if steps == 1 else 's'}"


def titles(losses: list[float], steps: int, head: int) -> tuple[str, str]:
    """Of the two halves of the picture. A model that had no time to learn is not said to have learnt."""
    after = done(losses, steps)
    loss = f"Loss over {after}" + " (the time was up)" * (len(losses) < steps)
    return f"Attention of layer {byte_model.NUM_LAYERS}, head {head + 1}, after {after}: exp(S - lse)", loss


def draw(path: Path, losses: list[float], steps: int, call: AttentionCall, text: bytes) -> str:
    """Save the picture: an attention map of the trained model, and its loss. Returns what to tell the user."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return "No picture: matplotlib is not installed (pip install matplotlib)."
    n = min(SNIPPET, call.q.shape[1])
    # softmax_lse makes each probability available without a second softmax: P = exp(S - lse). First text, each head.
    scores = np.einsum("qhd,khd->hqk", call.q[0, :n], call.k[0, :n]) * call.q.shape[-1] ** -0.5
    maps = np.exp(scores - call.lse[0, :, :n, None]) * np.tri(n)
    head = int(np.argmax(maps[:, 4:].max(axis=-1).mean(axis=-1)))  # the most decided head is the most telling

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6.4), width_ratios=(1.5, 1), layout="constrained")
    image = left.imshow(maps[head] ** 0.5, cmap="Greys", vmin=0, vmax=1)
    labels = [chr(byte) if 32 < byte < 127 else "·" for byte in text[:n]]
    left.set_xticks(range(n), labels, family="monospace", fontsize=7)
    left.set_yticks(range(n), labels, family="monospace", fontsize=7)
    left.set(xlabel="key: what was read", ylabel="query: where the next byte is predicted")
    left_title, right_title = titles(losses, steps, head)
    left.set_title(left_title)
    bar = figure.colorbar(image, ax=left, shrink=0.8, ticks=[0, 0.1**0.5, 0.5**0.5, 1])
    bar.ax.set_yticklabels(["0", "0.1", "0.5", "1"])
    right.plot(range(1, len(losses) + 1), losses, color="black")
    right.set(xlabel="training step", ylabel="loss, bits per byte", ylim=(0, None))
    right.set_title(right_title)
    right.spines[["top", "right"]].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        return f"No picture: {path} cannot be written ({error.strerror}); choose another place with --output."
    finally:
        plt.close(figure)
    return f"Picture: {path.absolute()}"
