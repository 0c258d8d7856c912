"""Streams, graphs, threads, processes, a second GPU, and how long first calls take."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cupy
import pytest
import torch

import fa2cupy
from tests.gpu.cases import Case
from tests.gpu.ledger import LEDGER
from tests.gpu.runner import inputs_of

Tensor = torch.Tensor
NAMES = ("q", "k", "v", "dout")
CASE = Case(333, 512, 128, "bfloat16", True, heads=(8, 2), seed=21)
NEEDS = [
    Case(64, 64, d, "bfloat16", causal, given=False, deterministic=True) for d in (64, 128) for causal in (False, True)
]
ROOT = Path(__file__).resolve().parents[2]
# GPU cycles: tens of milliseconds on any GPU that this runs on.
LONG = 100_000_000


def _everything(inputs: dict[str, Any], causal: bool = True, **given: Any) -> list[Any]:
    """out, lse, dq, dk, dv: bit-equal whenever the inputs are."""
    q, k, v, dout = (inputs[name] for name in NAMES)
    out, lse = fa2cupy.attention(q, k, v, causal=causal, return_lse=True)
    return [out, lse, *fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=causal, deterministic=True)]


def _same(left: list[Any], right: list[Any]) -> bool:
    return all(bool((x == y).all()) for x, y in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return inputs_of(CASE, torch.device("cuda", 0))


@pytest.fixture(scope="module")
def expected(inputs: dict[str, Tensor]) -> list[Tensor]:
    results = _everything(inputs)
    torch.cuda.synchronize()
    return results


@pytest.mark.alone
def test_torch_current_stream(inputs: dict[str, Tensor], expected: list[Tensor]) -> None:
    """On the current stream, behind what is queued there, and back at once."""
    stream = torch.cuda.Stream()
    late = {name: torch.full_like(x, math.nan) for name, x in inputs.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        for name, x in late.items():
            x.copy_(inputs[name])
        results = _everything(late)
        still_queued = not stream.query()
    assert still_queued, "the call waited for the GPU"
    stream.synchronize()
    assert _same(results, expected)


@pytest.mark.alone
def test_cupy_current_stream(inputs: dict[str, Tensor], expected: list[Tensor]) -> None:
    arrays = {name: cupy.from_dlpack(x).copy() for name, x in inputs.items()}
    late = {name: cupy.full_like(x, math.nan) for name, x in arrays.items()}
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        torch.cuda._sleep(1)  # another library's stream is of no concern
        blocker = cupy.RawKernel(
            'extern "C" __global__ void wait(long long n) { long long t = clock64(); while (clock64() - t < n); }',
            "wait",
        )
        blocker((1,), (1,), (LONG,))
        for name, x in late.items():
            x[...] = arrays[name]
        results = _everything(late)
        assert not stream.done, "the call waited for the GPU"
        stream.synchronize()
    mine = [torch.from_dlpack(x.view({2: "int16", 4: "int32"}[x.itemsize])) for x in results]
    theirs = [x.view(torch.int16 if x.itemsize == 2 else torch.int32) for x in expected]
    assert _same(mine, theirs)


def test_torch_graph_beside_an_eager_stream(inputs: dict[str, Tensor], expected: list[Tensor]) -> None:
    """Forward and backward captured whole, replayed with new inputs while the same shapes run eagerly elsewhere."""
    static = {name: x.clone() for name, x in inputs.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _everything(static)
    other = inputs_of(Case(333, 512, 128, "bfloat16", True, heads=(8, 2), seed=22), torch.device("cuda", 0))
    expected_other = [x.clone() for x in _everything(other)]
    side = torch.cuda.Stream()
    for turn in range(20):
        source, right = (inputs, expected) if turn % 2 else (other, expected_other)
        for x in captured:
            x.fill_(math.nan)
        for name, x in static.items():
            x.copy_(source[name])
        side.wait_stream(torch.cuda.current_stream())
        graph.replay()
        with torch.cuda.stream(side):
            eager = _everything(other)
        torch.cuda.synchronize()
        assert _same(captured, right), f"replay {turn}"
        assert _same(eager, expected_other), f"eager call beside replay {turn}"


def test_cupy_graph_with_everything_given(inputs: dict[str, Tensor], expected: list[Tensor]) -> None:
    arrays = {name: cupy.from_dlpack(x).copy() for name, x in inputs.items()}
    q, k, v, dout = (arrays[name] for name in NAMES)
    out, lse = cupy.empty_like(q), cupy.empty((2, 8, 333), dtype=cupy.float32)
    gradients = {f"d{name}": cupy.empty_like(arrays[name]) for name in ("q", "k", "v")}
    size = fa2cupy.backward_workspace_bytes(q, k, v, causal=True, deterministic=True)
    workspace = cupy.full(size, 255, dtype=cupy.uint8)

    def call() -> None:
        fa2cupy.attention(q, k, v, causal=True, out=out, lse_out=lse)
        fa2cupy.attention_backward(
            dout, q, k, v, out, lse, causal=True, deterministic=True, workspace=workspace, **gradients
        )

    call()
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(ValueError, match="out="):
                fa2cupy.attention(q, k, v, causal=True)
            with pytest.raises(ValueError, match="workspace="):
                fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True, **gradients)
            call()
        finally:
            graph = stream.end_capture()
        for _ in range(5):
            for x in (out, lse, *gradients.values()):
                x.fill(math.nan)
            workspace.fill(255)
            graph.launch(stream)
            stream.synchronize()
            for x, y in zip((out, lse, *gradients.values()), expected, strict=True):
                bits = torch.from_dlpack(x.view({2: "int16", 4: "int32"}[x.itemsize]))
                assert torch.equal(bits, y.view(bits.dtype))


def test_threads_each_on_a_stream_of_its_own(inputs: dict[str, Tensor]) -> None:
    cases = [
        Case(100 + 37 * n, 300 - 11 * n, (64, 128)[n % 2], "bfloat16", n % 3 == 0, heads=(4, 2), seed=n)
        for n in range(8)
    ]
    data = [inputs_of(case, torch.device("cuda", 0)) for case in cases]
    right = [_everything(x, case.causal) for x, case in zip(data, cases, strict=True)]
    torch.cuda.synchronize()
    problems: list[str] = []
    barrier = threading.Barrier(len(cases))

    def work(number: int) -> None:
        try:
            barrier.wait(30)
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(30):
                    # Its own shapes, and now and then its neighbour's: one plan from several threads at once.
                    which = (number + (turn % 3 == 0)) % len(cases)
                    made = _everything(data[which], cases[which].causal)
                    torch.cuda.current_stream().synchronize()
                    if not _same(made, right[which]):
                        problems.append(f"thread {number}, turn {turn}: wrong bits")
        except Exception as error:
            problems.append(f"thread {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not problems, problems


WORKER = """
import hashlib, json, time
import cupy, numpy
cupy.zeros(1).fill(0)  # the CUDA context
import fa2cupy
rng = numpy.random.default_rng(0)
q, k, v, dout = (cupy.asarray(rng.standard_normal((2, 300, 4, 64)).astype("float16")) for _ in range(4))
cupy.cuda.Device().synchronize()
times = {}
start = time.perf_counter()
out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)
cupy.cuda.Device().synchronize()
times["forward_ms"] = 1e3 * (time.perf_counter() - start)
start = time.perf_counter()
dq, dk, dv = fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
cupy.cuda.Device().synchronize()
times["backward_ms"] = 1e3 * (time.perf_counter() - start)
from fa2cupy.jit import compiler
times["nvrtc_loaded"] = compiler.nvrtc_is_loaded()
times["bits"] = hashlib.sha256(b"".join(cupy.asnumpy(x).tobytes() for x in (out, lse, dq, dk, dv))).hexdigest()
print(json.dumps(times))
"""


def _worker(cache: Path) -> subprocess.Popen[str]:
    # From CUDA 13 on NVRTC keeps a cache of its own, which would make a cold start look warm. What is installed has its
    # bytecode: whoever has told Python not to write any would time how it reads our sources.
    environment = dict(os.environ, FA2CUPY_CACHE_DIR=str(cache), CUDA_CACHE_DISABLE="1", PYTHONPATH=_path())
    environment["PYTHONPYCACHEPREFIX"] = str(cache.parent / "bytecode")
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    return answer


@pytest.mark.alone
def test_first_calls_cold_and_warm(tmp_path: Path) -> None:
    """From an existing context: at most 3 s with an empty cache, 50 ms with a full one, which does not load NVRTC."""
    _answer(_worker(tmp_path / "rehearsal"))  # CuPy's own caches and the file system's
    cold = _answer(_worker(tmp_path / "cache"))
    warm = min((_answer(_worker(tmp_path / "cache")) for _ in range(3)), key=lambda t: t["forward_ms"])
    LEDGER.note(
        "first_call_ms",
        {f"{kind}_{mode}": round(times[f"{mode}_ms"], 1)
         for kind, times in (("cold", cold), ("warm", warm)) for mode in ("forward", "backward")},
    )  # fmt: skip
    assert cold["bits"] == warm["bits"]
    assert cold["nvrtc_loaded"] and not warm["nvrtc_loaded"]
    for mode in ("forward_ms", "backward_ms"):
        assert cold[mode] <= 3000, cold
        assert warm[mode] <= 50, warm


def test_processes_on_one_empty_cache(tmp_path: Path) -> None:
    processes = [_worker(tmp_path / "cache") for _ in range(8)]
    answers = [_answer(process) for process in processes]
    assert all(answer["bits"] == answers[0]["bits"] for answer in answers)
    assert not list((tmp_path / "cache").rglob("*.tmp*"))


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_arrays_on_a_second_gpu_while_the_first_is_current(inputs: dict[str, Tensor], expected: list[Tensor]) -> None:
    there = {name: x.to("cuda:1") for name, x in inputs.items()}
    torch.cuda.synchronize("cuda:1")
    assert torch.cuda.current_device() == 0
    results = _everything(there)
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in results)
    torch.cuda.synchronize("cuda:1")
    assert _same([x.to("cuda:0") for x in results], expected)
    with cupy.cuda.Device(1):
        arrays = {name: cupy.from_dlpack(x).copy() for name, x in there.items()}
        cupy.cuda.Device().synchronize()
    out = fa2cupy.attention(arrays["q"], arrays["k"], arrays["v"], causal=True)
    assert out.device.id == 1 and cupy.cuda.Device().id == 0
    with cupy.cuda.Device(1):
        cupy.cuda.Device().synchronize()
        assert torch.equal(torch.from_dlpack(out.view("int16")).to("cuda:0"), expected[0].view(torch.int16))
    with pytest.raises(ValueError, match="device"):
        fa2cupy.attention(inputs["q"], there["k"], there["v"])


@pytest.mark.alone
def test_host_time_of_a_repeated_call(inputs: dict[str, Tensor]) -> None:
    """Reported here; benchmarks/host_cost.py measures it beside torch's."""
    q, k, v = (inputs[name][:1, :128] for name in ("q", "k", "v"))
    for _ in range(50):
        fa2cupy.attention(q, k, v, causal=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(500):
        fa2cupy.attention(q, k, v, causal=True)
    host_us = 1e6 * (time.perf_counter() - start) / 500
    torch.cuda.synchronize()
    LEDGER.note("host_us_per_call", round(host_us, 1))
    assert host_us < 500
