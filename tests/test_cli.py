"""`python -m fa2cupy demo | env | compile` as a user meets them, and the demo's model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fa2cupy import __main__, kernels
from fa2cupy.cli import backends, byte_model, demo, env
from fa2cupy.cli import compile as compile_command
from fa2cupy.cli.byte_model import Params
from fa2cupy.errors import CompilationError, UnsupportedDevice
from fa2cupy.jit import CompileResult, KernelResources
from tests import reference
from tests.fake_driver import fake_driver


def _hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make `import name` fail as if it were not installed."""
    for name in [*sys.modules]:
        if name.split(".")[0] in names:
            monkeypatch.delitem(sys.modules, name)
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_demo_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "picture.png"
    assert __main__.main(["demo", "--device", "cpu", "--steps", "3", "--output", str(picture)]) == 0
    said = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    for words in ("CPU (NumPy)", "float32", "error against float64", "GFLOP/s", "bits per byte", str(picture)):
        assert words in said
    assert all(len(line) <= 120 for line in said.splitlines() if "Picture" not in line)


def test_demo_without_matplotlib_and_tqdm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _hide(monkeypatch, "matplotlib", "tqdm")
    assert __main__.main(["demo", "--device", "cpu", "--steps", "1", "--output", str(tmp_path / "x.png")]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_demo_takes_the_cpu_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "cupy")
    backend, why = demo.choose_backend("auto")
    assert not backend.is_gpu and "CuPy is not installed" in why
    with pytest.raises(UnsupportedDevice, match="--device gpu"):
        demo.choose_backend("gpu")


def test_demo_reports_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("in the way")
    x = np.ones((1, 64, 4, 32), np.float32)
    call = byte_model.AttentionCall(x, x, x, x, np.full((1, 4, 64), 5, np.float32), x, x, x, x)
    said = demo.draw(tmp_path / "file" / "picture.png", [1.0], 1, call, b"x" * 64)
    assert "cannot be written" in said and "--output" in said


def test_demo_notices_a_wrong_result() -> None:
    backend = backends.cpu()
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 64, 2, 16), dtype=np.float32) for _ in range(4))
    out, lse = backend.forward(q, k, v)
    dq, dk, dv = backend.backward(dout, q, k, v, out, lse)
    right: list[Any] = [q, k, v, out, lse, dout, dq, dk, dv]
    assert demo.report_error("right", backend, byte_model.AttentionCall(*right), demo.LIMIT_RANDOM)
    for place in (3, 6, 7, 8):
        wrong = list(right)
        wrong[place] = wrong[place] * 1.05
        assert not demo.report_error("wrong", backend, byte_model.AttentionCall(*wrong), demo.LIMIT_RANDOM)
        wrong[place] = wrong[place] * np.nan
        assert not demo.report_error("wrong", backend, byte_model.AttentionCall(*wrong), demo.LIMIT_RANDOM)


def test_the_demos_formula_is_the_tests_formula() -> None:
    rng = np.random.default_rng(0)
    q, dout = (rng.standard_normal((2, 33, 4, 8)) for _ in range(2))
    k, v = (rng.standard_normal((2, 33, 2, 8)) for _ in range(2))
    expected = (_forward64(q, k, v)[0], *_backward64(dout, q, k, v, None, None))
    for mine, theirs in zip(demo.plain_formula(q, k, v, dout), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_the_unfused_formula_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", np)  # NumPy has every function of CuPy that it calls
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 33, heads, 16), dtype=np.float32) for heads in (4, 2, 2))
    run = backends.unfused(q, k, v)
    assert not isinstance(run, str)
    expected = _forward64(*(x.astype(np.float16).astype(np.float64) for x in (q, k, v)))[0]
    np.testing.assert_allclose(run().transpose(0, 2, 1, 3), expected, atol=5e-3)


def test_byte_model_gradients_are_slopes_of_its_loss() -> None:
    rng = np.random.default_rng(0)
    params = byte_model.init(16, seed=0, dtype=np.float64)
    text = rng.integers(0, 256, (2, 17)).astype(np.uint8)

    def loss(at: Params) -> float:
        return byte_model.loss_and_gradients(at, text, _forward64, _backward64)[0] * np.log(2)

    _, grads, calls = byte_model.loss_and_gradients(params, text, _forward64, _backward64)
    assert len(calls) == byte_model.NUM_LAYERS
    for name, gradient in grads.items():
        direction = rng.standard_normal(gradient.shape)
        ends = [loss({**params, name: params[name] + step * direction}) for step in (1e-5, -1e-5)]
        assert np.isclose((ends[0] - ends[1]) / 2e-5, (gradient * direction).sum(), rtol=1e-5), name


