"""fa2cupy for torch beyond `fa2cupy.attention`: SDPA by our kernels, and the operators that tracers see.

`forward_op` and `backward_op` are what a compiled graph, a selective checkpoint policy or a FLOP counter knows
attention by: torch.ops.fa2cupy.forward.default and torch.ops.fa2cupy.backward.default.
"""

from fa2cupy.torch.operators import backward_op, forward_op

__all__ = ["backward_op", "forward_op"]
