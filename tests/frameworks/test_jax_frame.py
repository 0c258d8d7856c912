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
EXTRA = {
    "alibi_slopes": ((2, 4), "float32"),
    "sinks": ((4,), "float32"),
    "dropout_seed": ((8,), "uint32"),
    "dlse": LSE,
}


def call(extra: tuple[str, ...] = (), further: tuple[str, ...] = ()) -> ffi.Call:
    inputs, outputs = ("dout", "q", "k", "v", "out", "lse", *extra), ("dq", "dk", "dv", *further)
    buffers = (Q, Q, Q, Q, Q, LSE, *(EXTRA[name] for name in extra), Q, Q, Q, *(EXTRA[name[1:]] for name in further))
    features = (("softcap", 30.0), ("dropout_p", 0.25)) if "dropout_seed" in extra else ()
    return ffi.Call("attention_backward", inputs, outputs, extra, buffers, {**OPTIONS, "features": features})


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
    ffi.forget()
    return gpu


@pytest.mark.parametrize(
    ("extra", "further"), [((), ()), (("dlse",), ()), (tuple(EXTRA), ()), (tuple(EXTRA), ("dsinks",))]
)
def test_pointers_stream_and_workspace(one_gpu: FakeGpu, extra: tuple[str, ...], further: tuple[str, ...]) -> None:
    assert set(extra) <= set(ARRAY_RULES)
    api = FakeApi(stream=0x123)
    for start in (0x10000, 0x50000):
        given = frame(api, call(extra, further), one_gpu.workspace_bytes + 255, start)
        assert ffi._callbacks["CUDA"](given.address) is None and not api.errors
        launched = one_gpu.last
        names = ("dout", "q", "k", "v", "out", "lse", *extra, "dq", "dk", "dv", *further)
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


def test_frames_that_lie_where_others_lay(one_gpu: FakeGpu) -> None:
    """XLA uses a frame again, with other buffers; then another executable's tables, or attribute, are there."""
    api = FakeApi()
    first, other = (frame(api, each, one_gpu.workspace_bytes + 255) for each in (call(), call(("dlse",))))
    handle = ffi._callbacks["CUDA"]
    inputs = (ctypes.c_uint64 * 6).from_address(ctypes.addressof(first.frame.args.contents))

    def launched() -> tuple[dict[str, int], bool]:
        assert handle(first.address) is None and not api.errors
        return one_gpu.last.pointers, one_gpu.last.problem.causal

    before, _ = launched()
    sites = dict(ffi._sites)
    xla.Buffer.from_address(inputs[1]).data = 0x77000  # q moves
    assert launched() == ({**before, "q": 0x77000}, True)
    inputs[0], inputs[1] = inputs[1], inputs[0]  # two buffers change places
    assert launched() == ({**before, "q": before["dout"], "dout": 0x77000}, True)
    assert ffi._sites.keys() == sites.keys() and len(sites) == 1
    # The same size of string at the same place: another call.
    text = call().attribute()
    changed = text.replace('"causal":true,"softmax_scale":null', '"causal":false,"softmax_scale":0.5')
    assert len(changed) == len(text) and changed != text
    place = xla.WORDS[xla.WORDS[xla.Frame(*xla._FRAME(xla.MEMORY, first.address)).attrs >> 3] >> 3]
    ctypes.memmove(place, changed.encode(), len(text))
    assert launched()[1] is False
    ctypes.memmove(place, text.encode(), len(text))
    assert launched()[1] is True
    assert handle(other.address) is None and "dlse" in one_gpu.last.pointers
    assert launched()[0].keys() == before.keys()


def test_what_is_known_of_frames_is_bounded(one_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffi, "_MAX_SITES", 3)
    api = FakeApi()
    frames = [frame(api, call(), one_gpu.workspace_bytes + 255, 0x10000 * (i + 1)) for i in range(8)]
    for i, given in enumerate(frames):
        assert ffi._callbacks["CUDA"](given.address) is None
        assert one_gpu.last.pointers["dout"] == 0x10000 * (i + 1) and len(ffi._sites) <= 3


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
    ffi.forget()
    assert ffi._callbacks["CUDA"](frame(api, call(), 4096).address) == 0xE
    assert api.errors[-1] == (xla._INVALID_ARGUMENT, "fa2cupy: q has \N{SNOWMAN}")


def test_what_is_promised() -> None:
    """XLA asks at registration, by an extension; then nothing is computed."""
    metadata = (ctypes.c_uint64 * 6)()
    extension = (ctypes.c_uint64 * 4)(32, 1, 0, ctypes.addressof(metadata))
    asks = CallFrame(extension=ctypes.addressof(extension))
    assert ffi._callbacks["CUDA"](ctypes.addressof(asks)) is None
    assert metadata[3] == 1 << 32 and metadata[4] == 1  # version 0.1; may be recorded into a command buffer


def test_another_extension_is_a_call(one_gpu: FakeGpu) -> None:
    given = frame(FakeApi(), call(), one_gpu.workspace_bytes + 255)
    extension = (ctypes.c_uint64 * 4)(24, 2)
    given.frame.extension = ctypes.addressof(extension)
    assert ffi._callbacks["CUDA"](given.address) is None and len(one_gpu.launches) == 1


def test_a_call_survives_its_string() -> None:
    whole = call(("dlse",))
    again = ffi.Call.parse(whole.attribute().encode())
    assert again == whole and again.attribute() == whole.attribute()
    assert Options.checked(**again.options).causal is True
