"""digests.py: what it says of binaries that are not what they were. test_compile.py asks it of real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fa2cupy.kernels import compile_jobs
from tests import digests, nvrtc
from tests.compile_worker import ARCHS, EVERY_ROW, in_sample, jobs_of

BUILD = "12.9.86 CL-1"


def row(label: str, digest: str = "aa", **changes: Any) -> dict[str, Any]:
    usual = {"arch": "sm_80", "source": "k.cu", "label": label, "digest": digest, "in_sample": True, "error": ""}
    return {**usual, **changes}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(digests, "FOLDER", tmp_path / "binaries")
    return tmp_path / "binaries"


def compiles_to(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> None:
    def compile_rows(release: str, arch: str, which: str) -> tuple[str, list[dict[str, Any]]]:
        assert which == "sample"
        return f"{release}.86 CL-1", rows if arch == "sm_80" else []

    monkeypatch.setattr(digests, "compile_rows", compile_rows)


def test_a_binary_that_differs_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiles_to(monkeypatch, [row("one"), row("two", "bb")])
    digests.renew("the first")
    assert digests.objections(BUILD, "sm_80", [row("one"), row("two", "bb")]) == []
    (found,) = digests.objections(BUILD, "sm_80", [row("one"), row("two", "cc")])
    assert found.startswith("sm_80 k.cu two: another binary than in 12.9.86.json") and "new-binaries REASON" in found
    (found,) = digests.objections(BUILD, "sm_80", [row("one")])
    assert found.startswith("sm_80 k.cu two: in 12.9.86.json, and no row any more")
    assert digests.objections(BUILD, "sm_80", [row("one")], {"sm_80 k.cu two"}) == []
    (found,) = digests.objections(BUILD, "sm_80", [row("one"), row("two", "bb"), row("three")])
    assert found.startswith("sm_80 k.cu three: is not in 12.9.86.json")
    # what does not compile is said elsewhere, and what `make compile-all` has beside the sample is not in the file
    others = [row("two", "", error="no"), row("three", in_sample=False)]
    assert digests.objections(BUILD, "sm_80", [row("one"), *others]) == []


def test_an_unknown_build_is_an_objection(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digests.objections(BUILD, "sm_80", [row("one")])
    compiles_to(monkeypatch, [row("one")])
    digests.renew("the first")
    for build in ("12.9.86 CL-2", "12.9.87 CL-1"):
        (found,) = digests.objections(build, "sm_80", [row("one")])
        assert found.startswith(f"tests/binaries has nothing of NVRTC {build}")


def test_renewing_keeps_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiles_to(monkeypatch, [row("one")])
    digests.renew("the first")
    record = json.loads((folder / "12.9.86.json").read_text())
    assert record["reason"] == "the first" and record["digests"]["sm_80"] == {"sm_80 k.cu one": "aa"}
    digests.renew("nothing differs")
    assert json.loads((folder / "12.9.86.json").read_text()) == record
    compiles_to(monkeypatch, [row("one", "bb")])
    digests.renew("a new mask")
    assert json.loads((folder / "12.9.86.json").read_text())["reason"] == "a new mask"
    compiles_to(monkeypatch, [row("one", "", error="one does not compile")])
    with pytest.raises(SystemExit, match="one does not compile"):
        digests.renew("broken")
    monkeypatch.setattr("sys.argv", ["digests", " "])
    with pytest.raises(SystemExit, match="REASON"):
        digests.main()


def test_the_files_are_of_the_releases_that_the_tests_use() -> None:
    found = [json.loads(path.read_text()) for path in sorted(digests.FOLDER.glob("*.json"))]
    assert [record["build"].rsplit(".", 1)[0] for record in found] == list(nvrtc.DISTRIBUTIONS)
    for record in found:
        assert record["reason"] and set(record["digests"]) == set(ARCHS) and all(record["digests"].values())


def test_the_samples_have_every_row_of_the_usual_architectures() -> None:
    for arch in ARCHS:
        jobs = compile_jobs(arch, True)
        taken = {release: [job for job in jobs if in_sample(job, release)] for release in nvrtc.DISTRIBUTIONS}
        both = {job.label for sample in taken.values() for job in sample if job.arch == arch}
        usual = {job.label for job in jobs if job.defines["FA2_BF16"] and job.arch == arch}
        if arch in EVERY_ROW:
            assert both >= usual
        assert all({job.name for job in sample} >= {"flash_fwd", "flash_bwd"} for sample in taken.values()), arch
        assert 0.15 < sum(map(len, taken.values())) / len(jobs) < 0.8, arch


def test_the_few_are_of_the_samples_and_have_every_kernel() -> None:
    few, sample = (
        {(release, arch): jobs_of(release, arch, which) for release in nvrtc.DISTRIBUTIONS for arch in ARCHS}
        for which in ("few", "sample")
    )
    kernels, tiles = set(), set()
    for pair, jobs in sample.items():
        assert jobs and {job.label for job in few[pair]} <= {job.label for job in jobs}
        kernels |= {(job.source, job.arch, job.defines["FA2_CAUSAL"], job.defines["FA2_BF16"]) for job in jobs}
        tiles |= {(job.source, job.arch, job.defines["FA2_BLOCK_M"], job.defines["FA2_BLOCK_N"]) for job in jobs}
    every = [job for jobs in few.values() for job in jobs]
    assert len(every) < 0.4 * sum(map(len, sample.values()))
    assert {(j.source, j.arch, j.defines["FA2_BLOCK_M"], j.defines["FA2_BLOCK_N"]) for j in every} == tiles
    both = {(job.source, job.arch, job.defines["FA2_CAUSAL"]) for job in every}
    assert both == {kernel[:3] for kernel in kernels}
    assert {(job.source, job.arch, job.defines["FA2_BF16"]) for job in every} == {(*k[:2], k[3]) for k in kernels}
