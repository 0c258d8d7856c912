"""Functions of the user's own, of a mask or of a score: traced by their operators into CUDA, and into NumPy.

`rebind.py` gives a function's arrays other values, `values.py` is what it computes with while it is traced, `graph.py`
what is left of it: a list of the operations of `operations.py`. From there `cuda.py` writes text, and `evaluate.py`
computes. `text.py` looks at text that the user wrote, `function.py` is what the rest of the package uses.
"""

from fa2cupy.tracing.function import MASK, SCORE, Capture, Kind, UserFunction

__all__ = ["MASK", "SCORE", "Capture", "Kind", "UserFunction"]
