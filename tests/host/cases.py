"""Which cases the kernels are run on: `make test` takes the usual ones, `make test-all` the many as well.

What a kernel is compiled for costs more than a run of it. So `covering_groups` chooses what to compile as a covering
array, and runs every length on each of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from tests.covering import covering
from tests.gpu.cases import DTYPES, WIDE_DTYPES, Case, random_cases
from tests.host.kernel_run import HostCase
from tests.reference import HEADS, SEQLENS_BOTH_WAYS

HEAD_DIMS = (1, 8, 15, 16, 40, 59, 64, 80, 96, 111, 112, 128, 192, 224, 250, 256)
_USUAL_LENGTHS = ((1, 1), (1, 239), (17, 17), (113, 203), (203, 113), (128, 217), (5, 130), (70, 3))
_ARCHES = ("sm_80", "sm_86", "sm_90")

# (head_dim, head_dim_v): each kind of tile, in columns that fill it and that do not.
_WIDTHS = ((16, None), (40, None), (59, None), (64, None), (96, None), (128, None), (256, None), (192, 128), (40, 72))
_COVERED_LENGTHS = ((1, 239), (17, 17), (113, 203), (203, 113), (128, 217), (70, 3))
_HEADS = ((1, 1), (4, 4), (6, 3), (4, 1))
# What differs in memory, by name; of the second kind rows are read element by element.
_ALIGNED: dict[str, dict[str, object]] = {"plain": {}, "padded": {"pad": 8}, "reordered": {"order": 2}, "flipped": {}}
_UNALIGNED: dict[str, dict[str, object]] = {"odd": {"pad": 1}, "shifted": {"shift": 1, "order": 1}}


def head_dim_cases(head_dim: int, dtype: str) -> list[HostCase]:
    """One head_dim at odd lengths, causal and not; heads and layouts take turns."""
    cases = []
    for number, (seqlen_q, seqlen_k) in enumerate(_USUAL_LENGTHS):
        for causal in (False, True):
            turn = number + causal + DTYPES.index(dtype)
            batch, heads = ((2, (1, 1)), (1, (4, 4)), (1, (6, 3)), (2, (4, 1)))[turn % 4]
            if seqlen_q * seqlen_k * head_dim > 1 << 20:
                batch, heads = 1, (2, 1)
            layout = ("bshd", "bhsd")[turn % 2]
            case = Case(seqlen_q, seqlen_k, head_dim, dtype, causal, batch, heads, layout=layout, seed=number)
            cases.append(HostCase(case))
    return cases


def head_dim_v_cases(head_dim: int, head_dim_v: int) -> list[HostCase]:
    """A head_dim_v of its own, on every kind of GPU: odd lengths, GQA, rows without keys, both dtypes."""
    cases = []
    for number, (seqlen_q, seqlen_k) in enumerate(((113, 203), (203, 113), (1, 239), (128, 217))):
        for causal in (False, True):
            dtype, layout = DTYPES[(number + causal) % 2], ("bshd", "bhsd")[number % 2]
            heads = ((2, 1), (4, 4), (6, 3), (2, 2))[number]
            case = Case(seqlen_q, seqlen_k, head_dim, dtype, causal, 1, heads, layout=layout, head_dim_v=head_dim_v)
            case = dataclasses.replace(case, pad=8 * causal, deterministic=causal, seed=number)
            cases += [HostCase(case, arch) for arch in ("sm_90", "sm_86")[: 2 - number % 2]]
    return cases


def covering_groups(backward: bool) -> dict[str, list[HostCase]]:
    """name -> what is compiled for the same choices: all pairs of GPU, head dims, dtype, mask, alignment, determinism.

    Each group has every length; heads, layouts and places in memory are an array of their own, dealt out to all groups.
    """
    compiled = covering(
        {
            "arch": (*_ARCHES, "sm_100"),  # what sm_100 runs is sm_80's, with tiles and additions of its own
            "width": _WIDTHS,
            "dtype": DTYPES,
            "causal": (False, True),
            "aligned": (True, False),
            "deterministic": (False, True) if backward else (False,),
        },
        impossible=lambda case: case.get("arch") == "sm_90" and not case.get("aligned", True),  # not Hopper's kernels
    )
    dealt = {
        aligned: _by_length({"heads": _HEADS, "batch": (1, 2), "layout": ("bshd", "bhsd"), "memory": tuple(memory)})
        for aligned, memory in ((True, _ALIGNED), (False, _UNALIGNED))
    }
    groups = {}
    for seed, choice in enumerate(compiled):
        head_dim, head_dim_v = choice["width"]
        members = []
        for seqlen_q, seqlen_k in _COVERED_LENGTHS:
            run = next(dealt[choice["aligned"]][seqlen_q, seqlen_k])
            large = seqlen_q * seqlen_k * head_dim > 1 << 20
            case = Case(
                seqlen_q,
                seqlen_k,
                head_dim,
                choice["dtype"],
                choice["causal"],
                1 if large else run["batch"],
                (2, 1) if large else run["heads"],
                layout=run["layout"],
                deterministic=choice["deterministic"],
                seed=seed,
                head_dim_v=head_dim_v,
            )
            memory = (_ALIGNED | _UNALIGNED)[run["memory"]]
            case = dataclasses.replace(case, **memory)  # type: ignore[arg-type]
            members.append(HostCase(case, choice["arch"], flip=run["memory"] == "flipped"))
        width = f"d{head_dim}" + (f"/{head_dim_v}" if head_dim_v else "")
        words = (choice["arch"], width, choice["dtype"], "causal" if choice["causal"] else "full")
        words += ("" if choice["aligned"] else "unaligned", "deterministic" if choice["deterministic"] else "")
        groups[f"{seed}-{'-'.join(filter(None, words))}"] = members
    return groups


def wide_groups(backward: bool, strength: int) -> dict[str, list[HostCase]]:
    """Of float32 and float64, whose products take the CPU longer: likewise, with fewer widths and lengths. strength 1:
    every GPU, width, type and mask is in one of few groups."""
    factors = {
        "arch": ("sm_80", "sm_86", "sm_100"),
        "width": ((64, None), (128, None), (72, 40), (33, None), (160, None)),
        "dtype": WIDE_DTYPES,
        "causal": (False, True),
        "aligned": (True, False),
        "deterministic": (False, True) if backward else (False,),
    }
    memory = {True: (*_ALIGNED,), False: (*_UNALIGNED,)}
    groups = {}
    for seed, choice in enumerate(covering(factors, strength=strength)):
        head_dim, head_dim_v = choice["width"]
        members = []
        for number, (seqlen_q, seqlen_k) in enumerate(((17, 17), (70, 3), (100, 133))):
            names = memory[choice["aligned"]]
            where = names[(seed + number) % len(names)]
            case = Case(
                seqlen_q,
                seqlen_k,
                head_dim,
                choice["dtype"],
                choice["causal"],
                1,
                ((2, 1), (4, 4), (6, 3))[(seed + number) % 3] if number < 2 else (2, 1),
                layout=("bshd", "bhsd")[number % 2],
                deterministic=choice["deterministic"],
                seed=seed,
                head_dim_v=head_dim_v,
            )
            case = dataclasses.replace(case, **(_ALIGNED | _UNALIGNED)[where])  # type: ignore[arg-type]
            members.append(HostCase(case, choice["arch"], flip=where == "flipped"))
        width = f"d{head_dim}" + (f"/{head_dim_v}" if head_dim_v else "")
        words = (choice["arch"], width, choice["dtype"], "causal" if choice["causal"] else "full")
        words += ("" if choice["aligned"] else "unaligned", "deterministic" if choice["deterministic"] else "")
        groups[f"{seed}-{'-'.join(filter(None, words))}"] = members
    return groups


def _by_length(factors: dict[str, tuple[Any, ...]]) -> dict[tuple[int, int], Iterator[dict[str, Any]]]:
    """A covering array of lengths and these factors: for each pair of lengths its rows, again and again."""
    rows = covering({"lengths": _COVERED_LENGTHS, **factors})
    return {each: itertools.cycle([row for row in rows if row["lengths"] == each]) for each in _COVERED_LENGTHS}


def length_cases(head_dim: int, dtypes: tuple[str, ...], limit: int) -> list[HostCase]:
    """Every pair of lengths of the list whose product is at most `limit`, causal and not; dtypes take turns."""
    cases = []
    pairs = [pair for pair in SEQLENS_BOTH_WAYS if pair[0] * pair[1] <= limit]
    for number, (seqlen_q, seqlen_k) in enumerate(pairs):
        for causal in (False, True):
            small = seqlen_q * seqlen_k < 1 << 14
            heads = HEADS[(number + causal) % len(HEADS)] if small else ((1, 1), (2, 1))[number % 2]
            dtype = dtypes[(number + causal) % len(dtypes)]
            case = Case(seqlen_q, seqlen_k, head_dim, dtype, causal, 1 + small, heads, seed=number)
            cases.append(HostCase(case))
    return cases


def special_cases(backward: bool) -> Iterator[tuple[str, list[HostCase]]]:
    """What is easy to get wrong, by name."""
    bf16 = Case(113, 203, 64, "bfloat16", True, batch=1, heads=(4, 2), seed=7)
    full = dataclasses.replace(bf16, causal=False, seqlen_q=77)
    fp16 = dataclasses.replace(bf16, dtype="float16", seqlen_q=100, seqlen_k=150)

    def changed(case: Case, **changes: object) -> HostCase:
        return HostCase(dataclasses.replace(case, **changes))  # type: ignore[arg-type]

    yield (
        "empty",
        [
            changed(case, seqlen_q=sq, seqlen_k=sk, batch=batch, heads=heads)
            for case in (bf16, full)
            for sq, sk in ((0, 9), (9, 0), (0, 0), (40, 7))
            for batch, heads in ((2, (4, 2)), (0, (4, 2)), (2, (0, 0)))
        ],
    )
    yield "unaligned", [changed(bf16, shift=1), changed(full, shift=3, pad=5), changed(fp16, pad=1)]
    yield (
        "strided",
        [
            changed(case, order=order, pad=pad)
            for case in (bf16, full)
            for order, pad in ((1, 0), (2, 8), (3, 24), (0, 8))
        ],
    )
    yield "backwards", [HostCase(case, flip=True) for case in (bf16, full, dataclasses.replace(bf16, pad=1))]
    yield "expanded", [changed(bf16, expanded=True, heads=(4, 4), layout="bhsd"), changed(full, expanded=True)]
    yield (
        "groups",
        [changed(bf16, heads=heads, batch=2, seqlen_q=70, seqlen_k=90) for heads in ((6, 3), (8, 2), (6, 1))],
    )
    yield "scales", [changed(case, scale=scale) for case in (bf16, full) for scale in (0.0, -0.3, 1.5, 1e-30)]
    steep = [changed(case, scale=scale) for case in (bf16, full) for scale in (40.0, -40.0)]
    yield "steep", [*steep, changed(full, seqlen_k=3, scale=30.0)]  # with few keys, some lse are far below 0
    yield "outliers", [changed(bf16, outliers=True), changed(fp16, outliers=True, causal=False)]
    yield "sections", [changed(bf16, batch=3, heads=(5, 5), seqlen_k=403), changed(bf16, batch=5, heads=(3, 1))]
    if backward:
        yield (
            "deterministic",
            [
                changed(bf16, deterministic=True, seqlen_k=513, seqlen_q=300),
                changed(full, deterministic=True, seqlen_k=400, heads=(2, 2)),
                changed(fp16, deterministic=True, head_dim=128, seqlen_k=260, heads=(2, 1)),
            ],
        )


def split_cases() -> list[tuple[HostCase, int]]:
    """Queries that share few keys; among how many thread blocks they are shared out on 4 multiprocessors: on Hopper by
    steps, unless deterministic; else by heads."""
    causal = Case(113, 203, 64, "bfloat16", True, batch=1, heads=(8, 1), seed=7)
    full = dataclasses.replace(causal, seqlen_q=77, seqlen_k=150, causal=False, dtype="float16", heads=(6, 2))

    def changed(case: Case, arch: str = "sm_90", flip: bool = False, **changes: object) -> HostCase:
        return HostCase(dataclasses.replace(case, **changes), arch, flip)  # type: ignore[arg-type]

    return [
        (changed(causal, "sm_100"), 4),
        (changed(causal, batch=2, heads=(8, 2)), 1),
        (changed(causal, heads=(8, 2), deterministic=True, layout="bhsd"), 2),
        (changed(causal, seqlen_k=300, heads=(6, 1), deterministic=True), 2),
        (changed(causal, "sm_100", seqlen_q=203, seqlen_k=40), 8),  # query rows that see no key
        (changed(causal, seqlen_q=0), 1),  # keys that no query sees
        (changed(causal, "sm_100", seqlen_q=1, seqlen_k=385), 2),
        (changed(causal, seqlen_q=300, seqlen_k=300, head_dim=40, pad=8, order=2), 2),
        (changed(full, "sm_100"), 3),
        (changed(full, heads=(7, 7)), 1),
        (changed(full, "sm_100", seqlen_k=3, scale=30.0), 3),
        (changed(full, head_dim=59, deterministic=True), 3),
        (changed(full, shift=3, pad=5, flip=True), 3),
        (changed(full, "sm_80", head_dim=128, heads=(4, 1), deterministic=True), 4),
        (changed(full, "sm_86", head_dim=128, heads=(4, 1)), 2),
        (changed(full, "sm_86", head_dim=256, seqlen_k=70, heads=(4, 1)), 2),
        (changed(full, head_dim=256, heads=(4, 1), expanded=True, deterministic=True), 2),
        (changed(causal, "sm_100", head_dim=192, seqlen_k=150, dtype="float16"), 4),
        (changed(causal, "sm_100", head_dim=192, head_dim_v=128, seqlen_k=150, deterministic=True), 4),
        (changed(causal, head_dim=192, head_dim_v=128, seqlen_k=150, deterministic=True), 2),
        (changed(full, "sm_86", head_dim=64, head_dim_v=160, seqlen_k=70, heads=(4, 1)), 2),
        (changed(full, head_dim=59, head_dim_v=100), 3),
        # by steps: parts that end within a head, of different lengths
        (changed(causal, seqlen_q=256, seqlen_k=256, head_dim=128), 3),
        (changed(causal, seqlen_q=250, seqlen_k=300, head_dim=72, head_dim_v=40, heads=(13, 1), layout="bhsd"), 2),
        (changed(full, seqlen_q=300, seqlen_k=100, heads=(9, 1)), 4),
        (changed(full, seqlen_q=1000, seqlen_k=100, head_dim=128, heads=(1, 1)), 4),
        (changed(full, seqlen_q=130, seqlen_k=3, head_dim=96, heads=(7, 1), scale=30.0), 3),
        (changed(full, seqlen_q=130, seqlen_k=100, head_dim=256, heads=(7, 1)), 2),
        (changed(causal, seqlen_q=120, seqlen_k=128, head_dim=192, heads=(11, 1)), 2),
        (changed(causal, seqlen_q=200, seqlen_k=128, head_dim=192, head_dim_v=128, heads=(12, 1)), 2),
    ]


def adder_cases() -> list[tuple[HostCase, bool]]:
    """Many key blocks add to a dQ on Hopper, in an order of their own; whether to zeros."""
    full = Case(150, 300, 128, "bfloat16", False, 1, (4, 2), seed=5)
    long = dataclasses.replace(full, seqlen_q=140, seqlen_k=2300, heads=(1, 1))

    def changed(case: Case, **changes: object) -> HostCase:
        return HostCase(dataclasses.replace(case, **changes))  # type: ignore[arg-type]

    return [
        # staggered: more query blocks than key blocks, fewer, as many, and a single one
        (changed(full, seqlen_q=330, seqlen_k=430), False),
        (changed(full, seqlen_q=330, seqlen_k=430, head_dim=96, head_dim_v=72, dtype="float16", pad=8), False),
        (changed(full, seqlen_k=900, heads=(2, 1), batch=2), False),
        (changed(full, seqlen_q=256, seqlen_k=512, layout="bhsd"), False),
        (changed(full, seqlen_q=40, seqlen_k=512), False),
        # in turn
        (changed(full, seqlen_q=330, seqlen_k=430, deterministic=True), False),
        (changed(full, seqlen_q=330, seqlen_k=430, deterministic=True, causal=True), False),
        (changed(full, head_dim=64, seqlen_k=900, heads=(2, 1), deterministic=True), False),
        # more than 16 of them on average
        (changed(long), True),
        (changed(long, dtype="float16", head_dim=64, heads=(2, 1)), True),
        (changed(long, seqlen_k=4000, causal=True), True),
        (changed(long, seqlen_k=4000, causal=True, dtype="float16", head_dim=64, heads=(2, 2)), True),
        (changed(long, deterministic=True), False),
    ]


def wide_cases() -> list[HostCase]:
    """Head dims above 128 on Hopper's own backward: every row of its table, lengths that end in a tile, GQA, turns."""
    causal = Case(113, 203, 256, "bfloat16", True, 1, (2, 1), seed=3)
    full = Case(203, 113, 256, "float16", False, 1, (2, 2), seed=4)

    def changed(case: Case, **changes: object) -> HostCase:
        return HostCase(dataclasses.replace(case, **changes))  # type: ignore[arg-type]

    return [
        changed(causal),
        changed(full),
        changed(causal, seqlen_q=1, seqlen_k=239),
        changed(causal, seqlen_q=200, seqlen_k=70),  # query rows that see no key
        changed(full, seqlen_q=64, seqlen_k=64, heads=(1, 1)),
        changed(full, seqlen_q=77, seqlen_k=150, heads=(8, 1)),
        changed(causal, head_dim=192, head_dim_v=128, layout="bhsd"),
        changed(full, head_dim=192, heads=(4, 2), pad=8),
        changed(causal, head_dim=200, heads=(6, 1), batch=2),
        changed(full, head_dim=136, head_dim_v=40, deterministic=True),
        changed(causal, head_dim=40, head_dim_v=160, dtype="float16"),
        changed(causal, seqlen_q=300, seqlen_k=513, deterministic=True),
        changed(full, seqlen_q=150, seqlen_k=400, deterministic=True),
    ]


