"""Segments, which the device finds: each beside float64, with NaN around all of them; and so many that not all have
room for a tile of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import fa2cupy
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import backward, common, plan_backward, plan_forward
from fa2cupy.kernels.plan import Plan
from tests.covering import covering
from tests.gpu.cases import SM80_WIDTHS, WIDTHS
from tests.gpu.test_lengths_backward import call_of, check_all, planned
from tests.host.lengths import LengthsCase, segments_of

Tensor = torch.Tensor

# Rows of the batch; of each segment (queries, keys, padding behind both).
MIXED = (((300, 300), (0, 30), (513, 130, 3), (65, 0), (1, 1)), ((1030, 1030), (40, 40, 9)), ((3, 700), (700, 900)))
EQUAL = (((256, 256),) * 6, ((512, 512),) * 3)
SHORT = (tuple((1 + n % 7, 1 + n % 7, n % 11 == 0) for n in range(60)), ((150, 6), (200, 200), *((2, 3),) * 20))
USED = (("seqused_q", (700, 1050, 600)), ("seqused_k", (440, 1060, 1500)), ("leftpad_k", (20, 0, 650)))


def cases_of(head_dim: int, head_dim_v: int | None, dtype: str) -> list[LengthsCase]:
    """Every two choices; which three, differs from width to width."""
    factors = {
        "rows": ((MIXED, ()), (EQUAL, ()), (SHORT, ()), (MIXED, USED)),
        "mask": ((False, None), (True, None), (False, (100, 30))),
        "reverse_keys": (False, True),
        "heads": ((4, 4), (6, 3), (4, 1)),
        "deterministic": (False, True),
    }
    cases = []
    for number, chosen in enumerate(covering(factors, seed=head_dim + (dtype == "float16"))):
        (rows, used), (causal, window) = chosen["rows"], chosen["mask"]
        lengths = segments_of(*rows, reverse_keys=chosen["reverse_keys"], used=dict(used), causal=causal, window=window)
        of_call = {name: chosen[name] for name in ("heads", "deterministic")}
        pad = (0, 8)[number % 5 == 0]
        cases.append(LengthsCase(lengths, head_dim, dtype, head_dim_v=head_dim_v, pad=pad, seed=number, **of_call))
    return cases


def needed_plans(info: DeviceInfo) -> Iterator[Plan]:
    """What is to be compiled beforehand."""
    cases = [case for width in WIDTHS for case in cases_of(*width)]
    cases += [
        dataclasses.replace(case, family="sm80")
        for head_dim, dtype in SM80_WIDTHS
        for case in cases_of(head_dim, None, dtype)
    ]
    for case in cases:
        yield plan_forward(planned(case, common.FORWARD_ARRAYS), info, family=case.family)
        yield plan_backward(planned(case, backward.ARRAYS), info, case.deterministic, family=case.family)


@pytest.mark.parametrize(("head_dim", "head_dim_v", "dtype"), WIDTHS)
def test_segments(head_dim: int, head_dim_v: int | None, dtype: str, device: torch.device) -> None:
    check_all(cases_of(head_dim, head_dim_v, dtype), device)


@pytest.mark.parametrize(("head_dim", "dtype"), SM80_WIDTHS)
@pytest.mark.usefixtures("sm80_kernels")
def test_segments_of_sm80(head_dim: int, dtype: str, device: torch.device) -> None:
    check_all(cases_of(head_dim, None, dtype), device)


def random_call(
    batch: int, seqlen: int, head_dim: int, device: torch.device, heads: tuple[int, int] = (4, 2)
) -> list[Tensor]:
    """q, k, v and dout."""
    generator = torch.Generator(device=device).manual_seed(seqlen)
    shapes = ((batch, seqlen, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0]))
    return [torch.randn(shape, device=device, generator=generator).to(torch.bfloat16) for shape in shapes]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("length", [1, 17, 64, 128, 512])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_equal_segments_are_a_dense_batch(
    head_dim: int, length: int, deterministic: bool, device: torch.device
) -> None:
    """Up to one for each token, many thousands; the short ones in another kernel than a dense batch."""
    count = 8192 // length
    q, k, v, dout = random_call(2, count * length, head_dim, device)
    ids = torch.arange(count, device=device).repeat_interleave(length).expand(2, -1)
    dense = [x.reshape(2 * count, length, *x.shape[2:]) for x in (q, k, v, dout)]
    options = {"causal": length != 64}
    out, lse = fa2cupy.attention(*dense[:3], return_lse=True, **options)
    expected = fa2cupy.attention_backward(dense[3], *dense[:3], out, lse, deterministic=True, **options)
    found = fa2cupy.attention(q, k, v, return_lse=True, segment_ids=ids, **options)
    torch.testing.assert_close(found[0].reshape(out.shape), out, rtol=2**-7, atol=2e-3)
    lse_of_rows = lse.reshape(2, count, *lse.shape[1:]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found[1], lse_of_rows, rtol=1e-5, atol=1e-4)
    gradients = fa2cupy.attention_backward(
        dout, q, k, v, *found, segment_ids=ids.int(), deterministic=deterministic, **options
    )
    for got, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got.reshape(right.shape), right, rtol=2**-6, atol=4e-3)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bits_repeat(head_dim: int, device: torch.device) -> None:
    """In turn, or of short segments: dq too."""
    call = call_of(LengthsCase(segments_of(*MIXED, *SHORT, causal=True), head_dim, deterministic=True), device)
    first = [x.clone() for x in (*call.forward()[:2], *call.gradients())]
    for _ in range(50):
        assert all(torch.equal(x, y) for x, y in zip((*call.forward()[:2], *call.gradients()), first, strict=True))


def test_a_graph_serves_other_ids(device: torch.device) -> None:
    """Captured once with few segments; then there are so many that the short ones are put apart, and few again."""
    q, k, v, dout = random_call(2, 2048, 128, device)
    ids = torch.zeros((2, 2048), dtype=torch.int32, device=device)

    def both() -> tuple[Tensor, ...]:
        out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True, segment_ids=ids)
        options = {"causal": True, "segment_ids": ids, "deterministic": True}
        return out, lse, *fa2cupy.attention_backward(dout, q, k, v, out, lse, **options)

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        both()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = both()
    tokens = torch.arange(2048, dtype=torch.int32, device=device)
    for length in (2048, 3, 100, 1, 1000):
        ids.copy_((tokens // length).expand(2, -1))
        graph.replay()
        torch.cuda.synchronize(device)
        assert all(torch.equal(x, y) for x, y in zip(results, both(), strict=True)), length


def test_nothing_waits(device: torch.device) -> None:
    call = call_of(LengthsCase(segments_of(*MIXED, causal=True)), device)
    call.forward()
    call.gradients()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs = (call.tensors[name] for name in "qkv")
        options = {name: value for name, value in call.options.items() if name != "deterministic"}
        fa2cupy.attention(*inputs, **options)
        call.gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_any_ids_write_nowhere_else(head_dim: int, deterministic: bool, device: torch.device) -> None:
    """Ids that come again are nobody's; whatever they are, memory beside the results stays as it is, and calls end."""
    q, k, v, dout = random_call(2, 3000, head_dim, device)
    generator = torch.Generator(device=device).manual_seed(1)
    for highest in (1, 5, 2000, 2**31 - 1):
        ids = tuple(
            torch.randint(-1, highest, (2, 3000), device=device, generator=generator).to(torch.int32) for _ in "qk"
        )
        guarded = [torch.full((3, *x.shape), 7.0, device=device, dtype=torch.bfloat16) for x in (q, q, k, v)]
        out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True, segment_ids=ids, out=guarded[0][1])
        results = dict(zip(("dq", "dk", "dv"), (whole[1] for whole in guarded[1:]), strict=True))
        fa2cupy.attention_backward(
            dout, q, k, v, out, lse, causal=True, segment_ids=ids, deterministic=deterministic, **results
        )
        torch.cuda.synchronize(device)
        assert all((whole[place] == 7).all() for whole in guarded for place in (0, 2))
        assert all(whole[1].isfinite().all() for whole in guarded)


