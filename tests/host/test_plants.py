"""Is the instrument awake? Bugs are planted into the kernels, one at a time, and every one has to be caught.

Two kinds. A plant leaves out one synchronisation (a barrier, a wait, a fence) while the kernel runs: all of them, by
their place in the source. A mutant is a kernel compiled with one bound changed: the table below.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

from fa2cupy.jit import source as source_module
from tests.covering import chosen
from tests.gpu.cases import Case
from tests.host import kernel_run, lengths, run
from tests.host.build import Mutation
from tests.host.kernel_run import HostCase, Schedule
from tests.host.lengths import Lengths, LengthsCase, segments_of, starts

AnyCase = HostCase | LengthsCase
_LENGTHS = Lengths(300, 500, 4, starts(1, 130, 0, 150), starts(203, 40, 7, 200), causal=True)
_NOTHING = Lengths(7, 5, 2, starts(0, 7), starts(5, 0))  # that is to be computed
# More segments than there is room for tiles of all of them.
_SEGMENTS = segments_of(
    tuple((1 + n % 3, 1 + n % 3, n % 5 == 0) for n in range(24)), ((70, 6), (40, 3), *((2, 3),) * 9, (9, 9))
)

# Cases that reach every synchronisation and every bound: each variant of a kernel, several blocks, ragged ends.
FORWARD: dict[str, AnyCase] = {
    "causal": HostCase(Case(150, 203, 64, "bfloat16", True, 1, (2, 1), seed=1), "sm_80"),
    "full": HostCase(Case(77, 150, 64, "bfloat16", False, 1, (2, 2), seed=2), "sm_80"),
    "narrow": HostCase(Case(150, 203, 40, "float16", True, 1, (2, 1), seed=3), "sm_80"),
    "unaligned": HostCase(Case(77, 150, 59, "bfloat16", False, 1, (2, 2), seed=4), "sm_80"),
    "wide": HostCase(Case(130, 150, 224, "bfloat16", True, 1, (1, 1), seed=5), "sm_86"),
    "dropped": HostCase(Case(90, 20, 40, "bfloat16", True, 2, (2, 2), seed=6), "sm_80"),
    "sections": HostCase(Case(400, 403, 32, "bfloat16", True, 16, (1, 1), seed=7), "sm_80"),  # of 6, 6 and 4 heads
    "own-v": HostCase(Case(70, 133, 40, "bfloat16", True, 1, (2, 1), seed=13, head_dim_v=72), "sm_80"),
    # the sm_90 kernel: thread blocks with several tiles, with one, two and three buffers of Q, and with one of O's own
    "hopper-causal": HostCase(Case(300, 403, 64, "bfloat16", True, 1, (4, 2), seed=8)),
    "hopper-full": HostCase(Case(150, 300, 128, "float16", False, 1, (4, 4), seed=9)),
    "hopper-narrow": HostCase(Case(150, 203, 40, "bfloat16", False, 1, (2, 1), seed=10)),
    "hopper-wide": HostCase(Case(150, 203, 256, "bfloat16", True, 1, (6, 2), seed=11)),
    "hopper-one-block": HostCase(Case(140, 60, 256, "float16", False, 1, (6, 3), seed=15)),
    "hopper-own-v": HostCase(Case(300, 150, 192, "bfloat16", True, 1, (4, 1), seed=14, head_dim_v=128)),
    "hopper-sections": HostCase(Case(300, 303, 32, "bfloat16", True, 13, (1, 1), seed=12)),
    # tiles of lists
    "listed": LengthsCase(_LENGTHS, 64, arch="sm_100"),
    "listed-several": LengthsCase(_SEGMENTS, 64, arch="sm_100", head_dim_v=40),
    "hopper-listed": LengthsCase(_LENGTHS, 64),
}
BACKWARD: dict[str, AnyCase] = {
    "causal": HostCase(Case(150, 203, 64, "bfloat16", True, 3, (2, 1), seed=1), "sm_100"),
    "full": HostCase(Case(77, 150, 64, "bfloat16", False, 1, (2, 2), seed=2), "sm_100"),
    "deterministic": HostCase(Case(150, 400, 64, "bfloat16", False, 1, (2, 1), deterministic=True, seed=3), "sm_86"),
    "turns": HostCase(
        Case(150, 300, 64, "bfloat16", True, 1, (2, 1), deterministic=True, seed=15), "sm_100"
    ),  # of four blocks
    "narrow": HostCase(Case(150, 203, 40, "float16", True, 1, (2, 1), seed=4), "sm_100"),
    "one-stage": HostCase(Case(150, 203, 112, "float16", True, 1, (2, 1), seed=5), "sm_86"),
    "wide": HostCase(Case(100, 130, 224, "bfloat16", True, 1, (2, 1), seed=6), "sm_100"),
    "wide-one-stage": HostCase(Case(100, 300, 208, "bfloat16", True, 1, (2, 1), deterministic=True, seed=7), "sm_80"),
    "unaligned": HostCase(Case(77, 150, 59, "bfloat16", False, 1, (2, 2), seed=8), "sm_100"),
    "dropped": HostCase(Case(90, 20, 64, "bfloat16", True, 2, (2, 2), seed=9), "sm_100"),
    "sections": HostCase(Case(200, 403, 32, "bfloat16", True, 13, (1, 1), seed=10), "sm_100"),  # of 7 and 6 heads
    "few": HostCase(
        Case(77, 3, 64, "bfloat16", False, 1, (2, 2), scale=30.0, seed=12), "sm_100"
    ),  # some lse are far below 0
    "tiny": HostCase(Case(150, 150, 16, "bfloat16", False, 1, (2, 2), seed=11), "sm_100"),
    "splits": HostCase(
        Case(150, 203, 64, "bfloat16", True, 1, (8, 2), seed=13), "sm_100"
    ),  # two blocks with two heads each
    "splits-unaligned": HostCase(
        Case(77, 150, 59, "bfloat16", False, 1, (6, 1), deterministic=True, seed=14), "sm_100"
    ),
    "own-v": HostCase(Case(90, 203, 40, "bfloat16", True, 3, (2, 1), seed=16, head_dim_v=72), "sm_100"),
    "splits-own-v": HostCase(Case(70, 133, 40, "bfloat16", False, 1, (8, 2), seed=17, head_dim_v=72), "sm_100"),
    # the sm_90 kernel: thread blocks with several tiles, tiles of one step, both shapes of dQ
    "hopper-causal": HostCase(Case(300, 403, 64, "bfloat16", True, 1, (4, 2), seed=18)),
    "hopper-full": HostCase(Case(150, 300, 128, "float16", False, 1, (4, 4), seed=19)),
    "hopper-turns": HostCase(Case(300, 403, 128, "bfloat16", True, 1, (3, 3), deterministic=True, seed=20)),
    "hopper-turns-full": HostCase(Case(150, 700, 64, "bfloat16", False, 1, (3, 3), deterministic=True, seed=21)),
    "hopper-short": HostCase(Case(60, 600, 128, "bfloat16", False, 1, (4, 4), seed=22)),
    "hopper-splits": HostCase(Case(256, 256, 128, "bfloat16", True, 1, (8, 1), seed=23)),  # by steps: in three
    "hopper-own-v": HostCase(Case(90, 203, 40, "bfloat16", True, 3, (2, 1), seed=24, head_dim_v=72)),
    "hopper-sections": HostCase(Case(300, 403, 32, "bfloat16", True, 13, (1, 1), seed=25)),
    "hopper-staggered": HostCase(Case(150, 600, 128, "float16", False, 1, (4, 2), seed=31)),
    "hopper-many": HostCase(Case(60, 2200, 64, "bfloat16", False, 1, (1, 1), seed=32)),  # added to zeros
    "hopper-narrow-panel": HostCase(
        Case(90, 203, 88, "float16", False, 2, (2, 1), seed=33)
    ),  # dQ in a panel and a half
    "hopper-few": HostCase(Case(77, 3, 64, "bfloat16", False, 1, (2, 2), scale=30.0, seed=12)),
    # and the one for wide heads: likewise
    "hopper-wide": HostCase(Case(300, 203, 256, "bfloat16", False, 1, (2, 2), seed=26)),
    "hopper-wide-turns": HostCase(Case(150, 300, 256, "float16", True, 1, (2, 2), deterministic=True, seed=27)),
    "hopper-wide-turns-full": HostCase(Case(150, 700, 192, "bfloat16", False, 1, (3, 3), deterministic=True, seed=21)),
    "hopper-wide-own-v": HostCase(Case(150, 203, 192, "bfloat16", True, 1, (8, 1), seed=28, head_dim_v=120)),
    "hopper-wide-own-full": HostCase(Case(90, 270, 160, "float16", True, 1, (2, 2), seed=30, head_dim_v=72)),
    "hopper-wide-splits": HostCase(Case(120, 128, 192, "bfloat16", True, 1, (11, 1), seed=34, head_dim_v=72)),
    "hopper-wide-short": HostCase(Case(60, 600, 192, "bfloat16", False, 1, (2, 2), seed=29)),
    # what is summed up over all rows of a head
    "sinks": HostCase(Case(20, 40, 64, "bfloat16", False, 2, (1, 1), seed=35), "sm_100", sinks="float32"),
    # tiles of lists
    "listed-short": LengthsCase(_SEGMENTS, 64, arch="sm_100"),
    "listed-short-unaligned": LengthsCase(_SEGMENTS, 59, arch="sm_86", heads=(4, 2)),
    "hopper-listed": LengthsCase(_LENGTHS, 64),
    "hopper-listed-nothing": LengthsCase(_NOTHING, 64),
    "hopper-wide-listed-nothing": LengthsCase(_NOTHING, 192),
}
# What only an unlucky order of blocks shows gets a few more of them: where no case has shown it in three.
MORE_SCHEDULES = 10 * (Schedule.RANDOM,)
SCHEDULES = (*Schedule, *MORE_SCHEDULES)

_SYNCHRONISATION = re.compile(
    r"\b(__syncthreads\(|__syncwarp\(|cp_async_wait_group<"
    r"|bar_sync\(|bar_arrive\(|fence_mbarrier_init\(|mbarrier_(arrive|arrive_expect_tx|wait|try_wait_parity)\("
    r"|cluster_sync\(|griddepcontrol_wait\(|mbarrier_arrive_cluster\("
    r"|fence_proxy_async\(|cp_async_bulk_wait_group(_read)?<|wgmma_fence\(|wgmma_wait_group<)"
)
_WRAPPERS = ("ptx.cuh", "wgmma.cuh")
# test_list_tiles.py, test_segments.py and test_block_lists.py leave out each of their barriers.
_OWN_TESTS = (
    "smxx/list_tiles.cu", "smxx/find_segments.cu", "common/sequences.cuh", "smxx/classify_blocks.cu",
    "smxx/list_blocks.cu", "sm80/flash_decode.cu", "common/combine.cuh",
)  # fmt: skip


def synchronisations_in_source() -> set[tuple[str, int]]:
    """(path, line) of everything in cuda_src that could be left out, less the wrappers themselves."""
    root = source_module.root()
    found = set()
    for path in (*root.rglob("*.cu"), *root.rglob("*.cuh")):
        if path.name in _WRAPPERS or path.relative_to(root).as_posix() in _OWN_TESTS:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if _SYNCHRONISATION.search(line.split("//")[0]):
                found.add((str(path.relative_to(root)), number))
    return found


def check(case: AnyCase, backward: bool, **options: Any) -> set[run.Site]:
    """By the module that knows such cases."""
    if isinstance(case, LengthsCase):
        return lengths.check(case, backward, **options)
    return kernel_run.check(case, backward, **options)


def is_caught(
    case: AnyCase,
    backward: bool,
    *,
    schedules: tuple[Schedule, ...] = SCHEDULES,
    plant: str | None = None,
    mutation: Mutation | None = None,
) -> bool:
    """Whether a bug shows in a case: as a wrong result, or as a broken rule."""
    try:
        check(case, backward, schedules=schedules, plant=plant, mutation=mutation)
    except (AssertionError, run.HostRunError):
        return True
    return False


def relative(site: run.Site) -> tuple[str, int]:
    return str(Path(site.file).relative_to(source_module.root())), site.line


@functools.cache
def reached_by(case: AnyCase, backward: bool) -> set[run.Site]:
    """The synchronisations that a case comes by."""
    sites = check(case, backward, schedules=(Schedule.LOWEST_FIRST,))
    return {site for site in sites if relative(site)[0] not in _OWN_TESTS}


def size(case: AnyCase) -> int:
    """How long a case takes, about."""
    if isinstance(case, LengthsCase):
        return case.heads[0] * case.lengths.rows_q * case.lengths.rows_k * case.head_dim
    dense = case.case
    return dense.batch * dense.heads[0] * dense.seqlen_q * dense.seqlen_k * dense.head_dim


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_synchronisation_is_needed(backward: bool) -> None:
    """Left out, each that some case reaches is caught."""
    unseen: dict[str, str] = {}
    cases = sorted((BACKWARD if backward else FORWARD).values(), key=size)  # the first that shows it is enough
    reached = {case: reached_by(case, backward) for case in cases}
    for site in sorted(set().union(*reached.values())):
        path, number = relative(site)
        attempts = (
            is_caught(case, backward, schedules=schedules, plant=site.plant)
            for schedules in (tuple(Schedule), MORE_SCHEDULES)
            for case in reached
            if site in reached[case]
        )
        if not any(attempts):
            line = (source_module.root() / path).read_text().splitlines()[number - 1].strip()
            unseen[f"{path}:{number}"] = line
    assert not unseen, f"left out, and nothing showed: {unseen}"


def test_every_synchronisation_is_watched() -> None:
    """Each one in the source is reached by some case."""
    cases = [(case, False) for case in FORWARD.values()] + [(case, True) for case in BACKWARD.values()]
    watched = {relative(site) for case, backward in cases for site in reached_by(case, backward)}
    assert watched == synchronisations_in_source(), "some synchronisations are reached by no case"


RANGE, MASK, SCHEDULE = "common/visit.cuh", "common/mask.cuh", "common/schedule.cuh"
TILE = "sm80/tile.cuh"
FWD, BWD = "sm80/flash_fwd.cu", "sm80/flash_bwd.cu"
FWD90, BWD90, TILE90 = "sm90/flash_fwd.cu", "sm90/flash_bwd.cu", "sm90/tile.cuh"
RING90 = "sm90/pipeline.cuh"  # of all three kernels
BOTH90, WIDE90 = "sm90/backward.cuh", "sm90/flash_bwd_wide.cu"  # of both backward kernels, and the one for wide heads
PRE, POST = "smxx/flash_bwd_preprocess.cu", "smxx/flash_bwd_postprocess.cu"
CHUNK = "common/chunk.cuh"
FILL, TILES = "smxx/fill_unseen.cu", "common/bwd_tiles.cuh"

# Bounds, each off by one or gone. Direction, case, file, what stands there, what is put there instead.
MUTANTS = [
    # which keys a query sees
    ("fwd", "causal", RANGE, "query + offset_of(sequence) + 1)", "query + offset_of(sequence) + 2)"),
    ("fwd", "causal", RANGE, "query + offset_of(sequence) + 1)", "query + offset_of(sequence))"),
    ("fwd", "causal", RANGE, "return sequence.seqlen_k - sequence.seqlen_q", "return 0"),
    ("fwd", "full", RANGE, "+ 1) : sequence.seqlen_k;", "+ 1) : sequence.seqlen_k + 1;"),
    ("fwd", "full", RANGE, "+ 1) : sequence.seqlen_k;", "+ 1) : sequence.seqlen_k - 1;"),
    (
        "fwd",
        "full",
        MASK,
        "(col_of(j, e) >= end || (kBand && col_of(j, e) < begin)) acc_s",
        "(col_of(j, e) > end) acc_s",
    ),
    (
        "fwd",
        "causal",
        MASK,
        "(col_of(j, e) >= end || (kBand && col_of(j, e) < begin)) acc_s",
        "(col_of(j, e) > end) acc_s",
    ),
    # which queries see a key
    ("bwd", "causal", RANGE, "key - offset_of(sequence) : 0", "key - offset_of(sequence) - 1 : 0"),
    ("bwd", "causal", RANGE, "key - offset_of(sequence) : 0", "key - offset_of(sequence) + 1 : 0"),
    ("bwd", "few", RANGE, "if (key >= sequence.seqlen_k)", "if (key > sequence.seqlen_k)"),
    ("bwd", "full", RANGE, "if (key >= sequence.seqlen_k)", "if (key >= sequence.seqlen_k - 1)"),
    ("bwd", "causal", BWD, "e % 2 < query_begin(sequence, key)", "e % 2 <= query_begin(sequence, key)"),
    # which blocks a block meets, and which of them are masked
    (
        "fwd",
        "causal",
        RANGE,
        "ceil_div(key_end(sequence, last_query), kBlockN)",
        "key_end(sequence, last_query) / kBlockN",
    ),
    ("fwd", "causal", RANGE, "key_end(sequence, last_query)", "key_end(sequence, first_query)"),
    ("fwd", "causal", RANGE, "unmasked = key_end(sequence, first_query) / kBlockN", "unmasked = end - 1"),
    ("fwd", "full", RANGE, "unmasked = key_end(sequence, first_query) / kBlockN", "unmasked = end"),
    ("fwd", "causal", FWD, "n >= visit.mask_from; --n) step(n", "n > visit.mask_from; --n) step(n"),
    ("fwd", "causal", FWD, "n >= visit.unmasked_from()", "n > visit.unmasked_from()"),
    ("fwd", "causal", FWD, "n < 0 ? 0 :", "n < 1 ? 0 :"),
    (
        "bwd",
        "causal",
        RANGE,
        "query_begin(sequence, first_key)) / kBlockM",
        "query_begin(sequence, last_key)) / kBlockM",
    ),
    (
        "bwd",
        "full",
        RANGE,
        "const int end = ceil_div(sequence.seqlen_q, kBlockM)",
        "const int end = sequence.seqlen_q / kBlockM",
    ),
    (
        "bwd",
        "few",
        RANGE,
        "if (last_key >= sequence.seqlen_k) return",
        "if (last_key > sequence.seqlen_k + 199) return",
    ),
    (
        "bwd",
        "causal",
        RANGE,
        "begin, min(end, ceil_div(max(0, query_begin(sequence, last_key)), kBlockM))}",
        "begin, begin}",
    ),
    ("bwd", "causal", BWD, "m_block < mask_to_at(visit", "m_block + 1 < mask_to_at(visit"),
    ("bwd", "causal", BWD, "any && step.head <= last_head", "any && step.head < last_head"),
    # which head of which batch
    ("fwd", "sections", SCHEDULE, "min(shape.heads_per_section, rows - first)", "shape.heads_per_section"),
    ("bwd", "sections", SCHEDULE, "min(shape.heads_per_section, rows - first)", "shape.heads_per_section"),
    # the sm_90 forward: masks, tiles, rings, rows, panels
    (
        "fwd",
        "hopper-full",
        MASK,
        "(col_of(j, e) >= end || (kBand && col_of(j, e) < begin)) acc_s",
        "(col_of(j, e) > end) acc_s",
    ),
    (
        "fwd",
        "hopper-causal",
        MASK,
        "(col_of(j, e) >= end || (kBand && col_of(j, e) < begin)) acc_s",
        "(col_of(j, e) > end) acc_s",
    ),
    ("fwd", "hopper-causal", FWD90, "n >= work.visit.mask_from; --n) step", "n > work.visit.mask_from; --n) step"),
    (
        "fwd",
        "hopper-full",
        FWD90,
        "work.visit.end - 1 >= work.visit.mask_from",
        "work.visit.end - 1 > work.visit.mask_from",
    ),
    ("fwd", "hopper-causal", FWD90, "unmasked_from() : 0)", "unmasked_from() : 1)"),
    ("fwd", "hopper-full", FWD90, "linear >= m_blocks * rows", "linear >= m_blocks * rows - 1"),
    ("fwd", "hopper-sections", FWD90, "gridDim.x - 1 - blockIdx.x", "gridDim.x - blockIdx.x"),
    ("fwd", "hopper-sections", FWD90, "m_blocks - 1 - tile.block : tile.block", "m_blocks - 1 : tile.block"),
    ("fwd", "hopper-causal", FWD90, "work.head / (shape.num_heads / shape.num_heads_k)", "work.head"),
    ("fwd", "hopper-full", RING90, "stage = 0, parity ^= 1;", "stage = 0;"),
    ("fwd", "hopper-full", FWD90, "ring.parity ^ 1);  // released by every consumer after its S", "ring.parity);"),
    ("fwd", "hopper-full", FWD90, "++stage) load_next(stage)", "++stage) load_next(0)"),
    ("fwd", "hopper-sections", FWD90, "} else {\n      load_next(ring.stage);", "} else {\n      load_next(0);"),
    ("fwd", "hopper-sections", FWD90, "return q[stage]; }", "return q[0]; }"),
    ("fwd", "hopper-causal", FWD90, "{ return group * 64; }", "{ return 0; }"),
    ("fwd", "hopper-own-v", FWD90, "kAhead = kQStages > 1 || kOwnO;", "kAhead = true;"),
    ("fwd", "hopper-own-v", FWD90, "more = kAhead && schedule.next(", "more = schedule.next("),
    ("fwd", "hopper-own-v", FWD90, "if (!kAhead) more = schedule.next(shape, next, params);", ""),
    ("fwd", "hopper-full", FWD90, "      more = more_after;\n", ""),
    ("fwd", "hopper-sections", FWD90, "      next = after;\n", ""),
    # and O's own buffer
    ("fwd", "hopper-wide", FWD90, "ring.parity);  // released by compute", "ring.parity ^ 1);  // released by compute"),
    ("fwd", "hopper-wide", FWD90, "group == 0 ? o_parity ^ 1 : o_parity", "o_parity"),
    ("fwd", "hopper-wide", FWD90, "group == 0 ? o_parity ^ 1 : o_parity", "o_parity ^ 1"),
    ("fwd", "hopper-wide", FWD90, "      o_parity ^= 1;\n", ""),
    ("fwd", "hopper-wide", FWD90, "o_empty[(group + kConsumers - 1) % kConsumers]", "o_empty[group]"),
    ("fwd", "hopper-wide", FWD90, "o_row(int) { return 0; }", "o_row(int group) { return group * 64; }"),
    ("fwd", "hopper-wide", FWD90, "if (n == work.visit.begin) release_q();", "if (n == 1) release_q();"),
    ("fwd", "hopper-wide", FWD90, "if (work.visit.end == work.visit.begin + 1) release_q();", "release_q();"),
    ("fwd", "hopper-wide", FWD90, "if (next.visit.end == next.visit.begin + 1) release_q();", "release_q();"),
    ("fwd", "hopper-one-block", FWD90, "if (work.visit.end == work.visit.begin + 1) release_q();", ""),
    ("fwd", "hopper-one-block", FWD90, "if (next.visit.end == next.visit.begin + 1) release_q();", ""),
    (
        "fwd",
        "hopper-wide",
        FWD90,
        "cp_async_bulk_wait_group_read<0>();  // the buffer is free again; and shared memory outlives its readers\n",
        "if (kOwnO) mbarrier_arrive(smem.o_empty[group]);\n    cp_async_bulk_wait_group_read<0>();\n    if (!kOwnO)\n",
    ),
    ("fwd", "hopper-full", FWD90, "!first));\n      pass_turn();\n      f", "true));\n      pass_turn();\n      f"),
    ("fwd", "hopper-full", FWD90, "softmax = Softmax<1>();", ""),
    ("fwd", "hopper-full", FWD90, "softmax.rescale(acc_o, alpha);", ""),
    ("fwd", "hopper-full", FWD90, "+ row + 8 * h < sequence_of", "+ row + 8 * h <= sequence_of"),
    ("fwd", "hopper-full", FWD90, "const int done_stage = q.stage", "const int done_stage = 0 * q.stage + 1"),
    ("fwd", "hopper-full", TILE90, "step / 4 * Panels<kRows, kCols>::kPanelBytes", "step / 4 * 8192"),
    ("fwd", "hopper-full", TILE90, "step % 4 * 32", "step % 4 * 16"),
    ("fwd", "hopper-full", TILE90, "step * 16 * 128 / 16", "step * 8 * 128 / 16"),
    ("fwd", "hopper-wide", TILE90, "64 * 2, tile.kPanelBytes", "64 * 2, 128 * 128"),
    (
        "fwd",
        "hopper-full",
        TILE90,
        "(lane / 16 ^ lane % 8) << 4",
        "(lane / 16) << 4",
    ),
    ("fwd", "hopper-full", TILE90, "k / 4 * tile.kPanelBytes", "k / 4 * 8192"),
    # the sm_90 backward: masks, tiles, rings, turns, rows, columns
    ("bwd", "hopper-causal", BWD90, "col_of(j, e) < begin[e / 2]", "col_of(j, e) <= begin[e / 2]"),
    ("bwd", "hopper-causal", BWD90, "position.key(0, 0, 2)", "position.key(0, 0, 0)"),
    ("bwd", "hopper-causal", BWD90, "step.m_block < mask_to_at(work", "step.m_block + 1 < mask_to_at(work"),
    ("bwd", "hopper-few", BWD90, "step.m_block < mask_to_at(work, step)", "false"),
    ("bwd", "hopper-full", BOTH90, "* parts * shape.batch;", "* parts * shape.batch - 1;"),
    ("bwd", "hopper-sections", BOTH90, "clusters - 1 - cluster", "clusters - cluster"),
    ("bwd", "hopper-sections", BOTH90, "n_blocks - 1 - tile.block : tile.block", "n_blocks - 1 : tile.block"),
    ("bwd", "hopper-splits", BOTH90, "++head, tile += head_blocks(work);", "++head;"),
    ("bwd", "hopper-causal", BOTH90, "m_block = work.begin, tile", "m_block = 0, tile"),
    ("bwd", "hopper-splits", BOTH90, "tile.head / splits;", "tile.head;"),
    ("bwd", "hopper-splits", BOTH90, "steps * (split + 1) / splits", "steps / splits * (split + 1)"),
    ("bwd", "hopper-splits", BOTH90, "steps * split / splits", "steps * split / splits + 1"),
    ("bwd", "hopper-splits", BOTH90, "head_k * heads + first / head_steps", "head_k * heads"),
    ("bwd", "hopper-splits", BOTH90, "visit.begin + first % head_steps", "visit.begin"),
    ("bwd", "hopper-full", BOTH90, "static_cast<int>(step.tile), 0, 0)", "step.m_block, 0, 0)"),
    ("bwd", "hopper-full", BWD90, "params.softmax_d, smem.dout_full", "params.lse_log2, smem.dout_full"),
    ("bwd", "hopper-full", BWD90, "first = step.left == 1;", "first = false;"),
    ("bwd", "hopper-full", RING90, "stage = 0, parity ^= 1;", "stage = 0;"),
    ("bwd", "hopper-full", BWD90, "if (last) k.advance(), v_parity ^= 1;", "if (last) k.advance();"),
    ("bwd", "hopper-full", BWD90, "if (last) k.advance(), v_parity ^= 1;", "if (last) v_parity ^= 1;"),
    ("bwd", "hopper-full", BWD90, "first ? k.before() : k.stage", "k.stage"),
    ("bwd", "hopper-full", BWD90, "dq_parity ^= 1;", ""),
    ("bwd", "hopper-short", BWD90, "last ? k.stage : k.before()", "k.before()"),
    ("bwd", "hopper-full", BWD90, "    ring.advance();\n    if (last)", "    if (last)"),
    ("bwd", "hopper-full", BWD90, "ring.parity ^ 1);  // released by both", "ring.parity);  // released by both"),
    ("bwd", "hopper-full", BWD90, "if (kDue && first)", "if (false)"),
    (
        "bwd",
        "hopper-full",
        BWD90,
        "frag_p, DownRows(smem.dout[ring.stage]), !first",
        "frag_p, DownRows(smem.dout[ring.stage]), true",
    ),
    (
        "bwd",
        "hopper-full",
        BWD90,
        "frag_ds, DownRows(smem.q[ring.stage]), !first",
        "frag_ds, DownRows(smem.q[ring.stage]), true",
    ),
    ("bwd", "hopper-full", BWD90, "kTurn + 1 - group", "kTurn + group"),
    ("bwd", "hopper-full", BWD90, "warp * kDqColParts + group;", "group * 4 + warp;"),
    ("bwd", "hopper-causal", BWD90, "kDqColParts == 1 ? group_row : 0", "0"),
    ("bwd", "hopper-full", BWD90, "DownRows(smem.k[k_stage], dq_col)", "DownRows(smem.k[k_stage], 0)"),
    (
        "bwd",
        "hopper-full",
        BWD90,
        "mbarrier_init(smem.ds_full[i], 4 * kKeyGroups)",
        "mbarrier_init(smem.ds_full[i], 4)",
    ),
    ("bwd", "hopper-full", BWD90, "ds_full[ds.stage], ds.parity)", "ds_full[ds.stage], ds.parity ^ 1)"),
    ("bwd", "hopper-full", BWD90, "    ds.advance();\n", ""),
    # where a head begins
    ("bwd", "hopper-staggered", BOTH90, "(visit.end, key_blocks) % visit.end", "(visit.end, key_blocks)"),
    ("bwd", "hopper-staggered", BOTH90, "m_block(work.m_block)", "m_block(work.begin)"),
    ("bwd", "hopper-staggered", BOTH90, ", tile -= work.end - work.begin;", ";"),
    ("bwd", "hopper-staggered", BOTH90, "if (m_block == work.head_begin) ++head", "if (m_block == work.begin) ++head"),
    # who begins a sum of dQ, and who waits for that
    ("bwd", "hopper-full", BOTH90, "while (seen < kWritten) seen = ld_acquire(counter);", ""),
    ("bwd", "hopper-full", BOTH90, "while (seen < kWritten)", "while (seen < 1)"),
    ("bwd", "hopper-full", BOTH90, "if (seen == 0) return true;", ""),
    ("bwd", "hopper-full", BOTH90, "kDeterministic ? 1 : kWritten", "1"),
    (
        "bwd",
        "hopper-full",
        BWD90,
        "if (first) {\n          cp_async_bulk_store",
        "if (0) {\n          cp_async_bulk_store",
    ),
    (
        "bwd",
        "hopper-full",
        BWD90,
        "if (first) {\n          cp_async_bulk_store",
        "if (1) {\n          cp_async_bulk_store",
    ),
    ("bwd", "hopper-full", BWD90, "        end_turn(turns);\n", ""),
    ("bwd", "hopper-full", BWD90, "step.tile * kDqParts + group;", "step.tile * kDqParts;"),
    ("bwd", "hopper-turns", BWD90, "step.tile * kDqParts + group, turn_of", "step.tile * kDqParts, turn_of"),
    ("bwd", "hopper-full", PRE, "if (!kShort && threadIdx.x < kDqParts)", "if (threadIdx.x == 0)"),
    ("bwd", "hopper-many", PRE, "if constexpr (kClearDq)", "if constexpr (false)"),
    ("bwd", "hopper-turns", BOTH90, "!kClearDq && turn == 0", "false"),
    ("bwd", "hopper-wide-turns", BOTH90, "!kClearDq && turn == 0", "false"),
    ("bwd", "hopper-wide-turns-full", BOTH90, "!kClearDq && turn == 0", "false"),
    ("bwd", "hopper-turns", BWD90, "if (kDeterministic || first)", "if (first)"),
    ("bwd", "hopper-turns-full", BOTH90, "ld_acquire(counter) < turn", "ld_acquire(counter) < turn - 1"),
    ("bwd", "hopper-full", BOTH90, "accumulator_row() + 8 * h < rows", "accumulator_row() + 8 * h <= rows"),
    ("bwd", "hopper-own-v", BOTH90, "8 * j + col < cols", "8 * j + col <= cols"),
    ("bwd", "hopper-own-v", BWD90, "params.head_dim_v, acc_dv", "shape.head_dim, acc_dv"),
    ("bwd", "hopper-full", BOTH90, "lane & bit ? x[i] : x[i + bit], bit)", "lane & bit ? x[i + bit] : x[i], bit)"),
    (
        "bwd",
        "hopper-splits",
        BWD90,
        "static_cast<int64_t>(work.part) * kBlockN + warp",
        "static_cast<int64_t>(work.n_block) * kBlockN + warp",
    ),
    ("bwd", "hopper-splits", BWD90, "warp_row) * kHeadDim;", "0) * kHeadDim;"),
    ("bwd", "hopper-full", TILE90, "lane / 16 * 8, chunk = col % 64 / 8", "lane / 16 * 8, chunk = 0"),
    ("bwd", "hopper-full", TILE90, "col / 64 * tile.kPanelBytes + row * 128 + ((chunk", "row * 128 + ((chunk"),
    ("bwd", "hopper-wide", RING90, "stage = 0, parity ^= 1;", "stage = 0;"),
    ("bwd", "hopper-wide", WIDE90, "params.dout, params.softmax_d", "params.dout, params.lse_log2"),
    ("bwd", "hopper-wide", BOTH90, "alignas(128) float statistics", "float statistics"),
    (
        "bwd",
        "hopper-wide-turns",
        WIDE90,
        "if (step.m_block < mask_to_of(work, step.m_block)) mask_p",
        "if (false) mask_p",
    ),
    (
        "bwd",
        "hopper-wide-turns",
        MASK,
        "(col_of(j, e) >= end || (kBand && col_of(j, e) < begin)) acc_p",
        "(col_of(j, e) > end) acc_p",
    ),
    ("bwd", "hopper-wide-turns", MASK, "position.query(0, 0, 2 * h)", "position.query(0, 0, 0)"),
    ("bwd", "hopper-wide", WIDE90, "statistics[q_stage][row + 8 * h]", "statistics[q_stage][row]"),
    ("bwd", "hopper-wide", WIDE90, "statistics[row], statistics[row + 8]", "statistics[row], statistics[row]"),
    ("bwd", "hopper-wide", WIDE90, "if (kCol > 0 || kParts > 1) q.advance();", "if (kCol > 0) q.advance();"),
    ("bwd", "hopper-wide-short", WIDE90, "kParts > 1 ? 0 : kCol), AlongRows(smem.k", "0), AlongRows(smem.k"),
    ("bwd", "hopper-wide", WIDE90, "AlongRows(smem.v, 0, kCol)", "AlongRows(smem.v)"),
    ("bwd", "hopper-wide", WIDE90, "empty[(q_stage + i) % kQBuffers]", "empty[q_stage]"),
    ("bwd", "hopper-wide", WIDE90, "empty[(dout_stage + i) % kDoutBuffers]", "empty[dout_stage]"),
    ("bwd", "hopper-wide", WIDE90, "DownRows(queries[rows.stage]), !first", "DownRows(queries[rows.stage]), true"),
    ("bwd", "hopper-wide", WIDE90, "empty[(rows_stage + kGradients - 1) % kBuffers]", "empty[rows_stage]"),
    ("bwd", "hopper-wide", WIDE90, "if constexpr (kGradients > 1) store(acc_gradient[1], kPartCols);", ""),
    ("bwd", "hopper-wide", WIDE90, "store(acc_gradient[1], kPartCols)", "store(acc_gradient[1], 0)"),
    ("bwd", "hopper-wide", WIDE90, "DownRows(smem.k, piece_col)", "DownRows(smem.k, 0)"),
    (
        "bwd",
        "hopper-wide",
        WIDE90,
        "dq_offset(warp, lane, 0, piece_col / 8, 0)",
        "dq_offset(warp, lane, 0, 0, 0)",
    ),
    ("bwd", "hopper-wide-short", WIDE90, "(warp * kPieceCols / 8 + j) * 128", "(warp + j) * 128"),
    (
        "bwd",
        "hopper-wide-short",
        WIDE90,
        "dq_offset(warp, 0, 0, first_col / 8, 0)",
        "dq_offset(warp, 0, 0, 0, 0)",
    ),
    (
        "bwd",
        "hopper-wide-short",
        WIDE90,
        "add_f32(target, source, cols * 64)",
        "add_f32(target, source, cols * 32)",
    ),
    (
        "bwd",
        "hopper-wide",
        WIDE90,
        "ring.parity ^ 1);  // released by compute_scores and",
        "ring.parity);  // released by compute_scores and",
    ),
    ("bwd", "hopper-wide", WIDE90, "(schedule.round + 1) % 2", "0"),
    ("bwd", "hopper-wide-splits", WIDE90, "static_cast<int64_t>(work.part)", "static_cast<int64_t>(work.n_block)"),
    (
        "bwd",
        "hopper-wide-own-full",
        WIDE90,
        "(kSecond ? params.shape.head_dim : params.head_dim_v) - col",
        "params.shape.head_dim - col",
    ),
    ("bwd", "hopper-wide", WIDE90, "(work.n_block ^ 1) * kBlockN", "work.n_block * kBlockN"),
    ("bwd", "hopper-wide", WIDE90, "first_col_of_dq(i > 0) / kDqCols", "2 * i"),
    ("bwd", "hopper-wide", WIDE90, "cluster_rank() * cols_of_dq(second)", "0"),
    ("bwd", "hopper-wide-splits", WIDE90, "cluster_rank() * cols_of_dq(second)", "cluster_rank() * kDqCols"),
    ("bwd", "hopper-wide-splits", WIDE90, "turn * kBlockM * kDqCols + warp", "warp"),
    ("bwd", "hopper-wide-splits", WIDE90, "kSecond * kDqCols + piece_col % kDqCols", "kSecond * kDqCols"),
    ("bwd", "hopper-wide", WIDE90, "kSecond * kDqCols + piece_col % kDqCols", "piece_col % kDqCols"),
    ("bwd", "hopper-wide", WIDE90, "piece_col % kDqCols), true)", "piece_col % kDqCols), false)"),
    ("bwd", "hopper-wide", WIDE90, "peer, smem.ds[stage].data[0][warp_row]", "peer, smem.ds[stage].data[0][0]"),
    (
        "bwd",
        "hopper-wide",
        WIDE90,
        "mbarrier_init(smem.ds_peer_empty, 2)",
        "mbarrier_init(smem.ds_peer_empty, 1)",
    ),
    ("bwd", "hopper-wide-turns-full", BOTH90, "block = work.n_block / kCluster;", "block = work.n_block;"),
    ("bwd", "hopper-wide-turns-full", WIDE90, "turn * kCluster + cluster_rank()", "turn * kCluster"),
    ("bwd", "hopper-wide", BOTH90, "first_block + cluster_rank()", "first_block"),
    (
        "bwd",
        "hopper-wide-turns",
        BOTH90,
        "kCluster > 1 ? query_blocks(sequence, n_block).mask_to : visit.mask_to",
        "visit.mask_to",
    ),
    ("bwd", "hopper-wide-splits", BOTH90, "+ tile.head) * kCluster * n_blocks", "+ tile.head) * n_blocks"),
    ("bwd", "hopper-wide-turns", BOTH90, "ld_acquire(counter) < turn", "ld_acquire(counter) < turn - 1"),
    ("bwd", "hopper-narrow-panel", BWD90, "kHeadDim - kDqCols : kDqCols", "kHeadDim - kDqCols - 16 : kDqCols"),
    # which of the blocks that share a key head
    ("bwd", "splits", BWD, "head_k = tile.head / splits", "head_k = tile.head % shape.num_heads_k"),
    ("bwd", "splits", BWD, "(tile.head + 1) * heads - 1", "(tile.head + 1) * heads - 2"),
    ("bwd", "splits", BWD, "(tile.batch * shares + tile.head) * n_blocks", "(tile.batch * shares + head_k) * n_blocks"),
    ("bwd", "splits", BWD, "(row + accumulator_row()) * kCols", "accumulator_row() * kCols"),
    ("bwd", "splits", POST, "split < params.splits", "split < params.splits - 1"),
    ("bwd", "splits", POST, "split < params.splits", "split <= params.splits"),
    ("bwd", "splits", POST, "row_of_keys * params.splits * part_floats", "row_of_keys * part_floats"),
    ("bwd", "splits", POST, "ceil_div(shape.seqlen_k, kBlockN)) * kBlockN", "shape.seqlen_k)"),
    # of lists: several tiles or sequences of a thread block, and sequences whose keys are one block
    ("fwd", "listed-several", FWD, "linear < tiles; linear += gridDim.x", "linear < tiles - 1; linear += gridDim.x"),
    (
        "fwd",
        "listed-several",
        FWD,
        "linear = blockIdx.x; linear",
        "linear = blockIdx.x; linear == blockIdx.x && linear",
    ),
    ("bwd", "listed-short", BWD, "linear < tiles; linear += gridDim.x", "linear < tiles - 1; linear += gridDim.x"),
    ("bwd", "listed-short", BWD, "i < rows ? gmem[i] : missing", "i <= rows ? gmem[i] : missing"),
    ("bwd", "listed-short", BWD, "kPlaces = kShort ? kBlockM : 1;", "kPlaces = 1;"),
    (
        "bwd",
        "listed-short",
        BWD,
        "if (row >= rows || col >= cols) continue;",
        "if (row > rows || col >= cols) continue;",
    ),
    ("bwd", "listed-short-unaligned", BWD, "if (row >= rows || col >= cols) continue;", "if (row >= rows) continue;"),
    ("bwd", "listed-short-unaligned", BWD, "if (col + 1 < cols) target[1]", "target[1]"),
    ("bwd", "listed-short", BWD, "x[2 * h + 1] * scale", "x[2 * h + 1]"),
    ("bwd", "listed-short", PRE, "skipped + kBlockM < sequence.seqlen_q ?", "false ?"),
    ("bwd", "listed-short", PRE, "first_row = skipped, tile", "tile"),
    (
        "bwd",
        "listed-short",
        PRE,
        "statistics_of(params, head, entry) + skipped;",
        "statistics_of(params, head, entry);",
    ),
    ("bwd", "listed-short", PRE, "if (skipped == 0) linear += gridDim.x,", "linear += gridDim.x,"),
    ("bwd", "listed-short", TILES, "* query_tiles_of_head(params) + entry.tile;", "* query_tiles_of_head(params);"),
    # whose columns, where v has its own
    ("fwd", "own-v", FWD, "keys_from(n), head_dim_v(params)", "keys_from(n), shape.head_dim"),
    ("fwd", "own-v", FWD, "queries, head_dim_v(params)", "queries, shape.head_dim"),
    ("fwd", "own-v", FWD, "store_accumulator(smem.out,", "store_accumulator(smem.q,"),
    ("fwd", "hopper-own-v", FWD90, "store_rows<64, kHeadDimV>", "store_rows<64, kHeadDimV - 64>"),
    ("bwd", "own-v", PRE, "ceil_pow2(kHeadDimV / 8)", "ceil_pow2(kHeadDim / 8)"),
    ("bwd", "own-v", PRE, "head_dim_v(params) : 0", "shape.head_dim : 0"),
    ("bwd", "own-v", BWD, "keys, head_dim_v(params));", "keys, shape.head_dim);"),
    ("bwd", "own-v", BWD, "first_query : 0, head_dim_v(params)", "first_query : 0, shape.head_dim"),
    ("bwd", "own-v", BWD, "gemm<kHeadStepsV>", "gemm<kHeadSteps>"),
    ("bwd", "own-v", BWD, "keys, head_dim_v(params), smem.v);", "keys, shape.head_dim, smem.v);"),
    ("bwd", "splits-own-v", BWD, "params.dv_partial + row * kHeadDimV", "params.dv_partial + row * kHeadDim"),
    ("bwd", "splits-own-v", POST, "shape.head_dim : head_dim_v(params)", "shape.head_dim : shape.head_dim"),
    ("bwd", "splits-own-v", POST, "kIsDk ? kHeadDim : kHeadDimV", "kHeadDim"),
    ("bwd", "splits-own-v", POST, "block < dk_blocks ? block :", "true ? block :"),
    ("bwd", "splits-own-v", POST, "(shape.head_dim, 8)", "(head_dim_v(params), 8)"),
    # whose turn it is to add to dQ
    ("bwd", "turns", BWD, "(m_block / kTurnBlocks + 1) * kTurnBlocks) - 1", "m_block + 1) - 1"),
    ("bwd", "turns", BWD, "tile_index(step) - block_in_turn", "tile_index(step)"),
    ("bwd", "turns", BWD, "kTurnBlocks || m_block + 1 == visit.end", "kTurnBlocks"),
    ("bwd", "turns", BWD, "block_in_turn + 1 == kTurnBlocks || m_block", "m_block"),
    # what is read
    ("fwd", "full", TILE, "rows > 0 : row < rows)", "rows > 0 : row <= rows)"),
    ("bwd", "full", TILE, "rows > 0 : row < rows)", "rows > 0 : row <= rows)"),
    ("fwd", "narrow", TILE, "&& map.col + col < cols;", "&& map.col + col <= cols;"),
    ("fwd", "causal", TILE, "pass * parts / kPasses != part", "pass != part"),
    ("bwd", "wide", TILE, "pass * parts / kPasses != part", "pass != part"),
    (
        "bwd",
        "causal",
        BWD,
        "step.head <= last_head ? sequence.seqlen_q - first_query : 0, head_dim_v",
        "step.head < last_head ? sequence.seqlen_q - first_query : 0, head_dim_v",
    ),
    ("fwd", "unaligned", TILE, "inside = row < rows && col < cols", "inside = row <= rows && col < cols"),
    ("fwd", "unaligned", TILE, "inside = row < rows && col < cols", "inside = row < rows && col <= cols"),
    ("fwd", "narrow", TILE, "kCols % map.kColsPerRound != 0 && map.col + col >= kCols", "false"),
    ("bwd", "tiny", TILE, "!= part || (kRows % map.kRowsPerPass != 0 && row >= kRows)", "!= part"),
    ("bwd", "full", PRE, "row < rows ? head_dim_v", "row <= rows ? head_dim_v"),
    ("bwd", "full", PRE, "own_row < rows", "own_row <= rows"),
    ("bwd", "full", PRE, "if (own_row < (kShort ? rows : kBlockM))", "if (true)"),
    ("bwd", "narrow", CHUNK, "if (col < cols)", "if (col <= cols)"),
    ("bwd", "unaligned", CHUNK, "if (col + i < cols) chunk.x[i]", "if (col + i <= cols) chunk.x[i]"),
    ("bwd", "tiny", PRE, "if (row < (kShort ? rows : kBlockM) && col == 0)", "if (col == 0)"),
    ("bwd", "full", PRE, "i < kDqTileFloats / 4", "i < kDqTileFloats / 4 - 1"),
    # what is written
    ("fwd", "full", TILE, "if (row >= rows ||", "if (row > rows ||"),
    ("fwd", "narrow", TILE, "if (map.col + col < cols)", "if (map.col + col <= cols)"),
    ("bwd", "full", TILE, "if (row >= rows ||", "if (row > rows ||"),
    ("bwd", "tiny", TILE, "row >= rows || (kRows % map.kRowsPerPass != 0 && row >= kRows)", "row >= rows"),
    ("fwd", "unaligned", TILE, "if (row < rows && col < cols)", "if (row <= rows && col < cols)"),
    ("fwd", "unaligned", TILE, "if (row < rows && col < cols)", "if (row < rows && col <= cols)"),
    ("fwd", "full", FWD, "if (row + 16 * i + 8 * h < rows)", "if (row + 16 * i + 8 * h <= rows)"),
    ("bwd", "narrow", POST, "if (dq_col(warp) + 8 * j >= kHeadDim) break;", ""),
    ("bwd", "splits", POST, "if (batch >= shape.batch) return", "if (batch > shape.batch) return"),
    ("bwd", "splits-unaligned", POST, "ceil_div(cols, 8)", "cols / 8"),
    (
        "bwd",
        "splits-unaligned",
        CHUNK,
        "if (col + i < cols) row[col + i] = T{",
        "if (col + i <= cols) row[col + i] = T{",
    ),
    ("fwd", "dropped", FILL, "if (batch >= params.batch ||", "if (batch > params.batch ||"),
    ("fwd", "dropped", FILL, "min(piece * 16 + 16, params.head_dim)", "piece * 16 + 16"),
    ("bwd", "dropped", FILL, "if (batch >= params.batch ||", "if (batch > params.batch ||"),
]


# `make test` has so many of them that every case still meets a mutant in every file that any of its mutants is in.
FEW = chosen([{"case": mutant[:2], "file": mutant[2]} for mutant in MUTANTS])


@pytest.mark.parametrize(
    "direction, case, path, find, replace",
    [
        pytest.param(*mutant, id=f"{mutant[0]}-{number}", marks=[] if number in FEW else pytest.mark.slow)
        for number, mutant in enumerate(MUTANTS)
    ],
)
def test_every_mutant_is_caught(direction: str, case: str, path: str, find: str, replace: str) -> None:
    cases = BACKWARD if direction == "bwd" else FORWARD
    assert is_caught(cases[case], direction == "bwd", mutation=Mutation(path, find, replace)), "nothing showed"
