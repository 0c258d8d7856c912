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
    starts, used = np.zeros(3, np.int32), np.zeros(2, np.int64)
    assert_type(fa2cupy.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=4), X)
    assert_type(fa2cupy.attention(q, k, v, seqused_k=used, leftpad_k=used, segment_ids=(starts, starts)), X)
    out, lse = fa2cupy.attention(q, k, v, return_lse=True)
    assert_type(fa2cupy.attention_backward(out, q, k, v, out, lse, deterministic=True, dq=None), tuple[X, X, X])
    assert_type(fa2cupy.attention(q, k, v, softcap=30.0, alibi_slopes=q, sinks=q), X)
    assert_type(fa2cupy.attention(q, k, v, dropout_p=0.1, dropout_seed=(1, 2)), X)
    assert_type(fa2cupy.attention_backward(out, q, k, v, out, lse, sinks=q, grad_of=("sinks",)), tuple[X, ...])
    assert_type(fa2cupy.backward_workspace_bytes(q, k, v) + fa2cupy.forward_workspace_bytes(q, k, v), int)
