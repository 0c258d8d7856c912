"""The instruments of tests/gpu and benchmarks, tried on the CPU with torch: what they accept, and what they catch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fa2cupy
from benchmarks import bench, peers, results
from fa2cupy.jit import compiler
from fa2cupy.jit.driver import DeviceInfo
from tests import reference
from tests.gpu import cases, compile_ahead, oracle, runner
from tests.gpu.cases import Case
from tests.scores import NAMES, draw_features, features_of

CPU = torch.device("cpu")
H100 = DeviceInfo(0, "x", (9, 0), 132, 232448, 50 << 20)
USUAL = Case(45, 70, 40, "bfloat16", True, heads=(6, 3), layout="bhsd", order=2, pad=3, shift=1)


@pytest.mark.parametrize(
    "case",
    [
        Case(33, 70, 40, "bfloat16", True, heads=(6, 3)),
        Case(70, 33, 16, "float16", True, heads=(4, 1), scale=-0.3, outliers=True),
        Case(17, 29, 64, "bfloat16", False, expanded=True),
        Case(9, 0, 8, "float16", False),
        Case(33, 70, 40, "bfloat16", True, heads=(6, 3), head_dim_v=24),
        Case(70, 33, 40, "bfloat16", True, heads=(6, 3), sinks="float32", dlse=True),
        Case(33, 70, 16, "float16", False, heads=(4, 4), window=(40, 3), sinks="float16"),
        Case(33, 70, 16, "float16", False, heads=(4, 4), dlse=True),
    ],
    ids=str,
)
def test_the_oracle_is_the_reference(case: Case) -> None:
    inputs = runner.inputs_of(case, CPU)
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    options = {"causal": case.causal, "scale": case.softmax_scale, "window": case.window}
    extras = runner.extras_of(case, CPU)
    found = oracle.attention(q, k, v, dout, **options, **extras)
    features = reference.Features(sinks=extras.get("sinks"))
    expected = reference.expect(q, k, v, dout, **options, dlse=extras.get("dlse"), features=features)
    _same(found, expected)


def _same(found: tuple[torch.Tensor, dict[str, oracle.Bound]], expected: reference.Expected) -> None:
    lse, bounds = found
    assert np.allclose(lse.numpy(), expected.lse, rtol=1e-6, atol=1e-6)
    for name, bound in expected.bounds.items():
        mine = bounds[name]
        assert np.allclose(mine.ref.numpy(), bound.ref, rtol=1e-10, atol=1e-12), name
        # torch rounds by way of float32, which can differ where a value is half way between two: rare.
        difference = np.linalg.norm(mine.model.numpy() - bound.model)
        assert difference <= 0.2 * np.linalg.norm(bound.model - bound.ref), name
        assert float(mine.floor) == pytest.approx(bound.floor, rel=1e-6, abs=1e-12), name


@pytest.mark.parametrize("names", [*((name,) for name in NAMES), NAMES[:1] + NAMES[2:]], ids=" ".join)
def test_the_oracle_is_the_reference_of_scores(names: tuple[str, ...]) -> None:
    case = Case(70, 45, 24, "bfloat16", True, heads=(6, 3), window=(30, -1), seed=3)
    keywords = draw_features(names, case.seed, case.batch, case.heads[0], case.dtype)
    features = features_of(keywords, case.batch, case.heads[0], case.seqlen_q, case.seqlen_k)
    inputs = runner.inputs_of(case, CPU)
    arrays = [inputs[name] for name in ("q", "k", "v", "dout")]
    options = {"causal": True, "scale": case.softmax_scale, "window": case.window}
    _same(oracle.attention(*arrays, **options, **oracle.features_on(features, CPU)),
          reference.expect(*arrays, **options, features=features))  # fmt: skip


def test_good_results_pass_in_every_layout() -> None:
    for order in range(4):
        for given in (True, False):
            case = Case(33, 50, 24, "float16", True, order=order, pad=order, shift=order, given=given, layout="bhsd")
            assert runner.check(case, True, CPU) == []
    assert runner.check(USUAL, True, CPU) == []
    assert runner.check(replace(USUAL, head_dim_v=56), True, CPU) == []
    for given, sinks in ((True, "float32"), (False, "bfloat16"), (True, None)):
        case = replace(USUAL, given=given, sinks=sinks, dlse=True, seqlen_q=70, seqlen_k=45)
        assert runner.check(case, True, CPU) == []
    for window in ((9, -1), (20, 3)):
        windowed = replace(USUAL, window=window, causal=window[1] < 0)
        for case in (windowed, replace(windowed, seqlen_q=windowed.seqlen_k, seqlen_k=windowed.seqlen_q)):
            assert runner.check(case, True, CPU) == []


def _spoiled(what: str) -> SimpleNamespace:
    """fa2cupy with one fault."""

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        out, lse = fa2cupy.attention(q, k, v, **options)
        with torch.no_grad():
            if what == "one element":
                out[0, 1, 60, 5] *= 1.2
            elif what == "every element a little":
                out *= 1 + 2**-7 * torch.randn(out.shape)
            elif what == "unwritten":
                out[1, 2, 3, 4] = torch.nan
            elif what == "lse":
                lse[0, 0, 60] += 0.01
            elif what == "input":
                q[0, 0, 0, 0] += 1
            elif what == "beside":
                start = out.storage_offset() + out.shape[-1]  # the padding after the first row
                torch.as_strided(out, (1,), (1,), start).fill_(1.0)
        return out, lse

    def backward(*arrays: Any, workspace: Any = None, **options: Any) -> Any:
        made = fa2cupy.attention_backward(*arrays, workspace=workspace, **options)
        if what == "masked row":
            made[0][0, 0, 24, 0] = 1e-6
        elif what == "beside the workspace":
            torch.as_strided(workspace, (1,), (1,), workspace.storage_offset() + workspace.numel()).fill_(0)
        return made

    return SimpleNamespace(
        attention=attention, attention_backward=backward, backward_workspace_bytes=fa2cupy.backward_workspace_bytes
    )


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("one element", "out: error"),
        ("every element a little", "out: rms error"),
        ("unwritten", "out: 1 elements are NaN"),
        ("lse", "lse: error"),
        ("input", "q was written"),
        ("beside", "memory beside out was written"),
        ("masked row", "dq is not 0 in rows of no use"),
        ("beside the workspace", "memory beside the workspace was written"),
    ],
)
def test_faults_are_caught(what: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "fa2cupy", _spoiled(what))
    case = Case(70, 45, 40, "bfloat16", True, heads=(6, 3), layout="bhsd", order=2, pad=3, shift=1)
    problems = runner.check(case, True, CPU)
    assert any(sentence in p for p in problems), problems


def test_plans_are_made_for_every_case_of_the_plan() -> None:
    wanted = [(case, True) for group in cases.groups()[:3] for case in group.values[0]]
    jobs = list(compile_ahead.jobs_of(wanted, H100))
    assert {job.name for job in jobs} >= {"flash_fwd", "flash_bwd", "fill_unseen"} and len(jobs) < 50


def test_the_plan_is_what_runs() -> None:
    """`problem_of` foresees the problem that the public functions will make of the arrays."""
    from fa2cupy.first_call import _problem as problem_of_call
    from fa2cupy.frameworks import TORCH
    from fa2cupy.frameworks.base import Device
    from fa2cupy.operations import FORWARD

    for case in [USUAL, replace(USUAL, head_dim_v=56), *list(cases.random_cases("float16", 30))]:
        arena = runner.Arena(case, CPU)
        inputs = runner.inputs_of(case, CPU)
        user = inputs if case.layout == "bshd" else {n: x.transpose(1, 2) for n, x in inputs.items()}
        arrays = {name: arena.put(name, user[name]) for name in ("q", "k", "v")}
        if case.given:
            arrays |= {"out": arena.take("out"), "lse_out": arena.take("lse_out")}
        options = cases.Options.checked(case.causal, case.scale, case.layout, None, case.deterministic)
        made = problem_of_call(FORWARD, TORCH, arrays, cases.sizes_of(case), case.dtype, options, Device("cpu", 0))
        foreseen = cases.problem_of(case, False)
        assert dict(foreseen.strides) == dict(made.strides), case


class _Clock:
    def burst(self, call: Callable[[], object], calls: int, delay_ms: float) -> tuple[float, bool]:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start), True


@pytest.fixture
def bench_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A "GPU" that is torch's CPU, which has a flash SDPA too."""

    def normal(shape: tuple[int, ...], case: Any) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(getattr(torch, case.dtype))

    def make_tensors(case: Any, seed: int = 0) -> peers.Tensors:
        q = (case.batch, case.seqlen, case.num_heads, case.head_dim)
        k = (case.batch, case.seqlen, case.num_heads_k, case.head_dim)
        leaves = (normal(shape, case).requires_grad_() for shape in (q, k, k))
        return peers.Tensors(*leaves, normal(q, case))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Made-Up 1")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(peers, "make_tensors", make_tensors)
    monkeypatch.setattr(peers, "kernel_family", lambda case: "sm80")
    monkeypatch.setattr(peers, "peak_bytes", lambda *_: 4096)
    monkeypatch.setattr(compiler, "nvrtc_build", lambda: "13.0.88 CL-1")
    monkeypatch.setattr(bench, "TorchClock", _Clock)
    monkeypatch.setattr(bench, "measure_gemm", lambda *_: 1.4)


