"""Gradients of sequences whose lengths only the device knows: each beside float64, with NaN around all of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import fa2cupy
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import backward, common, plan_backward, plan_forward
from fa2cupy.kernels.plan import Plan
from fa2cupy.problem import SPECS, AttentionProblem
from tests.gpu import oracle
from tests.gpu.cases import SM80_WIDTHS, WIDTHS
from tests.gpu.ledger import LEDGER
from tests.host.lengths import Lengths, LengthsCase, lengths_of

Tensor = torch.Tensor

# As lengths_of has them.
MIXED = (
    (300, 300),
    (0, 0),
    (513, 130),
    (3, 700, 0, 5, 7),
    (0, 33),
    (65, 0, 4),
    (1, 1),
    (700, 1100, 9, 0, 1),
    (1030, 1030),
)
SKEWED = ((3000, 3000), *((n % 90, n % 70) for n in range(60)), (2111, 2500, 3, 2, 1))
FEW = ((1500, 1500), *((n % 90, n % 70) for n in range(0, 60, 6)), (1111, 1300, 3, 2, 1))
EQUAL = ((512, 512),) * 6


@dataclass
class Call:
    """tensors: inputs, NaN wherever no sequence is, or its row sees nothing; and results. options: with the lengths."""

    case: LengthsCase
    tensors: dict[str, Tensor]
    options: dict[str, object]

    @property
    def lengths(self) -> Lengths:
        return self.case.lengths

    def part(self, name: str, sequence: int) -> Tensor:
        """A sequence's part: (seqlen, heads, width), of lse (heads, seqlen)."""
        side = "k" if name in ("k", "v", "dk", "dv") else "q"
        first, length = self.lengths.runs(side)[sequence]
        whole = self.tensors[name]
        if not self.lengths.is_packed(side):
            whole = whole[self.lengths.row(side, sequence)]
        return whole[:, first : first + length] if name == "lse" else whole[first : first + length]

    def gradients(self) -> tuple[Tensor, ...]:
        """Into results of NaN."""
        inputs = (self.tensors[name] for name in ("dout", "q", "k", "v", "out", "lse"))
        results = {name: self.tensors[name].fill_(torch.nan) for name in ("dq", "dk", "dv")}
        found: tuple[Tensor, ...] = fa2cupy.attention_backward(*inputs, **results, **self.options)
        return found


def call_of(case: LengthsCase, device: torch.device) -> Call:
    """`out` and `lse` are those of dense calls, sequence by sequence."""
    lengths = case.lengths
    generator = torch.Generator(device=device).manual_seed(case.seed)
    mask = {"causal": lengths.causal} | ({} if lengths.window is None else {"window_size": lengths.window})
    given: dict[str, object] = {name: torch.from_numpy(array).to(device) for name, array in lengths.arrays.items()}
    if lengths.segment_ids is not None:
        given["segment_ids"] = given.pop("segment_ids_q"), given.pop("segment_ids_k")
    call = Call(case, {}, {"deterministic": case.deterministic, **mask, **given})
    for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "lse"):
        side = "k" if name in ("k", "v", "dk", "dv") else "q"
        rows, heads = getattr(lengths, f"rows_{side}"), case.heads[side == "k"]
        batch = () if lengths.is_packed(side) else (lengths.problem_batch,)
        width = (case.head_dim_v or case.head_dim) if name in ("v", "dv", "out", "dout") else case.head_dim
        if name == "lse":
            call.tensors[name] = torch.full((*batch, heads, rows), torch.nan, device=device)
            continue
        dtype = getattr(torch, case.dtype)
        whole = torch.full((*batch, rows, heads, width + case.pad), torch.nan, dtype=dtype, device=device)
        call.tensors[name] = whole[..., :width]
    for sequence in range(lengths.sequences):
        seqlens = [lengths.runs(side)[sequence][1] for side in "qk"]
        queries, keys = unseen_of(lengths, *seqlens)
        for name in ("q", "k", "v", "dout"):
            part = call.part(name, sequence)
            part.copy_(torch.randn(part.shape, device=device, generator=generator))
            part[: keys if name in ("k", "v") else queries] = torch.nan
        if 0 not in seqlens:
            one = (call.part(name, sequence)[None] for name in ("q", "k", "v"))
            out, lse = fa2cupy.attention(*one, return_lse=True, **mask)
            call.part("out", sequence).copy_(out[0])
            call.part("lse", sequence).copy_(lse[0])
    return call


