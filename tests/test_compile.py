"""Every row of the tile tables compiles, without a spill that its row does not declare, and without a warning, to the
binary that it was (digests.py).

With NVRTC 12.9 and 13.0, whichever CuPy is installed (`python -m tests.nvrtc` fetches what is missing), and without a
GPU. `make test` compiles few rows (compile_worker.jobs_of), `make compile-all` everything; the kernel cache keeps it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fa2cupy.cached.problem import Rotary
from fa2cupy.jit import DeviceInfo, compile_many
from fa2cupy.kernels import CompileJob, cache_params, compile_jobs, plan_backward, plan_forward, planner
from fa2cupy.kernels.params import BwdParams, BwdTmaParams, FwdParams, FwdTmaParams, ListParams, composed
from fa2cupy.kernels.sm80 import flash_decode
from fa2cupy.kernels.tiles import shared_memory_class
from fa2cupy.mask_spec import PickedParams
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import DropoutParams, DropoutSpec, ScoreParams, ScoreSpec, SinksParams, SinksSpec, WindowParams
from tests import digests, nvrtc
from tests.compile_worker import ARCHS, compile_rows, jobs_of

# Largest dynamic plus static shared memory of a block, bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_90a": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
}

_STRUCTS = {
    "sm80/flash_fwd.cu": FwdParams,
    "sm80/flash_bwd.cu": BwdParams,
    "sm90/flash_fwd.cu": FwdTmaParams,
    "sm90/flash_bwd.cu": BwdTmaParams,
    "sm90/flash_bwd_wide.cu": BwdTmaParams,
}

each_nvrtc_and_arch = pytest.mark.parametrize(
    ("release", "arch"), [(release, arch) for arch in ARCHS for release in nvrtc.DISTRIBUTIONS]
)


def objections(row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled row, in words."""
    found = []
    if row["error"]:
        found.append(row["error"])
    if row["spill_bytes"] > row["allowed_spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes, its row declares {row['allowed_spill_bytes']}")
    if row["registers"] > 255:
        found.append(f"uses {row['registers']} registers")
    limit = SHARED_MEMORY[row["arch"]]
    if row["shared_mem_bytes"] > limit:
        found.append(f"needs {row['shared_mem_bytes']} bytes of shared memory: at most {limit} on {row['arch']}")
    found += row["warnings"]
    return [f"{row['arch']} {row['name']} {row['label']}: {objection}" for objection in found]


def check(release: str, arch: str, which: str) -> None:
    build, rows = compile_rows(release, arch, which)
    assert rows
    found = [objection for row in rows for objection in objections(row)]
    recorded = (f"{job.arch} {job.source} {job.label}" for job in jobs_of(release, arch, "sample"))
    found += digests.objections(build, arch, rows, () if which == "all" else set(recorded))
    assert not found, "\n" + "\n".join(found)


@each_nvrtc_and_arch
def test_few_rows(release: str, arch: str) -> None:
    check(release, arch, "few")


@pytest.mark.slow
@each_nvrtc_and_arch
def test_all_rows(release: str, arch: str) -> None:
    check(release, arch, "all")


# Of kernels with a band, by architecture, source and head_dim: what they spill beyond what their row declares, with
# either release. Addresses and bounds of the loop, not scores, but for sm80/flash_fwd.cu.
_BAND_SPILLS = {
    ("sm_90a", "sm90/flash_bwd.cu", 128): 28,
    ("sm_90a", "sm90/flash_bwd_wide.cu", 256): 12,
    ("sm_80", "sm80/flash_fwd.cu", 64): 140,
    ("sm_80", "sm80/flash_fwd.cu", 256): 24,
    ("sm_90", "sm80/flash_fwd.cu", 64): 92,
    ("sm_90", "sm80/flash_fwd.cu", 96): 8,
    ("sm_90", "sm80/flash_fwd.cu", 128): 36,
    ("sm_90", "sm80/flash_fwd.cu", 192): 16,
    ("sm_120", "sm80/flash_bwd.cu", 256): 12,
}


