"""transformers' attention interface: what a layer calls.

torch.compile traces this file: it holds nothing that Dynamo cannot follow.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fa2cupy import counts, dynamo
from fa2cupy.attention import attention
from fa2cupy.autograd.dispatch import cast
from fa2cupy.errors import InvalidArgument
from fa2cupy.log import warn_once
from fa2cupy.torch.dot_product import objection
from fa2cupy.torch.seeds import draw
from fa2cupy.transformers.masks import Keys, dense, is_ours, read

__all__ = ["DOOR", "attention_layer"]

DOOR = "transformers"


def attention_layer(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """A layer's attention of query (batch, heads, seqlen, head_dim) and key and value with heads of their own number.

    attention_mask: what `masks.mask` returned, or a 4-D mask of the user's. sliding_window counts the query itself; it
    is asked only where there is no attention_mask, which knows of windows too. cu_seq_lens_q and cu_seq_lens_k among
    the keywords say where packed sequences start, whatever the mask; all rows of a batch are one then. s_aux (heads,):
    sinks. What dropout drops is drawn from torch's generator.

    Returns (batch, seqlen, heads, head_dim) and no weights.
    """
    if kwargs.get("output_attentions"):
        _say("fa2cupy returns no attention weights (output_attentions=True): use attn_implementation='eager' for them")
    query, key, value = _as_its_weights(module, *cast(query, key, value))
    keys = _keys(module, attention_mask, sliding_window, is_causal, kwargs)
    why = _why_not(query, key, value, dropout, keys, position_bias)
    if why:
        return _by_sdpa(
            why, module, query, key, value, attention_mask if keys is None else keys, dropout, scaling, is_causal,
            position_bias, softcap, s_aux,
        ), None  # fmt: skip
    _took()
    assert keys is not None
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    features: dict[str, Any] = {"softcap": softcap, "sinks": _as_sinks(s_aux, query)}
    if dropout:
        features.update(dropout_p=dropout, dropout_seed=draw(query.device))
    if keys.window is not None:
        features["window_size"] = keys.window
    if keys.starts_q is not None:
        features.update(cu_seqlens_q=keys.starts_q, cu_seqlens_k=keys.starts_k)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    elif keys.last is not None:
        features.update(leftpad_k=keys.first, seqused_k=keys.last)
        if not keys.causal and keys.left >= 0:
            features["seqused_q"] = keys.last  # windows are aligned with the end of the tokens
    out = attention(
        q, k, v, causal=keys.causal, softmax_scale=scaling, deterministic=bool(kwargs.get("deterministic")), **features
    )
    if keys.starts_q is not None:
        out = out.unflatten(0, (query.shape[0], query.shape[2]))
    return out, None


def _keys(
    module: Any, attention_mask: Any, sliding_window: int | None, is_causal: bool | None, kwargs: dict[str, Any]
) -> Keys | None:
    """What is seen; None for a mask that is not ours."""
    if is_ours(attention_mask):
        keys = read(attention_mask)
    elif attention_mask is None:
        causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
        keys = Keys(causal, -1 if sliding_window is None else sliding_window - 1)
    else:
        return None
    starts_q, starts_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if starts_q is None and starts_k is None:
        return keys
    if starts_q is None or starts_k is None:
        raise InvalidArgument("cu_seq_lens_q and cu_seq_lens_k: one of them is given alone, both are needed")
    return Keys(keys.causal, keys.left, starts_q=starts_q, starts_k=starts_k)


def _why_not(q: Any, k: Any, v: Any, dropout: float, keys: Keys | None, position_bias: Any) -> str:
    if position_bias is not None:
        return "a position_bias is not supported yet"
    if keys is None:
        return "a mask that is not causal, windowed, padded at the ends or packed is not supported yet"
    return objection(q, k, v, dropout, (q.dtype, k.dtype, v.dtype))


def _by_sdpa(
    why: str, module: Any, query: Any, key: Any, value: Any, mask: Any, dropout: float, scaling: float | None,
    is_causal: bool | None, position_bias: Any, softcap: float | None, s_aux: Any,
) -> Any:  # fmt: skip
    """torch's SDPA, through transformers' own function. mask: the user's, or Keys."""
    for name, given in (("softcap", softcap), ("sinks (s_aux)", s_aux)):
        if given is not None:
            raise InvalidArgument(
                f"{name} is not supported where attention goes to torch's SDPA, as here because {why}: use "
                "attn_implementation='eager'"
            )
    _fell_back(why)
    batch, _, seqlen, _ = query.shape
    packed = isinstance(mask, Keys) and mask.starts_q is not None
    if packed:
        query, key, value = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (query, key, value))
    if isinstance(mask, Keys):
        is_causal = mask.causal
        if mask.starts_q is not None or mask.last is not None or mask.left >= 0 or query.shape[2] != key.shape[2]:
            mask = dense(mask, query.shape[2], key.shape[2], query.device)
            is_causal = False
        else:
            mask = None
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
        position_bias=position_bias,
    )  # fmt: skip
    return out[0].unflatten(0, (batch, seqlen)) if packed else out


def _as_its_weights(module: Any, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """On a GPU, float32 that came of norms kept in float32 (PEFT's) in the dtype that the layer computes in."""
    if query.dtype != torch.float32 or query.device.type != "cuda":
        return query, key, value
    dtype = query.dtype
    if hasattr(getattr(module, "config", None), "_is_quantized"):
        dtype = module.config.dtype
    else:
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                dtype = layer.weight.dtype
                break
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _as_sinks(s_aux: Any, query: Any) -> Any:
    """Parameters, in a dtype that goes with that of the query."""
    if s_aux is None or s_aux.dtype == query.dtype or (s_aux.dtype == torch.float32 and query.dtype.itemsize == 2):
        return s_aux
    return s_aux.to(query.dtype)


@dynamo.constant
def _took() -> None:
    counts.took(DOOR)


@dynamo.constant
def _fell_back(why: str) -> None:
    counts.fell_back(DOOR, "torch's SDPA", why)


@dynamo.constant
def _say(message: str) -> None:
    warn_once(message)
