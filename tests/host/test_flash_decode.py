"""cuda_src/sm80/flash_decode.cu and smxx/append_keys.cu, run on the CPU: four multiprocessors, under three schedules.

Rows of the cache and pages that nobody may read hold NaN, tables garbage behind the last page, the workspace NaN; no
bit depends on the order of things, counters are 0 again, and nothing is written outside of results and new keys.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fa2cupy.jit import source as source_module
from fa2cupy.kernels.sm80.flash_decode import DECODE_TILES, DECODE_TILES_8, DecodeTile
from tests.caches import FLOAT8, INT8, CacheCase
from tests.host import run
from tests.host.build import Mutation
from tests.host.caches import HostCache, check, execute, prepare
from tests.host.run import HostRunError, Schedule

_LENS = (300, 0, 17, 64, 1, 16)
_NEOX, _PAIRS = (32, "neox", "float32"), (12, "interleaved", "bfloat16")


def _case(*more: Any, **changes: Any) -> CacheCase:
    usual: dict[str, Any] = {"capacity": 320, "head_dim": 64, "heads": (8, 2), "causal": True, "dtype": "bfloat16"}
    return CacheCase(*more, **{**usual, **changes})


# What is compiled for the same choices, by name: rows of the table, where keys lie, what comes with the call.
CASES: dict[str, tuple[HostCache, ...]] = {
    "pages": (
        HostCache(_case(_LENS, 1, page=32)),
        HostCache(_case(_LENS, 4, page=64, table="indptr", causal=False, window=(40, 3))),
        HostCache(_case(_LENS, (1, 2, 0, 4, 3, 1), page=32, leftpad=(33, 0, 4, 0, 1, 15), batch_idx=True)),
        HostCache(_case((320,) * 33, 1, page=32, by=None, heads=(2, 1)), sm_count=4),
        HostCache(_case((64, 5), 2, page=32, heads=(6, 2)), sm_count=16),
        HostCache(_case((300, 90), 1, page=32, heads=(2, 1)), sm_count=29),
    ),
    "any pages, new keys that are turned": (
        HostCache(_case((283, 0, 17, 64), 3, 3, page=3, capacity=321, rotary=_NEOX)),
        HostCache(_case((283, 0, 17, 64), 2, 1, page=1, rotary=_PAIRS, causal=False, by="seqused_k", layout="bhsd")),
        HostCache(_case((303, 0, 300, 64), (3, 0, 9, 1), 1, page=17, capacity=306, rotary=_NEOX, window=(25, -1))),
        HostCache(_case((320, 319), 2, 2, page=16, rotary=_NEOX)),
    ),
    "no pages, 32 rows": (
        HostCache(_case(_LENS, 5, head_dim=128, dtype="float16")),
        HostCache(_case((319, 33), 20, head_dim=128, dtype="float16", heads=(4, 2), window=(50, -1), batch_idx=True)),
    ),
    "odd columns, new keys": (
        HostCache(_case((283, 0, 17, 64), 2, 1, head_dim=33, head_dim_v=7)),
        HostCache(_case((283, 0, 17, 64), (1, 0, 2, 5), 1, head_dim=33, head_dim_v=7, heads=(3, 3))),
    ),
    "parts": (
        HostCache(_case(_LENS, 1, page=32), split_size=64),
        HostCache(_case(_LENS, (9, 2, 0, 4, 3, 1), page=32, window=(100, -1)), split_size=128),
        HostCache(_case((320, 17), 1, page=32, heads=(4, 1)), split_size=64, sm_count=1),
        HostCache(_case((320, 17), 1, page=32, heads=(2, 1)), split_size=64, sm_count=3),
    ),
    "e4m3 by its bits, scales of pages, new keys": (
        HostCache(_case((283, 0, 17, 64), 3, 2, page=16, kv_dtype=FLOAT8, scales=("page", "page"), dtype="float16"),
                  "sm_80"),
        HostCache(_case((283, 1, 17, 64), 1, 1, page=16, kv_dtype=FLOAT8, scales=("head", "page"), dtype="float16",
                        by="seqused_k"), "sm_80"),
    ),
    "int8, a head's own logit, softcap, slopes": (
        HostCache(_case(_LENS, 2, page=32, kv_dtype=INT8, scales=("batch", "head"), softcap=3.0, slopes="batch",
                        sinks="float32")),
        HostCache(_case(_LENS, 3, page=32, kv_dtype=INT8, scales=("number", "none"), softcap=3.0, slopes="head",
                        sinks="bfloat16", causal=False)),
    ),
    "many new keys": (
        HostCache(_case((30, 0, 100), 5, 70, page=16, rotary=_NEOX)),
    ),
}  # fmt: skip
ALL = [case for cases in CASES.values() for case in cases]


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    for case in CASES[name]:
        check(case)


_MORE: dict[str, tuple[HostCache, ...]] = {
    f"{name} {head_dim} {dtype} {arch}": (
        HostCache(_case(_LENS, 1, head_dim=head_dim, dtype=dtype, **more), arch),
        HostCache(_case((299, 0, 17, 64), 7, head_dim=head_dim, dtype=dtype, **{**more, "window": (30, -1)}), arch),
    )
    for head_dim in (16, 40, 72, 96, 128, 192, 256)
    for arch in ("sm_80", "sm_86", "sm_90")
    for dtype, name, more in (
        ("bfloat16", "rows", {}),
        ("float16", "pages of 1", {"page": 1}),
        ("float16", "turned", {"page": 16, "new": 2, "rotary": (16, "neox", "float16"), "sinks": "float32"}),
        ("bfloat16", "e4m3", {"page": 16, "kv_dtype": FLOAT8}),
        ("bfloat16", "int8", {"page": 1, "new": 1, "kv_dtype": INT8, "scales": ("page", "head"), "slopes": "head"}),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _MORE)
def test_more_cases(name: str) -> None:
    for case in _MORE[name]:
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [*DECODE_TILES[232448], *DECODE_TILES_8[232448]], ids=str)
def test_rows(tile: DecodeTile) -> None:
    """Each with more rows than it holds, and as many as it has."""
    kv_dtype = FLOAT8 if tile.item_bytes == 1 else None
    for queries in (tile.block_m // 4, tile.block_m // 4 + 3):
        check(HostCache(_case((299, 0, 64), queries, head_dim=tile.head_dim, page=16, kv_dtype=kv_dtype), tile=tile))


# ----------------------------------------------------------------------------------------------------------------------
# Bits


def _bits(case: HostCache, drawn_as: HostCache | None = None, row: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    prepared = prepare(case)
    if drawn_as is not None and row is not None:
        other = prepare(drawn_as).drawn
        prepared.drawn.q[...] = other.q[row : row + 1]
        for name in ("k_cache", "v_cache"):
            getattr(prepared.drawn, name)[0] = getattr(other, name)[row]
        prepared.caches = {name: getattr(prepared.drawn, name).tobytes() for name in prepared.caches}
    execute(prepared, Schedule.LOWEST_FIRST)
    return prepared.tensors["out"].values.copy(), prepared.tensors["lse_out"].values.copy()


def test_with_parts_no_bit_depends_on_the_others() -> None:
    """Alone, in a batch, on another number of multiprocessors, and in pages of any size."""
    many = _case((300, 7, 319, 0, 64, 128, 77) * 5, 1, heads=(4, 1))
    together = HostCache(many, split_size=64)
    out, lse = _bits(together)
    for sm_count in (1, 7):
        other_out, other_lse = _bits(dataclasses.replace(together, sm_count=sm_count))
        assert (other_out == out).all() and (other_lse == lse).all()
    for row in (0, 1, 6, 33):
        before = many.before[row : row + 1]
        alone = HostCache(dataclasses.replace(many, before=before, seed=900 + row), split_size=64)
        own_out, own_lse = _bits(alone, together, row)
        assert (own_out[0] == out[row]).all() and (own_lse[0] == lse[row]).all()


def test_many_repeats_have_the_same_bits() -> None:
    """Shared tiles, added up by whoever is last."""
    case = HostCache(_case((320, 200), 2, page=32, heads=(4, 1)), sm_count=13)
    check(case, schedules=(*Schedule, *12 * (Schedule.RANDOM,)))


# ----------------------------------------------------------------------------------------------------------------------
# Plants and mutants

_SOURCES = ("sm80/flash_decode.cu", "common/combine.cuh")
_SYNCHRONISATION = re.compile(r"\b(__syncthreads\(|__syncwarp\(|cp_async_wait_group<)")
_SCHEDULES = (*Schedule, *10 * (Schedule.RANDOM,))
_PLANTED = (CASES["pages"][1], CASES["parts"][0], CASES["no pages, 32 rows"][0])


def _relative(site: run.Site) -> tuple[str, int]:
    return str(Path(site.file).relative_to(source_module.root())), site.line


def test_every_synchronisation_is_needed() -> None:
    """Each in the sources is reached, and left out it shows."""
    reached: dict[run.Site, HostCache] = {}
    for case in _PLANTED:
        for site in check(case, schedules=(Schedule.LOWEST_FIRST,)):
            reached.setdefault(site, case)
    found = {
        (path, number)
        for path in _SOURCES
        for number, line in enumerate((source_module.root() / path).read_text().splitlines(), 1)
        if _SYNCHRONISATION.search(line.split("//")[0])
    }
    assert {_relative(site) for site in reached} == found
    for site, case in reached.items():
        with pytest.raises((AssertionError, HostRunError)):
            check(case, schedules=_SCHEDULES, plant=site.plant)


CACHE, LIST, COMBINE, STREAM = "common/cache.cuh", "common/work_list.cuh", "common/combine.cuh", "sm80/key_stream.cuh"
KERNEL, APPEND, ROTARY, SCORES = (
    "sm80/flash_decode.cu", "common/append.cuh", "common/rotary.cuh", "common/packed_scores.cuh",
)  # fmt: skip
BYTES, QUANTISED = "sm80/key_bytes.cuh", "common/quantised.cuh"
NEW, PARTS, E4M3 = "any pages, new keys that are turned", "parts", "e4m3 by its bits, scales of pages, new keys"
OWN = "int8, a head's own logit, softcap, slopes"
MUTANTS = [
    # which keys a query sees, and which a tile needs
    ("pages", 2, CACHE, "sequence.seqlen_q + params.right + 1)", "sequence.seqlen_q + params.right + 2)"),
    ("pages", 1, CACHE, "sequence.seqlen_q - params.left)", "sequence.seqlen_q - params.left + 1)"),
    ("pages", 2, CACHE, "sequence.first = clamp(params.leftpad[b], 0", "sequence.first = clamp(params.leftpad[b], 1"),
    ("pages", 2, CACHE, "sequence.row = params.batch_idx[b];", "sequence.row = b;"),
    ("no pages, 32 rows", 1, CACHE, "ceil_div(sequence.seqlen_q * params.group.value, kBlockM)", "1"),
    ("pages", 0, CACHE, "col_of(j, e) >= end) acc_s", "col_of(j, e) > end) acc_s"),
    ("pages", 1, CACHE, "col_of(j, e) < begin ||", "col_of(j, e) <= begin ||"),
    ("pages", 1, KERNEL, "first_key < all_from || first_key", "first_key"),
    ("pages", 4, KERNEL, "first_key + kBlockN > all_to", "first_key + kBlockN > all_to + 1"),
    # where they are
    ("pages", 1, CACHE, "params.table + clamp(params.table_starts[sequence.row]", "params.table + clamp(0"),
    ("pages", 1, CACHE, "key - page * params.page.value}", "key % kBlockN}"),
    (NEW, 0, STREAM, "__shfl_sync(0xffffffffu, own.inside, row)", "own.inside"),
    ("pages", 2, STREAM, "own.inside -= key - first;", "own.inside -= 0;"),
    ("pages", 0, STREAM, "first_key_ <= key && key < cached;\n", "first_key_ <= key && key <= cached;\n"),
    ("pages", 2, STREAM, "there = first_key_ <= key && key < cached;\n", "there = key < cached;\n"),
    # whose share it is
    ("pages", 0, LIST, "((place + 1) * share.blocks - 1)", "((place + 2) * share.blocks - 1)"),
    ("pages", 0, LIST, "total * (block + 1) / blocks - from", "total * (block + 1) / blocks - from - (block == 1)"),
    ("pages", 5, LIST, "static_cast<int>(min(total, static_cast<int64_t>(blocks)))", "blocks"),
    ("pages", 3, LIST, "before += shuffle64(up_to - own, passed);", ""),
    ("pages", 0, LIST, "min(share.size - start, slices.count())", "min(share.size - start - 1, slices.count())"),
    (PARTS, 1, LIST, "(slices.begin / params.part_slices + part)", "(part)"),
    (PARTS, 1, LIST, "if (++part < cost && start + part < share.size) return;", "if (++part < cost) return;"),
    (PARTS, 3, LIST, "part = kFixedParts ? -start : 0;", "part = kFixedParts ? 1 - start : 0;"),
    # who adds up what
    ("pages", 0, COMBINE, "parts.sharers - 1);\n    buffer", "parts.sharers);\n    buffer"),
    ("pages", 0, COMBINE, "before == static_cast<uint32_t>(parts.sharers - 1)", "before == 0"),
    ("pages", 3, COMBINE, "+ (part == 0)", ""),
    ("pages", 0, COMBINE, "place = parts.place(params, p)", "place = parts.place(params, 0)"),
    ("pages", 0, COMBINE, "max[i][h] == -kInfinity ? 0.f : ex2(max[i][h] - largest)", "1.f"),
    ("pages", 4, COMBINE, "min(kCombinedRows, rows - first)", "kCombinedRows"),
    (PARTS, 1, COMBINE, "if (kFixedParts && parts.sharers == 1) return true;", ""),
    (PARTS, 1, COMBINE, "part + 1 < count && walk.start", "walk.start"),
    # new keys
    (NEW, 3, APPEND, "if (key < 0 || key >= sequence.end) return;", "if (key < 0) return;"),
    (NEW, 3, CACHE, "new_keys(params, sequence), room);\n  }", "new_keys(params, sequence), room + 1);\n  }"),
    (NEW, 2, APPEND, "if (params.starts_q[first + half] <= row)", "if (params.starts_q[first + half] < row)"),
    (NEW, 0, APPEND, "read_chunk<kTurned>(params, k, key,", "read_chunk<kTurned>(params, k, index,"),
    (NEW, 0, STREAM, "kNewKeys ? min(end_key_, walk_.sequence.before) : end_key_", "end_key_"),
    (NEW, 0, KERNEL, "params.each ? packed.query : 0", "0"),
    (NEW, 1, ROTARY, "params.neighbours ? col ^ 1", "params.neighbours ? col"),
    (NEW, 0, ROTARY, "second ? y : -y", "y"),
    (NEW, 0, ROTARY, "if (col >= 2 * params.half) return x;", ""),
    ("many new keys", 0, APPEND, "item += warps", "item += 2 * warps"),
    # 8 bits
    (E4M3, 0, BYTES, "(pair & 0x007f007fu) << 7", "(pair & 0x003f003fu) << 7"),
    (E4M3, 0, BYTES, "kQuantised == 1 && !kCvtE4m3 ? 256.f : 1.f", "1.f"),
    (E4M3, 0, BYTES, "(col & 2) * 4 + (col & 1)", "(col & 2) * 2 + (col & 1)"),
    (E4M3, 0, BYTES, "p.r[i][k], odd0, odd1", "p.r[i][k], even0, even1"),
    (E4M3, 0, STREAM, "slot.v_scale[i] = there ? scale_of<true>", "slot.v_scale[i] = there ? scale_of<false>"),
    (E4M3, 0, QUANTISED, "0x7ffff + (magnitude >> 20 & 1)", "0"),
    (E4M3, 0, QUANTISED, "quantise(div_rn(to_float(x), scale))", "quantise(to_float(x))"),
    (OWN, 0, BYTES, "bytes ^= 0x80808080u;", ""),
    (OWN, 0, KERNEL, "acc_s.x[i][j][e] *= factor;", "acc_s.x[i][j][e] *= 1.f;"),
    (OWN, 0, QUANTISED, "b * params.k_batch + ", ""),
    # scores
    (OWN, 1, SCORES, "in_front ? slope * distance : 0.f", "0.f"),
    (OWN, 1, SCORES, "fabsf(distance - col_of(j, e))", "(distance - col_of(j, e))"),
    (OWN, 0, SCORES, "packed_row(params, head_k, first_row + row_of(i, 2 * h)).head", "head_k"),
    (OWN, 0, SCORES, "lse_log2 = with;", ""),
    (OWN, 0, SCORES, "return factor;\n  } else {\n    return 1.f;", "return 1.f;\n  } else {\n    return 1.f;"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m[2]}-{m[3][:40]}")
def test_every_bound_is_watched(mutant: tuple[str, int, str, str, str]) -> None:
    name, number, path, find, replace = mutant
    with pytest.raises((AssertionError, HostRunError)):
        check(CASES[name][number], schedules=_SCHEDULES[:4], mutation=Mutation(path, find, replace))
