"""The structs of cuda_src/common/params.cuh and their ctypes twins: every field at the same offset, of the same size.

Equal sizes are not enough: a composed struct has had a field at 200 in C++ and at 196 in ctypes. One small program of
g++ holds the header once for every set of macros that a kernel is compiled with, each in a namespace of its own, and
prints what C++ makes of the structs.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fa2cupy.jit import source
from fa2cupy.kernels import compile_jobs, params
from tests.host import build

HEADER = "common/params.cuh"
ARCHS = ("sm_80", "sm_86", "sm_90a", "sm_100", "sm_120")
NAMES_IN_CTYPES = {"Strides": "Strides3"}  # where they are not those of C++

Defines = Mapping[str, int | str]
Layout = dict[str, tuple[int, int]]  # field -> offset and size; "" -> 0 and the size of the whole


def flattened(path: str, seen: set[str]) -> str:
    """A header and what it includes, each once, as one text that can be had many times."""
    if path in seen:
        return ""
    seen.add(path)
    lines = []
    for line in (source.root() / path).read_text().splitlines():
        included = re.match(r'\s*#\s*include\s*"(.*)"', line)
        lines.append(flattened(included[1], seen) if included else line if "#pragma once" not in line else "")
    return "\n".join(lines) + "\n"


def sets_of_defines() -> list[Defines]:
    """Of all that is compiled, enough that every two macros meet in all their values.

    0 and 1 are choices; any other number is a size, of which only counts that it is there.
    """
    found: list[Defines] = []
    covered: set[object] = set()
    for arch in ARCHS:
        for job in compile_jobs(arch, True):
            choice = sorted((name, str(value) if value in (0, 1) else "") for name, value in job.defines.items())
            pairs = {*itertools.combinations(choice, 2), tuple(name for name, _ in choice)}
            if not pairs <= covered:
                covered |= pairs
                found.append(job.defines)
    fill = {"FA2_BF16": 1, "FA2_HEAD_DIM": 16, "FA2_ALIGNED": 0, "FA2_FILL_THREADS": 256}
    return [*found, fill | {"FA2_PARAMS_BYTES": ctypes.sizeof(params.FillParams)}]


def structs_of(text: str) -> dict[str, list[str]]:
    """name -> fields of each struct in preprocessed text that has data."""
    found = {}
    for name, body in re.findall(r"\bstruct\s+(?:alignas\(\d+\)\s+)?(\w+)\s*\{([^{}]*)\}\s*;", text):
        declarations = (each.strip() for each in body.split(";"))
        fields = [
            re.findall(r"\w+", re.sub(r"\[.*", "", declarator))[-1]
            for declaration in declarations
            if declaration and not declaration.startswith("static ")
            for declarator in declaration.split(",")
        ]
        if fields:
            found[name] = fields
    return found


def layouts_in_cxx(sets: Iterable[Defines], header: str, folder: Path) -> list[dict[str, Layout]]:
    """For each set of macros: name of each struct -> its layout, as g++ has it."""
    parts = ["#define FA2_HOST 1\n#define FA2_DEVICE inline\n#define FA2_SHARED_MEMORY(Type, name)\n"]
    for number, defines in enumerate(sets):
        macros = "".join(f"#define {name} {value}\n" for name, value in defines.items())
        undone = "".join(f"#undef {name}\n" for name in defines)
        parts.append(f"{macros}namespace set{number} {{\n{header}}}  // of the set\n{undone}")

    def cxx(name: str, *arguments: str) -> str:
        command = [build.CXX, "-std=c++17", "-w", *arguments, str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    (folder / "sets.cpp").write_text("".join(parts))
    text = cxx("sets.cpp", "-E", "-P")
    found = [structs_of(part) for part in re.split(r"\bnamespace set\d+ ?\{", text)[1:]]
    prints = []
    for number, structs in enumerate(found):
        for name, fields in structs.items():
            whole = f"set{number}::{name}"
            prints.append(f'  printf("{number} {name} - 0 %zu\\n", sizeof({whole}));\n')
            for field in fields:
                place = f"__builtin_offsetof({whole}, {field}), sizeof((({whole}*)0)->{field})"
                prints.append(f'  printf("{number} {name} {field} %zu %zu\\n", {place});\n')
    names = "#include <cstdint>\n#include <cstdio>\n"
    (folder / "print.cpp").write_text(f"{names}{text}int main() {{\n{''.join(prints)}}}\n")
    cxx("print.cpp", "-O0", "-o", "print")
    layouts: list[dict[str, Layout]] = [{} for _ in found]
    for line in subprocess.run([folder / "print"], capture_output=True, text=True, check=True).stdout.splitlines():
        number, name, field, offset, size = line.split()
        layouts[int(number)].setdefault(name, {})["" if field == "-" else field] = int(offset), int(size)
    return layouts


def layout_in_ctypes(name: str) -> Layout:
    """Of the twin; names that begin with an underscore are padding."""
    twin: Any = getattr(params, NAMES_IN_CTYPES.get(name, name))
    fields = [field[0] for field in twin._fields_ if not field[0].startswith("_")]
    places = {field: (getattr(twin, field).offset, getattr(twin, field).size) for field in fields}
    return {"": (0, ctypes.sizeof(twin)), **places}


def compare(layout: dict[str, Layout], defines: Defines) -> None:
    """AssertionError unless every struct has a twin that is laid out alike, and every twin a struct."""
    own = {name: fields for name, fields in layout.items() if name not in ("half_t", "bf16_t", "TensorMap")}
    twins = {name for name in params.__all__ if isinstance(getattr(params, name), type(ctypes.Structure))}
    assert {NAMES_IN_CTYPES.get(name, name) for name in own} == twins
    assert layout["TensorMap"][""] == (0, ctypes.sizeof(params.TensorMap))
    for name, fields in own.items():
        assert fields == layout_in_ctypes(name), f"{name} of {dict(defines)}"
    assert defines["FA2_PARAMS_BYTES"] in [fields[""][1] for fields in own.values()]


def test_every_field_has_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = sets_of_defines()
    layouts = layouts_in_cxx(sets, flattened(HEADER, set()), tmp_path)
    assert len(layouts) == len(sets) > 20
    for defines, layout in zip(sets, layouts, strict=True):
        compare(layout, defines)

    class FillParams(ctypes.Structure):  # of the same size, with two fields that changed places
        _fields_ = (*params.FillParams._fields_[:-2], *params.FillParams._fields_[:-3:-1])

    assert ctypes.sizeof(FillParams) == ctypes.sizeof(params.FillParams)
    monkeypatch.setattr(params, "FillParams", FillParams)
    with pytest.raises(AssertionError, match="FillParams of"):
        compare(layouts[0], sets[0])


def test_the_instrument(tmp_path: Path) -> None:
    """Several names of one type, pointers, arrays, what a macro adds, and the holes that alignment leaves."""
    header = """struct A { int x, y; const float* p; };
    struct alignas(16) B {
      float* p;
    #if FA2_MORE
      float more[3];
    #endif
      A a;  };
    struct Empty { static constexpr int n = 1; };
    """
    plain, more = layouts_in_cxx([{"FA2_MORE": 0}, {"FA2_MORE": 1}], header, tmp_path)
    assert plain["A"] == {"": (0, 16), "x": (0, 4), "y": (4, 4), "p": (8, 8)} and "Empty" not in plain
    assert plain["B"] == {"": (0, 32), "p": (0, 8), "a": (8, 16)}
    assert more["B"] == {"": (0, 48), "p": (0, 8), "more": (8, 12), "a": (24, 16)}
