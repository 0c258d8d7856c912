"""Functions with the signatures of jax.nn and flax, computed by `fa2cupy.attention`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fa2cupy.attention import attention
from fa2cupy.errors import InvalidArgument

__all__ = ["dot_product_attention", "flax_attention"]


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`: layout BTNH, query is (batch, seqlen_q, num_heads, head_dim), or TNH.
    is_causal is **top-left** aligned as there: query i sees keys j <= i (`fa2cupy.attention`: bottom-right).

    Args:
        query, key, value: (batch, seqlen, heads, head_dim) or (seqlen, heads, head_dim); key and value may have fewer
            heads.
        bias, mask, query_seq_lengths, key_value_seq_lengths: as there, as far as `fa2cupy.attention`
            has bias=, mask=, seqused_q= and seqused_k=; what it has not yet is an error that names it.
        scale: None is head_dim ** -0.5.
        is_causal, local_window_size: with query_seq_lengths or key_value_seq_lengths an error until masks can express
            where these align.
        implementation: accepted and ignored: it is always fa2cupy.
        return_residual: also return the log-sum-exp, (batch, seqlen_q, num_heads) float32 (float64 of float64).

    Returns:
        out of query's shape (with value's last dimension) and dtype; with return_residual=True (out, residual). A row
        that sees no key is 0 here, mean(value) there.

    Raises: ValueError or TypeError for what is said above, and as `fa2cupy.attention`.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    is_single = query.ndim == 3
    if is_single:
        query, key, value = query[None], key[None], value[None]
    aligned = "is_causal=True" if is_causal else f"local_window_size={local_window_size!r}"
    window, rows = None, query.shape[1]
    if (is_causal or local_window_size is not None) and query.ndim == key.ndim == value.ndim == 4:
        if query_seq_lengths is not None or key_value_seq_lengths is not None:
            raise InvalidArgument(
                f"{aligned} with query_seq_lengths or key_value_seq_lengths: jax.nn aligns queries and keys at the "
                "first key, fa2cupy.attention at the last used one; not supported until masks can say the former"
            )
        query, key, value, window = _top_left(query, key, value, *_window(local_window_size, is_causal))
    options: dict[str, Any] = {"bias": bias, "mask": mask, "seqused_q": query_seq_lengths}
    options |= {"seqused_k": key_value_seq_lengths, "window_size": window}
    given = {name: value for name, value in options.items() if value is not None}
    out, lse = attention(query, key, value, softmax_scale=scale, return_lse=True, **given)
    unseen = rows - query.shape[1]
    if unseen:
        out = jnp.pad(out, ((0, 0), (0, unseen), (0, 0), (0, 0)))
        lse = jnp.pad(lse, ((0, 0), (0, 0), (0, unseen)), constant_values=-jnp.inf)
    residual = jnp.swapaxes(lse, 1, 2)
    if is_single:
        out, residual = out[0], residual[0]
    return (out, residual) if return_residual else out


def _top_left(query: Any, key: Any, value: Any, left: int, right: int) -> tuple[Any, Any, Any, tuple[int, int]]:
    """The queries that see a key and the keys that a query sees, where query i stands beside key i, and the window that
    says the same with the last of them beside each other. Those left out are the last ones. -1 is unlimited.
    """
    keys = key.shape[1] if right < 0 else min(key.shape[1], query.shape[1] + right)
    queries = query.shape[1] if left < 0 else min(query.shape[1], key.shape[1] + left)
    shift = queries - keys
    window = left if left < 0 else left - shift, right if right < 0 else right + shift
    return query[:, :queries], key[:, :keys], value[:, :keys], window


def _window(local_window_size: int | tuple[int, int] | None, is_causal: bool) -> tuple[int, int]:
    """(left, right), each without the query's own key, as jax.nn counts too."""
    if local_window_size is None:
        return -1, 0
    left, right = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    return int(left), 0 if is_causal else int(right)


def flax_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """For linen's MultiHeadDotProductAttention and nnx's MultiHeadAttention(attention_fn=fa2cupy.jax.flax_attention).
    Layout (batch..., seqlen, num_heads, head_dim). linen has no word for causal but a mask: give it
    `functools.partial(flax_attention, causal=True)`.

    Args:
        query, key, value: any number of batch dimensions.
        bias, mask: as `fa2cupy.attention` has them; an error that names them until then.
        dropout_rate: dropped of P unless deterministic is True, by the key dropout_rng, which is a dropout_seed of
            `fa2cupy.attention`: other places than flax's, as many. Every sequence and head has a mask of its own:
            broadcast_dropout=True, the default of flax's modules, is then an error.
        dtype: computed in, None for query's. precision, module: not used.
        is_causal: nnx's, top-left aligned: query i sees keys j <= i.
        options: further keywords of `fa2cupy.attention`: causal, softmax_scale, sinks, ...

    Returns: out of query's shape, with value's last dimension.
    """
    if dropout_rate and not deterministic:
        if broadcast_dropout:
            raise InvalidArgument(
                f"broadcast_dropout=True with dropout_rate={dropout_rate!r}: every sequence and head has a mask of its "
                "own here; pass broadcast_dropout=False, to the module or to flax_attention"
            )
        if dropout_rng is None:
            raise InvalidArgument(f"dropout_rng=None with dropout_rate={dropout_rate!r}: a key is needed")
        options |= {"dropout_p": dropout_rate, "dropout_seed": dropout_rng}
    if is_causal:
        if "causal" in options or "window_size" in options:
            raise InvalidArgument("is_causal=True beside causal= or window_size=: one of them is needed")
        seqlen_q = query.shape[-3]
        key, value = key[..., :seqlen_q, :, :], value[..., :seqlen_q, :, :]
        options["window_size"] = (-1, seqlen_q - key.shape[-3])
    if dtype is not None:
        query, key, value = (array.astype(dtype) for array in (query, key, value))
    batch = query.shape[:-3]
    q, k, v = (array.reshape(-1, *array.shape[-3:]) for array in (query, key, value))
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None:
            options[name] = array if len(batch) == 1 else _folded(array, batch)
    if mask is not None:
        options["mask"] = options["mask"].astype(bool)  # flax's may hold numbers
    out = attention(q, k, v, **options)
    return out.reshape(*batch, *out.shape[1:])


def _folded(array: Any, batch: tuple[int, ...]) -> Any:
    """An array whose last three dimensions are not the batch's with all of these in one."""
    own = array.shape[-3:]
    return jnp.broadcast_to(array, (*batch, *own)).reshape(-1, *own)
