"""One of two processes of torch's ring attention over our kernels; run by test_torch_distributed.py.

    python -m tests.frameworks.ring_worker RANK PORT

The ring calls CUDA's flash operators. Here they are given our kernels as kernels for the CPU, which has none.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa2cupy
from fa2cupy.torch import takeover

WORLD = 2
OPERATORS = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")


def native(why: str, *_: Any, **__: Any) -> Any:
    raise AssertionError(why)


def main(rank: int, port: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    library = torch.library.Library("aten", "IMPL", "CPU")
    for name in OPERATORS:
        library.impl(name, takeover._OPERATORS["cuda"][name](native), "CPU", with_keyset=True)
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 4, 64, 16) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = functional.scaled_dot_product_attention(*leaves, is_causal=True)
    gradients = torch.autograd.grad(wanted, leaves, dout)
    with ring.context_parallel(mesh, buffers=[q, k, v, dout], buffer_seq_dims=[2] * 4):
        results = ring._scaled_dot_product_ring_flash_attention(mesh, q, k, v, is_causal=True)
        out, lse, length = results[0], results[1], q.shape[2]
        parts = ring._scaled_dot_product_ring_flash_attention_backward(
            mesh, dout, q, k, v, out, lse, None, None, length, length, 0.0, True, results[6], results[7]
        )
        parts = [x.clone() for x in (out, *parts[:3])]
    for got, want in zip(ring.context_parallel_unshard(mesh, parts, [2] * 4), (wanted, *gradients), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert {(row.kernel, row.calls) for row in fa2cupy.report()} == {("fa2cupy", WORLD)}
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
