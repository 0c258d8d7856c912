"""flash_attn.ops.triton: rotary, in torch."""
