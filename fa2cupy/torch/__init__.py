"""fa2cupy for torch beyond `fa2cupy.attention`: SDPA by our kernels, and the operators that tracers see.

`forward_op` and `backward_op` are what a compiled graph, a selective checkpoint policy or a FLOP counter knows
attention by: torch.ops.fa2cupy.forward.default and torch.ops.fa2cupy.backward.default.
"""

from fa2cupy.autograd.operators import backward_op, forward_op
from fa2cupy.torch.dot_product import scaled_dot_product_attention
from fa2cupy.torch.takeover import disable_sdpa, enable_sdpa, sdpa

__all__ = ["backward_op", "disable_sdpa", "enable_sdpa", "forward_op", "scaled_dot_product_attention", "sdpa"]