def test_a_check_names_ids_that_come_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = random_call(1, 64, 64, device)
    ids = torch.tensor([[3] * 20 + [4] * 20 + [3] * 24], dtype=torch.int32, device=device)
    fa2cupy.attention(q, k, v, segment_ids=ids)
    monkeypatch.setenv("FA2CUPY_CHECK", "1")
    with pytest.raises(ValueError, match="segment_ids_q has id 3 at places apart in batch row 0"):
        fa2cupy.attention(q, k, v, segment_ids=ids)


def test_autograd(device: torch.device) -> None:
    """torch's door, eager and compiled: the gradients are those of packed sequences."""
    q, k, v, dout = random_call(1, 1500, 128, device)
    lengths = (700, 3, 1, 500, 296)
    ids = torch.repeat_interleave(torch.arange(5, device=device), torch.tensor(lengths, device=device))[None].int()
    starts = torch.from_numpy(np.cumsum((0, *lengths)).astype(np.int32)).to(device)
    packed = [x[0].detach().requires_grad_() for x in (q, k, v)]
    options = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    fa2cupy.attention(*packed, causal=True, **options).backward(dout[0])
    compiled = torch.compile(lambda *qkv: fa2cupy.attention(*qkv, causal=True, segment_ids=ids), fullgraph=True)
    for attend in (lambda *qkv: fa2cupy.attention(*qkv, causal=True, segment_ids=ids), compiled):
        dense = [x.detach().requires_grad_() for x in (q, k, v)]
        attend(*dense).backward(dout)
        for got, right in zip(dense, packed, strict=True):
            torch.testing.assert_close(got.grad[0], right.grad, rtol=2**-6, atol=4e-3)
