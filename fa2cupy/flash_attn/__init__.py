"""flash_attn's functions, computed by fa2cupy: `from fa2cupy.flash_attn import flash_attn_func`, one import changed.

Or no import: `fa2cupy.install_as_flash_attn()` serves these modules under flash_attn's names. Names, arguments, their
order and what is returned are flash_attn 2.8's; what fa2cupy lacks is refused with its name.
"""

import fa2cupy
from fa2cupy.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from fa2cupy.install import FLASH_ATTN_VERSION

__version__ = FLASH_ATTN_VERSION
__fa2cupy__ = fa2cupy.__version__  # who this is: a real flash_attn has no such name

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
