"""Sequences whose lengths only the device knows, forward and backward: each beside float64, with NaN around all of
them; then gradients alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import fa2cupy
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import backward, common, plan_backward, plan_forward
from fa2cupy.kernels.plan import Plan
from fa2cupy.problem import SPECS, AttentionProblem
from tests.covering import covering
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

    def forward(self) -> tuple[Tensor, Tensor, bool]:
        """out and lse, from arrays of NaN between guards, and whether these are as they were."""
        wholes = []
        for name in ("out", "lse"):
            like = self.tensors[name]
            whole = torch.full((3, *like.shape), 7.0, dtype=like.dtype, device=like.device)
            whole[1] = torch.nan
            wholes.append(whole)
        out, lse = (whole[1] for whole in wholes)
        options = {name: value for name, value in self.options.items() if name != "deterministic"}
        inputs = (self.tensors[name] for name in "qkv")
        found = fa2cupy.attention(*inputs, return_lse=True, out=out, lse_out=lse, **options)
        assert found[0] is out and found[1] is lse
        return out, lse, all(bool((whole[place] == 7).all()) for whole in wholes for place in (0, 2))

    def gradients(self) -> tuple[Tensor, ...]:
        """Into results of NaN."""
        inputs = (self.tensors[name] for name in ("dout", "q", "k", "v", "out", "lse"))
        results = {name: self.tensors[name].fill_(torch.nan) for name in ("dq", "dk", "dv")}
        found: tuple[Tensor, ...] = fa2cupy.attention_backward(*inputs, **results, **self.options)
        return found


def call_of(case: LengthsCase, device: torch.device) -> Call:
    """`out` and `lse` are those of `forward`, but NaN where it writes what everybody knows."""
    lengths = case.lengths
    generator = torch.Generator(device=device).manual_seed(case.seed)
    mask = {"causal": lengths.causal} | ({} if lengths.window is None else {"window_size": lengths.window})
    given: dict[str, object] = {name: torch.from_numpy(array).to(device) for name, array in lengths.arrays.items()}
    if lengths.segment_ids is not None:
        given["segment_ids"] = given.pop("segment_ids_q"), given.pop("segment_ids_k")
    call = Call(case, {}, {"deterministic": case.deterministic, **mask, **given})
    seen = {side: seen_of(lengths, side, device) for side in "qk"}
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
        if name in ("q", "k", "v", "dout"):
            numbers = torch.randn((*batch, rows, heads, width), device=device, generator=generator)
            whole[..., :width] = torch.where(seen[side][..., None, None], numbers, torch.nan)
    out, lse, _ = call.forward()
    call.tensors["out"] = torch.where(seen["q"][..., None, None], out, torch.nan)
    call.tensors["lse"] = torch.where(seen["q"][..., None, :], lse, torch.nan)
    return call


def seen_of(lengths: Lengths, side: str, device: torch.device) -> Tensor:
    """Of the array's rows, with its batch if it has one: which of the queries see a key, or which keys a query sees."""
    seen = torch.zeros((lengths.batch(side), getattr(lengths, f"rows_{side}")), dtype=torch.bool)
    for sequence, runs in enumerate(zip(lengths.runs("q"), lengths.runs("k"), strict=True)):
        unseen = unseen_of(lengths, *(length for _, length in runs))["qk".index(side)]
        first, length = runs["qk".index(side)]
        seen[lengths.row(side, sequence), first + unseen : first + length] = True
    return (seen[0] if lengths.is_packed(side) else seen).to(device)


