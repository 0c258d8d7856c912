"""What the kernels' sources may say: capabilities, never the feature of a user that needs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[1] / "cuda_src"
HOOKS = {"visit", "mask", "score", "dropout", "softmax", "statistics"}  # of common: what belongs to features goes here
OWN = {"flash_bwd_sinks.cu"}  # kernels that are there for one feature
FEATURE = re.compile(
    r"window|alibi|slope|soft_?cap|drop_?out|philox|var_?len|cu_?seqlens|seq_?used|sink|bias|rope|block_?mask|paged|page_",
    re.IGNORECASE,
)
INCLUDE = re.compile(r'^#include "common/(\w+)\.cuh"$', re.MULTILINE)


def kernels() -> list[Path]:
    return [path for folder in ("sm80", "sm90", "smxx") for path in sorted((CUDA / folder).glob("*.cu*"))]


def test_kernels_name_no_feature() -> None:
    named = {}
    for path in (path for path in kernels() if path.name not in OWN):
        words = {match[0] for match in FEATURE.finditer(INCLUDE.sub("", path.read_text()))}
        if words:
            named[path.name] = words
    assert not named, (
        f"{named}: a kernel names a capability (kLeftMask), the feature belongs into one of {sorted(HOOKS)}"
    )


@pytest.mark.parametrize("line", ["if constexpr (kWindow) {", "params.alibi_slopes", "// with dropout", "kVarlen"])
def test_a_feature_would_be_found(line: str) -> None:
    assert FEATURE.search(INCLUDE.sub("", f'#include "common/dropout.cuh"\n{line}\n'))


def test_hooks_are_there_and_used() -> None:
    """Each of them by both families."""
    assert all((CUDA / "common" / f"{name}.cuh").is_file() for name in HOOKS)
    included = {path: set(INCLUDE.findall(path.read_text())) for path in CUDA.rglob("*.cu*")}

    def reached(names: set[str]) -> set[str]:
        while True:
            more = names | {each for name in names for each in included[CUDA / "common" / f"{name}.cuh"]}
            if more == names:
                return names
            names = more

    for folder in ("sm80", "sm90"):
        names = {name for path, found in included.items() if path.parent.name == folder for name in found}
        assert reached(names) >= HOOKS