def band_jobs(arch: str) -> list[CompileJob]:
    """Every row of the main kernels as it is compiled for a window."""
    jobs = []
    for job in compile_jobs(arch, True):
        struct = _STRUCTS.get(job.source)
        masked = job.source == "sm90/flash_fwd.cu"  # whose windows take the rows of causal problems
        if struct is None or not job.defines["FA2_BF16"] or job.defines["FA2_CAUSAL"] != masked:
            continue
        size = ctypes.sizeof(composed(struct, (WindowParams,)))
        defines = {**job.defines, "FA2_CAUSAL": 0, "FA2_BAND": 1, "FA2_PARAMS_BYTES": size}
        more = _BAND_SPILLS.get((job.arch, job.source, int(job.defines["FA2_HEAD_DIM"])), 0)
        allowed = job.allowed_spill_bytes + more
        jobs.append(dataclasses.replace(job, defines=defines, label=f"{job.label} band", allowed_spill_bytes=allowed))
    return jobs


# Of kernels whose scores become others, by architecture, source and head_dim: likewise, whatever becomes of them.
_SCORE_SPILLS = {
    ("sm_90a", "sm90/flash_fwd.cu", 256): 44,
    ("sm_90a", "sm90/flash_bwd.cu", 128): 184,
    ("sm_90a", "sm90/flash_bwd_wide.cu", 192): 48,
    ("sm_90a", "sm90/flash_bwd_wide.cu", 256): 124,
    ("sm_90", "sm80/flash_fwd.cu", 128): 16,
    ("sm_90", "sm80/flash_fwd.cu", 192): 12,
    ("sm_90", "sm80/flash_bwd.cu", 80): 64,
    ("sm_90", "sm80/flash_bwd.cu", 256): 20,
    ("sm_80", "sm80/flash_fwd.cu", 128): 24,
    ("sm_80", "sm80/flash_fwd.cu", 192): 8,
    ("sm_80", "sm80/flash_fwd.cu", 256): 12,
    ("sm_120", "sm80/flash_bwd.cu", 64): 16,
    ("sm_120", "sm80/flash_bwd.cu", 256): 4,
}
SCORES = {
    "softcap": {"FA2_SOFTCAP": 1},
    "alibi": {"FA2_ALIBI": 1},
    "softcap alibi": {"FA2_SOFTCAP": 1, "FA2_ALIBI": 1},
}


def score_jobs(arch: str, scores: str) -> list[CompileJob]:
    """Every row of the main kernels that has room, as it is compiled for scores that become others."""
    jobs = []
    for job in compile_jobs(arch, True):
        struct = _STRUCTS.get(job.source)
        if struct is None or not job.defines["FA2_BF16"] or not has_room(job):
            continue
        size = ctypes.sizeof(composed(struct, (ScoreParams,)))
        defines = {**job.defines, **SCORES[scores], "FA2_PARAMS_BYTES": size}
        more = _SCORE_SPILLS.get((job.arch, job.source, int(job.defines["FA2_HEAD_DIM"])), 0)
        label, allowed = f"{job.label} {scores}", job.allowed_spill_bytes + more
        jobs.append(dataclasses.replace(job, defines=defines, label=label, allowed_spill_bytes=allowed))
    return jobs


