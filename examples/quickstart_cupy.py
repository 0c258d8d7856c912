"""CuPy arrays in, CuPy arrays out: forward, backward, grouped queries. Without a GPU the same runs on NumPy arrays."""

import numpy as np

import fa2cupy

try:
    import cupy

    on_gpu = cupy.cuda.runtime.getDeviceCount() > 0
except Exception:  # no CuPy, no driver or no GPU
    on_gpu = False

batch, seqlen, num_heads, num_heads_k, head_dim = 2, 512, 8, 2, 64
rng = np.random.default_rng(0)


def random(heads, dtype=np.float16):
    x = rng.standard_normal((batch, seqlen, heads, head_dim), dtype=np.float32).astype(dtype)
    return cupy.asarray(x) if on_gpu else x


# (batch, seqlen, heads, head_dim). Four query heads share each key and value head.
q, k, v = random(num_heads), random(num_heads_k), random(num_heads_k)

out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)

dout = random(num_heads)
dq, dk, dv = fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=True)

print(f"{type(out).__module__}: out {out.shape} {out.dtype}, lse {lse.shape} {lse.dtype}")
print(f"dq {dq.shape}, dk {dk.shape}, dv {dv.shape}")
assert out.shape == q.shape and dk.shape == k.shape

# The first query of a causal attention sees one key, so it returns that key's value.
assert abs(out[:, 0, 0] - v[:, 0, 0]).max() < 1e-2

# float32 and float64 as they come, in their own accuracy: rows of P add up to 1.
for dtype in (np.float32, np.float64):
    q, k = random(num_heads, dtype), random(num_heads_k, dtype)
    out = fa2cupy.attention(q, k, abs(k) * 0 + 1)
    print(f"{out.dtype}: off by {float(abs(out - 1).max()):.0e}")
    assert abs(out - 1).max() < 16 * np.finfo(dtype).eps