def arch_cases(head_dim: int, arch: str, dtype: str) -> list[HostCase]:
    """The tiles of another class of shared memory; before sm_90, dQ is added one float at a time."""
    return [
        HostCase(Case(sq, sk, head_dim, dtype, causal, 1, (2, 1), deterministic=causal, seed=sq), arch=arch)
        for (sq, sk), causal in itertools.product(((113, 203), (97, 97), (203, 70)), (False, True))
    ]


def some_random_cases(count: int, head_dims: tuple[int, ...], dtype: str) -> list[HostCase]:
    """Of the GPU tests' combinations of everything, the first `count` that are small enough.

    Not too small: a result is judged by its largest error beside that of a model, and with few elements that is a toss.
    """

    def fits(case: Case) -> bool:
        rows = min(case.seqlen_q * case.heads[0], case.seqlen_k * case.heads[1])
        work = case.batch * case.heads[0] * case.seqlen_q * case.seqlen_k * case.head_dim
        return case.head_dim in head_dims and work < 1 << 23 and case.batch * rows * case.head_dim >= 1 << 12

    small = filter(fits, random_cases(dtype, 2000, seed=5))
    arches = itertools.cycle(_ARCHES)
    return [
        HostCase(case, next(arches), flip=number % 7 == 3) for number, case in enumerate(itertools.islice(small, count))
    ]


