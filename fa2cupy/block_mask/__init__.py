"""Which keys queries see, by blocks of 128 x 128: empty, full, or partial with a bit for each element.

`lists.py` is what the kernels read, `tiles.py` what it is made of, `build.py` makes one of the other: classify, count,
scan, write, in NumPy. `mask.py` is the class for users.
"""

from fa2cupy.block_mask.mask import BlockMask

__all__ = ["BlockMask"]
