"""JAX: fa2cupy.attention under jit and grad, beside jax.nn's own."""

import jax
import jax.numpy as jnp

import fa2cupy

on_gpu = jax.default_backend() == "gpu"
dtype = jnp.bfloat16 if on_gpu else jnp.float32
keys = jax.random.split(jax.random.key(0), 4)
q = jax.random.normal(keys[0], (2, 256, 8, 64), dtype)
k = jax.random.normal(keys[1], (2, 256, 2, 64), dtype)
v = jax.random.normal(keys[2], (2, 256, 2, 64), dtype)
dout = jax.random.normal(keys[3], q.shape, dtype)


@jax.jit
def ours(q, k, v, dout):
    out, pullback = jax.vjp(lambda q, k, v: fa2cupy.attention(q, k, v, causal=True), q, k, v)
    return out, *pullback(dout)


out, dq, dk, dv = ours(q, k, v, dout)


def by_jax(q, k, v):
    # With as many queries as keys both causal masks agree; otherwise JAX aligns its mask with the first query and key,
    # fa2cupy with the last.
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


expected, vjp = jax.vjp(by_jax, *(x.astype(jnp.float32) for x in (q, k, v)))
tolerance = 2e-2 if on_gpu else 1e-5
for name, ours, theirs in zip(
    ("out", "dq", "dk", "dv"), (out, dq, dk, dv), (expected, *vjp(dout.astype(jnp.float32))), strict=True
):
    error = float(jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs))
    print(f"{name:4} {ours.shape} {ours.dtype}: {error:.1e} from JAX")
    assert error < tolerance
