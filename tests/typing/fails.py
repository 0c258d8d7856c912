# What a type checker must refuse, line by line: tests/test_typing.py says so to mypy.
import numpy as np
from numpy.typing import NDArray

import fa2cupy


def wrong(q: NDArray[np.float32], n: list[float]) -> None:
    fa2cupy.attention(q, q, q, is_causal=True)  # no such keyword
    fa2cupy.attention(q, q, q, causal="yes")  # no bool
    fa2cupy.attention(q, q, q, True)  # not by position
    fa2cupy.attention(q, q)  # no v
    fa2cupy.attention(q, q, n)  # no array
    fa2cupy.attention(q, q, q, return_lse=True).sum()  # a tuple
    fa2cupy.attention_backward(q, q, q, q, q, q, bias=q)  # not there yet
    fa2cupy.backward_workspace_bytes(q, q, q, deterministic=None)  # no bool
    fa2cupy.backward_workspace_bytes(q, q, q).sum()  # an int
    fa2cupy.atention(q, q, q)  # no such function
