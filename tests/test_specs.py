"""What goes beyond dense attention, as the planner sees it: specs that are made up for these tests."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fa2cupy import jit
from fa2cupy.errors import InvalidArgument
from fa2cupy.jit import driver
from fa2cupy.kernels import KernelLaunch, common, launch, plan_backward, plan_forward
from fa2cupy.kernels.params import BwdParams, BwdTmaParams, FillParams, FwdParams, FwdTmaParams, TensorMap, composed
from fa2cupy.kernels.planner import FORWARD
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import Row, Spec
from tests.host.build import CXX
from tests.plan_cases import A100, H200, backward_problem, main_launch, named, problem


class TiltParams(ctypes.Structure):
    _fields_ = (("degrees", ctypes.c_float), ("weights", ctypes.c_uint64), ("turns", ctypes.c_int32))


class ShadeParams(ctypes.Structure):
    _fields_ = (("depth", ctypes.c_int32),)


@dataclass(frozen=True, slots=True)
class Tilt(Spec):
    """Scores lean by some degrees, by weights of each head. Rows of 192 queries have no registers for that."""

    degrees: float
    widest: int = 128

    def reaches(self, source: str) -> bool:
        return not source.startswith("smxx/fill")

    def defines(self) -> dict[str, int | str]:
        return {"FA2_TILT": 1}

    def params(self) -> ctypes.Structure:
        return TiltParams(self.degrees, 0, 7)

    def arrays(self) -> tuple[str, ...]:
        return ("weights",)

    def objection(self, row: Row) -> str:
        return f"no room for tilt beside {row.block_m} query rows" if row.block_m > self.widest else ""


@dataclass(frozen=True, slots=True)
class Shade(Spec):
    """Has no array, and reaches every kernel."""

    def defines(self) -> dict[str, int | str]:
        return {"FA2_SHADE": 2}

    def params(self) -> ctypes.Structure:
        return ShadeParams(5)


@dataclass(frozen=True, slots=True)
class Plain(Spec):
    """Changes nothing but what is compiled."""


@dataclass(frozen=True, slots=True)
class Problem(AttentionProblem):
    """With the fields that two features would add."""

    tilt: Spec | None = None
    shade: Spec | None = None


def with_specs(base: AttentionProblem, **specs: Spec) -> Problem:
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return Problem(**values, **specs)


CAUSAL = problem(4096, 4096, causal=True)
BACKWARD = backward_problem(2048, 2048, 128, "bfloat16", True)


def test_absent_specs_change_nothing() -> None:
    for device in (H200, A100):
        plan, dense = plan_forward(with_specs(CAUSAL), device), plan_forward(CAUSAL, device)
        assert plan.launches == dense.launches and plan.tile == dense.tile
        plan, dense = plan_backward(with_specs(BACKWARD), device, False), plan_backward(BACKWARD, device, False)
        assert plan.launches == dense.launches and plan.workspace_bytes == dense.workspace_bytes
    assert not any(word in str(plan) for word in ("tilt", "shade", "None"))
    assert "tilt=Tilt(degrees=0.5, widest=128)" in str(plan_forward(with_specs(CAUSAL, tilt=Tilt(0.5)), H200))
    assert with_specs(CAUSAL, shade=Shade(), tilt=Tilt(1)).specs == (Tilt(1), Shade())


def test_a_row_that_nothing_speaks_against() -> None:
    assert plan_forward(CAUSAL, H200).tile.block_m == 192
    plan = plan_forward(with_specs(CAUSAL, tilt=Tilt(0.5)), H200)
    assert plan.family == "sm90" and plan.tile.block_m == 128 and plan.objection == ""


def test_a_family_that_nothing_speaks_against() -> None:
    narrow = with_specs(CAUSAL, tilt=Tilt(0.5, widest=64))
    why = "no room for tilt beside 192 query rows"  # of the row that it would have had
    plan = plan_forward(narrow, H200)
    assert (plan.family, plan.tile.block_m, plan.objection) == ("sm80", 64, why)
    assert f"  sm_80 kernel: {why}" in str(plan).splitlines()
    with pytest.raises(InvalidArgument, match=f"=sm90 is impossible here: {why}; use sm80, or unset it"):
        plan_forward(narrow, H200, family="sm90")
    none = with_specs(CAUSAL, tilt=Tilt(0.5, widest=32))
    other = "no room for tilt beside 128 query rows"
    with pytest.raises(InvalidArgument, match=f"^no kernel can compute this: sm90: {why}; sm80: {other}$"):
        plan_forward(none, H200)
    with pytest.raises(InvalidArgument, match=f"=sm80 is impossible here: {other}; use sm90, or unset it"):
        plan_forward(none, H200, family="sm80")
    with pytest.raises(InvalidArgument, match=re.escape("sm90: device 0 (A100) has compute capability 8.0, not 9.0")):
        plan_forward(none, A100)
    wide = with_specs(backward_problem(300, 300, 192, "bfloat16", False), tilt=Tilt(0.5, widest=32))
    with pytest.raises(InvalidArgument, match="sm90: no room for tilt beside 64 query rows; sm80: no room"):
        plan_backward(wide, H200, False)


def block_of(packed: bytes, offset: int, block: type[ctypes.Structure]) -> Any:
    return block.from_buffer_copy(packed[offset : offset + ctypes.sizeof(block)])


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_what_a_forward_gets(device: Any) -> None:
    base = FwdTmaParams if device is H200 else FwdParams
    wanted = with_specs(CAUSAL, tilt=Tilt(0.5), shade=Shade())
    dense = main_launch(plan_forward(CAUSAL, device, plan_forward(wanted, device).tile))
    main = main_launch(plan_forward(wanted, device))
    assert main.defines == {
        **dense.defines,
        "FA2_TILT": 1,
        "FA2_SHADE": 2,
        "FA2_PARAMS_BYTES": 640 if device is H200 else 232,
    }
    assert len(main.params) == main.defines["FA2_PARAMS_BYTES"]
    first = ctypes.sizeof(base)
    assert main.params[:first] == dense.params and main.tensor_maps == dense.tensor_maps
    assert main.pointers == (*dense.pointers, (first + 8, 5, 0))
    packed = main.pack((16, 32, 48, 64, 80, 1 << 40), lambda spec, pointer: bytes(128))
    tilt = block_of(packed, first, TiltParams)
    assert (tilt.degrees, tilt.weights, tilt.turns) == (0.5, 1 << 40, 7)
    assert block_of(packed, first + 24, ShadeParams).depth == 5


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_what_a_backward_gets(family: str) -> None:
    """The arrays of specs come before the workspace, and each kernel has what reaches it."""
    wanted = with_specs(backward_problem(300, 200, 128, "bfloat16", True), tilt=Tilt(0.5), shade=Shade())
    plan = plan_backward(wanted, H200, False, family=family)
    main, before, fill = (named(plan, name) for name in ("flash_bwd", "flash_bwd_preprocess", "fill_unseen"))
    places = {"flash_bwd": BwdTmaParams if family == "sm90" else BwdParams, "flash_bwd_preprocess": BwdParams}
    for each in (main, before):
        first = ctypes.sizeof(places[each.name])
        assert [pointer for pointer in each.pointers if pointer.position == 9] == [(first + 8, 9, 0)]
        assert {"FA2_TILT", "FA2_SHADE"} <= set(each.defines)
        packed = each.pack(tuple(1 << (20 + place) for place in range(11)), lambda spec, pointer: bytes(128))
        block = block_of(packed, first, TiltParams)
        assert (block.weights, block.turns) == (1 << 29, 7)
        struct = places[each.name].from_buffer_copy(packed)
        assert struct.dq_accum > 1 << 30 and not struct.dq_accum & 1 << 29
    assert "FA2_TILT" not in fill.defines and fill.defines["FA2_SHADE"] == 2
    assert len(fill.params) == ctypes.sizeof(FillParams) + 8 == fill.defines["FA2_PARAMS_BYTES"]
    assert [pointer.position for pointer in fill.pointers] == [6]


def test_a_spec_may_have_nothing_to_say() -> None:
    wanted = with_specs(CAUSAL, shade=Plain())
    assert plan_forward(wanted, H200).launches == plan_forward(CAUSAL, H200).launches
    assert common.pointer_names(wanted, ("q",)) == ("q",)


def test_every_main_kernel_is_asked_before_its_rows() -> None:
    """A kernel that cannot run on a device is never planned, whatever rows it would have."""
    for kernel in FORWARD:
        if kernel.ROW.family == "sm90":
            assert kernel.rows(CAUSAL, A100) and kernel.objection(CAUSAL, A100)


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_pointers_that_are_not_in_front_arrive(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched is what `pack` gives; also where a call has more pointers than a kernel takes."""
    arrived: list[bytes] = []

    class Launcher:
        def __init__(self, function: int, config: Any) -> None:
            pass

        def arguments(self, block: Any, offset: int, stream: int) -> tuple[Any, ...]:
            address = int.from_bytes(bytes(block)[offset : offset + 8], "little")
            return (ctypes.string_at(address, size),)

    def launched(params: bytes) -> int:
        arrived.append(params)
        return 0

    monkeypatch.setattr(launch, "Launcher", Launcher)
    monkeypatch.setattr(driver, "launch_kernel_ex", lambda: launched)
    monkeypatch.setattr(driver, "device_guard", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(jit, "kernels", lambda *args, **options: ())
    monkeypatch.setattr(jit, "kernel", lambda *args, **options: SimpleNamespace(function=lambda *args: 0))
    monkeypatch.setattr("fa2cupy.jit.tensor_map.encode", encoded)
    for wanted in (with_specs(CAUSAL, tilt=Tilt(0.5)), with_specs(CAUSAL, tilt=OfOthers())):
        main = main_launch(plan_forward(wanted, device))
        size = len(main.params)
        bound = launch.bind([main], 0, "")
        for number in range(3):
            pointers = tuple((number + 2) << (20 + place) for place in range(6))
            bound(pointers, 0)
            assert arrived.pop() == main.pack(pointers, encoded)


@dataclass(frozen=True, slots=True)
class OfOthers(Spec):
    """Its array is of other kernels."""

    def reaches(self, source: str) -> bool:
        return False

    def arrays(self) -> tuple[str, ...]:
        return ("weights",)


def encoded(spec: Any, pointer: int) -> bytes:
    return pointer.to_bytes(8, "little") * 16


CTYPES = {
    ctypes.c_uint64: "unsigned long",
    ctypes.c_int64: "long",
    ctypes.c_int32: "int",
    ctypes.c_float: "float",
    TensorMap: "TensorMap",
}
BLOCKS = (ShadeParams, TiltParams)


def in_cpp(struct: type[ctypes.Structure], known: dict[str, str]) -> str:
    """The name of a struct whose definition, and those of its members, are now in `known`. Filling is left to g++."""
    if struct in CTYPES:
        return CTYPES[struct]
    members = [f"{in_cpp(kind, known)} {name};" for name, kind, *_ in struct._fields_ if not name.startswith("_")]
    known[struct.__name__] = f"struct {struct.__name__} {{ {' '.join(members)} }};"
    return struct.__name__


def test_composed_structs_are_the_same_in_cpp(tmp_path: Path) -> None:
    """Parts as bases, with an absent one between, against parts as members: every offset and every size."""
    known = {"TensorMap": "struct alignas(64) TensorMap { unsigned long opaque[16]; };", "Empty": "struct Empty {};"}
    lines, expected = [], []
    for base in (FwdParams, FwdTmaParams, BwdParams, BwdTmaParams, FillParams):
        for number, blocks in enumerate((BLOCKS, BLOCKS[::-1], BLOCKS[:1])):
            name = f"{base.__name__}{number}"
            bases = [in_cpp(part, known) for part in (base, *blocks)]
            known[name] = f"struct {name} : {', Empty, '.join(bases[:2])}{''.join(f', {b}' for b in bases[2:])} {{}};"
            struct = composed(base, blocks)
            lines.append(f'printf("%zu", sizeof({name}));')
            texts = [str(ctypes.sizeof(struct))]
            for part in (base, *blocks):
                for field, *_ in part._fields_:
                    if not field.startswith("_"):
                        lines.append(f'printf(" %zu", offsetof({name}, {part.__name__}::{field}));')
                        start = getattr(struct, part.__name__).offset
                        texts.append(str(start + getattr(part, field).offset))
            lines.append('puts("");')
            expected.append(" ".join(texts))
    program = tmp_path / "offsets.cpp"
    includes = "#include <cstddef>\n#include <cstdio>\n"
    program.write_text(includes + "\n".join(known.values()) + "\nint main() {\n" + "\n".join(lines) + "\n}\n")
    built = [CXX, "-std=c++17", "-Wno-invalid-offsetof", str(program), "-o", str(tmp_path / "offsets")]
    subprocess.run(built, check=True, capture_output=True)
    said = subprocess.run([tmp_path / "offsets"], check=True, capture_output=True, text=True).stdout
    assert said.splitlines() == expected


def test_a_launch_is_a_value() -> None:
    first, second = (main_launch(plan_forward(with_specs(CAUSAL, tilt=Tilt(0.5)), H200)) for _ in range(2))
    assert isinstance(first, KernelLaunch) and first == second and first.params == second.params
    assert first != main_launch(plan_forward(with_specs(CAUSAL, tilt=Tilt(0.25)), H200))
