"""Faults that users met with torch tensors, each with the right outcome."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fa2cupy
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import TORCH
from fa2cupy.frameworks.base import Device
from fa2cupy.prepared import PREPARED
from tests import ranks
from tests.fake_gpu import FakeGpu

SHAPE = (2, 5, 4, 16)
FORWARD = ("q", "k", "v", "out", "lse_out")
BACKWARD = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")


@pytest.fixture(params=["cpu", "gpu"])
def where(request: pytest.FixtureRequest, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> str:
    """On the CPU, or CPU tensors that say that they are on cuda:1 (float16)."""
    if request.param == "gpu":
        monkeypatch.setattr(TORCH, "device", lambda tensor, argument: Device("cuda", 1))
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: gpu.stream + index, raising=False)
    return str(request.param)


def arrays(names: tuple[str, ...], offset: int = 0) -> dict[str, torch.Tensor]:
    """Each in a storage of its own, `offset` elements after its start."""
    found = {}
    for name in names:
        shape, dtype = ((2, 4, 5), torch.float32) if name.startswith("lse") else (SHAPE, torch.float16)
        size = offset + 2 * 5 * 4 * 16
        found[name] = torch.ones(size, dtype=dtype)[offset:][: torch.Size(shape).numel()].view(shape)
    return found


def forward(x: dict[str, Any]) -> Any:
    given = {name: x[name] for name in ("out", "lse_out") if name in x}
    return fa2cupy.attention(x["q"], x["k"], x["v"], return_lse=True, **given)


def backward(x: dict[str, Any]) -> Any:
    given = {name: x[name] for name in ("dq", "dk", "dv") if name in x}
    return fa2cupy.attention_backward(*(x[name] for name in BACKWARD[:6]), **given)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("offset", [0, 4096])
@pytest.mark.parametrize(("call", "names"), [(forward, FORWARD), (backward, BACKWARD)])
def test_fault_freed_storage(
    where: str, gpu: FakeGpu, call: Callable[[Any], Any], names: tuple[str, ...], offset: int, prepared: bool
) -> None:
    """As FSDP frees it: on the first call of a signature and on those that are prepared."""
    for name in names:
        PREPARED.clear()
        if prepared:
            call(arrays(names, offset))
        launches = len(gpu.launches)
        x = arrays(names, offset)
        x[name].untyped_storage().resize_(0)
        with pytest.raises(InvalidArgument, match=rf"^{name} has no memory: its storage was freed"):
            call(x)
        assert len(gpu.launches) == launches


def test_fault_storage_that_became_too_small(where: str) -> None:
    x = arrays(FORWARD)
    x["k"].untyped_storage().resize_(64)
    with pytest.raises(InvalidArgument, match=r"k reaches beyond its memory: .* 64 bytes, 1280 are needed"):
        forward(x)


def test_fault_functional_tensors(where: str) -> None:
    """Through torch's operator, where there is one for the call; else they are named."""
    x = arrays(BACKWARD)
    forwards = torch.func.functionalize(lambda q, k, v: fa2cupy.attention(q, k, v))
    into = torch.func.functionalize(lambda q, k, v: fa2cupy.attention(q, k, v, out=torch.empty_like(q)))
    backwards = torch.func.functionalize(lambda *given: fa2cupy.attention_backward(*given))
    for _ in range(2):
        result = forwards(x["q"], x["k"], x["v"])
        if where == "cpu":
            assert torch.equal(result, fa2cupy.attention(x["q"], x["k"], x["v"]))
        with pytest.raises(InvalidArgument, match=r"^q has no memory: .*functionalize"):
            into(x["q"], x["k"], x["v"])
        with pytest.raises(InvalidArgument, match=r"^dout has no memory: .*functionalize"):
            backwards(*(x[name] for name in BACKWARD[:6]))
        forward({name: x[name] for name in FORWARD[:3]})  # the second time there is a prepared call


def test_fault_freed_workspace(where: str) -> None:
    x = arrays(BACKWARD)
    workspace = torch.empty(1 << 20, dtype=torch.uint8)
    for _ in range(2):
        given = workspace[-workspace.data_ptr() % 256 :].clone()
        given.untyped_storage().resize_(0)
        with pytest.raises(InvalidArgument, match="workspace has no memory"):
            fa2cupy.attention_backward(*(x[name] for name in BACKWARD[:6]), workspace=given)
        backward(x)


def test_empty_tensors_are_valid(where: str) -> None:
    q = torch.empty(2, 0, 4, 16, dtype=torch.float16)
    k = torch.ones(2, 3, 4, 16, dtype=torch.float16)
    for _ in range(2):
        assert fa2cupy.attention(q, k, k).shape == q.shape
        out, lse = fa2cupy.attention(k, q, q, return_lse=True)
        assert out.shape == k.shape and lse.shape == (2, 4, 3)
        if where == "cpu":
            assert (out == 0).all() and torch.isneginf(lse).all()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return fa2cupy.attention(q + 1, k, v)


@pytest.mark.filterwarnings("ignore")
def test_fault_tracing(where: str, gpu: FakeGpu) -> None:
    """A traced function would have kept the first result for every input."""
    x = arrays(FORWARD)
    q, k, v = (x[name] for name in FORWARD[:3])
    given = arrays(BACKWARD)

    def into(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fa2cupy.attention(q, k, v, out=torch.empty_like(q))

    for _ in range(2):
        launches = len(gpu.launches)
        with pytest.raises(InvalidType, match=r"torch\.jit\.trace does not see fa2cupy\.attention"):
            torch.jit.trace(into, (q, k, v))
        for pre_dispatch in (False, True):
            with pytest.raises(InvalidType, match=r"make_fx does not see fa2cupy\.attention"):
                make_fx(into, tracing_mode="real", pre_dispatch=pre_dispatch)(q, k, v)
        with pytest.raises(InvalidType, match=r"make_fx does not see fa2cupy\.attention_backward"):
            make_fx(fa2cupy.attention_backward, tracing_mode="real")(*(given[name] for name in BACKWARD[:6]))
        assert len(gpu.launches) == launches
        attention(q, k, v)  # the second time there is a prepared call
        backward(given)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_fault_make_fx_sees_the_operator(where: str, gpu: FakeGpu, pre_dispatch: bool) -> None:
    q, k, v = arrays(FORWARD[:3]).values()
    traced = make_fx(attention, tracing_mode="real", pre_dispatch=pre_dispatch)(q, k, v)
    launches = len(gpu.launches)
    other = torch.arange(q.numel(), dtype=q.dtype).view(q.shape).remainder(7)
    result = traced(other, k, other)
    if where == "gpu":
        assert len(gpu.launches) == launches + 1
    else:
        assert torch.equal(result, attention(other, k, other)) and not torch.equal(result, attention(q, k, v))


def test_modes_that_only_look_on(where: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = arrays(FORWARD[:3])
    with FlopCounterMode(display=False):
        out, _ = forward(x)
    assert out.shape == SHAPE


def test_fault_torchrun_ranks_compile_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight ranks on one empty cache."""
    done = tmp_path / "done"
    done.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks.RANKS}"]
    root, cache = Path(__file__).parents[2], tmp_path / "cache"
    subprocess.run(
        [*torchrun, ranks.__file__, str(done)],
        env={**os.environ, "FA2CUPY_CACHE_DIR": str(cache), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    compiled, seconds = ranks.read(done)
    with capsys.disabled():
        print(
            f"\n{ranks.RANKS} ranks (torchrun), {ranks.KERNELS} kernels: {seconds[0]:.2f} to {seconds[-1]:.2f} s each"
        )
    assert compiled == ranks.KERNELS
