"""The lists of a BlockMask, by loops over blocks and elements: what builders have to make of a dense mask."""

from __future__ import annotations

import numpy as np

from fa2cupy.block_mask.lists import BLOCK, BlockLists


def expected_lists(dense: np.ndarray) -> BlockLists:
    """Of (batch, heads, seqlen_q, seqlen_k)."""
    sq, sk = dense.shape[2:]
    masks = dense.reshape(dense.shape[0] * dense.shape[1], sq, sk)
    rows, columns = -(-sq // BLOCK), -(-sk // BLOCK)
    kinds = np.zeros((len(masks), rows, columns), int)  # 0 empty, 1 partial, 2 full
    numbers = np.full(kinds.shape, -1)
    bits = []
    for g, mask in enumerate(masks):
        for m in range(rows):
            for n in range(columns):
                part = mask[m * BLOCK :, n * BLOCK :][:BLOCK, :BLOCK]
                if part.any():
                    kinds[g, m, n] = 2 if part.all() and part.shape[1] == BLOCK else 1
                if kinds[g, m, n] == 1:
                    numbers[g, m, n] = len(bits)
                    bits.append(_bits(part))
    rows_q, entries_q, _ = _lists(kinds, numbers)
    rows_k, entries_k, places = _lists(kinds.swapaxes(1, 2), numbers.swapaxes(1, 2))
    ranks = np.array([int((kinds[g, m, :n] != 0).sum()) for g, n, m in places], np.int32)
    words = np.array(bits, np.uint32).reshape(-1, 2, BLOCK, 4).view(np.int32)
    return BlockLists(rows_q, entries_q, rows_k, entries_k, ranks, words)


def _lists(kinds: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int]]]:
    """Rows, entries, and where each entry stands: (mask, row, column)."""
    table, entries, places = [], [], []
    for g, mask in enumerate(kinds):
        counts = [int((row != 0).sum()) for row in mask]
        order = sorted(range(len(mask)), key=lambda row, counts=counts: (-counts[row], row))
        for r, row in enumerate(mask):
            table.append([len(entries), int((row == 1).sum()), int((row == 2).sum()), order[r]])
            for kind in (1, 2):
                for column in np.flatnonzero(row == kind).tolist():
                    entries.append([column, numbers[g, r, column]])
                    places.append((g, r, column))
    shape = (*kinds.shape[:2], 4)
    return np.array(table, np.int32).reshape(shape), np.array(entries, np.int32).reshape(-1, 2), places


def _bits(part: np.ndarray) -> np.ndarray:
    """By the rule: bit 2j + e of word (r, t) is column 8j + 2t + e."""
    whole = np.zeros((BLOCK, BLOCK), bool)
    whole[: part.shape[0], : part.shape[1]] = part
    words = np.zeros((2, BLOCK, 4), np.uint32)
    for layout, each in enumerate((whole, whole.T)):
        for j in range(16):
            for t in range(4):
                for e in range(2):
                    words[layout, :, t] |= each[:, 8 * j + 2 * t + e].astype(np.uint32) << np.uint32(2 * j + e)
    return words


def same_lists(got: BlockLists, expected: BlockLists) -> bool:
    """Every array, as far as it is in use."""
    for name, a, b in zip(BlockLists.__annotations__, got.arrays(), expected.arrays(), strict=True):
        a = np.asarray(a)
        if name in ("entries_q", "entries_k", "ranks", "bits"):
            a = a[: len(b)]
        if a.dtype != np.int32 or a.shape != b.shape or not (a == b).all():
            return False
    return True
