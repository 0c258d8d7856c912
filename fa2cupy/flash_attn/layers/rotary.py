"""flash_attn.layers.rotary: rotary embedding of one tensor, of packed ones in place, and as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from fa2cupy.errors import InvalidArgument
from fa2cupy.flash_attn.ops.triton.rotary import Part, apply_rotary, rotate_in_place

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Each pair (a, b) of the last dimension as (-b, a); pairs are (i, i + n), or interleaved (2i, 2i + 1)."""
    axis = -1 if interleaved else -2
    a, b = x.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(axis)
    return torch.stack((-b, a), axis).flatten(-2)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`apply_rotary_emb` in x's own precision, with cos and sin (seqlen, n) or (batch, seqlen, n)."""
    n = cos.shape[-1]
    if 2 * n > x.shape[-1]:
        raise InvalidArgument(f"cos has shape {tuple(cos.shape)}: rotary_dim is above x's head_dim {x.shape[-1]}")
    both = (
        (table.repeat_interleave(2, -1) if interleaved else table.repeat(*[1] * (table.ndim - 1), 2)).unsqueeze(-2)
        for table in (cos, sin)
    )
    turning = x[..., : 2 * n]
    turned = turning * next(both) + rotate_half(turning, interleaved) * next(both)
    return torch.cat((turned, x[..., 2 * n :]), -1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x with the first 2 n dimensions of each head turned: x (batch, seqlen, heads, head_dim), or packed sequences
    (total, heads, head_dim) with cu_seqlens and max_seqlen; cos, sin (positions, n). See `ops.triton.rotary`."""
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turn q and k inside qkv, in place, and return qkv.

    qkv: (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, num_heads_q + 2 heads_k, head_dim) with num_heads_q.
    cos_k, sin_k: of the keys, where they differ.
    """
    cos_k = cos if cos_k is None else cos_k
    sin_k = sin if sin_k is None else sin_k
    if qkv.ndim == 5 and qkv.shape[2] == 3:
        parts: list[Part] = [(lambda whole: whole[:, :, 0], cos, sin), (lambda whole: whole[:, :, 1], cos_k, sin_k)]
    elif (
        qkv.ndim == 4
        and num_heads_q is not None
        and (qkv.shape[2] - num_heads_q) % 2 == 0 <= num_heads_q < qkv.shape[2]
    ):
        end = (qkv.shape[2] + num_heads_q) // 2
        parts = [
            (lambda whole: whole[:, :, :num_heads_q], cos, sin),
            (lambda whole: whole[:, :, num_heads_q:end], cos_k, sin_k),
        ]
    else:
        raise InvalidArgument(
            f"qkv has shape {tuple(qkv.shape)} and num_heads_q is {num_heads_q}: (batch, seqlen, 3, heads, head_dim), "
            "or (batch, seqlen, num_heads_q + 2 heads_k, head_dim) with num_heads_q, is needed"
        )
    return rotate_in_place(qkv, parts, _options(interleaved, seqlen_offsets))


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Turn k inside kv, (batch, seqlen, 2, heads, head_dim), in place, and return kv."""
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise InvalidArgument(f"kv has shape {tuple(kv.shape)}: (batch, seqlen, 2, heads, head_dim) is needed")
    parts: list[Part] = [(lambda whole: whole[:, :, 0], cos, sin)]
    return rotate_in_place(kv, parts, _options(interleaved, seqlen_offsets))


def _options(interleaved: bool, seqlen_offsets: int | Tensor) -> dict[str, object]:
    return {"seqlen_offsets": seqlen_offsets, "cu_seqlens": None, "max_seqlen": None, "interleaved": interleaved}


class RotaryEmbedding(torch.nn.Module):
    """The tables of cos and sin for `dim` dimensions of a head, made as long as is needed, and their application.

    Angles are position / base ** (2i / dim), computed in float32. scale_base: XPos, which also scales queries up and
    keys down with the position (512 is usual).
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else (self._even(device) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _even(self, device: torch.device | str | None) -> Tensor:
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return 1.0 / self.base ** (self._even(device) / self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Make the tables anew if they are too short, elsewhere, of another dtype, or of inference mode in training."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
            and not (self.training and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        # A model in bfloat16 has its buffers in bfloat16, which is too coarse for angles.
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = positions[:, None] * inv_freq.to(positions.device)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (positions - seqlen // 2) / self.scale_base
        scale = self.scale.to(positions.device, torch.float32) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turn q and k in place. qkv as `apply_rotary_emb_qkv_` takes it; or q, (batch, seqlen, heads, head_dim), with
        kv, (batch, seqlen, 2, heads, head_dim), and then (q, kv) comes back.

        seqlen_offset: position of the first token, an int or (batch,); for a tensor give max_seqlen, which is how long
        the tables must be.
        """
        if max_seqlen is None and isinstance(seqlen_offset, int):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        cos, sin, cos_k, sin_k = self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        if cos is None or sin is None:
            raise InvalidArgument("max_seqlen is None: with seqlen_offset a tensor, the length of the tables is needed")
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        cos_k, sin_k = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
