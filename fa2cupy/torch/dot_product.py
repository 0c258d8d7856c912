"""torch's SDPA by our kernels, as a function with its signature. `takeover.py` puts them behind torch's own.

torch.compile traces this file: it holds nothing that Dynamo cannot follow.
"""

from __future__ import annotations

from typing import Any

import torch

from fa2cupy import counts, dynamo
from fa2cupy.attention import attention
from fa2cupy.errors import MissingDependency, UnsupportedDevice
from fa2cupy.problem import MAX_HEAD_DIM
from fa2cupy.torch.seeds import MOST, draw

__all__ = ["Features", "objection", "scaled_dot_product_attention", "top_left"]

Features = tuple[tuple[str, Any], ...]  # options beyond dense attention, as a launch has them

_DOOR = "fa2cupy.torch.scaled_dot_product_attention"
_DTYPES = {
    "cuda": (torch.float16, torch.bfloat16),
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch.nn.functional.scaled_dot_product_attention by our kernels: (batch, num_heads, seqlen, head_dim).

    is_causal is aligned top-left, as torch's: query i sees keys j <= i. dropout_p is rounded to multiples of 2^-15, and
    what it drops is drawn from torch's generator of the device. What our kernels do not compute (masks, float32 on a
    GPU, shapes that broadcast) goes to torch's function, counted by `fa2cupy.report()` and logged the first time;
    FA2CUPY_STRICT=1 makes it an error. float16 and bfloat16 on a GPU, on the CPU also float32 and float64.
    Differentiable as `fa2cupy.attention` is.

    Returns (batch, num_heads, seqlen_q, head_dim_v) in the dtype of query, or of autocast. Raises as torch's function.
    """
    why = _why_not(query, key, value, attn_mask, dropout_p, enable_gqa)
    if why:
        _fell_back(why)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _took()
    if is_causal and query.shape[2] < key.shape[2]:  # nobody sees the keys behind, and a square is aligned both ways
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    causal, features = top_left(is_causal, query.shape[2], key.shape[2])
    keywords = dict(features)
    if dropout_p:
        keywords.update(dropout_p=dropout_p, dropout_seed=draw(query.device))
    return attention(query, key, value, causal=causal, softmax_scale=scale, layout="bhsd", **keywords)


def top_left(is_causal: bool, seqlen_q: int, seqlen_k: int) -> tuple[bool, Features]:
    """causal, and the options beside it, of a causal mask with the first query beside the first key; keys behind the
    last query are left out before. With more queries than keys it is a window to the right, aligned bottom-right.
    """
    if is_causal and seqlen_q > seqlen_k:
        return False, (("window_size", (-1, seqlen_q - seqlen_k)),)
    return is_causal, ()


def _why_not(q: Any, k: Any, v: Any, attn_mask: Any, dropout_p: float, enable_gqa: bool) -> str:
    if attn_mask is not None:
        return "attn_mask is not supported yet"
    why = objection(q, k, v, dropout_p, (_dtype(q), _dtype(k), _dtype(v)))
    if why:
        return why
    if q.shape[1] != k.shape[1] and not enable_gqa:
        return "fewer key heads than query heads without enable_gqa are not supported"
    return ""


def objection(q: Any, k: Any, v: Any, dropout_p: float, dtypes: tuple[Any, Any, Any]) -> str:
    """Why our kernels do not compute the attention of these (batch, heads, seqlen, head_dim) tensors, or ''.

    dtypes: what the tensors have, or will have been cast to.
    """
    if not 0 <= dropout_p < MOST:
        return "dropout of everything is not supported"
    device = q.device
    supported = _DTYPES.get(device.type)
    if supported is None:
        return f"device {device.type} is not supported"
    dtype = dtypes[0]
    if dtype not in supported or dtypes[1] != dtype or dtypes[2] != dtype:
        return f"{', '.join(map(str, dtypes))} on {device.type} are not supported"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return "tensors of other than 4 dimensions are not supported"
    batch, heads, _, head_dim = q.shape
    batch_k, heads_k, seqlen_k, head_dim_k = k.shape
    batch_v, heads_v, seqlen_v, head_dim_v = v.shape
    if not (0 < head_dim <= MAX_HEAD_DIM and 0 < head_dim_v <= MAX_HEAD_DIM):
        return "a head_dim of 0 or above 256 is not supported"
    if batch_k != batch or (batch_v, heads_v, seqlen_v) != (batch_k, heads_k, seqlen_k) or head_dim_k != head_dim:
        return "shapes that broadcast are not supported"
    if heads_k == 0 or heads % heads_k:
        return "query heads that are not a multiple of the key heads are not supported"
    return _device_objection(device.index or 0) if device.type == "cuda" else ""


def _dtype(x: Any) -> Any:
    """The dtype that attention sees: autocast's, where it casts."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


_objections: dict[int, str] = {}


@dynamo.constant
def _device_objection(index: int) -> str:
    """Why this GPU, or what is installed, cannot run our kernels, or ''."""
    why = _objections.get(index)
    if why is None:
        from fa2cupy.jit import driver

        try:
            driver.device_info(index)
            why = ""
        except (UnsupportedDevice, MissingDependency) as error:
            why = str(error)
        _objections[index] = why
    return why


@dynamo.constant
def _took() -> None:
    counts.took(_DOOR)


@dynamo.constant
def _fell_back(why: str) -> None:
    counts.fell_back(_DOOR, "torch's SDPA", why)