# Of kernels that drop some of P, by architecture, source, head_dim, and whether one by one: likewise.
_DROPOUT_SPILLS = {
    ("sm_90a", "sm90/flash_fwd.cu", 128, False): 46,
    ("sm_90a", "sm90/flash_fwd.cu", 192, False): 164,
    ("sm_90a", "sm90/flash_fwd.cu", 256, False): 228,
    ("sm_90a", "sm90/flash_fwd.cu", 256, True): 116,
    ("sm_90a", "sm90/flash_bwd.cu", 128, False): 80,
    ("sm_90a", "sm90/flash_bwd.cu", 128, True): 108,
    ("sm_90a", "sm90/flash_bwd_wide.cu", 192, False): 32,
    ("sm_90a", "sm90/flash_bwd_wide.cu", 192, True): 92,
    ("sm_90a", "sm90/flash_bwd_wide.cu", 256, False): 112,
    ("sm_90a", "sm90/flash_bwd_wide.cu", 256, True): 128,
    ("sm_90", "sm80/flash_fwd.cu", 192, False): 20,
    ("sm_90", "sm80/flash_fwd.cu", 192, True): 24,
    ("sm_90", "sm80/flash_fwd.cu", 256, True): 20,
    ("sm_90", "sm80/flash_bwd.cu", 80, False): 76,
    ("sm_90", "sm80/flash_bwd.cu", 96, False): 48,
    ("sm_90", "sm80/flash_bwd.cu", 96, True): 28,
    ("sm_90", "sm80/flash_bwd.cu", 192, False): 20,
    ("sm_90", "sm80/flash_bwd.cu", 192, True): 32,
    ("sm_80", "sm80/flash_fwd.cu", 192, False): 24,
    ("sm_80", "sm80/flash_fwd.cu", 192, True): 60,
    ("sm_80", "sm80/flash_fwd.cu", 256, False): 44,
    ("sm_80", "sm80/flash_fwd.cu", 256, True): 20,
    ("sm_80", "sm80/flash_bwd.cu", 64, False): 32,
    ("sm_80", "sm80/flash_bwd.cu", 64, True): 48,
    ("sm_80", "sm80/flash_bwd.cu", 128, False): 28,
    ("sm_80", "sm80/flash_bwd.cu", 128, True): 52,
    ("sm_80", "sm80/flash_bwd.cu", 256, False): 12,
    ("sm_80", "sm80/flash_bwd.cu", 256, True): 24,
    ("sm_86", "sm80/flash_fwd.cu", 128, True): 12,
    ("sm_86", "sm80/flash_fwd.cu", 256, True): 20,
    ("sm_120", "sm80/flash_bwd.cu", 64, True): 24,
    ("sm_120", "sm80/flash_bwd.cu", 256, False): 4,
    ("sm_120", "sm80/flash_bwd.cu", 256, True): 4,
}


def dropout_jobs(arch: str, one_by_one: bool) -> list[CompileJob]:
    """Every row of the main kernels that has room, as it is compiled for dropout. one_by_one: rows are left out."""
    jobs = []
    for job in compile_jobs(arch, True):
        struct = _STRUCTS.get(job.source)
        if struct is None or not job.defines["FA2_BF16"] or not has_room(job):
            continue
        spec = DropoutSpec(threshold=8192, words=4, moves=one_by_one)
        defines = {
            **job.defines,
            **spec.defines(),
            "FA2_PARAMS_BYTES": ctypes.sizeof(composed(struct, (DropoutParams,))),
        }
        more = _DROPOUT_SPILLS.get((job.arch, job.source, int(job.defines["FA2_HEAD_DIM"]), one_by_one), 0)
        label, allowed = f"{job.label} dropout{' one by one' * one_by_one}", job.allowed_spill_bytes + more
        jobs.append(dataclasses.replace(job, defines=defines, label=label, allowed_spill_bytes=allowed))
    return jobs


def has_room(job: CompileJob) -> bool:
    """Whether the row that a job of a main kernel is for has room for hooks."""
    numbers = {name: int(value) for name, value in job.defines.items() if str(value).isdigit()}
    tile = tuple(numbers[f"FA2_{name}"] for name in ("BLOCK_M", "BLOCK_N", "NUM_WARPS"))
    kernel: Any = next(each for each in (*planner.FORWARD, *planner.BACKWARD) if each._KERNEL[0] == job.source)
    rows = [row for table in vars(kernel).values() for row in _rows(table) if isinstance(row, kernel.ROW)]
    fits = [row for row in rows if (row.block_m, row.block_n, row.num_warps) == tile]
    return min((row for row in fits if row.head_dim >= numbers["FA2_HEAD_DIM"]), key=lambda row: row.head_dim).room