def unseen_of(lengths: Lengths, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Leading queries that see no key, and leading keys that no query sees."""
    left, right = lengths.window or (-1, -1)
    left, right = (1 << 30 if end < 0 else end for end in (left, 0 if lengths.causal else right))
    queries = seqlen_q if seqlen_k == 0 else max(0, seqlen_q - seqlen_k - right)
    keys = seqlen_k if seqlen_q == 0 else max(0, seqlen_k - seqlen_q - left)
    return queries, keys


def problems_of(case: LengthsCase, device: torch.device) -> list[str]:
    """What is wrong with a case, one sentence each. Sequences of the same lengths are judged together."""
    call, lengths = call_of(case, device), case.lengths
    call.gradients()
    call.tensors["out"], call.tensors["lse"], guarded = call.forward()
    problems = [] if guarded else [f"{case}: memory beside the results was written"]
    alike: dict[tuple[int, int], list[int]] = {}
    for sequence, ((_, seqlen_q), (_, seqlen_k)) in enumerate(zip(lengths.runs("q"), lengths.runs("k"), strict=True)):
        if seqlen_q and seqlen_k:
            alike.setdefault((seqlen_q, seqlen_k), []).append(sequence)
    for sequences in alike.values():
        of = {name: torch.stack([call.part(name, sequence) for sequence in sequences]) for name in call.tensors}
        lse, bounds = oracle.attention(
            *(of[name] for name in ("q", "k", "v", "dout")),
            causal=lengths.causal,
            scale=case.head_dim**-0.5,
            window=lengths.window,
            out=of["out"],
        )
        judgements = oracle.judge({name: of[name] for name in ("out", "dq", "dk", "dv")}, of["lse"], lse, bounds, {})
        LEDGER.add(case.dtype, judgements)
        problems += [f"{case} sequences {sequences}: {text}" for each in judgements.values() for text in each.problems]
    for name, nothing in (("out", 0), ("dq", 0), ("dk", 0), ("dv", 0), ("lse", -torch.inf)):
        seen = seen_of(lengths, "k" if name in ("dk", "dv") else "q", device)
        seen = seen[..., None, :] if name == "lse" else seen[..., None, None]
        if not ((call.tensors[name] == nothing) | seen).all():
            problems.append(f"{case}: {name} is not {nothing} in rows of no sequence, or that see nothing")
    return problems


def check_all(cases: list[LengthsCase], device: torch.device) -> None:
    problems = [problem for case in cases for problem in problems_of(case, device)]
    assert not problems, f"{len(problems)} problems in {len(cases)} cases:\n" + "\n".join(problems[:40])


MASKS = ((False, None), (True, None), (False, (100, 30)), (True, (257, -1)))


def cases_of(head_dim: int, head_dim_v: int | None, dtype: str) -> list[LengthsCase]:
    """Every two choices of lengths, mask, layout, heads and order; which three, differs from width to width."""
    factors = {
        "sequences": (MIXED, FEW, EQUAL),
        "mask": MASKS,
        "packed": ((True, True), (True, False), (False, True), (False, False)),
        "heads": ((4, 4), (6, 3), (4, 1)),
        "deterministic": (False, True),
    }
    cases = []
    for number, chosen in enumerate(covering(factors, seed=head_dim + (dtype == "float16"))):
        (packed_q, packed_k), (causal, window) = chosen["packed"], chosen["mask"]
        lengths = lengths_of(
            *chosen["sequences"],
            packed_q=packed_q,
            packed_k=packed_k,
            behind=number % 4 * 3,
            causal=causal,
            window=window,
        )
        of_call = {name: chosen[name] for name in ("heads", "deterministic")}
        pad = (0, 8)[number % 7 == 0]
        cases.append(LengthsCase(lengths, head_dim, dtype, head_dim_v=head_dim_v, pad=pad, seed=number, **of_call))
    return cases


def needed_plans(info: DeviceInfo) -> Iterator[Plan]:
    """What is to be compiled beforehand."""
    cases = [case for width in WIDTHS for case in cases_of(*width)]
    cases += [
        dataclasses.replace(case, family="sm80")
        for head_dim, dtype in SM80_WIDTHS
        for case in cases_of(head_dim, None, dtype)
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
def test_lengths(head_dim: int, head_dim_v: int | None, dtype: str, device: torch.device) -> None:
    check_all(cases_of(head_dim, head_dim_v, dtype), device)


@pytest.mark.parametrize(("head_dim", "dtype"), SM80_WIDTHS)
@pytest.mark.usefixtures("sm80_kernels")
def test_lengths_of_sm80(head_dim: int, dtype: str, device: torch.device) -> None:
    check_all(cases_of(head_dim, None, dtype), device)


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
