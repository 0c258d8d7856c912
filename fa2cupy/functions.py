"""Functions for mask_mod and score_mod: traced where they are, and NumPy's elsewhere.

NumPy's own do as well, as far as it has them: numpy.where, numpy.exp, ... of a traced value are traced.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fa2cupy.tracing.values import CapturedArray, Value

__all__ = ["abs", "clip", "exp", "floor", "log", "maximum", "minimum", "sigmoid", "sqrt", "tanh", "where"]

abs = np.abs
clip = np.clip
exp = np.exp
floor = np.floor
log = np.log
maximum = np.maximum
minimum = np.minimum
sqrt = np.sqrt
tanh = np.tanh
where = np.where


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))"""
    if isinstance(x, (Value, CapturedArray)):
        return x._apply("sigmoid", x)
    return 1 / (1 + np.exp(-x))