def _rows(table: Any) -> list[Any]:
    if isinstance(table, dict):
        return [row for each in table.values() for row in _rows(each)]
    return list(table) if isinstance(table, tuple) else []


# Of kernels that take tiles from lists, by architecture, source, head_dim, and whether there is a band: likewise.
_LIST_SPILLS = {
    ("sm_80", "sm80/flash_fwd.cu", 64, True): 144,
    ("sm_80", "sm80/flash_fwd.cu", 96, False): 4,
    ("sm_80", "sm80/flash_fwd.cu", 96, True): 56,
    ("sm_80", "sm80/flash_fwd.cu", 128, False): 24,
    ("sm_80", "sm80/flash_fwd.cu", 256, False): 52,
    ("sm_80", "sm80/flash_fwd.cu", 256, True): 52,
    ("sm_90", "sm80/flash_fwd.cu", 64, False): 76,
    ("sm_90", "sm80/flash_fwd.cu", 96, False): 16,
    ("sm_90", "sm80/flash_fwd.cu", 96, True): 36,
    ("sm_90", "sm80/flash_fwd.cu", 128, False): 28,
    ("sm_90", "sm80/flash_fwd.cu", 128, True): 72,
    ("sm_90", "sm80/flash_fwd.cu", 192, True): 8,
    ("sm_90a", "sm90/flash_fwd.cu", 256, False): 8,
    ("sm_90a", "sm90/flash_fwd.cu", 256, True): 20,
    ("sm_90a", "sm90/flash_bwd_wide.cu", 256, False): 28,
    ("sm_90a", "sm90/flash_bwd_wide.cu", 256, True): 16,
    ("sm_80", "sm80/flash_bwd.cu", 64, False): 84,
    ("sm_80", "sm80/flash_bwd.cu", 64, True): 64,
    ("sm_80", "sm80/flash_bwd.cu", 128, False): 20,
    ("sm_120", "sm80/flash_bwd.cu", 64, True): 12,
    ("sm_120", "sm80/flash_bwd.cu", 128, False): 8,
    ("sm_120", "sm80/flash_bwd.cu", 128, True): 16,
    ("sm_120", "sm80/flash_bwd.cu", 256, False): 12,
    ("sm_120", "sm80/flash_bwd.cu", 256, True): 24,
}


def list_jobs(arch: str, band: bool) -> list[CompileJob]:
    """Every row of the main kernels as it is compiled for lists of tiles (of the backward with key blocks unshared)."""
    jobs = []
    for job in compile_jobs(arch, True):
        struct = _STRUCTS.get(job.source)
        if struct is None or not job.defines["FA2_BF16"] or job.defines.get("FA2_PARTIAL_DKV"):
            continue
        masked = job.source == "sm90/flash_fwd.cu"  # as of windows alone
        if band and job.defines["FA2_CAUSAL"] != masked:
            continue
        size = ctypes.sizeof(composed(struct, (*((WindowParams,) if band else ()), ListParams)))
        lists = {"FA2_LISTED": 1, "FA2_UNSEEN_ROWS": 1, "FA2_PARAMS_BYTES": size}
        defines = {**job.defines, **lists, **({"FA2_CAUSAL": 0, "FA2_BAND": 1} if band else {})}
        more = _LIST_SPILLS.get((job.arch, job.source, int(job.defines["FA2_HEAD_DIM"]), band), 0)
        allowed = job.allowed_spill_bytes + more
        label = f"{job.label} of a list" + " band" * band
        jobs.append(dataclasses.replace(job, defines=defines, label=label, allowed_spill_bytes=allowed))
    return jobs


