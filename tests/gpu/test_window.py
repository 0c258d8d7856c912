"""Windows against float64: every head_dim, both ends, lengths both ways round; that equal ones are equal; long ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

import fa2cupy
from tests.gpu.cases import SM80_WIDTHS, WIDTHS, Case
from tests.gpu.runner import check_all, inputs_of

WINDOWS = ((0, 0), (1, 0), (63, 64), (127, 0), (128, 0), (129, 130), (200, -1), (-1, 77), (5, 300), (1000, 1000))
LENGTHS = ((1, 513), (113, 203), (203, 113), (256, 256), (300, 1023), (1023, 300), (640, 128), (1024, 1024))


def window_cases(dtype: str, head_dim: int, head_dim_v: int | None) -> Iterator[Case]:
    for number, ((seqlen_q, seqlen_k), window) in enumerate(itertools.product(LENGTHS, WINDOWS)):
        yield Case(
            seqlen_q,
            seqlen_k,
            head_dim,
            dtype,
            causal=window[1] <= 0 and number % 3 == 0,
            heads=((4, 4), (6, 3), (4, 1))[number % 3],
            layout=("bshd", "bhsd")[number % 2],
            given=number % 4 != 0,
            deterministic=number % 5 < 2,
            pad=(0, 8)[number % 7 == 0],
            seed=number,
            head_dim_v=head_dim_v,
            window=window,
        )


NEEDS = [case for head_dim, head_dim_v, dtype in WIDTHS for case in window_cases(dtype, head_dim, head_dim_v)]
NEEDS_SM80 = [case for head_dim, dtype in SM80_WIDTHS for case in list(window_cases(dtype, head_dim, None))[::2]]


@pytest.mark.parametrize(("head_dim", "head_dim_v", "dtype"), WIDTHS)
def test_windows(head_dim: int, head_dim_v: int | None, dtype: str, device: torch.device) -> None:
    check_all(list(window_cases(dtype, head_dim, head_dim_v)), True, device)


@pytest.mark.parametrize(("head_dim", "dtype"), SM80_WIDTHS)
@pytest.mark.usefixtures("sm80_kernels")
def test_windows_of_sm80(head_dim: int, dtype: str, device: torch.device) -> None:
    check_all(list(window_cases(dtype, head_dim, None))[::2], True, device)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_sequences(head_dim: int, deterministic: bool, device: torch.device) -> None:
    """Many tiles of a thread block, many key blocks, and many heads on few keys, which several thread blocks share."""
    cases = [
        Case(4224, 4224, head_dim, "bfloat16", True, 1, (4, 2), window=(511, -1), deterministic=deterministic),
        Case(3000, 5000, head_dim, "float16", False, 1, (3, 3), window=(130, 257), deterministic=deterministic),
        Case(300, 4096, head_dim, "bfloat16", False, 1, (32, 1), window=(150, 40), deterministic=deterministic),
        Case(4096, 300, head_dim, "bfloat16", True, 1, (32, 1), window=(64, 0), deterministic=deterministic),
    ]
    check_all(cases, True, device)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_bits_repeat(head_dim: int, device: torch.device) -> None:
    case = Case(1500, 2000, head_dim, "bfloat16", False, 2, (6, 3), window=(300, 100))
    tensors = inputs_of(case, device)
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))

    def results() -> tuple[torch.Tensor, ...]:
        out, lse = fa2cupy.attention(q, k, v, window_size=case.window, return_lse=True)
        gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, window_size=case.window, deterministic=True)
        return out, lse, *gradients

    first = results()
    for _ in range(100):
        assert all(torch.equal(x, y) for x, y in zip(results(), first, strict=True))


def test_equal_windows_have_equal_bits(device: torch.device) -> None:
    """Ends that nobody notices are none, and a right end of 0 alone is causal."""
    tensors = inputs_of(Case(500, 700, 128, "bfloat16", False), device)
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    for causal, windows in (
        (False, ((-1, -1), (699, 499), (10**9, -1))),
        (True, ((-1, 0), (699, 0), (5000, -1))),
    ):
        plain = fa2cupy.attention(q, k, v, causal=causal)
        for window in windows:
            assert torch.equal(fa2cupy.attention(q, k, v, causal=causal, window_size=window), plain), window
    assert torch.equal(fa2cupy.attention(q, k, v, window_size=(-1, 0)), fa2cupy.attention(q, k, v, causal=True))


def test_a_row_of_a_window_is_attention_over_its_keys(device: torch.device) -> None:
    """What one query sees of a long cache, alone and among the others of a prefill."""
    tensors = inputs_of(Case(64, 8192, 128, "bfloat16", False, 2, (8, 2)), device)
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    alone = fa2cupy.attention(q[:, -1:], k, v, window_size=(1023, 0))
    assert torch.equal(alone, fa2cupy.attention(q[:, -1:], k[:, -1024:], v[:, -1024:]))
    among = fa2cupy.attention(q, k, v, window_size=(1023, 0))[:, -1:]
    torch.testing.assert_close(alone, among, rtol=2**-7, atol=2e-3)


def test_autograd(device: torch.device) -> None:
    """Through torch's graph come the gradients of `attention_backward`, and its bits."""
    case = Case(300, 500, 128, "bfloat16", False, 2, (4, 2), window=(100, 0))
    tensors = inputs_of(case, device)
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    out, lse = fa2cupy.attention(q, k, v, window_size=case.window, return_lse=True)
    options = {"window_size": case.window, "deterministic": True}
    expected = fa2cupy.attention_backward(dout, q, k, v, out, lse, **options)
    arrays = [x.requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(fa2cupy.attention(*arrays, **options), arrays, dout)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
