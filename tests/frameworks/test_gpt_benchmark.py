"""The processes of benchmarks/gpt.py, rehearsed on the CPU with tiny sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import gpt, gpt_worker, numerics

KINDS = ["fa2cupy", "sdpa-flash"]


@pytest.mark.parametrize(
    ("kernel", "owner"),
    [
        ("flash_fwd", "fa2cupy"),
        ("flash_bwd", "fa2cupy"),
        ("flash_bwd_preprocess", "fa2cupy"),
        ("flash_bwd_postprocess", "fa2cupy"),
        ("fill_unseen", "fa2cupy"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4>>", "fa2"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x64x128_4x1x1", "cudnn"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "another"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_0", ""),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT", ""),
    ],
)
def test_whose_kernel_it_is(kernel: str, owner: str) -> None:
    assert gpt_worker.owner(kernel) == owner


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[gpt_worker.Job]:
    data = (torch.arange(5000) * torch.arange(5000) % 251).to(torch.uint8).numpy()
    monkeypatch.setattr(gpt_worker.gpt_data, "tokens", lambda: data)
    yield gpt_worker.Job(
        {"attention": "fa2cupy", "device": "cpu", "compile": "none", "shapes": {"124m": gpt.TINY["124m"]},
         "vocabulary": 256, "seed": 0, "steps": 4}
    )  # fmt: skip


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line[1:]) for line in capsys.readouterr().out.splitlines() if line.startswith("@")]


def test_a_curve(job: gpt_worker.Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.curve()
    (found,) = told(capsys)
    assert len(found["losses"]) == len(found["norms"]) == 4
    assert found["losses"][0] == pytest.approx(5.5, abs=0.5) and found["losses"][-1] < found["losses"][0]


def test_errors_of_gradients(job: gpt_worker.Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.gradients(KINDS, 2)
    *found, kernels = told(capsys)
    assert kernels == {"kernels": dict.fromkeys(KINDS)}
    assert [(row["what"], row["step"], row["kind"]) for row in found] == [
        (what, step, kind) for step in (2, 4) for what in ("model", "attention") for kind in KINDS
    ]
    for row in found:  # bfloat16's, of a whole model or of attention alone
        assert 1e-5 < row["error"] < (2e-2 if row["what"] == "model" else 2e-3)


def test_a_wrong_attention_is_seen(
    job: gpt_worker.Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gpt_worker.gpt_torch.attend

    def attend(kind: str, qkv: Any) -> Any:
        q, k, v = qkv.unbind(2)
        return plain(kind, torch.stack((q, k, v * (1.01 if kind == "fa2cupy" else 1.0)), 2))

    monkeypatch.setattr(gpt_worker.gpt_torch, "attend", attend)
    job.gradients(KINDS, 1)
    errors = {row["kind"]: row["error"] for row in told(capsys) if row.get("what") == "attention"}
    assert errors["fa2cupy"] > 1.2 * errors["sdpa-flash"]


def test_a_rehearsal_of_times(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "times --rehearse --attentions fa2cupy,fa2cupy-packed --turns 1 --turn-steps 1 --compile none"
    assert gpt.main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert printed.count("| fa2cupy.attention |") == printed.count("| fa2cupy, qkv in one |") == 2
    assert "FAILED" not in printed


def test_a_process_that_fails_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "TINY", dict.fromkeys(gpt.TINY, (1, 32, 3, 32, 2)))  # 3 heads do not divide 32
    arguments = "times --rehearse --attentions fa2cupy --turns 1 --compile none"
    assert gpt.main(arguments.split()) == 1
    printed = capsys.readouterr().out
    assert "FAILED: times fa2cupy: exit status 1" in printed and "RuntimeError: shape" in printed


def test_an_unknown_attention_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpt.parse(["--attentions", "fa2cupy,nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_a_rehearsal_of_numerics(capsys: pytest.CaptureFixture[str]) -> None:
    assert numerics.main(["--rehearse", "--seqlens", "16"]) == 0
    printed = capsys.readouterr().out
    assert "Every shape, fa2cupy / FA2 / format:" in printed and "nan" not in printed and "inf" not in printed


def test_kernels_of_another_are_a_failure() -> None:
    driver = gpt.Driver(gpt.parse(["--rehearse"]))
    ours = {"fa2cupy": {"flash_fwd": 2, "flash_bwd": 2, "flash_bwd_preprocess": 2}}
    driver.check("x", "fa2cupy", ours, "124m")
    driver.check("x", "none", {}, "124m")
    driver.check("x", "sdpa-default", {"cudnn": {"sdpa": 4}}, "124m")
    assert driver.failures == []
    for attention, kernels in (
        ("fa2cupy", {"fa2": {"flash_fwd": 2}}),
        ("fa2cupy", {**ours, "fa2": {"y": 1}}),
        ("fa2cupy", {}),
        ("fa2cupy", {"fa2cupy": {"flash_fwd": 2, "flash_bwd": 1}}),
        ("sdpa-flash", {"cudnn": {"sdpa": 4}}),
        ("none", ours),
    ):
        before = len(driver.failures)
        driver.check("x", attention, kernels, "124m")
        assert len(driver.failures) == before + 1
