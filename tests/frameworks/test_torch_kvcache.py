"""torch tensors on the CPU as a KV cache: the same as NumPy's, in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fa2cupy
from fa2cupy.errors import InvalidArgument, InvalidType
from tests import caches
from tests.caches import FLOAT8, CacheCase, draw


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kv_dtype", [None, FLOAT8])
def test_cpu(dtype: str, kv_dtype: str | None) -> None:
    case = CacheCase(
        (5, 0, 70), 2, 2, dtype=dtype, page=16, causal=True, rotary=(16, "neox", dtype), kv_dtype=kv_dtype,
        scales=("head", "page"), by="seqused_k",
    )  # fmt: skip
    drawn = draw(case)
    given: dict[str, Any] = {name: to_torch(array) for name, array in drawn.arrays.items()}
    k, v = to_torch(drawn.k_cache), to_torch(drawn.v_cache)
    if kv_dtype:
        k, v = k.view(torch.float8_e4m3fn), v.view(torch.float8_e4m3fn)
    version = k._version
    scales = {name: given.pop(name) for name in ("k_scale", "v_scale") if name in given}
    cache = fa2cupy.KVCache(k, v, block_table=given.pop("block_table"), **scales)
    new = {name: given.pop(f"{name}_new") for name in ("k", "v")}
    rotary = given.pop("rotary_cos"), given.pop("rotary_sin"), "neox"
    q = to_torch(drawn.q)
    out, lse = cache.attend(q, **given, **new, rotary=rotary, causal=True, return_lse=True)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    assert k._version > version, "autograd has to know"
    bits = out.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else out.numpy()
    caches.check(drawn, bits, lse.numpy())


def test_refused() -> None:
    k = torch.zeros(2, 8, 1, 16)
    q = torch.zeros(2, 1, 1, 16, requires_grad=True)
    with pytest.raises(InvalidArgument, match="q requires grad"):
        fa2cupy.KVCache(k, k.clone()).attend(q)
    with torch.no_grad():
        assert fa2cupy.KVCache(k, k.clone()).attend(q).shape == q.shape
    with pytest.raises(InvalidType, match=r"q is a numpy.ndarray but the cache has arrays of PyTorch"):
        fa2cupy.KVCache(k, k.clone()).attend(q.detach().numpy())
    with pytest.raises(InvalidType, match=r"v is a numpy.ndarray but k is a torch.Tensor"):
        fa2cupy.KVCache(k, k.numpy())
