"""The backward of sequences whose lengths only the device knows, in every main kernel, run on the CPU."""

from __future__ import annotations

import pytest

from tests.host.packed_run import PackedCase, check, lengths

# Queries and keys, and rows that are not used: behind the queries, in front of and behind the keys.
MIXED = lengths((70, 70), (0, 0), (130, 40), (3, 200, 0, 5, 7), (0, 33), (65, 0, 4), (1, 1), (200, 260, 9, 0, 1))


@pytest.mark.parametrize("causal", [False, True])
def test_sm80(causal: bool) -> None:
    check(PackedCase(MIXED, 64, "sm_80", causal=causal, behind=5), True)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_sm90(head_dim: int) -> None:
    check(PackedCase(MIXED, head_dim, "sm_90", causal=head_dim != 128, behind=5), True)
