"""tools/binaries.py: what it compares, what it passes over, and what it says."""

from __future__ import annotations

from typing import Any

import pytest

from fa2cupy.jit import Source, compiler
from fa2cupy.kernels import compile_jobs
from tools import binaries

PARTS = {"code": "128:aa", "registers": 168, "spill_bytes": 0}
KEY = ("sm90/flash_fwd.cu", "flash_fwd", "sm_90a", "forward")


def parts(arch: str, index: str, last: int = 8, more: str = "") -> dict[str, str]:
    text = f"""{more}
    constexpr float table[8] = {{1, 2, 3, 4, 5, 6, 7, {last}}};
    extern "C" __global__ void k(float* out, int i) {{ out[threadIdx.x] = table[{index}]; }}
    """
    return binaries.parts(compiler.compile(Source("k.cu", text.encode()), arch, {}).image)


@pytest.mark.parametrize("arch", binaries.ARCHS)
def test_parts_of_a_binary(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant that no code reads counts for nothing; the values of a table that code reads do, and so does code."""
    plain = parts(arch, "3")
    assert plain == parts(arch, "3", more="constexpr int kMore = 6;") and "data" not in plain
    read = parts(arch, "i")
    assert int(read["data"].split(":")[0]) >= 32
    changed = parts(arch, "i", last=9)
    assert binaries.difference(read, changed).startswith("data (")
    assert binaries.difference(plain, parts(arch, "4")).startswith("code (")
    monkeypatch.setenv("FA2CUPY_DEBUG", "1")
    assert parts(arch, "3") == plain, "line information is no difference"


def test_difference() -> None:
    assert binaries.difference(PARTS, dict(PARTS)) == ""
    assert binaries.difference(PARTS, {**PARTS, "code": "128:ab"}) == "code (128 -> 128 bytes)"
    assert binaries.difference(PARTS, {**PARTS, "registers": 170, "spill_bytes": 4}) == (
        "registers 168 -> 170, spill bytes 0 -> 4"
    )
    assert binaries.difference(PARTS, {**PARTS, "data": "8:cc"}) == "data (0 -> 8 bytes)"


def test_compare() -> None:
    other = (*KEY[:3], "another label")
    assert binaries.compare({KEY: PARTS}, {KEY: PARTS}) == ([], [])
    changed: dict[str, Any] = {**PARTS, "registers": 170}
    assert binaries.compare({KEY: PARTS}, {KEY: changed})[0] == [f"differs: {' '.join(KEY)}: registers 168 -> 170"]
    assert binaries.compare({KEY: PARTS}, {}) == ([f"gone: {' '.join(KEY)}"], [])
    assert binaries.compare({}, {KEY: PARTS}) == ([], [f"new: {' '.join(KEY)}"])
    renamed = f"renamed: {' '.join(KEY)} is now {' '.join(other)}"
    assert binaries.compare({KEY: PARTS}, {other: PARTS}) == ([], [renamed])
    wrong, said = binaries.compare({KEY: PARTS}, {other: changed})
    assert wrong == [f"gone: {' '.join(KEY)}"] and said == [f"new: {' '.join(other)}"]


@pytest.mark.parametrize("arch", binaries.ARCHS)
def test_chosen(arch: str) -> None:
    """Every bfloat16 row, and of float16 a part that has a forward and a backward."""
    jobs = compile_jobs(arch, True)
    chosen = [job for job in jobs if binaries.chosen(job, 1)]
    half = [job for job in jobs if not job.defines["FA2_BF16"]]
    taken = [job for job in chosen if not job.defines["FA2_BF16"]]
    assert len(chosen) - len(taken) == len(jobs) - len(half)
    assert len(half) / 16 <= len(taken) <= len(half) / 4
    assert {job.name for job in taken} >= {"flash_fwd", "flash_bwd"}
    assert len({(job.source, job.name, job.arch, job.label) for job in jobs}) == len(jobs)


def test_a_tree_is_compiled_by_a_process_of_its_own() -> None:
    """What the tool knows of a tree is there: this one's; twice the same, the second time from what was kept."""
    every = 150
    wanted = {
        (job.source, job.name, job.arch, job.label)
        for arch in binaries.ARCHS
        for job in compile_jobs(arch, True)
        if binaries.chosen(job, every)
    }
    build, found = binaries.binaries(binaries.ROOT, "this tree", every, 1)
    assert build == compiler.nvrtc_build() and set(found) == wanted and 0 < len(wanted) < 8
    for description in found.values():
        assert int(description["code"].split(":")[0]) > 1000 and 0 < description["registers"] <= 255
    assert binaries.compare(found, binaries.binaries(binaries.ROOT, "this tree", every, 1)[1]) == ([], [])
