"""A small GPT in plain JAX, trained with fa2cupy or with jax.nn's own attention, on the standard library's sources.

    python examples/gpt_jax.py --tiny                                   # on a CPU: the same losses as the plain formula
    python examples/gpt_jax.py --attention fa2cupy --shape 124m --steps 300 --json curve.json
    python examples/gpt_jax.py --attention cudnn --shape 8k --steps 20       # 12 x 2,048, heads of 128, S 8,192

Weights are float32, the computation is bfloat16 (float32 with --tiny). The tokens are bytes.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gpt_data import SHAPES, VOCABULARY, batches, tokens

import fa2cupy


def attend(kind, q, k, v):
    if kind == "fa2cupy":
        return fa2cupy.attention(q, k, v, causal=True)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kind)


def normalized(x, gain):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain


def model(weights, batch, heads, attention, dtype):
    """Logits of the next token."""
    batch_size, length = batch.shape
    x = weights["tokens"][batch] + weights["positions"][:length]

    def block(x, layer):
        h = normalized(x, layer["norm1"]).astype(dtype)
        qkv = (h @ layer["qkv"].astype(dtype)).reshape(batch_size, length, 3, heads, -1)
        out = attend(attention, *(qkv[:, :, i] for i in range(3)))
        x = x + (out.reshape(batch_size, length, -1) @ layer["out"].astype(dtype)).astype(jnp.float32)
        h = normalized(x, layer["norm2"]).astype(dtype)
        h = jax.nn.gelu(h @ layer["up"].astype(dtype))
        return x + (h @ layer["down"].astype(dtype)).astype(jnp.float32), None

    x, _ = jax.lax.scan(block, x, weights["layers"])
    return normalized(x, weights["norm"]).astype(dtype) @ weights["tokens"].T.astype(dtype)


def initial(key, layers, width, length, vocabulary):
    keys = iter(jax.random.split(key, 8))

    def normal(*shape, scale=0.02):
        return scale * jax.random.normal(next(keys), shape)

    residual = 0.02 / (2 * layers) ** 0.5
    return {
        "tokens": normal(vocabulary, width),
        "positions": normal(length, width),
        "norm": jnp.ones(width),
        "layers": {
            "norm1": jnp.ones((layers, width)),
            "norm2": jnp.ones((layers, width)),
            "qkv": normal(layers, width, 3 * width),
            "out": normal(layers, width, width, scale=residual),
            "up": normal(layers, width, 4 * width),
            "down": normal(layers, 4 * width, width, scale=residual),
        },
    }


def train(args):
    layers, width, heads, length, batch_size = SHAPES[args.shape]
    dtype = jnp.float32 if args.shape == "tiny" else jnp.bfloat16
    data = tokens()
    weights = initial(jax.random.key(args.seed), layers, width, length, 256 if args.shape == "tiny" else VOCABULARY)
    moments = jax.tree.map(lambda w: (jnp.zeros_like(w), jnp.zeros_like(w)), weights)

    def loss(weights, batch):
        logits = model(weights, batch[:, :-1], heads, args.attention, dtype).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, batch[:, 1:, None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - picked).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, moments, batch, number):
        value, gradients = jax.value_and_grad(loss)(weights, batch)
        norm = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(gradients)))
        clip = jnp.minimum(1.0, 1.0 / (norm + 1e-6))
        rate = args.rate * jnp.minimum(1.0, (number + 1) / 20)

        def adamw(w, m, g):
            first, second = 0.9 * m[0] + 0.1 * g * clip, 0.95 * m[1] + 0.05 * (g * clip) ** 2
            t = number + 1.0
            update = first / (1 - 0.9**t) / (jnp.sqrt(second / (1 - 0.95**t)) + 1e-8)
            return w - rate * (update + 0.1 * w * (w.ndim > 1)), (first, second)

        pairs = jax.tree.map(adamw, weights, moments, gradients, is_leaf=lambda x: isinstance(x, tuple))
        weights, moments = (
            jax.tree.map(lambda pair, i=i: pair[i], pairs, is_leaf=lambda x: isinstance(x, tuple)) for i in (0, 1)
        )
        return weights, moments, value, norm

    source = batches(data, args.seed, batch_size, length)
    losses, norms, times = [], [], []
    for number in range(args.steps):
        batch = jnp.asarray(next(source), jnp.int32)
        begin = time.perf_counter()
        weights, moments, value, norm = step(weights, moments, batch, number)
        losses.append(float(value))
        norms.append(float(norm))
        times.append(time.perf_counter() - begin)
        if number % 20 == 0 or number == args.steps - 1:
            print(f"step {number:4d}  loss {losses[-1]:.4f}  gradient {norms[-1]:.3f}  {1e3 * times[-1]:.1f} ms")
    return {"losses": losses, "norms": norms, "ms": 1e3 * float(np.median(times[min(5, len(times) // 2) :]))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", choices=["fa2cupy", "cudnn", "xla"], default="fa2cupy")
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write losses, gradient norms and the median step time there")
    parser.add_argument("--tiny", action="store_true", help="20 steps in float32 beside the plain formula")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.steps = "tiny", 20
        results = {}
        for args.attention in ("fa2cupy", "xla"):
            results[args.attention] = train(args)
        worst = max(abs(a - b) for a, b in zip(*(results[kind]["losses"] for kind in results), strict=True))
        print(f"largest difference of a loss from the plain formula's: {worst:.1e}")
        assert worst <= 1e-5
        return
    result = train(args)
    print(f"{args.attention}: {result['ms']:.1f} ms a step")
    if args.json:
        Path(args.json).write_text(json.dumps({"attention": args.attention, "seed": args.seed, **result}))


if __name__ == "__main__":
    main()
