"""From arrays to a launch: validate a new signature once, then repeat it cheaply.

The first call of a signature validates, plans, compiles and leaves a `PreparedCall`; the next ones look it up and run
it.
"""

from __future__ import annotations

from typing import Any

from fa2cupy.frameworks import framework_of
from fa2cupy.operations import Operation
from fa2cupy.options import RawOptions
from fa2cupy.prepared import PREPARED, framework_by_type, signature_key
from fa2cupy.spec import MASK_ARRAYS

__all__ = ["call", "with_mask", "with_seed"]


def call(operation: Operation, arrays: list[Any], workspace: Any, options: RawOptions) -> list[Any]:
    """Run the operation and return the outputs, the caller's or new ones (or whatever held a scratch output).

    arrays: those of `operation.names()`, None for an output to allocate.
    """
    framework = framework_by_type.get(type(arrays[0]))
    if framework is not None:
        try:
            signature, pointers = framework.signature(arrays)
            prepared = PREPARED.get(signature_key(operation, signature, options))
        except Exception:  # unhashable options, mixed frameworks, ...: the first call says what is wrong
            prepared = None
        if prepared is not None:
            return prepared.run(arrays, pointers, workspace)
    from fa2cupy.first_call import first_call

    return first_call(operation, arrays, workspace, options)


def with_seed(arrays: list[Any], extra: tuple[str, ...], like: Any) -> list[Any]:
    """`arrays`, the last ones called `extra`, with what is no array in kind with `like` made one: two numbers for
    dropout_seed, and what `with_mask` does.
    """
    if "dropout_seed" in extra:
        place = len(arrays) - len(extra) + extra.index("dropout_seed")
        framework = framework_of(like) if isinstance(arrays[place], tuple) else None
        if framework is not None:
            arrays[place] = framework.seed(arrays[place], like)
    return with_mask(arrays, extra, like)


def with_mask(arrays: list[Any], extra: tuple[str, ...], like: Any) -> list[Any]:
    """`arrays` with those of a BlockMask of another library's arrays in kind with `like`."""
    if MASK_ARRAYS[0] in extra:
        from fa2cupy.block_mask.arrays import in_kind

        first = len(arrays) - len(extra) + extra.index(MASK_ARRAYS[0])
        own = slice(first, first + len(MASK_ARRAYS))
        arrays[own] = in_kind(arrays[own], like)
    return arrays