# Of kernels of lists for segments, FA2_SHORT of backwards and FA2_REPEAT of forwards, by architecture, source,
# head_dim, and whether there is a band: what they spill beyond what those of lists may.
_SEGMENT_SPILLS = {
    ("sm_80", "sm80/flash_bwd.cu", 128, True): 16,
    ("sm_86", "sm80/flash_bwd.cu", 256, False): 24,
    ("sm_86", "sm80/flash_bwd.cu", 256, True): 24,
    ("sm_90", "sm80/flash_bwd.cu", 96, False): 4,
    ("sm_90", "sm80/flash_bwd.cu", 96, True): 4,
    ("sm_80", "sm80/flash_fwd.cu", 160, False): 12,
    ("sm_80", "sm80/flash_fwd.cu", 160, True): 8,
    ("sm_86", "sm80/flash_fwd.cu", 256, True): 24,
    ("sm_90", "sm80/flash_fwd.cu", 160, False): 48,
    ("sm_90", "sm80/flash_fwd.cu", 160, True): 36,
    ("sm_90", "sm80/flash_fwd.cu", 192, True): 12,
    ("sm_90", "sm80/flash_fwd.cu", 256, False): 12,
    ("sm_90", "sm80/flash_fwd.cu", 256, True): 16,
}


def segment_jobs(arch: str, band: bool) -> list[CompileJob]:
    """Every row of the backwards as it is compiled for short segments, whose dQ is no sum; and of the forward whose
    thread blocks take several tiles of very many segments each."""
    jobs = []
    for job in list_jobs(arch, band):
        if job.name == "flash_bwd" and not job.defines["FA2_DETERMINISTIC"]:
            kind = "FA2_SHORT"
        elif job.source == "sm80/flash_fwd.cu":
            kind = "FA2_REPEAT"
        else:
            continue
        more = _SEGMENT_SPILLS.get((job.arch, job.source, int(job.defines["FA2_HEAD_DIM"]), band), 0)
        label, allowed = f"{job.label} {kind}", job.allowed_spill_bytes + more
        defines = {**job.defines, kind: 1}
        jobs.append(dataclasses.replace(job, defines=defines, label=label, allowed_spill_bytes=allowed))
    return jobs


# Of kernels that go by a mask's lists of blocks, by architecture, source and head_dim: likewise. Of sm90/flash_bwd.cu
# most is what the threads keep that copy and add, not those that compute (docs/lab/masks.md).
_MASK_SPILLS = {
    ("sm_90a", "sm90/flash_fwd.cu", 256): 4,
    ("sm_90a", "sm90/flash_bwd.cu", 64): 580,
    ("sm_90a", "sm90/flash_bwd.cu", 96): 420,
    ("sm_90a", "sm90/flash_bwd.cu", 128): 580,
    ("sm_90", "sm80/flash_fwd.cu", 128): 4,
    ("sm_90", "sm80/flash_fwd.cu", 160): 240,
    ("sm_90", "sm80/flash_fwd.cu", 192): 12,
    ("sm_90", "sm80/flash_fwd.cu", 256): 28,
    ("sm_80", "sm80/flash_fwd.cu", 160): 256,
    ("sm_80", "sm80/flash_fwd.cu", 192): 28,
    ("sm_80", "sm80/flash_fwd.cu", 256): 52,
    ("sm_80", "sm80/flash_bwd.cu", 64): 44,
    ("sm_80", "sm80/flash_bwd.cu", 128): 136,
    ("sm_86", "sm80/flash_bwd.cu", 256): 16,
    ("sm_120", "sm80/flash_bwd.cu", 64): 8,
    ("sm_120", "sm80/flash_bwd.cu", 256): 8,
}


