"""JAX's way in, under every transformation: `door.py` checks, `transforms.py` transforms, `ffi.py` is what XLA calls.

Imports jax, so only what has a JAX array imports this. `fa2cupy.jax` has the functions for users.
"""
