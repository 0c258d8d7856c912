"""Attention sinks and a gradient of lse against float64: every head_dim, windows, rows that see no key, sequences whose
lengths only the device knows; the same bits each time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import fa2cupy
from tests.gpu.cases import SM80_WIDTHS, WIDTHS, Case
from tests.gpu.runner import check_all, extras_of, inputs_of
from tests.gpu.test_lengths_backward import FEW, MIXED
from tests.host.lengths import lengths_of

Tensor = torch.Tensor
LENGTHS = ((113, 203), (203, 113), (1, 513), (1023, 300), (640, 640), (9, 0))


def sinks_cases(dtype: str, head_dim: int, head_dim_v: int | None) -> Iterator[Case]:
    masks = ((False, None), (True, None), (False, (127, 0)), (False, (60, 77)))
    for number, ((seqlen_q, seqlen_k), (causal, window)) in enumerate(itertools.product(LENGTHS, masks)):
        yield Case(
            seqlen_q,
            seqlen_k,
            head_dim,
            dtype,
            causal,
            heads=((4, 4), (6, 3), (4, 1), (16, 2))[number % 4],
            layout=("bshd", "bhsd")[number % 2],
            given=number % 3 != 0,
            deterministic=number % 5 < 2,
            pad=(0, 8)[number % 7 == 0],
            seed=number,
            head_dim_v=head_dim_v,
            window=window,
            sinks=("float32", dtype)[number % 2],
            dlse=number % 3 != 1,
        )


NEEDS = [case for head_dim, head_dim_v, dtype in WIDTHS for case in sinks_cases(dtype, head_dim, head_dim_v)]
NEEDS_SM80 = [case for head_dim, dtype in SM80_WIDTHS for case in list(sinks_cases(dtype, head_dim, None))[::2]]


@pytest.mark.parametrize(("head_dim", "head_dim_v", "dtype"), WIDTHS)
def test_sinks(head_dim: int, head_dim_v: int | None, dtype: str, device: torch.device) -> None:
    check_all(list(sinks_cases(dtype, head_dim, head_dim_v)), True, device)


@pytest.mark.parametrize(("head_dim", "dtype"), SM80_WIDTHS)
@pytest.mark.usefixtures("sm80_kernels")
def test_sinks_of_sm80(head_dim: int, dtype: str, device: torch.device) -> None:
    check_all(list(sinks_cases(dtype, head_dim, None))[::2], True, device)


@pytest.mark.parametrize("window", [None, (127, 0)])
def test_many_rows_of_a_head(window: tuple[int, int] | None, device: torch.device) -> None:
    """Many sums, and many rows of the batch with few; GPT-OSS's heads."""
    cases = [
        Case(8192, 8192, 64, "bfloat16", window is None, 1, (8, 1), window=window, sinks="bfloat16", given=False),
        Case(40, 70, 64, "bfloat16", window is None, 300, (4, 2), window=window, sinks="float32", dlse=True),
        Case(700, 40, 128, "float16", True, 3, (4, 2), sinks="float32", dlse=True),
    ]
    check_all(cases, True, device)


