"""The keywords of one call: what is checked once, and what a call may ask for beyond dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fa2cupy.block_mask import BlockMask
from fa2cupy.checks import GRADIENTS, check_grad_of, check_hint, shown
from fa2cupy.declared import BESIDE_BLOCK_MASK, RIGHT_OF_CAUSAL
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks.base import TensorRef
from fa2cupy.keywords import KEYWORDS, is_neutral, not_supported, too_many_by_position, unknown
from fa2cupy.spec import MASK_ARRAYS

__all__ = ["Options", "RawOptions", "given", "gradients"]

# What a call was given, of any type, in the order of the fields of `Options`: part of its signature.
RawOptions = tuple[object, object, object, object, object, tuple[tuple[str, Any], ...]]


@dataclass(frozen=True, slots=True)
class Options:
    """The keywords of a call, checked; arrays are not among them.

    dtype: what uint16 arrays hold, or None. features: (name, value) of the options beyond dense attention that were
    given, in the table's order, their values checked and hashable.
    """

    causal: bool
    softmax_scale: float | None
    layout: str
    dtype: str | None
    deterministic: bool = False
    features: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def checked(
        cls,
        causal: object,
        softmax_scale: object,
        layout: object,
        dtype: object,
        deterministic: object = False,
        features: tuple[tuple[str, Any], ...] = (),
    ) -> Options:
        """From what the user gave, of any type. `features`: from `given`, which has checked them one by one; what two
        keywords cannot be together is checked here.
        """
        options = cls(
            layout=_checked("layout", layout),
            dtype=_checked("dtype", dtype),
            causal=_checked("causal", causal),
            softmax_scale=_checked("softmax_scale", softmax_scale),
            deterministic=_checked("deterministic", deterministic),
            features=features,
        )
        window = dict(features).get("window_size")
        if options.causal and window is not None and window[1] > 0:
            raise RIGHT_OF_CAUSAL.error(value=window)
        if "mask" in dict(features):  # a BlockMask's shape
            if options.causal:
                raise BESIDE_BLOCK_MASK.error(name="causal", value=True)
            if window is not None:
                raise BESIDE_BLOCK_MASK.error(name="window_size", value=window)
        return options

    def dtype_of(self, ref: TensorRef) -> str:
        """The dtype that the elements of a 16-bit array hold, for an argument whose own dtype may be uint16."""
        return self.dtype if ref.dtype == "uint16" and self.dtype is not None else ref.dtype


def _checked(name: str, value: object) -> Any:
    check = KEYWORDS[name].check
    assert check is not None
    return check(name, value)


def given(
    function: str,
    arrays: list[Any],
    options: RawOptions,
    positional: tuple[object, ...],
    keywords: dict[str, Any],
) -> tuple[tuple[str, ...], list[Any], RawOptions]:
    """A dense call with all the rest that `function` was given: the names by which `Operation.extended` extends the
    operation (which is left to the caller: torch.compile traces this, and makes no operations), arrays and options.

    With nothing but neutral values it is the dense call itself. Raises for what the function does not take.
    """
    if positional:
        raise too_many_by_position(function, positional)
    features: list[tuple[str, Any]] = []
    extra: list[tuple[str, Any]] = []
    for name in keywords:
        if name not in KEYWORDS or function not in KEYWORDS[name].functions:
            raise unknown(function, name)
    order = list(KEYWORDS)
    for name in sorted(keywords, key=order.index):
        keyword, value = KEYWORDS[name], keywords[name]
        if is_neutral(keyword, value):
            continue
        if not keyword.since:
            raise not_supported(function, keyword, value)
        if keyword.hint:
            check_hint(name, value)
        elif isinstance(value, BlockMask):
            if name != "mask":
                raise InvalidType(f"{name} is a BlockMask: mask= takes one")
            extra.extend(zip(MASK_ARRAYS, value.lists.arrays(), strict=True))
            features.append((name, value.shape))
        elif keyword.check is None:
            extra.append((name, value))
        elif keyword.arrays:
            extra.extend(zip(keyword.arrays, keyword.check(name, value), strict=True))
        else:
            checked = keyword.check(name, value)
            if checked is not None:
                features.append((name, checked))
    _match_seed(extra, features, keywords)
    if not extra and not features:
        return (), arrays, options
    names = tuple(name for name, _ in extra)
    return names, [*arrays, *(array for _, array in extra)], (*options[:5], tuple(features))


def _match_seed(extra: list[tuple[str, Any]], features: list[tuple[str, Any]], keywords: dict[str, Any]) -> None:
    """A seed goes with a probability: one that nothing is dropped by is left out, of both."""
    if "dropout_p" not in dict(features):
        extra[:] = [each for each in extra if each[0] != "dropout_seed"]
    elif "dropout_seed" not in dict(extra):
        p = shown("dropout_p", keywords["dropout_p"])
        raise InvalidArgument(f"{p} is given without dropout_seed=(seed, offset), which is needed")


def gradients(keywords: dict[str, Any]) -> tuple[tuple[str, ...], list[Any]]:
    """What a backward was asked for beyond dq, dk and dv, and taken out of its keywords: names of outputs, in the order
    of grad_of, and the arrays that were given for them, or None.
    """
    asked = keywords.pop("grad_of", None)
    wanted = () if is_neutral(KEYWORDS["grad_of"], asked) else check_grad_of("grad_of", asked)
    for name in wanted:
        if keywords.get(name) is None:
            raise InvalidArgument(f"grad_of={wanted!r} names {name!r}, and {name} is not given")
    given_arrays = {output: keywords.pop(output, None) for output in GRADIENTS.values()}
    for name, output in GRADIENTS.items():
        if name not in wanted and given_arrays[output] is not None:
            raise InvalidArgument(f"{output} is given, and grad_of does not name {name!r}")
    names = tuple(GRADIENTS[name] for name in wanted)
    return names, [given_arrays[name] for name in names]
