"""XLA's frames, read and answered: pointers in the order of the kernels, the stream, errors, what is promised."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from fa2cupy.errors import InvalidArgument
from fa2cupy.options import Options
from fa2cupy.problem import ARRAY_RULES
from fa2cupy.xla import ffi
from fa2cupy.xla import frame as xla
from tests.fake_gpu import FakeGpu
from tests.frameworks.xla_frame import CallFrame, FakeApi, FakeFrame

Q, LSE = ((2, 5, 4, 16), "float16"), ((2, 4, 5), "float32")
OPTIONS = {"causal": True, "softmax_scale": None, "layout": "bshd", "dtype": None, "deterministic": False}


def call(extra: tuple[str, ...] = ()) -> ffi.Call:
    inputs = ("dout", "q", "k", "v", "out", "lse", *extra)
    buffers = (Q, Q, Q, Q, Q, LSE, *(LSE,) * len(extra), Q, Q, Q)
    return ffi.Call("attention_backward", inputs, ("dq", "dk", "dv"), extra, buffers, {**OPTIONS, "features": ()})


def frame(api: FakeApi, call: ffi.Call, workspace: int, start: int = 0x10000) -> FakeFrame:
    """Buffers at start, start + 0x1000 and so on; the workspace, of that many bytes, at an address of its own."""
    buffers = [(dtype, shape, start + 0x1000 * i) for i, (shape, dtype) in enumerate(call.buffers)]
    args, rets = buffers[: len(call.inputs)], buffers[len(call.inputs) :]
    if workspace:
        rets.append(("uint8", (workspace,), 0x99940))
    return FakeFrame(api, call.attribute(), args, rets)


@pytest.fixture
def one_gpu(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu.compute = False
    monkeypatch.setattr(ffi, "_gpus", lambda: (1,))
    ffi._prepared.clear()
    return gpu


@pytest.mark.parametrize("extra", [(), ("dlse",)])
def test_pointers_stream_and_workspace(one_gpu: FakeGpu, extra: tuple[str, ...]) -> None:
    assert set(extra) <= set(ARRAY_RULES)
    api = FakeApi(stream=0x123)
    for start in (0x10000, 0x50000):
        given = frame(api, call(extra), one_gpu.workspace_bytes + 255, start)
        assert ffi._callbacks["CUDA"](given.address) is None and not api.errors
        launched = one_gpu.last
        names = ("dout", "q", "k", "v", "out", "lse", *extra, "dq", "dk", "dv")
        for i, name in enumerate(names):
            assert launched.pointers[name] == start + 0x1000 * i
        assert launched.pointers["workspace"] == 0x99A00
        assert (launched.stream, launched.device, launched.current_device) == (0x123, 1, 1)
    assert one_gpu.binds == 1


def test_device_of_several(one_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffi, "_gpus", lambda: (0, 1))
    for device in (1, 0):
        given = frame(FakeApi(device=device), call(), one_gpu.workspace_bytes + 255)
        assert ffi._callbacks["CUDA"](given.address) is None
        assert one_gpu.last.device == device


def test_errors_go_to_xla(one_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeApi()
    too_small = frame(api, call(), 100)
    assert ffi._callbacks["CUDA"](too_small.address) == 0xE
    assert (
        api.errors[-1][0] == xla._INTERNAL and "compiled with a workspace of 100 bytes but needs" in api.errors[-1][1]
    )
    silent = FakeApi(fails=True)
    assert ffi._callbacks["CUDA"](frame(silent, call(), 4096).address) == 0xE
    assert "does not say on which stream" in silent.errors[-1][1]

    def refuses(*_: Any) -> None:
        raise InvalidArgument("q has \N{SNOWMAN}")

    monkeypatch.setattr(ffi, "_plan", refuses)
    ffi._prepared.clear()
    assert ffi._callbacks["CUDA"](frame(api, call(), 4096).address) == 0xE
    assert api.errors[-1] == (xla._INVALID_ARGUMENT, "fa2cupy: q has \N{SNOWMAN}")


def test_what_is_promised() -> None:
    """XLA asks at registration, by an extension; then nothing is computed."""
    metadata = (ctypes.c_uint64 * 6)()
    extension = (ctypes.c_uint64 * 4)(32, 1, 0, ctypes.addressof(metadata))
    asks = CallFrame(extension=ctypes.addressof(extension))
    assert ffi._callbacks["CUDA"](ctypes.addressof(asks)) is None
    assert metadata[3] == 1 << 32 and metadata[4] == 1  # version 0.1; may be recorded into a command buffer


def test_a_call_survives_its_string() -> None:
    whole = call(("dlse",))
    again = ffi.Call.parse(whole.attribute().encode())
    assert again == whole and again.attribute() == whole.attribute()
    assert Options.checked(**again.options).causal is True
