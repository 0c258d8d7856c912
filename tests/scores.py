"""softcap, ALiBi, sinks and dropout in tests: drawn as keywords of `attention`, and as the reference has them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

import fa2cupy
from tests.reference import Features, store

NAMES = ("softcap", "alibi_slopes", "alibi of batch", "sinks", "dropout_p")
SEED = (2**63 + 12345, -7)


def draw_features(
    names: Collection[str], seed: int, batch: int, heads: int, dtype: str, *, softcap: float = 1.5, p: float = 0.25
) -> dict[str, Any]:
    """Keywords of `attention` for some of NAMES. Scores of unit variance feel a softcap of 1.5."""
    rng = np.random.default_rng(seed)
    wide = "float64" if dtype == "float64" else "float32"
    keywords: dict[str, Any] = {}
    if "softcap" in names:
        keywords["softcap"] = softcap
    if "alibi_slopes" in names or "alibi of batch" in names:
        shape = (batch, heads) if "alibi of batch" in names else (heads,)
        keywords["alibi_slopes"] = (2.0 ** -rng.uniform(1, 8, shape) * rng.choice([1, 1, 1, -1], shape)).astype(wide)
    if "sinks" in names:
        keywords["sinks"] = store(rng.standard_normal(heads) + 1, dtype if seed % 2 else wide)
    if "dropout_p" in names:
        keywords |= {"dropout_p": p, "dropout_seed": SEED}
    return keywords


def features_of(keywords: dict[str, Any], batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Features:
    """What the reference is told; of dropout the mask for these lengths."""
    p, keep = 0.0, None
    if keywords.get("dropout_p"):
        p = round(keywords["dropout_p"] * 2**15) / 2**15
        keep = fa2cupy.dropout_mask(batch, heads, seqlen_q, seqlen_k, p, keywords["dropout_seed"])
    return Features(keywords.get("softcap"), keywords.get("alibi_slopes"), keywords.get("sinks"), p, keep)
