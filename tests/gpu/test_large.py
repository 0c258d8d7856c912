"""Offsets beyond 2^31 elements, batch and batch x heads beyond 65,535. Checked for NaN whole, by value in part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import pytest
import torch

import fa2cupy
from tests.gpu import oracle
from tests.gpu.cases import Case

Tensor = torch.Tensor
GIB = 1 << 30
pytestmark = pytest.mark.xdist_group("large")  # one after the other: together they would need too much memory
NEEDS = [Case(64, 64, d, "bfloat16", causal) for d in (64, 128) for causal in (False, True)]


def _needs(gib: float) -> pytest.MarkDecorator:
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return pytest.mark.skipif(memory < gib * GIB, reason=f"needs {gib:.0f} GiB of GPU memory")


@pytest.fixture(autouse=True)
def _all_memory() -> Iterator[None]:
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def _normal(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    x = torch.empty(shape, dtype=dtype, device=device)
    flat = x.view(-1)
    step = 1 << 28  # random numbers of a slice at a time: they are float32 on the way
    for start in range(0, flat.numel(), step):
        flat[start : start + step].normal_(generator=generator)
    return x


def _nan(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def _all_finite(x: Tensor) -> bool:
    """Slice by slice, to save memory: NaN and infinities survive in the largest magnitude."""
    return all(math.isfinite(float(part.abs().amax())) for part in x.reshape(-1).split(1 << 29)) if x.numel() else True


def _check_batches(
    inputs: dict[str, Tensor], results: dict[str, Tensor], lse: Tensor, batches: Iterable[slice], causal: bool
) -> None:
    for b in batches:
        part = {name: x[b] for name, x in inputs.items()}
        dout = part["dout"] if "dq" in results else None
        scale = part["q"].shape[-1] ** -0.5
        lse_ref, bounds = oracle.attention(part["q"], part["k"], part["v"], dout, causal=causal, scale=scale)
        got = {name: x[b] for name, x in results.items()}
        judgements = oracle.judge(got, lse[b], lse_ref, bounds, {})
        problems = [f"batches {b}: {p}" for j in judgements.values() for p in j.problems]
        assert not problems, problems
    for name, x in results.items():
        assert _all_finite(x), f"{name} is not finite everywhere"


def _forward_backward(
    inputs: dict[str, Tensor], causal: bool, backward: bool = True, **options: object
) -> tuple[dict[str, Tensor], Tensor]:
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    device, layout = q.device, options.get("layout", "bshd")
    out = _nan(tuple(q.shape), device, q.dtype)
    heads = q.shape[2] if layout == "bshd" else q.shape[1]
    seqlen = q.shape[1] if layout == "bshd" else q.shape[2]
    lse = _nan((q.shape[0], heads, seqlen), device, torch.float32)
    fa2cupy.attention(q, k, v, causal=causal, out=out, lse_out=lse, **options)
    results = {"out": out}
    if backward:
        results |= {name: _nan(tuple(x.shape), device, x.dtype) for name, x in (("dq", q), ("dk", k), ("dv", v))}
        gradients = {name: results[name] for name in ("dq", "dk", "dv")}
        fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=causal, **gradients, **options)
    return results, lse


@_needs(24)
@pytest.mark.parametrize("causal", [False, True])
def test_one_token_in_8300_sequences(causal: bool, device: torch.device) -> None:
    """b = 8300, s = 1, h = 16: batch x heads x rows of a tile x head_dim is above 2^31."""
    shape = (8300, 1, 16, 128)
    inputs = {name: _normal(shape, n, device) for n, name in enumerate(("q", "k", "v", "dout"))}
    results, lse = _forward_backward(inputs, causal)
    _check_batches(inputs, results, lse, [slice(0, 8300)], causal)


@_needs(80)
def test_long_sequences_of_1600_heads(device: torch.device) -> None:
    """(400, 4, 10496, 128) in bhsd: every tensor has 2.15e9 elements."""
    shape = (400, 4, 10496, 128)
    inputs = {name: _normal(shape, n, device) for n, name in enumerate(("q", "k", "v", "dout"))}
    results, lse = _forward_backward(inputs, True, layout="bhsd")
    for b, h in ((0, 0), (399, 3), (398, 0), (251, 1)):
        one = {name: x[b : b + 1, h : h + 1].transpose(1, 2) for name, x in inputs.items()}
        mine = {name: x[b : b + 1, h : h + 1].transpose(1, 2) for name, x in results.items()}
        _check_batches(one, mine, lse[b : b + 1, h : h + 1], [slice(0, 1)], True)
    for name, x in results.items():
        assert _all_finite(x), f"{name} is not finite everywhere"


@_needs(40)
@pytest.mark.parametrize("which", ["queries", "keys"])
def test_rows_9728_elements_apart(which: str, device: torch.device) -> None:
    """410,923 rows of a packed buffer with 9,728 elements each: the last ones start beyond 2^31 elements."""
    rows, pitch, heads, d, few = 410_923, 9728, 2, 64, 300
    assert rows * pitch > 2**31
    buffer = torch.full((rows, pitch), 0x7FC1, dtype=torch.int16, device=device).view(torch.bfloat16)

    def long(seed: int) -> Tensor:
        x = buffer[None, :, seed * heads * d : (seed + 1) * heads * d].unflatten(2, (heads, d))
        x.copy_(_normal((1, rows, heads, d), seed, device))
        return x

    long_names = ("q", "dout") if which == "queries" else ("k", "v")
    inputs = {}
    for n, name in enumerate(("q", "k", "v", "dout")):
        inputs[name] = long(n) if name in long_names else _normal((1, few, heads, d), n, device)
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    base = 4 * heads * d  # results go between the inputs' columns of the same buffer
    names = ("out", "dq") if which == "queries" else ("dk", "dv")
    packed = {
        name: buffer[None, :, base + n * heads * d : base + (n + 1) * heads * d].unflatten(2, (heads, d))
        for n, name in enumerate(names)
    }
    out = packed.get("out", _nan(tuple(q.shape), device))
    lse = _nan((1, heads, q.shape[1]), device, torch.float32)
    fa2cupy.attention(q, k, v, out=out, lse_out=lse)
    gradients = {f"d{n}": packed.get(f"d{n}", _nan(tuple(inputs[n].shape), device)) for n in ("q", "k", "v")}
    fa2cupy.attention_backward(dout, q, k, v, out, lse, **gradients)
    # All of S in float64 would be 2 GB for each head: fine one head at a time.
    for h in range(heads):
        one = {name: x[:, :, h : h + 1] for name, x in inputs.items()}
        mine = {name: x[:, :, h : h + 1] for name, x in {"out": out, **gradients}.items()}
        _check_batches(one, mine, lse[:, h : h + 1], [slice(0, 1)], False)
    used = base + 2 * heads * d
    assert bool((buffer[:, used:].view(torch.int16) == 0x7FC1).all()), "memory beside the results was written"


@pytest.mark.parametrize(
    ("batch", "heads", "heads_k", "seqlen"),
    [(70_001, 1, 1, 3), (300, 256, 64, 5), (2, 65_537, 1, 4), (66_000, 2, 2, 1), (1, 70_000, 70_000, 17)],
)
def test_more_heads_than_a_grid_has_rows(
    batch: int, heads: int, heads_k: int, seqlen: int, device: torch.device
) -> None:
    d = 64
    shapes = {"q": heads, "k": heads_k, "v": heads_k, "dout": heads}
    inputs = {name: _normal((batch, seqlen, h, d), n, device) for n, (name, h) in enumerate(shapes.items())}
    for causal in (False, True):
        results, lse = _forward_backward(inputs, causal)
        _check_batches(inputs, results, lse, [slice(0, batch)], causal)


@_needs(16)
def test_expanded_keys_of_a_large_batch(device: torch.device) -> None:
    """One key sequence for 5,000 batch entries (stride 0 in batch): nothing is expanded."""
    q, dout = (_normal((5000, 40, 8, 64), n, device) for n in (0, 1))
    k, v = (_normal((1, 70, 2, 64), n, device).expand(5000, 70, 2, 64) for n in (2, 3))
    inputs = {"q": q, "k": k, "v": v, "dout": dout}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = fa2cupy.attention(q, k, v, causal=True)
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * 2 + 5000 * 8 * 40 * 4 + (1 << 20)
    results, lse = _forward_backward(inputs, True)
    _check_batches(inputs, results, lse, [slice(0, 50), slice(4950, 5000)], True)


def test_workspace_is_linear_in_the_sequence_length(device: torch.device) -> None:
    sizes = []
    for seqlen in (4096, 8192, 16384):
        q = torch.empty((1, seqlen, 8, 128), dtype=torch.bfloat16, device=device)
        sizes.append(fa2cupy.backward_workspace_bytes(q, q, q, causal=True))
    assert sizes[2] <= 2.01 * sizes[1] <= 4.05 * sizes[0]
