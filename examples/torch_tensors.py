"""PyTorch tensors in, PyTorch tensors out, without a copy, on the tensors' device and its current stream."""

import torch

import fa2cupy

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
torch.manual_seed(0)
q = torch.randn(2, 256, 8, 64, device=device, dtype=dtype)
k, v = (torch.randn(2, 256, 2, 64, device=device, dtype=dtype) for _ in range(2))
dout = torch.randn_like(q)

# Gradients are explicit: attention_backward returns them, and autograd stays out of it.
with torch.no_grad():
    out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)
    dq, dk, dv = fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=True)

# The same by PyTorch, whose layout is (batch, heads, seqlen, head_dim). With as many queries as keys both causal masks
# agree; otherwise PyTorch aligns its mask with the first query and key, fa2cupy with the last.
references = [x.detach().float().requires_grad_() for x in (q, k, v)]
expected = torch.nn.functional.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in references), is_causal=True, enable_gqa=True
).transpose(1, 2)
expected.backward(dout.float())

tolerance = 2e-2 if device == "cuda" else 1e-5
for name, ours, theirs in zip(
    ("out", "dq", "dk", "dv"),
    (out, dq, dk, dv),
    (expected.detach(), *(x.grad for x in references)),
    strict=True,
):
    error = ((ours.float() - theirs).norm() / theirs.norm()).item()
    print(f"{name:4} {tuple(ours.shape)} {ours.dtype} on {ours.device}: {error:.1e} from PyTorch")
    assert error < tolerance
