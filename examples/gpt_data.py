"""What the GPT examples learn: the bytes of Python's own sources, in an order that a seed decides."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def tokens() -> np.ndarray:
    """The bytes of the standard library's sources, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "idle_test"}
    paths = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    data = b"\n".join(path.read_bytes() for path in paths)
    print(f"{len(data) / 1e6:.1f} MB of sources, sha256 {hashlib.sha256(data).hexdigest()[:16]}")
    return np.frombuffer(data, np.uint8)


def batches(data: np.ndarray, seed: int, batch: int, length: int) -> Iterator[np.ndarray]:
    """(batch, length + 1) int64 without end: the tokens, and the next of each."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(data) - length - 1, batch)
        yield np.stack([data[start : start + length + 1] for start in starts]).astype(np.int64)


if __name__ == "__main__":
    print(bytes(next(batches(tokens(), 0, 1, 200))[0].astype(np.uint8)).decode(errors="replace"))
