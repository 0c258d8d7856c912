"""Attention of sequences whose lengths only the device knows: each beside float64, with NaN around all of them."""

from __future__ import annotations

import cupy
import pytest
import torch

import fa2cupy
from tests.gpu import oracle
from tests.gpu.cases import SM80_WIDTHS, WIDTHS
from tests.gpu.ledger import LEDGER
from tests.gpu.test_lengths_backward import (
    EQUAL,
    MIXED,
    SKEWED,
    Call,
    call_of,
    cases_of,
    unseen_of,
)
from tests.host.lengths import LengthsCase, lengths_of

Tensor = torch.Tensor


def run(call: Call) -> tuple[Tensor, Tensor, bool]:
    """out and lse, from arrays of NaN between guards, and whether these are as they were."""
    wholes = []
    for name in ("out", "lse"):
        like = call.tensors[name]
        whole = torch.full((3, *like.shape), 7.0, dtype=like.dtype, device=like.device)
        whole[1] = torch.nan
        wholes.append(whole)
    out, lse = (whole[1] for whole in wholes)
    options = {name: value for name, value in call.options.items() if name != "deterministic"}
    inputs = (call.tensors[name] for name in "qkv")
    found = fa2cupy.attention(*inputs, return_lse=True, out=out, lse_out=lse, **options)
    assert found[0] is out and found[1] is lse
    return out, lse, all(bool((whole[place] == 7).all()) for whole in wholes for place in (0, 2))


def problems_of(case: LengthsCase, device: torch.device) -> list[str]:
    """What is wrong with a case, one sentence each."""
    call = call_of(case, device)
    lengths = case.lengths
    call.tensors["out"], call.tensors["lse"], guarded = run(call)
    problems = [] if guarded else [f"{case}: memory beside the results was written"]
    nobodys = Call(case, {name: torch.ones_like(call.tensors[name], dtype=torch.bool) for name in ("out", "lse")}, {})
    for sequence in range(lengths.sequences):
        seqlens = [lengths.runs(side)[sequence][1] for side in "qk"]
        first, _ = unseen_of(lengths, *seqlens)
        nobodys.part("out", sequence)[first:] = False
        nobodys.part("lse", sequence)[:, first:] = False
        if 0 in seqlens:
            continue
        one = {name: call.part(name, sequence)[None] for name in ("q", "k", "v", "out", "lse")}
        lse, bounds = oracle.attention(
            *(one[name] for name in "qkv"), None,
            causal=lengths.causal, scale=case.head_dim**-0.5, window=lengths.window,
        )  # fmt: skip
        judgements = oracle.judge({"out": one["out"]}, one["lse"], lse, bounds, {})
        LEDGER.add(case.dtype, judgements)
        problems += [f"{case} sequence {sequence}: {text}" for each in judgements.values() for text in each.problems]
    if not (call.tensors["out"][nobodys.tensors["out"]] == 0).all():
        problems.append(f"{case}: out is not 0 in rows of no sequence, or that see nothing")
    if not (call.tensors["lse"][nobodys.tensors["lse"]] == -torch.inf).all():
        problems.append(f"{case}: lse is not -inf there")
    return problems


def check_all(cases: list[LengthsCase], device: torch.device) -> None:
    problems = [problem for case in cases for problem in problems_of(case, device)]
    assert not problems, f"{len(problems)} problems in {len(cases)} cases:\n" + "\n".join(problems[:40])


@pytest.mark.parametrize(("head_dim", "head_dim_v", "dtype"), WIDTHS)
def test_lengths(head_dim: int, head_dim_v: int | None, dtype: str, device: torch.device) -> None:
    check_all(list(cases_of(head_dim, head_dim_v, dtype)), device)


@pytest.mark.parametrize(("head_dim", "dtype"), SM80_WIDTHS)
@pytest.mark.usefixtures("sm80_kernels")
def test_lengths_of_sm80(head_dim: int, dtype: str, device: torch.device) -> None:
    check_all(list(cases_of(head_dim, None, dtype))[::2], device)


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
def test_a_long_sequence_among_small_ones(head_dim: int, device: torch.device) -> None:
    lengths = lengths_of((5, 9), (100_000, 700), (64, 64), (700, 100_000), (0, 3), causal=True)
    check_all([LengthsCase(lengths, head_dim, heads=(1, 1))], device)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bits_repeat(head_dim: int, device: torch.device) -> None:
    """They do not depend on the order of the list, which may be another each time."""
    call = call_of(LengthsCase(lengths_of(*SKEWED, causal=True), head_dim, heads=(4, 2)), device)
    out, lse, _ = run(call)
    for _ in range(100):
        again = run(call)
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
        expected = run(other)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_nothing_waits(device: torch.device) -> None:
    call = call_of(LengthsCase(lengths_of(*MIXED)), device)
    run(call)
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
            assert run(call)[2], f"{name} = {wrong.tolist()}"
            torch.cuda.synchronize(device)


def test_cupy_arrays(device: torch.device) -> None:
    """The same bits as of torch's tensors, new or given results, and inside a capture."""
    call = call_of(LengthsCase(lengths_of(*SKEWED, causal=True), 128, "float16", heads=(4, 2)), device)
    out, lse, _ = run(call)
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
