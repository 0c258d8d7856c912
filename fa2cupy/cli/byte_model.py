"""The demo's model: a two-layer, attention-only causal transformer that predicts the next byte of a text.

Everything but the attention is NumPy in float32, forward and backward written out, so that the attention under test is
the only moving part; it is handed in as two functions on NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Params = dict[str, Array]
Forward = Callable[[Array, Array, Array], tuple[Array, Array]]  # q, k, v -> out, lse
Backward = Callable[[Array, Array, Array, Array, Array, Array], tuple[Array, Array, Array]]  # dout, q, k, v, out, lse

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 4, 32
WIDTH = NUM_HEADS * HEAD_DIM
NUM_BYTES = 256


@dataclass(frozen=True)
class AttentionCall:
    """What one layer's attention was given and gave back, all (batch, seqlen, heads, head_dim)."""

    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array
    dout: Array
    dq: Array
    dk: Array
    dv: Array


def init(seqlen: int, seed: int, dtype: Any = np.float32) -> Params:
    """Random weights for texts of at most `seqlen` bytes."""
    rng = np.random.default_rng(seed)

    def normal(rows: int, columns: int, std: float) -> Array:
        return (std * rng.standard_normal((rows, columns))).astype(dtype)

    params = {"embed": normal(NUM_BYTES, WIDTH, 0.5), "position": normal(seqlen, WIDTH, 0.5)}
    for layer in range(NUM_LAYERS):
        for name in ("wq", "wk", "wv", "wo"):
            params[f"{name}{layer}"] = normal(WIDTH, WIDTH, WIDTH**-0.5)
    params["head"] = normal(WIDTH, NUM_BYTES, 0.02)
    return params


def _normalise(x: Array) -> tuple[Array, Array]:
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * scale, scale


def _normalise_backward(dy: Array, y: Array, scale: Array) -> Array:
    result: Array = scale * (dy - y * np.mean(dy * y, axis=-1, keepdims=True))
    return result


def loss_and_gradients(
    params: Params, text: Array, forward: Forward, backward: Backward
) -> tuple[float, Params, list[AttentionCall]]:
    """Mean loss in bits per byte of text (batch, seqlen + 1) of uint8, its gradients, and each layer's attention."""
    tokens, targets = text[:, :-1], text[:, 1:]
    batch, seqlen = tokens.shape
    heads = (batch, seqlen, NUM_HEADS, HEAD_DIM)
    x = params["embed"][tokens] + params["position"][:seqlen]
    saved = []
    for layer in range(NUM_LAYERS):
        h, scale = _normalise(x)
        q, k, v = ((h @ params[f"{name}{layer}"]).reshape(heads) for name in ("wq", "wk", "wv"))
        out, lse = forward(q, k, v)
        x = x + out.reshape(x.shape) @ params[f"wo{layer}"]
        saved.append((h, scale, q, k, v, out, lse))
    h, scale = _normalise(x)
    logits = h @ params["head"]
    logits -= logits.max(axis=-1, keepdims=True)
    log_probability = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_probability, targets[..., None].astype(np.intp), axis=-1)
    bits = -float(chosen.mean()) / np.log(2)

    # The gradients of the *sum* over positions: of order one, which a 16-bit dout holds well. Divided at the end.
    grads: Params = {}
    dlogits = np.exp(log_probability)
    dlogits -= np.arange(NUM_BYTES) == targets[..., None]
    grads["head"] = _weight_gradient(h, dlogits)
    dx = _normalise_backward(dlogits @ params["head"].T, h, scale)
    calls = []
    for layer in reversed(range(NUM_LAYERS)):
        h, scale, q, k, v, out, lse = saved[layer]
        grads[f"wo{layer}"] = _weight_gradient(out.reshape(x.shape), dx)
        dout = (dx @ params[f"wo{layer}"].T).reshape(heads)
        dq, dk, dv = backward(dout, q, k, v, out, lse)
        calls.append(AttentionCall(q, k, v, out, lse, dout, dq, dk, dv))
        dh = np.zeros_like(h)
        for name, gradient in (("wq", dq), ("wk", dk), ("wv", dv)):
            gradient = gradient.reshape(x.shape)
            grads[f"{name}{layer}"] = _weight_gradient(h, gradient)
            dh += gradient @ params[f"{name}{layer}"].T
        dx = dx + _normalise_backward(dh, h, scale)
    grads["position"] = np.zeros_like(params["position"])
    grads["position"][:seqlen] = dx.sum(axis=0)
    grads["embed"] = np.zeros_like(params["embed"])
    np.add.at(grads["embed"], tokens, dx)
    for gradient in grads.values():
        gradient /= tokens.size
    return bits, grads, calls[::-1]


def _weight_gradient(x: Array, dy: Array) -> Array:
    result: Array = x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])
    return result


class Adam:
    """The usual optimiser; `step` updates the parameters in place."""

    def __init__(self, params: Params, rate: float) -> None:
        self.rate, self.count = rate, 0
        self.mean = {name: np.zeros_like(value) for name, value in params.items()}
        self.square = {name: np.zeros_like(value) for name, value in params.items()}

    def step(self, params: Params, grads: Params) -> None:
        """One update with bias correction."""
        self.count += 1
        rate = self.rate * np.sqrt(1 - 0.99**self.count) / (1 - 0.9**self.count)
        for name, gradient in grads.items():
            self.mean[name] += 0.1 * (gradient - self.mean[name])
            self.square[name] += 0.01 * (gradient * gradient - self.square[name])
            params[name] -= rate * self.mean[name] / (np.sqrt(self.square[name]) + 1e-8)
