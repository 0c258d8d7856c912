"""The structs of cuda_src/common's params.cuh and cache_params.cuh and their ctypes twins: every field at the same
offset, of the same size.

Equal sizes are not enough: a composed struct has had a field at 200 in C++ and at 196 in ctypes. One small program of
g++ holds the header once for every set of macros that a kernel is compiled with, each in a namespace of its own, and
prints what C++ makes of the structs. So it does of structs that are composed of parts, their bases; a part that is
empty in a set is no part there.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fa2cupy import spec
from fa2cupy.jit import source
from fa2cupy.kernels import cache_params, compile_jobs, params
from fa2cupy.mask_spec import PickedParams
from tests.host import build

HEADER = "common/cache_params.cuh"  # which includes common/params.cuh
ARCHS = ("sm_80", "sm_86", "sm_90a", "sm_100", "sm_120")
NAMES_IN_CXX = {"Strides3": "Strides"}  # of twins, where they are others
BLOCKS = {
    name: getattr(spec, name)
    for name in (
        "DlseParams",
        "DropoutParams",
        "LengthsParams",
        "ScoreParams",
        "SinksGradientParams",
        "SinksParams",
        "WindowParams",
    )
} | {"PickedParams": PickedParams}
_BAND, _LISTED = ("FA2_BAND", spec.WindowParams), ("FA2_LISTED", params.ListParams)
_SINKS, _DLSE = ("FA2_SINKS", spec.SinksParams), ("FA2_DLSE", spec.DlseParams)
_SCORES = ("FA2_SOFTCAP FA2_ALIBI", spec.ScoreParams)
_PICKED = ("FA2_PICKED", PickedParams)
_DROPOUT = ("FA2_DROPOUT", spec.DropoutParams)
_SINKS_GRADIENT = spec.SinksGradientParams
_SEGMENTS = ("FA2_SEGMENTS", params.SegmentParams)
# Struct with parts -> the twin of its first, and each other with the macros with one of which it is there; with none,
# always.
COMPOSED = {
    "DecodeParams": (
        cache_params.CacheParams,
        (
            ("FA2_NEW_KEYS", cache_params.NewKeysParams),
            ("FA2_TURNED", cache_params.TurnParams),
            ("FA2_QUANTISED", cache_params.ScaleParams),
            _SCORES,
            _SINKS,
        ),
    ),
    "FwdBandParams": (params.FwdParams, (_BAND, _SCORES, _PICKED, _SINKS, _DROPOUT, _LISTED)),
    "FwdTmaBandParams": (params.FwdTmaParams, (_BAND, _SCORES, _PICKED, _SINKS, _DROPOUT, _LISTED)),
    "BwdBandParams": (params.BwdParams, (_BAND, _SCORES, _PICKED, _DROPOUT, _LISTED)),
    "BwdTmaBandParams": (params.BwdTmaParams, (_BAND, _SCORES, _PICKED, _DROPOUT, _LISTED)),
    "PreprocessParams": (params.BwdParams, (("FA2_SINKS", _SINKS_GRADIENT), _DROPOUT, _DLSE, _LISTED)),
    "PostprocessParams": (params.BwdParams, (_LISTED,)),
    "ListTilesBandParams": (params.ListTilesParams, (_BAND, _SINKS, ("", spec.LengthsParams), _SEGMENTS)),
    "FindSegmentsParams": (params.FindParams, (("", spec.LengthsParams), ("", params.SegmentParams))),
    "FillUnseenParams": (params.FillParams, (_PICKED, _SINKS)),
    "SinksBwdBandParams": (
        params.SinksBwdParams,
        (_BAND, ("", _SINKS_GRADIENT), ("FA2_LISTED", spec.LengthsParams), _DLSE, _LISTED, _SEGMENTS),
    ),
}

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
    with_sinks = ctypes.sizeof(params.composed(params.FillParams, (spec.SinksParams,)))
    found.append(fill | {"FA2_PARAMS_BYTES": ctypes.sizeof(params.FillParams)})
    found.append(fill | {"FA2_SINKS": 1, "FA2_PARAMS_BYTES": with_sinks})
    for first in (params.FindParams, params.ListTilesParams):
        size = ctypes.sizeof(params.composed(first, (spec.LengthsParams, params.SegmentParams)))
        found.append(fill | {"FA2_SEGMENTS": 1, "FA2_PARAMS_BYTES": size})
    more = ("FA2_BAND", "FA2_SOFTCAP", "FA2_ALIBI", "FA2_PICKED", "FA2_SINKS", "FA2_DROPOUT", "FA2_LISTED")
    any_size = {"FA2_PARAMS_BYTES": 0}
    for n in (1, 2, len(more)):
        found += [{**found[0], **dict.fromkeys(macros, 1), **any_size} for macros in itertools.combinations(more, n)]
    return found


def structs_of(text: str) -> dict[str, list[str]]:
    """name -> fields of each struct in preprocessed text that has data."""
    found = {}
    for name, body in re.findall(r"\bstruct\s+(?:alignas\(\d+\)\s+)?(\w+)\s*\{([^{}]*)\}\s*;", text):
        declarations = (each.strip() for each in body.split(";"))
        fields = [
            re.findall(r"\w+", re.sub(r"\[.*", "", declarator))[-1]
            for declaration in declarations
            if declaration and not declaration.startswith(("static ", "using ")) and "(" not in declaration
            for declarator in declaration.split(",")
        ]
        if fields:
            found[name] = fields
    return found


def parts_of(text: str) -> dict[str, list[tuple[str, str]]]:
    """name -> its parts, each with the constant by which it is there or not, of what is `Composed<...>`."""
    found = re.findall(r"\busing\s+(\w+)\s*=\s*Composed\s*<\s*(\w+)\s*,([^;]*)>\s*;", text)
    part = r"\bPart\s*<\s*(\w+)\s*,\s*(\w+)\s*>"
    return {name: [("true", first), *re.findall(part, others)] for name, first, others in found}


def constants_of(text: str) -> dict[str, int]:
    """name -> value of each capability, an enum of preprocessed text: a number, or some of those before it."""
    values = {"true": 1}
    for name, value in re.findall(r"\benum\s*\{\s*(k\w+)\s*=\s*([\w\s|]+?)\s*\}\s*;", text):
        values[name] = max(int(values.get(each.strip(), each)) for each in value.split("||"))
    return values


def layouts_in_cxx(sets: Iterable[Defines], header: str, folder: Path) -> list[dict[str, Layout]]:
    """For each set of macros: name of each struct -> its layout, as g++ has it."""
    parts = ["#define FA2_HOST 1\n#define FA2_DEVICE inline\n#define FA2_SHARED_MEMORY(Type, name)\n"]
    parts.append("struct int2 { int x, y; };\nstruct int4 { int x, y, z, w; };\n")  # of which only the pointers count
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
    found = [
        (structs_of(part), parts_of(part), constants_of(part)) for part in re.split(r"\bnamespace set\d+ ?\{", text)[1:]
    ]
    prints = []
    for number, (structs, composed, constants) in enumerate(found):
        for name, fields in structs.items():
            whole = f"set{number}::{name}"
            prints.append(f'  printf("{number} {name} - 0 %zu\\n", sizeof({whole}));\n')
            for field in fields:
                place = f"__builtin_offsetof({whole}, {field}), sizeof((({whole}*)0)->{field})"
                prints.append(f'  printf("{number} {name} {field} %zu %zu\\n", {place});\n')
        for name, parts in composed.items():
            whole = f"set{number}::{name}"
            prints.append(f'  printf("{number} {name} - 0 %zu\\n", sizeof({whole}));\n')
            for constant, part in parts:
                if not constants[constant]:
                    continue
                for field in structs[part]:
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


def layout_in_ctypes(twin: Any) -> Layout:
    """Of a twin; strides that stand side by side are taken together."""
    places = {name: (getattr(twin, name).offset, getattr(twin, name).size) for name in fields_of(twin)}
    stems = [name.removesuffix("batch") for name in places if name.endswith("_batch")]
    for stem in (stem for stem in stems if f"{stem}row" in places):
        first, *others = (places.pop(stem + name) for name in fields_of(params.Strides3))
        assert others == [(first[0] + 8, 8), (first[0] + 16, 8)]
        places[f"{stem}strides"] = first[0], ctypes.sizeof(params.Strides3)
    return {"": (0, ctypes.sizeof(twin)), **places}


def fields_of(twin: Any) -> Iterator[str]:
    """Those of its parts too; names that begin with an underscore are padding."""
    for name, kind, *_ in twin._fields_:
        if name in getattr(twin, "_anonymous_", ()):
            yield from fields_of(kind)
        elif not name.startswith("_"):
            yield name


def twins(defines: Defines) -> dict[str, Any]:
    """Name of each struct in C++ -> its twin, in a set of macros."""
    exported = {name: getattr(module, name) for module in (params, cache_params) for name in module.__all__}
    found = {name: each for name, each in exported.items() if isinstance(each, type(ctypes.Structure))}
    found = {NAMES_IN_CXX.get(name, name): twin for name, twin in found.items()} | BLOCKS
    for name, (first, others) in COMPOSED.items():
        there = tuple(block for macros, block in others if not macros or any(map(defines.get, macros.split())))
        found[name] = params.composed(first, there) if there else first
    return found


def compare(layout: dict[str, Layout], defines: Defines) -> None:
    """AssertionError unless every struct has a twin that is laid out alike, and every twin a struct."""
    own = {name: fields for name, fields in layout.items() if name not in ("half_t", "bf16_t", "TensorMap")}
    expected = twins(defines)
    assert set(own) == set(expected)
    assert layout["TensorMap"][""] == (0, ctypes.sizeof(params.TensorMap))
    for name, fields in own.items():
        assert fields == layout_in_ctypes(expected[name]), f"{name} of {dict(defines)}"
    assert defines["FA2_PARAMS_BYTES"] in [0, *(fields[""][1] for fields in own.values())]


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
    """Several names of one type, pointers, arrays, what a macro adds, the holes that alignment leaves, and parts."""
    header = """struct A { int x, y; const float* p; };
    struct alignas(16) B {
      float* p;
    #if FA2_MORE
      float more[3];
    #endif
      A a;  };
    struct Empty { static constexpr int n = 1; };
    enum { kMore = FA2_MORE };
    struct C {
      float c;
      int64_t d; };
    template <bool kGiven, typename Block> struct Part {};
    template <typename First, typename Other> struct Two : First {};
    template <typename First, typename Block> struct Two<First, Part<true, Block>> : First, Block {};
    template <typename First, typename Other> using Composed = Two<First, Other>;
    using Whole = Composed<A, Part<kMore, C>>;
    """
    plain, more = layouts_in_cxx([{"FA2_MORE": 0}, {"FA2_MORE": 1}], header, tmp_path)
    assert plain["A"] == {"": (0, 16), "x": (0, 4), "y": (4, 4), "p": (8, 8)} and "Empty" not in plain
    assert plain["B"] == {"": (0, 32), "p": (0, 8), "a": (8, 16)}
    assert more["B"] == {"": (0, 48), "p": (0, 8), "more": (8, 12), "a": (24, 16)}
    assert plain["Whole"] == plain["A"] and plain["C"] == {"": (0, 16), "c": (0, 4), "d": (8, 8)}
    assert more["Whole"] == {**plain["A"], "": (0, 32), "c": (16, 4), "d": (24, 8)}