def _forward64(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    return reference.attention_reference(q, k, v, causal=True)


def _backward64(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any) -> tuple[Any, Any, Any]:
    return reference.attention_backward_reference(dout, q, k, v, causal=True)


def test_env_prints_every_section(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA2CUPY_DEBUG", "1")
    assert __main__.main(["env"]) == 0
    said = capsys.readouterr().out
    for words in (*env.SECTIONS, "fa2cupy", "numpy", "kernel cache", "FA2CUPY_CACHE_DIR", "FA2CUPY_KERNEL"):
        assert words in said
    assert re.search(r"FA2CUPY_DEBUG +'1'", said)


def test_env_works_with_nothing_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "cupy")
    monkeypatch.delenv("HOME", raising=False)
    assert __main__.main(["env"]) == 0
    assert "Settings" in capsys.readouterr().out


def test_env_survives_a_section_that_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> env.Lines:
        yield "first", "fine"
        raise OSError("the disk\nis gone")

    monkeypatch.setattr(env, "SECTIONS", {"Disk": broken})
    assert __main__.main(["env"]) == 0
    said = capsys.readouterr().out
    assert "first" in said and "OSError: the disk is gone" in said


def test_env_shows_the_gpu_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fa2cupy" / "__init__.py"
    monkeypatch.setattr("fa2cupy.__file__", str(package))
    assert "only a checkout" in dict(env.gpu_record())["tests/gpu/record.json"]
    record = tmp_path / "tests" / "gpu" / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"state": "passed", "device": "a GPU", "worst": {"out": 1}}))
    (record.parent / "record.py").write_text(
        "def read(): return 1\ndef digest(): return 2\ndef verdict(record, digest): return True, f'{record} {digest}'\n"
    )
    assert dict(env.gpu_record()) == {"verdict": "1 2", "state": "passed", "device": "a GPU"}


def test_compile_prints_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("cupy")
    few = kernels.compile_jobs("sm_80", all_rows=False)[:2]
    monkeypatch.setattr(kernels, "compile_jobs", lambda arch, all_rows, wide: few)
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path / "cache"))
    assert __main__.main(["compile", "--arch", "sm_80", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "registers" in said and "2 compiled, 0 were in the cache, 0 failed" in said
    assert all(job.label in said for job in few)
    assert __main__.main(["compile", "--arch", "sm_80", "--quick"]) == 0
    assert "0 compiled, 2 were in the cache" in capsys.readouterr().out


def test_compile_without_a_gpu_asks_for_an_arch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_command, "own_archs", list)
    assert __main__.main(["compile"]) == 2
    assert "--arch" in capsys.readouterr().out


def test_compile_for_this_machines_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 has kernels of its own beside those of sm_90."""
    with fake_driver(monkeypatch) as fake:
        fake.set_compute_capability(1, (8, 6))
        assert compile_command.own_archs() == ["sm_90a", "sm_86"]
    archs = {job.arch for job in kernels.compile_jobs("sm_90a", all_rows=True)}
    assert archs == {"sm_90", "sm_90a"}


def test_compile_names_a_bad_arch(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["compile", "--arch", "80"]) == 1
    output = capsys.readouterr()
    assert "80" in output.out + output.err and "sm_" in output.out + output.err


def test_compile_table_lines_up() -> None:
    job = kernels.compile_jobs("sm_80", all_rows=False)[0]
    good = CompileResult(job, KernelResources(128, 0, 64, 0), ("a warning",), 1.25, cached=False)
    bad = CompileResult(job, None, (), 0.5, cached=False, error=CompilationError("it does not compile"))
    header, first, second = compile_command.table([job, job], [good, bad]).splitlines()
    end = header.index("registers") + len("registers")
    assert first[:end].endswith("128") and second[:end].endswith("failed")
    assert first.endswith("a warning")


def test_the_module_runs_and_explains_itself() -> None:
    result = subprocess.run([sys.executable, "-m", "fa2cupy", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(word in result.stdout for word in ("demo", "env", "compile", "plan"))
