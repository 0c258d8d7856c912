"""Ours beside torch's flash attention and cuDNN on the same inputs: nobody's error may be smaller by more than 5%."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fa2cupy
from tests.gpu import oracle
from tests.gpu.cases import DTYPES, Case
from tests.gpu.ledger import LEDGER
from tests.gpu.runner import inputs_of

Tensor = torch.Tensor
Gradients = tuple[Tensor, Tensor, Tensor]

SHAPES = [(64, 1024, False), (128, 2048, True), (128, 4096, False), (256, 1024, True)]
PEERS = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
NEEDS = [Case(s, s, d, dtype, causal, given=False) for d, s, causal in SHAPES for dtype in DTYPES]


def _peer(backend: SDPBackend) -> Callable[..., dict[str, Tensor]]:
    def compute(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> dict[str, Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), is_causal=causal).transpose(1, 2)
        gradients = torch.autograd.grad(out, leaves, dout)
        return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))

    return compute


@pytest.mark.parametrize("outliers", [False, True], ids=["normal", "outliers"])
@pytest.mark.parametrize(("head_dim", "seqlen", "causal"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_peer_is_closer(
    dtype: str, head_dim: int, seqlen: int, causal: bool, outliers: bool, device: torch.device
) -> None:
    case = Case(seqlen, seqlen, head_dim, dtype, causal, batch=2, heads=(4, 4), outliers=outliers, seed=7)
    tensors = inputs_of(case, device)
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    _, bounds = oracle.attention(q, k, v, dout, causal=causal, scale=case.softmax_scale, want_model=False)
    out, lse = fa2cupy.attention(q, k, v, causal=causal, return_lse=True)
    gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=causal)
    ours = oracle.rms_errors(dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True)), bounds)
    theirs: dict[str, dict[str, float]] = {}
    for name, backend in PEERS.items():
        try:
            results = _peer(backend)(q, k, v, dout, causal)
        except RuntimeError:  # torch's word for "this backend does not run this here"
            continue
        theirs[name] = oracle.rms_errors(results, bounds)
    assert theirs, "no peer ran: there is nothing to compare with"
    label = f"{dtype} {'outliers' if outliers else 'normal'} d{head_dim} s{seqlen} {'causal' if causal else 'full'}"
    rounded = {
        who: {n: float(f"{e:.3e}") for n, e in errors.items()} for who, errors in {"ours": ours, **theirs}.items()
    }
    LEDGER.notes.setdefault("rms_errors", {})[label] = rounded
    for name, error in ours.items():
        best = min(errors[name] for errors in theirs.values())
        assert error <= 1.05 * best, f"{name}: rms error {error:.3e}, best peer {best:.3e}: {rounded}"
