"""Attention on a KV cache: what a cache is, and a call on it; both on the CPU. `fa2cupy.kvcache` is the door."""
