"""fa2cupy for JAX: under jit, grad, vmap, scan, remat and shardings, through one FFI target.

`attention` is `fa2cupy.attention`, which takes JAX arrays, traced ones too. `dot_product_attention` has the
signature of `jax.nn.dot_product_attention`, `flax_attention` that of flax's `attention_fn`. `dropout_seed` makes of a
key the seed of a part of a batch. Names for remat policies: "attention_out" and "attention_lse"
(`jax.checkpoint_policies.save_only_these_names`).
"""

from fa2cupy.attention import attention, attention_backward
from fa2cupy.jax.drop_ins import dot_product_attention, flax_attention
from fa2cupy.jax.ring import ring_attention
from fa2cupy.jax.seeds import dropout_seed
from fa2cupy.merge import merge_attention
from fa2cupy.xla import ffi
from fa2cupy.xla.ffi import TARGET

__all__ = [
    "TARGET",
    "attention",
    "attention_backward",
    "dot_product_attention",
    "dropout_seed",
    "flax_attention",
    "merge_attention",
    "ring_attention",
]

ffi.register()  # so that importing this is enough for what another process exported or compiled
