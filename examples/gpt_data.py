"""The GPT examples' sizes, and what they learn: the bytes of Python's own sources, in an order that a seed decides."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# layers, width, heads, sequence, batch
SHAPES = {
    "tiny": (2, 64, 4, 128, 2),
    "124m": (12, 768, 12, 1024, 8),
    "2k": (12, 2048, 16, 2048, 8),
    "8k": (12, 2048, 16, 8192, 2),
}
VOCABULARY = 50304  # GPT-2's, padded; 256 would do for bytes, and does for "tiny"


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
