"""Whether the installed transformers asks for masks as `masks` reads them: its versions differ, so it is asked once.

Its own functions build small masks, for us and for SDPA, and both must let the same keys be seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import masking_utils

from fa2cupy.transformers import masks

__all__ = ["objection"]

_NAME = "fa2cupy.probe"
_WINDOW = 3
_PACKED = [[0, 1, 2, 3, 4, 0, 1]]
_PADDED = [[0, 1, 1, 1, 1, 1, 1]]


@functools.cache
def objection() -> str:
    """What is not as expected, or nothing."""
    version = f"transformers {transformers.__version__}"
    try:
        wrong = [what for what, asked in _requests() if not _agrees(asked)]
    except Exception as error:  # of functions that are not those that we know, whatever it is
        return f"{version} asks for masks in a way that is not known: {type(error).__name__}: {error}"
    return f"{version} means by its masks what no known version does: {', '.join(wrong)}" if wrong else ""


def _requests() -> Iterator[tuple[str, dict[str, Any]]]:
    """What a model's masks are asked with."""
    asked: list[dict[str, Any]] = []

    def spy(*unnamed: Any, **arguments: Any) -> None:
        if unnamed:
            raise TypeError("arguments without names")
        asked.append(arguments)

    config = SimpleNamespace(_attn_implementation=_NAME, sliding_window=_WINDOW, is_causal=True)
    masking_utils.AttentionMaskInterface.register(_NAME, spy)
    packed, padded = (torch.tensor(rows, device="cpu") for rows in (_PACKED, _PADDED))
    embeddings = torch.zeros(1, packed.shape[1], 1, device="cpu")
    for build in (masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask):
        build(config, embeddings, None, None)
        build(config, embeddings, padded, None)
        build(config, embeddings, None, None, position_ids=packed)
        yield from _named(build, asked, 3)
    for build in (masking_utils.create_bidirectional_mask, masking_utils.create_bidirectional_sliding_window_mask):
        build(config, embeddings, None)
        build(config, embeddings, padded)
        yield from _named(build, asked, 2)


def _named(build: Callable[..., Any], asked: list[dict[str, Any]], count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if len(asked) != count:
        raise TypeError(f"{build.__name__} called the mask interface {len(asked)} times of {count}")
    for kind, arguments in zip(("whole", "padded", "packed"), asked, strict=False):
        yield f"{build.__name__}, {kind}", arguments
    asked.clear()


def _agrees(asked: dict[str, Any]) -> bool:
    """Ours, and what would be traced, against SDPA's mask; one that is not ours is SDPA's in any case."""
    wanted = masking_utils.sdpa_mask(**{**asked, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    got = masks.mask(**asked)
    length = asked["q_length"]
    pattern = masks.pattern_of(asked["mask_function"])
    bidirectional = "allow_is_bidirectional_skip" in asked
    traced = masks._traced_pattern(
        asked["mask_function"], asked.get("local_size"), bidirectional, False,
        asked.get("attention_mask") is None and not asked.get("allow_is_causal_skip", True),
    )  # fmt: skip
    if pattern is None or traced != pattern:
        return pattern is None and traced is None
    if got is not None and not masks.is_ours(got):
        return bool(torch.equal(got, wanted))
    keys = masks.Keys(not bidirectional) if got is None else masks.read(got)
    seen = masks.dense(keys, length, length, "cpu")
    tokens = asked.get("attention_mask")
    kept = slice(None) if tokens is None else tokens[0]
    seen = torch.ones_like(wanted) if seen is None else seen.expand_as(wanted)
    return bool(torch.equal(seen[:, :, kept], wanted[:, :, kept]))
