"""The forward against float64 where test_flash_bwd, whose cases run it too, does not go: long sequences, the kernel of
every GPU; bits."""

from __future__ import annotations

import pytest
import torch

import fa2cupy
from tests.gpu.cases import DTYPES, Case, groups
from tests.gpu.runner import check_all, inputs_of


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_for_long_sequences(dtype: str, device: torch.device) -> None:
    """More queries than the rows of Hopper for short sequences take."""
    shapes = [(head_dim, causal) for head_dim in (64, 200, 256) for causal in (False, True)]
    cases = [Case(2151, 2311, head_dim, dtype, causal, 1, (2, 1), seed=head_dim) for head_dim, causal in shapes]
    check_all(cases, False, device)


@pytest.mark.parametrize("cases", groups())
@pytest.mark.usefixtures("sm80_kernels")
def test_forward_of_sm80(cases: list[Case], device: torch.device) -> None:
    """test_flash_bwd's cases with the kernel that every GPU has, on a GPU that would take another."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("test_flash_bwd has run the only kernel that there is")
    check_all(cases, False, device)


def test_graph_beside_eager_calls(device: torch.device) -> None:
    """A captured launch, replayed on one stream while another stream computes something else, gives the same bits."""
    tensors = [inputs_of(Case(777, 1024, 128, "bfloat16", True, batch=4, heads=(8, 2), seed=s), device) for s in (1, 2)]
    (q, k, v), (q2, k2, v2) = ([t[name] for name in ("q", "k", "v")] for t in tensors)
    expected, expected2 = fa2cupy.attention(q, k, v, causal=True), fa2cupy.attention(q2, k2, v2, causal=True)
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fa2cupy.attention(q, k, v, causal=True, out=out)
    side = torch.cuda.Stream(device)
    for _ in range(50):
        out.fill_(float("nan"))
        side.wait_stream(torch.cuda.current_stream(device))
        graph.replay()
        with torch.cuda.stream(side):
            beside = [fa2cupy.attention(q2, k2, v2, causal=True) for _ in range(3)]
        torch.cuda.synchronize(device)
        assert torch.equal(out, expected)
        assert all(torch.equal(x, expected2) for x in beside)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_repeat(dtype: str, device: torch.device) -> None:
    """The shape on which a shared-memory race was once found in a backward: 250 times the same bits."""
    tensors = inputs_of(Case(128, 128, 128, dtype, True, batch=60, heads=(4, 4)), device)
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    for causal in (False, True):
        first = fa2cupy.attention(q, k, v, causal=causal, return_lse=True)
        differs = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(250):
            again = fa2cupy.attention(q, k, v, causal=causal, return_lse=True)
            for x, y in zip(again, first, strict=True):
                differs += (x != y).any()
        assert int(differs) == 0
