"""A mask as a picture in text."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NONE", "SOME", "WHOLE", "picture"]

NONE, SOME, WHOLE = "·", "▒", "█"


def picture(seen: npt.NDArray[Any], whole: npt.NDArray[Any], width: int) -> str:
    """Rows of letters: whether any, or all, of what stands there is visible. At most `width` in a line.

    Where several columns are one letter, twice as many rows are, since letters are twice as high as wide.
    """
    rows, columns = seen.shape
    each = max(1, -(-columns // width), -(-rows // (2 * width)))
    high = each if each == 1 else 2 * each
    lines = []
    for top in range(0, rows, high):
        part = slice(top, top + high)
        some = np.logical_or.reduceat(seen[part].any(0), np.arange(0, columns, each)) if columns else ()
        full = np.logical_and.reduceat(whole[part].all(0), np.arange(0, columns, each)) if columns else ()
        lines.append("".join(WHOLE if f else SOME if s else NONE for s, f in zip(some, full, strict=True)))
    return "\n".join(lines)
