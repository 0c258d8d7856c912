"""What benchmarks/numerics.py makes of its records; what it compiles beforehand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import numerics
from benchmarks.variants import jobs_of
from tests.plan_cases import H200


def records(**ours: float) -> list[dict[str, Any]]:
    """All errors 1e-3, but cuDNN's 2e-3, the format's 0.9e-3, and ours as told."""
    common = {"run": "r", "gpu": "NVIDIA H200", "torch": "2", "date": "2026-01-01", "commit": "c", "command": "x"}
    made = []
    for case in numerics.cases([512, 1024]):
        rms = {"fa2": 1e-3, "cudnn": 2e-3, "format": 9e-4}
        errors = {
            name: {"lse": {"max": 1e-6}, **{out: {"rms": x, "max": 5 * x, "exact": 0.5} for out in numerics.OUTPUTS}}
            for name, x in {"fa2cupy": 1e-3, **rms}.items()
        }
        if case["seqlen"] == 1024 and case["dtype"] == "float16":
            for name, error in ours.items():
                errors["fa2cupy"][name]["rms"] = error
        made.append({**common, **case, "errors": errors})
    return made


def test_cases() -> None:
    assert len(list(numerics.cases([512, 1024, 2048, 4096]))) == 64


@pytest.mark.parametrize(("ours", "ratio"), [({}, 1.0), ({"dk": 1.2e-3}, 1.2), ({"dq": math.nan}, math.inf)])
def test_the_worst_ratio(ours: dict[str, float], ratio: float) -> None:
    found, where = numerics.worst(records(**ours))
    assert found == pytest.approx(ratio)
    if ours:
        assert where.startswith(f"{next(iter(ours))}, float16") and where.endswith("S 1,024")


def test_from_records_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, file = tmp_path / "page.md", tmp_path / "h200.jsonl"
    page.write_text("before\n<!-- numerics: begin -->\nold\n<!-- numerics: end -->\nafter\n")
    monkeypatch.setattr(numerics, "PAGE", page)
    for ours, status in (({}, 0), ({"dv": 1.06e-3}, 1)):
        file.write_text("".join(json.dumps(record) + "\n" for record in records(**ours)))
        assert numerics.main(["--from", str(file)]) == status
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count("| bfloat16 | normal | 64 | causal | 512 | 10.00 / 10.00 / 20.00 / 9.00 |") == 1


def test_every_kernel_is_compiled_once() -> None:
    jobs = jobs_of(numerics.plans([512, 4096], H200))
    keys = [(job.source, job.name, tuple(sorted(job.defines.items()))) for job in jobs]
    assert len(keys) == len(set(keys)) and {"flash_fwd", "flash_bwd"} <= {job.name for job in jobs}
    assert all(job.arch.startswith("sm_90") for job in jobs)