def mask_jobs(arch: str) -> list[CompileJob]:
    """Every row of the main kernels that can go by a mask's lists, as it is compiled for them."""
    jobs = []
    for job in compile_jobs(arch, True):
        struct = _STRUCTS.get(job.source)
        if struct is None or not job.defines["FA2_BF16"] or job.defines.get("FA2_PARTIAL_DKV"):
            continue
        masked = job.source == "sm90/flash_fwd.cu"  # which takes the rows of causal problems
        blocks = [int(job.defines[f"FA2_BLOCK_{side}"]) for side in "MN"]
        hopper = job.source.startswith("sm90/")
        if job.defines["FA2_CAUSAL"] != masked or any(128 % block for block in blocks):
            continue
        if hopper and not has_room(job):
            continue
        if int(job.defines.get("FA2_CLUSTER", 1)) > 1 or job.label.endswith(" full"):  # of which sums begin with zeros
            continue
        size = ctypes.sizeof(composed(struct, (PickedParams,)))
        whole = {"FA2_WHOLE_QUERIES": 1, "FA2_CLEAR_DQ": 1} if job.name == "flash_bwd" else {}
        picked = {"FA2_PICKED": 1, "FA2_UNSEEN_ROWS": 1, "FA2_PARAMS_BYTES": size}
        defines = {**job.defines, **picked, **whole, "FA2_CAUSAL": 0}
        more = _MASK_SPILLS.get((job.arch, job.source, int(job.defines["FA2_HEAD_DIM"])), 0)
        label, allowed = f"{job.label} by a mask's lists", job.allowed_spill_bytes + more
        jobs.append(dataclasses.replace(job, defines=defines, label=label, allowed_spill_bytes=allowed))
    return jobs


def sinks_jobs(arch: str) -> list[CompileJob]:
    """Every row of the forwards as it is compiled for sinks, which spill no more than without."""
    jobs = []
    for job in compile_jobs(arch, True):
        if job.name == "flash_fwd" and job.defines["FA2_BF16"]:
            size = ctypes.sizeof(composed(_STRUCTS[job.source], (SinksParams,)))
            defines = {**job.defines, "FA2_SINKS": 1, "FA2_PARAMS_BYTES": size}
            jobs.append(dataclasses.replace(job, defines=defines, label=f"{job.label} sinks"))
    return jobs


def check_spills(jobs: list[CompileJob]) -> None:
    """Compiled with the NVRTC that is installed."""
    found = []
    for result in compile_many(jobs):
        assert result.resources is not None, result.error
        assert isinstance(result.job, CompileJob)
        spills, job = result.resources.spill_bytes, result.job
        found += [f"{job.arch} {job.label}: {warning}" for warning in result.warnings]
        if spills > job.allowed_spill_bytes:
            found.append(f"{job.arch} {job.label}: spills {spills} bytes, {job.allowed_spill_bytes} are known")
    assert not found, "\n".join(found)


def test_some_rows_with_a_band() -> None:
    """The first row at head_dim 128, or above, of each main kernel."""
    first = {job.source: job for job in reversed(band_jobs("sm_90a")) if int(job.defines["FA2_HEAD_DIM"]) >= 128}
    assert len(first) == len(_STRUCTS)
    check_spills(list(first.values()))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a", "sm_120"])
def test_all_rows_with_a_band(arch: str) -> None:
    check_spills(band_jobs(arch))


def test_some_rows_of_scores() -> None:
    """One of each kernel of Hopper."""
    first = {
        job.source: job for job in score_jobs("sm_90a", "softcap alibi") if job.defines["FA2_HEAD_DIM"] in (64, 256)
    }
    check_spills([job for source, job in first.items() if source.startswith("sm90/")])


@pytest.mark.slow
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("arch", ARCHS)
def test_all_rows_of_scores(arch: str, scores: str) -> None:
    check_spills(score_jobs(arch, scores))


def test_some_rows_with_dropout() -> None:
    """One of each kernel of Hopper, where P is dropped several at a time."""
    first = {job.source: job for job in dropout_jobs("sm_90a", False) if job.defines["FA2_HEAD_DIM"] in (64, 256)}
    check_spills([job for source, job in first.items() if source.startswith("sm90/")])


@pytest.mark.slow
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a", "sm_120"])
def test_all_rows_with_dropout(arch: str, one_by_one: bool) -> None:
    check_spills(dropout_jobs(arch, one_by_one))


