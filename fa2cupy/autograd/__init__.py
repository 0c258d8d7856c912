"""`fa2cupy.attention` on torch tensors: which way a call goes, autograd, operators for whoever traces.

Imports torch, so only what has a tensor imports this. `fa2cupy.torch` has the functions for users.
"""
