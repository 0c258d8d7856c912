"""`python -m fa2cupy plan`: what would run, and who objects, without a GPU."""

from __future__ import annotations

import pytest

from fa2cupy import __main__
from fa2cupy.cli import plan as plan_command
from fa2cupy.kernels.tiles import SHARED_MEMORY
from tests.fake_driver import fake_driver


def plan_said(capsys: pytest.CaptureFixture[str], *options: str, status: int = 0) -> str:
    assert __main__.main(["plan", *options]) == status
    return "".join(capsys.readouterr())


def test_plan_prints_both_directions(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--head-dim", "128", "--seqlen", "4096", "--heads", "32", "--causal", "--dtype", "float16")
    said = plan_said(capsys, *shape, "--heads-k", "8", "--arch", "sm_90a", "--deterministic")
    lines = said.splitlines()
    assert lines[0] == "H100 SXM: sm_90, 132 multiprocessors, 50 MiB of L2"
    assert [line.partition("(")[0] for line in lines if "AttentionProblem(" in line] == ["ForwardPlan", "BackwardPlan"]
    assert said.count("num_heads=32, num_heads_k=8") == 2 and lines.count("  sm_90 kernel") == 2
    assert [line.split()[0] for line in lines if "LaunchConfig(" in line] == [
        "flash_fwd",
        "flash_bwd_preprocess",
        "flash_bwd",
        "flash_bwd_postprocess",
    ]
    assert "  FwdTileSm90(head_dim=128, " in said and "deterministic=1" in said and "bf16=0" in said
    said = plan_said(capsys, *shape, "--seqlen-k", "100", "--head-dim-v", "64", "--arch", "sm_86", "--sm-count", "10")
    assert said.startswith("GeForce RTX 3090: sm_86, 10 multiprocessors, 6 MiB of L2\n")
    assert said.count("seqlen_q=4096, seqlen_k=100") == said.count("head_dim=128, head_dim_v=64, dtype") == 2
    assert said.count("  sm_80 kernel: device 0 (GeForce RTX 3090) has compute capability 8.6, not 9.0\n") == 2
    assert said.count("fill_unseen sm_86") == 2


def test_plan_of_a_window(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--head-dim", "64", "--seqlen", "500", "--arch", "sm_90a")
    said = plan_said(capsys, *shape, "--causal", "--window-size", "100", "-1")
    assert said.count("window=WindowSpec(left=100, right=0, only_drops=False)") == 2 and said.count("band=1") == 2
    plain = plan_said(capsys, *shape, "--causal")
    assert plain == plan_said(capsys, *shape, "--window-size", "-1", "0") and "band" not in plain
    said = plan_said(capsys, *shape, "--causal", "--window-size", "5", "5", status=1)
    assert said.count("window_size=(5, 5) with causal=True: causal makes the right end 0") == 2


def test_plan_says_who_objects(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA2CUPY_KERNEL", "sm90")
    said = plan_said(capsys, "--head-dim", "60", "--seqlen", "10", "--arch", "sm_90a", status=1)
    for direction in ("forward", "backward"):
        objection = "head_dim 60 is not a multiple of 8"
        assert f"no {direction}: FA2CUPY_KERNEL=sm90 is impossible here: {objection}; use sm80" in said
    monkeypatch.delenv("FA2CUPY_KERNEL")
    for options, message in (
        (("--head-dim", "300", "--seqlen", "10", "--arch", "sm_80"), "q has head_dim 300, which is not supported"),
        (("--head-dim", "64", "--seqlen", "10", "--heads-k", "3", "--arch", "sm_80"), "q has 16 heads and k has 3"),
        (("--head-dim", "64", "--seqlen", "10", "--arch", "sm_70"), "sm_70 is not supported: one of sm_80, sm_86"),
    ):
        assert message in plan_said(capsys, *options, status=1)
    with pytest.raises(SystemExit):
        __main__.main(["plan", "--head-dim", "64", "--seqlen", "-1", "--arch", "sm_80"])
    assert "argument --seqlen: invalid" in capsys.readouterr().err


def test_plan_takes_this_machines_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ("--head-dim", "64", "--seqlen", "100")
    with fake_driver(monkeypatch) as fake:
        fake.set_compute_capability(0, (8, 6))
        assert ": sm_86, " in plan_said(capsys, *shape)
    monkeypatch.setattr(plan_command, "_own_gpu", lambda: None)
    assert "--arch" in plan_said(capsys, *shape, status=2)
    assert plan_command.GPUS.keys() == SHARED_MEMORY.keys()