def gradients_of(case: Case, device: torch.device, sinks: Tensor | None = None) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv, dsinks."""
    tensors, extras = inputs_of(case, device), extras_of(case, device)
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    sinks = extras["sinks"] if sinks is None else sinks
    options = {"causal": case.causal, "window_size": case.window, "sinks": sinks}
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, **options)
    found = fa2cupy.attention_backward(
        dout, q, k, v, out, lse, **options, dlse=extras["dlse"], grad_of=("sinks",), deterministic=case.deterministic
    )
    return out, lse, *found


def test_the_same_bits_each_time(device: torch.device) -> None:
    """Of dsinks also where the order of dq's sums is anybody's."""
    for deterministic in (False, True):
        case = Case(900, 700, 128, "bfloat16", True, 3, (8, 2), sinks="float32", dlse=True, deterministic=deterministic)
        first = gradients_of(case, device)
        for _ in range(50):
            again = gradients_of(case, device)
            for place, (x, y) in enumerate(zip(again, first, strict=True)):
                assert torch.equal(x, y) or (place == 2 and not deterministic)


def test_no_sink_is_none(device: torch.device) -> None:
    """-inf in each head: the bits without, and a gradient of 0, rows that see no key included."""
    for head_dim in (64, 128, 256):
        case = Case(300, 200, head_dim, "bfloat16", True, sinks="float32", dlse=True)
        none = torch.full((4,), -torch.inf, device=device)
        out, lse, *_, dsinks = gradients_of(case, device, none)
        tensors = inputs_of(case, device)
        plain = fa2cupy.attention(*(tensors[name] for name in "qkv"), causal=True, return_lse=True)
        assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1]) and not dsinks.any()


@pytest.mark.parametrize("sequences", [MIXED, FEW], ids=["mixed", "few"])
@pytest.mark.parametrize("window", [None, (100, 30)])
@pytest.mark.parametrize("family", ["", "sm80"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sequences(
    head_dim: int, family: str, window: tuple[int, int] | None, sequences: tuple[tuple[int, ...], ...],
    device: torch.device, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Packed, with NaN around, beside each of them by itself; lse of rows of none is -inf."""
    if family:
        request.getfixturevalue("sm80_kernels")
    lengths = lengths_of(*sequences, behind=5, causal=window is None, window=window)
    generator = torch.Generator(device=device).manual_seed(head_dim)
    sizes = {"q": (lengths.rows_q, 4), "k": (lengths.rows_k, 2), "v": (lengths.rows_k, 2), "dout": (lengths.rows_q, 4)}
    arrays = {
        name: torch.full((rows, heads, head_dim), torch.nan, dtype=torch.bfloat16, device=device)
        for name, (rows, heads) in sizes.items()
    }
    dlse = torch.full((4, lengths.rows_q), torch.nan, device=device)
    sinks = torch.tensor([0.5, 2.0, -torch.inf, 9.0], device=device)
    mask = {"causal": True} if window is None else {"window_size": window}
    out, lse = (torch.zeros_like(arrays["q"]), torch.full_like(dlse, -torch.inf))
    wanted = {name: torch.zeros_like(arrays[name[1:]]) for name in ("dq", "dk", "dv")}
    dsinks = torch.zeros(4, device=device, dtype=torch.float64)
    for (first_q, seqlen_q), (first_k, seqlen_k) in zip(lengths.runs("q"), lengths.runs("k"), strict=True):
        queries, keys = slice(first_q, first_q + seqlen_q), slice(first_k, first_k + seqlen_k)
        for name, array in arrays.items():
            part = array[queries if name in ("q", "dout") else keys]
            part.copy_(torch.randn(part.shape, device=device, generator=generator))
        dlse[:, queries] = torch.randn((4, seqlen_q), device=device, generator=generator)
        q, k, v, dout = arrays["q"][queries], arrays["k"][keys], arrays["v"][keys], arrays["dout"][queries]
        one, one_lse = fa2cupy.attention(q[None], k[None], v[None], return_lse=True, sinks=sinks, **mask)
        out[queries], lse[:, queries] = one[0], one_lse[0]
        dq, dk, dv, own = fa2cupy.attention_backward(
            dout[None], q[None], k[None], v[None], one, one_lse, sinks=sinks, grad_of=("sinks",),
            dlse=dlse[None, :, queries], **mask,
        )  # fmt: skip
        wanted["dq"][queries], wanted["dk"][keys], wanted["dv"][keys] = dq[0], dk[0], dv[0]
        dsinks += own.double()
    given = {name: torch.from_numpy(array).to(device) for name, array in lengths.arrays.items()}
    options = {**mask, **given, "sinks": sinks}
    inputs = [arrays[name] for name in "qkv"]
    got, got_lse = fa2cupy.attention(*inputs, return_lse=True, **options)
    torch.testing.assert_close(got, out, rtol=2**-6, atol=2**-7)
    torch.testing.assert_close(got_lse, lse, rtol=1e-5, atol=1e-5)
    found = fa2cupy.attention_backward(arrays["dout"], *inputs, out, lse, dlse=dlse, grad_of=("sinks",), **options)
    for name, x in zip(("dq", "dk", "dv"), found, strict=False):
        torch.testing.assert_close(x, wanted[name], rtol=2**-5, atol=2**-4)
    torch.testing.assert_close(found[3].double(), dsinks, rtol=1e-4, atol=1e-2)


def test_graph_replay(device: torch.device) -> None:
    """Sinks are read when the graph runs."""
    case = replace(Case(300, 300, 64, "bfloat16", True, sinks="float32", dlse=True), seed=3)
    sinks = extras_of(case, device)["sinks"]
    gradients_of(case, device, sinks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients_of_static(case, device, sinks)
    for value in (0.0, 3.0):
        sinks.fill_(value)
        graph.replay()
        for x, y in zip(captured, gradients_of_static(case, device, sinks), strict=True):
            torch.testing.assert_close(x, y, rtol=2**-6, atol=1e-3)


_STATIC: dict[Case, tuple[Tensor, ...]] = {}


def gradients_of_static(case: Case, device: torch.device, sinks: Tensor) -> tuple[Tensor, ...]:
    """Without random numbers inside the capture."""
    if case not in _STATIC:
        tensors = inputs_of(case, device)
        _STATIC[case] = *(tensors[name] for name in ("q", "k", "v", "dout")), extras_of(case, device)["dlse"]
    q, k, v, dout, dlse = _STATIC[case]
    out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True, sinks=sinks)
    return out, lse, *fa2cupy.attention_backward(
        dout, q, k, v, out, lse, causal=True, sinks=sinks, dlse=dlse, grad_of=("sinks",), deterministic=True
    )  # fmt: skip
