"""What benchmarks/gpt.py makes of its records: FLOPs, bars, tables, the picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpt, gpt_report

COMMON = {"run": "r1", "gpu": "NVIDIA H200", "torch": "2", "date": "2026-01-01", "commit": "c", "command": "python x"}
MS = {  # measured once with a bare autograd.Function
    "2k": {"fa2cupy": 127.6, "sdpa-default": 130.8, "sdpa-flash": 139.2, "none": 118.8},
    "8k": {"fa2cupy": 151.9, "sdpa-default": 160.6, "sdpa-flash": 193.7, "none": 119.3},
}


def times(packed: dict[str, float] | None = None, **changed: float) -> list[dict[str, Any]]:
    """packed: milliseconds by shape of our attention over qkv in one piece, which old records do not have."""
    rows = {shape: {**row, **({"fa2cupy-packed": packed[shape]} if packed else {})} for shape, row in MS.items()}
    return [
        {
            **COMMON,
            "what": "time",
            "shape": shape,
            "attention": attention,
            "sizes": gpt.SHAPES[shape],
            "ms": [changed.get(f"{shape} {attention}", ms)] * 3,
            "peak_gb": 40.0,
            "kernels": {},
        }
        for shape, row in rows.items()
        for attention, ms in row.items()
    ]


def curves(wobble: float = 0.01, final: float = 2.0) -> list[dict[str, Any]]:
    """Ours is `wobble` above FA2, which is 0.01 below cuDNN."""
    offsets = {"fa2cupy": wobble, "sdpa-flash": 0.0, "sdpa-cudnn": 0.01}
    return [
        {**COMMON, "what": "curve", "attention": attention, "seed": seed, "losses": [final + offset] * 30,
         "norms": [1 + offset] * 30}
        for attention, offset in offsets.items()
        for seed in range(3)
    ]  # fmt: skip


def gradients(ours: float = 1.0) -> list[dict[str, Any]]:
    errors = {"fa2cupy": ours, "sdpa-flash": 1.0, "sdpa-cudnn": 1.1}
    return [
        {**COMMON, "what": "gradients", "of": of, "step": 15 * step, "attention": attention, "error": 1e-3 * error}
        for of in ("model", "attention")
        for step in range(1, 21)
        for attention, error in errors.items()
    ]


def missed(records: list[dict[str, Any]]) -> list[str]:
    return [verdict.text for verdict in gpt_report.verdicts(records) if not verdict.holds]


def test_flops_of_a_step() -> None:
    """12 x 2,048 at S 8,192, batch 2: 6 N tokens and 6 or 12 L S d tokens."""
    causal, paper = gpt_report.flops(gpt.SHAPES["8k"])
    assert causal / 151.9e9 == pytest.approx(588, abs=1) and paper / 151.9e9 == pytest.approx(718, abs=1)


def test_everything_held() -> None:
    records = times() + curves() + gradients()
    assert len(gpt_report.verdicts(records)) == 11
    assert missed(records) == []


@pytest.mark.parametrize(
    ("records", "count"),
    [
        (times(**{"8k fa2cupy": 154.0}), 2),
        (times(**{"2k sdpa-flash": 137.0}), 1),
        ([row for row in times() if row["attention"] != "sdpa-default"], 2),
        (curves(wobble=0.0151), 2),
        (curves(wobble=math.nan), 5),
        (curves(final=2.5), 1),
        (curves()[:-1], 5),
        (gradients(1.06), 2),
        (gradients(math.nan), 2),
        (gradients()[:-1], 1),
    ],
)
def test_what_is_missed(records: list[dict[str, Any]], count: int) -> None:
    assert len(missed(records)) == count


def test_the_last_run_of_each_kind_counts() -> None:
    old = [{**row, "run": "r0"} for row in times(**{"8k fa2cupy": 500.0}) + curves()]
    assert missed(old + times()) == []


def test_the_faster_of_ours_counts_and_is_named() -> None:
    """Over q, k and v, or over qkv in one piece, shape by shape."""
    records = times(packed={"2k": 125.0, "8k": 154.0}, **{"2k fa2cupy": 200.0})
    assert missed(records) == []
    found = {verdict.text: verdict.found for verdict in gpt_report.verdicts(records)}
    assert found["2k: SDPA's default's step over ours (fa2cupy, qkv in one), at least 1.02"] == pytest.approx(1.0464)
    assert found["8k: SDPA's default's step over ours (fa2cupy.attention), at least 1.05"] == 160.6 / 151.9
    table = "\n".join(gpt_report.time_table(records))
    assert "| fa2cupy, qkv in one | 125.0 | 1.000 |" in table and "| fa2cupy.attention | 200.0 | 1.600 |" in table
    assert "at S = 2,048 (fa2cupy, qkv in one) 1.046 x SDPA's default" in gpt_report.readme_block(records)
    alone = [row for row in records if row["attention"] != "fa2cupy"]
    assert len(missed(alone)) == 2 and "nan" not in gpt_report.readme_block(alone)


def test_pages_say_what_the_records_say() -> None:
    records = gpt_report.load(gpt_report.results.RESULTS / "gpt" / "h200.jsonl")
    for page, text in (
        (gpt_report.PAGE, gpt_report.block(records)),
        (gpt_report.README, gpt_report.readme_block(records)),
    ):
        assert f"\n{text}\n" == gpt_report.MARKED.search(page.read_text(encoding="utf-8")).group()


def test_pages_are_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAGE", "README"):
        path = tmp_path / name
        path.write_text("a\n<!-- gpt: begin -->\nold\n<!-- gpt: end -->\nb\n")
        monkeypatch.setattr(gpt_report, name, path)
    gpt_report.report(times() + curves(), None, write=True)
    page, readme = ((tmp_path / name).read_text() for name in ("PAGE", "README"))
    assert "old" not in page + readme and page.endswith("-->\nb\n") and "| bar |" in page and "| bar |" not in readme
    assert "at S = 8,192 1.057 x SDPA's default and 1.275 x SDPA flash (FA2)" in readme
    (tmp_path / "bare").write_text("nothing\n")
    with pytest.raises(ValueError, match="no block"):
        gpt_report.renew(tmp_path / "bare", "")


def test_tables_and_picture(tmp_path: Path) -> None:
    records = times() + curves() + gradients()
    text = gpt_report.block(records)
    assert (
        "| 12 x 2048, heads of 128, S 8,192, batch 2 | fa2cupy.attention | 151.9 | 1.000 | 588 | 59.4% | 718 |" in text
    )
    assert "missed" not in text
    assert gpt_report.report(records, tmp_path / "x.png") == 0
    assert (tmp_path / "x.png").stat().st_size > 10_000
