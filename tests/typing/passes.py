# What a type checker must accept: tests/test_typing.py says so to mypy.
import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import fa2cupy

X = NDArray[np.float32]


def plain(q: X, k: X, v: X, wanted: bool) -> None:
    assert_type(fa2cupy.attention(q, k, v, causal=True, softmax_scale=0.5, layout="bhsd"), X)
    assert_type(fa2cupy.attention(q, k, v, return_lse=False, out=q), X)
    assert_type(fa2cupy.attention(q, k, v, return_lse=True), tuple[X, X])
    assert_type(fa2cupy.attention(q, k, v, return_lse=wanted), X | tuple[X, X])
    out, lse = fa2cupy.attention(q, k, v, return_lse=True)
    assert_type(fa2cupy.attention_backward(out, q, k, v, out, lse, deterministic=True, dq=None), tuple[X, X, X])
    assert_type(fa2cupy.backward_workspace_bytes(q, k, v) + fa2cupy.forward_workspace_bytes(q, k, v), int)
