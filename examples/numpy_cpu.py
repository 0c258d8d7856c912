"""NumPy arrays in, NumPy arrays out: the same tiled algorithm on the CPU, with no GPU, CuPy or CUDA installed."""

import numpy as np

import fa2cupy

rng = np.random.default_rng(0)
q = rng.standard_normal((1, 100, 4, 32))  # float64 on the CPU: a reference to trust
k, v = (rng.standard_normal((1, 300, 4, 32)) for _ in range(2))

# More keys than queries: the mask is aligned bottom-right, so the last query sees every key and the first 201 of them.
out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)

# Check one head against the formula.
scores = q[0, :, 0] @ k[0, :, 0].T / np.sqrt(32)
scores[~np.tri(100, 300, 300 - 100, dtype=bool)] = -np.inf
p = np.exp(scores - lse[0, 0][:, None])  # lse is all that is kept of the scores
assert np.allclose(p.sum(axis=1), 1)
assert np.allclose(out[0, :, 0], p @ v[0, :, 0])

# Gradients, checked by a step along a random direction.
dout = rng.standard_normal(out.shape)
dq, dk, dv = fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=True)
direction, step = rng.standard_normal(k.shape), 1e-6
difference = (
    fa2cupy.attention(q, k + step * direction, v, causal=True)
    - fa2cupy.attention(q, k - step * direction, v, causal=True)
) / (2 * step)
assert np.isclose((difference * dout).sum(), (dk * direction).sum(), rtol=1e-6)
print(f"out {out.shape}, lse {lse.shape}, dq {dq.shape}, dk {dk.shape}, dv {dv.shape}: as the formula says")
