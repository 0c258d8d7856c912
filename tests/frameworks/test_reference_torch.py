"""tests/reference.py computed with torch, as on a GPU for shapes too big for a CPU, is the same as with NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.reference import as_float64, expect, make_inputs


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "causal"), [(70, 90, True), (90, 50, True), (40, 60, False)])
def test_torch_computes_the_same(dtype, seqlen_q, seqlen_k, causal):
    inputs = make_inputs(0, seqlen_q, seqlen_k, dtype=dtype, heads=(6, 3), head_dim=24, outliers=True)
    tensors = [torch.from_numpy(x.view(np.int16)).view(getattr(torch, dtype)) for x in inputs]
    for x, tensor in zip(inputs, tensors, strict=True):
        np.testing.assert_array_equal(as_float64(tensor), as_float64(x))
    expected = expect(*inputs, causal=causal)
    for computed in (expect(*tensors, causal=causal, xp=torch), expect(*inputs, causal=causal, xp=torch)):
        np.testing.assert_allclose(computed.lse, expected.lse, rtol=1e-13)
        for name, bound in computed.bounds.items():
            np.testing.assert_allclose(bound.ref, expected.bounds[name].ref, rtol=1e-9, atol=1e-12)
            np.testing.assert_array_equal(bound.model, expected.bounds[name].model)
            assert bound.floor == pytest.approx(expected.bounds[name].floor, rel=1e-12)