def test_some_rows_of_lists() -> None:
    """The first row at head_dim 128, or above, of each main kernel."""
    first = {job.source: job for job in reversed(list_jobs("sm_90a", False)) if int(job.defines["FA2_HEAD_DIM"]) >= 128}
    assert len(first) == len(_STRUCTS)
    check_spills(list(first.values()))


def test_some_rows_of_masks() -> None:
    """The first row at head_dim 128, or above, of each main kernel that can."""
    first = {job.source: job for job in reversed(mask_jobs("sm_90a")) if int(job.defines["FA2_HEAD_DIM"]) >= 128}
    assert len(first) == len(_STRUCTS) - 1
    check_spills(list(first.values()))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a", "sm_120"])
def test_all_rows_of_masks(arch: str) -> None:
    check_spills(mask_jobs(arch))


def test_some_rows_with_sinks() -> None:
    """The first row of each forward, and on Hopper that with the least room."""
    jobs = sinks_jobs("sm_90a")
    first = {job.source: job for job in reversed(jobs)}
    assert len(first) == 2
    check_spills([*first.values(), next(job for job in jobs if "head_dim 96" in job.label)])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a", "sm_120"])
def test_all_rows_with_sinks(arch: str) -> None:
    check_spills(sinks_jobs(arch))


_ON_A_CACHE: dict[str, dict[str, Any]] = {
    "softcap alibi sinks": {"score": ScoreSpec(1.0, 2.0, (0, 1)), "sinks": SinksSpec(False)},
    "parts": {"split_size": 128},
    "parts, pages, new keys": {"split_size": 64, "seqlen_new": 2, "rotary": Rotary(32, 1, False, True, True)},
    "softcap sinks of e4m3": {
        "score": ScoreSpec(1.0, 2.0, None),
        "sinks": SinksSpec(True),
        "kv_dtype": "float8_e4m3fn",
    },
}


def cache_jobs(arch: str) -> list[CompileJob]:
    """Every row of decoding with what is not compiled ahead."""
    device, jobs = cache_params.device_of(arch), []
    for label, fields in _ON_A_CACHE.items():
        table = flash_decode.DECODE_TILES_8 if "kv_dtype" in fields else flash_decode.DECODE_TILES
        for tile in table[shared_memory_class(device.shared_mem_optin)]:
            page = 16 if "seqlen_new" in fields else None
            problem = cache_params.problem_of(tile.head_dim, "bfloat16", page, fields)
            launch = flash_decode.launch(problem, device, tile, new_keys="seqlen_new" in fields)
            name = f"head_dim {tile.head_dim} {tile.block_m} rows {label}"
            jobs.append(CompileJob(launch.source, launch.name, arch, launch.defines, name, 0, tile.spill_bytes))
    return jobs


def test_some_rows_of_caches() -> None:
    jobs = {job.label: job for job in cache_jobs("sm_90")}
    check_spills([jobs[f"head_dim 128 16 rows {label}"] for label in ("softcap alibi sinks", "parts")])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120"])
def test_all_rows_of_caches(arch: str) -> None:
    check_spills(cache_jobs(arch))


