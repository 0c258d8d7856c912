"""fa2cupy for torch beyond `fa2cupy.attention`: SDPA by our kernels, and the operators that tracers see.

`forward_op` and `backward_op` are what a compiled graph, a selective checkpoint policy or a FLOP counter knows
attention by: torch.ops.fa2cupy.forward.default and torch.ops.fa2cupy.backward.default. `forward_ops` and `backward_ops`
are all of them: with those of flash_attn's packed functions, forward_kv, forward_qkv and so on.
"""

from fa2cupy.autograd.operators import backward_op, backward_ops, forward_op, forward_ops
from fa2cupy.torch.dot_product import scaled_dot_product_attention
from fa2cupy.torch.takeover import disable_sdpa, enable_sdpa, sdpa

__all__ = [
    "backward_op",
    "backward_ops",
    "disable_sdpa",
    "enable_sdpa",
    "forward_op",
    "forward_ops",
    "scaled_dot_product_attention",
    "sdpa",
]