CELLS = "fwd:d64:b1:s64:h2:causal,bwd:d64:b1:s64:h2:causal"


@pytest.mark.usefixtures("bench_on_the_cpu")
def test_a_run_of_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--cases", CELLS, "--bursts", "2", "--out", str(tmp_path), "--commit", "abc"]) == 0
    printed = capsys.readouterr().out
    assert "left out: fa3" in printed and "left out: fa4" in printed and "does not run: cudnn (" in printed
    assert "NVRTC 13.0.88 CL-1" in printed
    assert "bwd fa2cupy/fa2" in printed and "(workspace 0 bytes)" in printed
    records = results.load(tmp_path / "made-up-1.jsonl")
    assert [r["workspace_bytes"] for r in records] == [None, None, None, 0, None]  # 0: ours ran on the CPU
    assert [(r["peer"], r["mode"], r["kernel"]) for r in records] == [
        ("gemm", None, None),
        ("fa2cupy", "fwd", "sm80"), ("fa2", "fwd", None), ("fa2cupy", "bwd", "sm80"), ("fa2", "bwd", None),
    ]  # fmt: skip
    assert all(r["nvrtc"] == ("13.0.88 CL-1" if r["peer"] == "fa2cupy" else None) for r in records)
    assert {r["commit"] for r in records} == {"abc"} and len({r["run"] for r in records}) == 1
    with pytest.raises(results.DuplicateCellError):  # before anything is measured
        bench.main(["--cases", CELLS, "--out", str(tmp_path), "--run", str(records[0]["run"])])


@pytest.mark.usefixtures("bench_on_the_cpu")
def test_a_run_in_two_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cases", CELLS, "--bursts", "1", "--out", str(tmp_path), "--peers", "fa2cupy,fa2,gemm"]
    bench.main([*arguments, "--part", "1/2"])
    run = capsys.readouterr().out.split("--part 2/2 --run ")[1].split()[0]
    bench.main([*arguments, "--part", "2/2", "--run", run])
    records = results.load(tmp_path / "made-up-1.jsonl")
    assert len(records) == 5 and {r["run"] for r in records} == {run}


@pytest.mark.usefixtures("bench_on_the_cpu")
def test_the_speed_of_a_wrong_kernel_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fa2cupy.attention

    def wrong(*arrays: Any, **options: Any) -> Any:
        out, lse = honest(*arrays, **options)
        return out * 1.1, lse

    monkeypatch.setattr(fa2cupy, "attention", wrong)
    with pytest.raises(RuntimeError, match="out of fa2cupy and fa2 differ"):
        bench.main(["--cases", CELLS.split(",")[0], "--out", str(tmp_path), "--peers", "fa2cupy,fa2"])
    assert results.load(tmp_path / "made-up-1.jsonl") == []