@pytest.mark.slow
@pytest.mark.parametrize("band", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a", "sm_120"])
def test_all_rows_of_lists(arch: str, band: bool) -> None:
    check_spills(list_jobs(arch, band))


def test_some_rows_of_segments() -> None:
    """The first row at head_dim 128, or above, of each kernel that has them."""
    jobs = segment_jobs("sm_90a", False)
    first = {job.source: job for job in reversed(jobs) if int(job.defines["FA2_HEAD_DIM"]) >= 128}
    assert len(first) == 4
    check_spills(list(first.values()))


@pytest.mark.slow
@pytest.mark.parametrize("band", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a", "sm_120"])
def test_all_rows_of_segments(arch: str, band: bool) -> None:
    check_spills(segment_jobs(arch, band))


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (1, 2, 3))])
def test_every_head_dim_compiles(turn: int) -> None:
    """What the plans of any head_dim launch, with the NVRTC that is installed.

    Multiples of 16 in turn forward on sm_80 with 16-byte copies, forward on sm_86 without, and backward likewise.
    """
    jobs = {}
    for head_dim in range(16, 257, 16):
        place = (head_dim // 16 + turn) % 4
        aligned, backward = place % 2 == 0, place >= 2
        major, minor = (8, 0) if aligned else (8, 6)
        device = DeviceInfo(0, "", (major, minor), 84, SHARED_MEMORY[f"sm_{major}{minor}"], 6 << 20)
        problem = problem_of(head_dim if aligned else head_dim - 1, aligned)
        plan = plan_backward(problem, device, False) if backward else plan_forward(problem, device)
        for launch in plan.launches:
            label = f"head_dim {problem.head_dim}"
            size = launch.config.shared_mem_bytes
            job = CompileJob(launch.source, launch.name, launch.arch, launch.defines, label, size, 0)
            jobs[job.source, job.arch, tuple(job.defines.items())] = job
    assert {job.name for job in jobs.values()} >= {"flash_fwd", "flash_bwd", "fill_unseen"}
    errors = [str(result.error) for result in compile_many(jobs.values()) if result.error]
    assert not errors, "\n\n".join(errors)


@pytest.mark.parametrize("release", nvrtc.DISTRIBUTIONS)
def test_with_nvrtc(release: str, tmp_path: Path) -> None:
    """A program runs with the NVRTC that was named, and with a cache that has nothing else's kernels."""
    library = nvrtc.library(release)
    assert library is not None
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from fa2cupy import jit\n"
        "from fa2cupy.jit.kernel import build\n"
        "source = jit.Source('k.cu', b'extern \"C\" __global__ void k() {}')\n"
        "print(sys.argv[1:], jit.wgmma_objection('12.8.93 CL-1') == '', build(source, 'sm_90a', {}).cubin.build)\n"
    )

    def run(claimed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tests.with_nvrtc", claimed, str(library.parent), str(script), "--option"],
            env={**os.environ, "FA2CUPY_CACHE_DIR": str(tmp_path / "cache")},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )

    done = run(release)
    assert done.returncode == 0, done.stderr
    first, printed, last = done.stdout.splitlines()
    assert first.startswith(f"NVRTC {release}.") and str(tmp_path / "cache") in first
    assert printed.startswith(f"['--option'] True {release}.")
    assert last.startswith(f"1 kernels for sm_90a made by NVRTC {release}.")
    wrong = run("12.1")
    assert wrong.returncode != 0 and f"CuPy uses NVRTC {release}." in wrong.stderr


def problem_of(head_dim: int, aligned: bool) -> AttentionProblem:
    """Causal, with query rows that see no key."""
    batch, seqlen_q, seqlen_k, heads = 2, 200, 100, 4
    strides = {
        name: (length * heads * head_dim, heads * head_dim, head_dim)
        for names, length in ((("q", "out", "dout", "dq"), seqlen_q), (("k", "v", "dk", "dv"), seqlen_k))
        for name in names
    }
    strides["lse"] = (heads * seqlen_q, seqlen_q, 1)
    return AttentionProblem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=heads,
        num_heads_k=heads,
        head_dim=head_dim,
        head_dim_v=head_dim,
        dtype="bfloat16",
        causal=True,
        softmax_scale=head_dim**-0.5,
        strides=tuple(strides.items()),
        aligned=aligned,
    )


def wide_jobs(arch: str) -> list[CompileJob]:
    return compile_jobs(arch, True, wide=True)


def test_some_rows_of_float32_and_float64() -> None:
    """One of each kernel; of the forward the narrowest of float64, of the backward that of tf32."""
    chosen = ("forward float64 head_dim 64 full", "backward tf32 head_dim 64 64x64x8 causal from zeros")
    jobs = [job for job in wide_jobs("sm_90a") if job.label.startswith(chosen)]
    assert len(jobs) == 2
    check_spills(jobs)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a"])
def test_all_rows_of_float32_and_float64(arch: str) -> None:
    check_spills(wide_jobs(arch))
