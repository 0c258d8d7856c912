"""Faults that users met with JAX arrays, each with the right outcome."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import fa2cupy
from tests.frameworks.jax_versions import x64
from tests.reference import Inputs, expect, make_inputs


@pytest.mark.parametrize("inside", [False, True])
def test_fault_float64_outside_the_scope_that_made_it(inside: bool) -> None:
    stored = make_inputs(2, 5, 7, dtype="float64", heads=(4, 2), head_dim=16)
    with x64():
        x = Inputs(*map(jnp.asarray, stored))
    assert x.q.dtype == "float64"

    with x64(inside):
        out, lse = fa2cupy.attention(x.q, x.k, x.v, return_lse=True)
        dq, dk, dv = fa2cupy.attention_backward(x.dout, x.q, x.k, x.v, out, lse)
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert {str(array.dtype) for array in results.values()} == {"float64"}
    expect(*stored).check(**{name: np.asarray(array) for name, array in results.items()})
    assert jnp.asarray(np.zeros(3)).dtype == "float32"  # the scope is the caller's again
