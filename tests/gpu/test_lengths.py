"""The forward of sequences whose lengths only the device knows: bits, graphs, waiting, wrong lengths. Beside float64
they are in test_lengths_backward."""

from __future__ import annotations

import cupy
import pytest
import torch

import fa2cupy
from tests.gpu.test_lengths_backward import EQUAL, MIXED, SKEWED, call_of
from tests.host.lengths import LengthsCase, lengths_of

Tensor = torch.Tensor


def equal_lengths(seqlen: int, head_dim: int, batch: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k, v of a batch, and where its rows start when they are packed."""
    generator = torch.Generator(device=device).manual_seed(seqlen)
    shapes = ((batch, seqlen, heads, head_dim) for heads in (4, 2, 2))
    arrays = [torch.randn(shape, device=device, generator=generator).to(torch.bfloat16) for shape in shapes]
    return arrays, torch.arange(batch + 1, device=device, dtype=torch.int32) * seqlen


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (200, 100)}], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "seqlen"), [(64, 700), (64, 1500), (96, 515), (128, 1024), (192, 300), (256, 2100)]
)
def test_equal_lengths_have_the_bits_of_dense_ones(
    head_dim: int, seqlen: int, mask: dict[str, object], device: torch.device
) -> None:
    arrays, starts = equal_lengths(seqlen, head_dim, 3, device)
    out, lse = fa2cupy.attention(*arrays, return_lse=True, **mask)
    packed = fa2cupy.attention(
        *(x.flatten(0, 1) for x in arrays), return_lse=True, cu_seqlens_q=starts, cu_seqlens_k=starts, **mask
    )
    assert torch.equal(packed[0], out.flatten(0, 1))
    assert torch.equal(packed[1], lse.transpose(0, 1).flatten(1))
    used = torch.full((3,), seqlen, dtype=torch.int32, device=device)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 77), value=float("nan")) for x in arrays]
    again = fa2cupy.attention(*padded, return_lse=True, seqused_q=used, seqused_k=used, **mask)
    assert torch.equal(again[0][:, :seqlen], out) and torch.equal(again[1][:, :, :seqlen], lse)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_short_sequences(head_dim: int, device: torch.device) -> None:
    """8,192 of 34 tokens, more than a list's maker takes at a time."""
    arrays, starts = equal_lengths(34, head_dim, 8192, device)
    out = fa2cupy.attention(*arrays, causal=True)
    packed = fa2cupy.attention(
        *(x.flatten(0, 1) for x in arrays), cu_seqlens_q=starts, cu_seqlens_k=starts.long(), causal=True
    )
    torch.testing.assert_close(packed, out.flatten(0, 1), rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bits_repeat(head_dim: int, device: torch.device) -> None:
    """They do not depend on the order of the list, which may be another each time."""
    call = call_of(LengthsCase(lengths_of(*SKEWED, causal=True), head_dim, heads=(4, 2)), device)
    out, lse, _ = call.forward()
    for _ in range(100):
        again = call.forward()
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_a_graph_serves_other_lengths(device: torch.device) -> None:
    """Captured once; then the lengths change where they lie, and the sum of them stays."""
    call = call_of(LengthsCase(lengths_of(*EQUAL, causal=True), 128, heads=(4, 2)), device)
    starts = {name: call.options[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    inputs = [call.tensors[name] for name in "qkv"]
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        fa2cupy.attention(*inputs, causal=True, return_lse=True, **starts)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, lse = fa2cupy.attention(*inputs, causal=True, return_lse=True, **starts)
    for sequences in (EQUAL, ((1000, 1000), (24, 24), (0, 0), (513, 513), (1, 1), (1534, 1534))):
        other = call_of(LengthsCase(lengths_of(*sequences, causal=True), 128, heads=(4, 2)), device)
        for name, array in zip("qkv", inputs, strict=True):
            array.copy_(other.tensors[name])
        for name, array in starts.items():
            array.copy_(other.options[name])  # type: ignore[attr-defined]
        graph.replay()
        torch.cuda.synchronize(device)
        expected = other.forward()
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_nothing_waits(device: torch.device) -> None:
    call = call_of(LengthsCase(lengths_of(*MIXED)), device)
    call.forward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs = (call.tensors[name] for name in "qkv")
        fa2cupy.attention(*inputs, **call.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["sm90", "sm80"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_wrong_lengths_write_nowhere_else(
    head_dim: int, family: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """Whatever they are, memory beside the results stays as it is, and the call ends."""
    if family == "sm80":
        request.getfixturevalue("sm80_kernels")
    call = call_of(LengthsCase(lengths_of(*MIXED, causal=True), head_dim, heads=(4, 2)), device)
    right = call.options
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        starts = right[name]
        assert isinstance(starts, Tensor)
        for wrong in (starts.flip(0), starts * 1000, starts - 10**6, starts * 0 - 5, starts * 0 + 2**31 - 1):
            call.options = right | {name: wrong.contiguous()}
            assert call.forward()[2], f"{name} = {wrong.tolist()}"
            torch.cuda.synchronize(device)


def test_cupy_arrays(device: torch.device) -> None:
    """The same bits as of torch's tensors, new or given results, and inside a capture."""
    call = call_of(LengthsCase(lengths_of(*SKEWED, causal=True), 128, "float16", heads=(4, 2)), device)
    out, lse, _ = call.forward()
    arrays = [cupy.from_dlpack(call.tensors[name]) for name in "qkv"]
    starts = {name: cupy.from_dlpack(call.options[name]) for name in call.lengths.arrays}
    found = fa2cupy.attention(*arrays, causal=True, return_lse=True, **starts)
    assert isinstance(found[0], cupy.ndarray)
    assert torch.equal(torch.from_dlpack(found[0]), out) and torch.equal(torch.from_dlpack(found[1]), lse)
    results = {"out": cupy.full_like(found[0], cupy.nan), "lse_out": cupy.full_like(found[1], cupy.nan)}
    size = fa2cupy.forward_workspace_bytes(*arrays, causal=True, **starts)
    assert size > 0
    workspace = cupy.empty(size, cupy.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream:
        fa2cupy.attention(*arrays, causal=True, return_lse=True, workspace=workspace, **starts, **results)
        results["out"].fill(cupy.nan)
        stream.begin_capture()
        fa2cupy.attention(*arrays, causal=True, return_lse=True, workspace=workspace, **starts, **results)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    assert torch.equal(torch.from_dlpack(results["out"]), out)
    assert torch.equal(torch.from_dlpack(results["lse_out"]), lse)