def unseen_of(lengths: Lengths, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Leading queries that see no key, and leading keys that no query sees."""
    left, right = lengths.window or (-1, -1)
    left, right = (1 << 30 if end < 0 else end for end in (left, 0 if lengths.causal else right))
    queries = seqlen_q if seqlen_k == 0 else max(0, seqlen_q - seqlen_k - right)
    keys = seqlen_k if seqlen_q == 0 else max(0, seqlen_k - seqlen_q - left)
    return queries, keys


def problems_of(case: LengthsCase, device: torch.device) -> list[str]:
    """What is wrong with a case, one sentence each."""
    call = call_of(case, device)
    call.gradients()
    lengths = case.lengths
    results = ("dq", "dk", "dv")
    problems = []
    nobodys = Call(case, {name: torch.ones_like(call.tensors[name], dtype=torch.bool) for name in results}, {})
    for sequence in range(lengths.sequences):
        empty = 0 in (lengths.runs(side)[sequence][1] for side in "qk")
        for name in results:
            nobodys.part(name, sequence)[...] = empty
        if empty:
            continue
        one = {name: call.part(name, sequence)[None] for name in (*results, "q", "k", "v", "dout", "out")}
        lse, bounds = oracle.attention(
            *(one[name] for name in ("q", "k", "v", "dout")),
            causal=lengths.causal,
            scale=case.head_dim**-0.5,
            window=lengths.window,
            out=one["out"],
        )
        judgements = oracle.judge({name: one[name] for name in results}, None, lse, bounds, {})
        LEDGER.add(case.dtype, judgements)
        problems += [
            f"{case} sequence {sequence}: {text}" for judged in judgements.values() for text in judged.problems
        ]
    for name, rows in nobodys.tensors.items():
        if not (call.tensors[name][rows] == 0).all():
            problems.append(f"{case}: {name} is not 0 in rows of no sequence")
    return problems


def check_all(cases: list[LengthsCase], device: torch.device) -> None:
    problems = [problem for case in cases for problem in problems_of(case, device)]
    assert not problems, f"{len(problems)} problems in {len(cases)} cases:\n" + "\n".join(problems[:40])


def cases_of(head_dim: int, head_dim_v: int | None, dtype: str) -> Iterator[LengthsCase]:
    masks = ((False, None), (True, None), (False, (100, 30)), (True, (257, -1)))
    sides = ((True, True), (True, False), (False, True), (False, False))
    for number, (sequences, (causal, window), (packed_q, packed_k)) in enumerate(
        itertools.product((MIXED, FEW, EQUAL), masks, sides)
    ):
        lengths = lengths_of(
            *sequences, packed_q=packed_q, packed_k=packed_k, behind=number % 4 * 3, causal=causal, window=window
        )
        yield LengthsCase(
            lengths,
            head_dim,
            dtype,
            ((4, 4), (6, 3), (4, 1))[number % 3],
            head_dim_v=head_dim_v,
            pad=(0, 8)[number % 7 == 0],
            deterministic=number % 5 < 2,
            seed=number,
        )


def needed_plans(info: DeviceInfo) -> Iterator[Plan]:
    """What is to be compiled beforehand."""
    cases = [case for width in WIDTHS for case in cases_of(*width)]
    cases += [
        dataclasses.replace(case, family="sm80")
        for head_dim, dtype in SM80_WIDTHS
        for case in list(cases_of(head_dim, None, dtype))[::2]
    ]
    for case in cases:
        yield plan_forward(planned(case, common.FORWARD_ARRAYS), info, family=case.family)
        problem = planned(case, backward.ARRAYS)
        yield plan_backward(problem, info, case.deterministic, family=case.family)


def planned(case: LengthsCase, names: tuple[str, ...]) -> AttentionProblem:
    """The problem of a call, but that its arrays lie in no memory."""
    lengths, width = case.lengths, case.head_dim + case.pad
    (heads, heads_k), odd = case.heads, case.head_dim % 8 > 0
    problem = AttentionProblem(
        batch=lengths.problem_batch,
        seqlen_q=lengths.rows_q,
        seqlen_k=lengths.rows_k,
        num_heads=heads,
        num_heads_k=heads_k,
        head_dim=case.head_dim,
        head_dim_v=case.head_dim_v or case.head_dim,
        dtype=case.dtype,
        causal=lengths.causal,
        softmax_scale=case.head_dim**-0.5,
        strides=tuple((name, (0, heads * width, width)) for name in names),
        aligned=not odd,
        lengths=lengths.spec,
    )
    return problem if lengths.window is None else SPECS["window_size"](problem, lengths.window)


@pytest.mark.parametrize(("head_dim", "head_dim_v", "dtype"), WIDTHS)
def test_gradients(head_dim: int, head_dim_v: int | None, dtype: str, device: torch.device) -> None:
    check_all(list(cases_of(head_dim, head_dim_v, dtype)), device)


@pytest.mark.parametrize(("head_dim", "dtype"), SM80_WIDTHS)
@pytest.mark.usefixtures("sm80_kernels")
def test_gradients_of_sm80(head_dim: int, dtype: str, device: torch.device) -> None:
    check_all(list(cases_of(head_dim, None, dtype))[::2], device)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (300, 100)}], ids=str)
def test_deterministic_bits_repeat(head_dim: int, mask: dict[str, object], device: torch.device) -> None:
    """Whoever waits for a turn waits for somebody who runs: many blocks, of many sequences, a hundred times."""
    lengths = lengths_of(*SKEWED, **mask)  # type: ignore[arg-type]
    call = call_of(LengthsCase(lengths, head_dim, heads=(6, 3), deterministic=True), device)
    first = [x.clone() for x in call.gradients()]
    for _ in range(100):
        assert all(torch.equal(x, y) for x, y in zip(call.gradients(), first, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dk_and_dv_repeat(head_dim: int, device: torch.device) -> None:
    """They do not depend on the order of the list, which may be another each time."""
    call = call_of(LengthsCase(lengths_of(*SKEWED, causal=True), head_dim, heads=(4, 2)), device)
    first = [x.clone() for x in call.gradients()[1:]]
    for _ in range(30):
        assert all(torch.equal(x, y) for x, y in zip(call.gradients()[1:], first, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_short_sequences(head_dim: int, device: torch.device) -> None:
    """8,192 of 34 tokens, beside the same as a dense batch."""
    generator = torch.Generator(device=device).manual_seed(head_dim)
    shapes = {name: (8192, 34, 2 if name in ("q", "dout") else 1, head_dim) for name in ("q", "k", "v", "dout")}
    q, k, v, dout = (
        torch.randn(shape, device=device, generator=generator).to(torch.bfloat16) for shape in shapes.values()
    )
    out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)
    expected = fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
    starts = torch.arange(0, 8193 * 34, 34, dtype=torch.int32, device=device)
    packed = [x.flatten(0, 1) for x in (dout, q, k, v, out)]
    packed.append(lse.permute(1, 0, 2).flatten(1).contiguous())
    found = fa2cupy.attention_backward(
        *packed, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, deterministic=True
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y.flatten(0, 1), rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_long_sequence_among_small_ones(head_dim: int, deterministic: bool, device: torch.device) -> None:
    lengths = lengths_of((5, 9), (100_000, 700), (64, 64), (700, 100_000), (0, 3), causal=True)
    check_all([LengthsCase(lengths, head_dim, heads=(1, 1), deterministic=deterministic)], device)


def test_a_graph_serves_other_lengths(device: torch.device) -> None:
    """Captured once; then the lengths change where they lie, and the sum of them stays."""
    lengths = lengths_of(*EQUAL, causal=True)
    call = call_of(LengthsCase(lengths, 128, heads=(4, 2), deterministic=True), device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        call.gradients()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call.gradients()
    for sequences in (EQUAL, ((1000, 1000), (24, 24), (0, 0), (513, 513), (1, 1), (1534, 1534))):
        other = call_of(LengthsCase(lengths_of(*sequences, causal=True), 128, heads=(4, 2), deterministic=True), device)
        for name in ("q", "k", "v", "dout", "out", "lse"):
            call.tensors[name].copy_(other.tensors[name])
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            call.options[name].copy_(other.options[name])  # type: ignore[attr-defined]
        graph.replay()
        torch.cuda.synchronize(device)
        found = [call.tensors[name].clone() for name in ("dq", "dk", "dv")]
        assert all(torch.equal(x, y) for x, y in zip(found, other.gradients(), strict=True))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_wrong_lengths_write_nowhere_else(head_dim: int, deterministic: bool, device: torch.device) -> None:
    """Whatever they are, memory beside the results stays as it is, and the call ends."""
    case = LengthsCase(lengths_of(*MIXED, causal=True), head_dim, heads=(4, 2), deterministic=deterministic)
    call = call_of(case, device)
    starts = call.options["cu_seqlens_q"]
    assert isinstance(starts, Tensor)
    for wrong in (starts.flip(0), starts * 1000, starts - 10**6, starts * 0 - 5, starts * 0 + 2**31 - 1):
        guarded = {
            name: torch.full((3, *call.tensors[name].shape), 7.0, device=device, dtype=torch.bfloat16)
            for name in ("dq", "dk", "dv")
        }
        call.tensors |= {name: whole[1] for name, whole in guarded.items()}
        call.options |= {"cu_seqlens_q": wrong.contiguous()}
        call.gradients()
        assert all((whole[place] == 7).all() for whole in guarded.values() for place in (0, 2))