def sanitized_cases(backward: bool, hopper: bool) -> list[HostCase]:
    """Few and short: these compile and run several times slower. Those of Hopper's own kernels, or the others."""

    def host_case(
        sq: int, sk: int, width: tuple[int, int | None], dtype: str, causal: bool, **more: object
    ) -> HostCase:
        case = Case(sq, sk, width[0], dtype, causal, 1, (2, 1), seed=sq, head_dim_v=width[1])
        return HostCase(dataclasses.replace(case, **more), "sm_90" if hopper else "sm_86")

    found = [
        host_case(sq, sk, (head_dim, None), dtype, causal, pad=8 * causal, deterministic=backward)
        for head_dim, dtype, causal in ((64, "bfloat16", True), (40, "float16", False))
        for sq, sk in ((5, 17), (40, 3), (70, 133))
    ]
    found.append(host_case(33, 70, (72, 40), "bfloat16", True))
    if not hopper:
        found.append(host_case(70, 133, (59, None), "float16", False, pad=1, deterministic=backward))
        unaligned = host_case(33, 70, (64, None), "bfloat16", True, heads=(2, 2), shift=1, pad=1)
        found.append(dataclasses.replace(unaligned, flip=True))
        found.append(host_case(33, 70, (40, 72), "bfloat16", True))
        found.append(host_case(9, 0, (64, None), "bfloat16", False))
    return found
