"""Gradients of sequences whose lengths only the device knows: each beside float64, with NaN around all of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import fa2cupy
from fa2cupy.calls import PREPARED
from tests.gpu import oracle
from tests.gpu.cases import DTYPES
from tests.gpu.ledger import LEDGER
from tests.host.packed_run import PackedCase, Sequence, lengths

Tensor = torch.Tensor

WIDTHS = ((40, None), (64, None), (96, None), (128, None), (192, 128), (192, None), (256, None))
MIXED = lengths(
    (300, 300), (0, 0), (513, 130), (3, 700, 0, 5, 7), (0, 33), (65, 0, 4), (1, 1), (700, 1100, 9, 0, 1), (1030, 1030)
)
SKEWED = (Sequence(3000, 3000), *(Sequence(n % 90, n % 70) for n in range(60)), Sequence(2111, 2500, 3, 2, 1))
EQUAL = (Sequence(512, 512),) * 6


@dataclass
class Arrays:
    """Of a case: inputs with their sequences' values and NaN everywhere else, and results of NaN alone."""

    tensors: dict[str, Tensor]
    options: dict[str, object]


def arrays_of(case: PackedCase, device: torch.device) -> Arrays:
    """`out` and `lse` are those of dense calls, sequence by sequence."""
    generator = torch.Generator(device=device).manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    tensors = {}
    for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "lse"):
        of_keys = name in ("k", "v", "dk", "dv")
        rows, heads = case.rows(of_keys), case.heads[of_keys]
        width = (case.head_dim_v or case.head_dim) if name in ("v", "dv", "out", "dout") else case.head_dim
        batch = () if case.is_packed(of_keys) else (len(case.sequences),)
        if name == "lse":
            tensors[name] = torch.full((*batch, heads, rows), torch.nan, device=device)
            continue
        whole = torch.full((*batch, rows, heads, width + case.pad), torch.nan, dtype=dtype, device=device)
        tensors[name] = whole[..., :width]
    window = {} if case.window is None else {"window_size": case.window}
    for number, sequence in enumerate(case.sequences):
        unseen = dict(zip(("queries", "keys"), case.unseen(sequence), strict=True))
        for name in ("q", "k", "v", "dout"):
            view = view_of(case, tensors, name, number)
            view.copy_(torch.randn(view.shape, device=device, generator=generator))
            view[: unseen["keys" if name in ("k", "v") else "queries"]] = torch.nan
        if 0 not in (sequence.seqlen_q, sequence.seqlen_k):
            one = (view_of(case, tensors, name, number)[None] for name in ("q", "k", "v"))
            out, lse = fa2cupy.attention(*one, causal=case.causal, return_lse=True, **window)
            view_of(case, tensors, "out", number).copy_(out[0])
            view_of(case, tensors, "lse", number).copy_(lse[0])
    given = {name: torch.from_numpy(array).to(device) for name, array in case.given().items()}
    options = {"causal": case.causal, "deterministic": case.deterministic, **window, **given}
    return Arrays(tensors, options)


def view_of(case: PackedCase, tensors: dict[str, Tensor], name: str, number: int) -> Tensor:
    """A sequence's part: (seqlen, heads, width), of lse (heads, seqlen)."""
    of_keys = name in ("k", "v", "dk", "dv")
    batch, rows = case.place(number, of_keys)
    whole = tensors[name] if case.is_packed(of_keys) else tensors[name][batch]
    return whole[:, rows] if name == "lse" else whole[rows]


def gradients(arrays: Arrays) -> tuple[Tensor, ...]:
    """Into results of NaN."""
    inputs = (arrays.tensors[name] for name in ("dout", "q", "k", "v", "out", "lse"))
    results = {name: arrays.tensors[name].fill_(torch.nan) for name in ("dq", "dk", "dv")}
    found: tuple[Tensor, ...] = fa2cupy.attention_backward(*inputs, **results, **arrays.options)
    return found


def problems_of(case: PackedCase, device: torch.device) -> list[str]:
    arrays = arrays_of(case, device)
    gradients(arrays)
    tensors = arrays.tensors
    problems = []
    others = {name: torch.ones_like(tensors[name], dtype=torch.bool) for name in ("dq", "dk", "dv")}
    for number, sequence in enumerate(case.sequences):
        for name in others:
            view_of(case, others, name, number)[...] = 0 in (sequence.seqlen_q, sequence.seqlen_k)
        if 0 in (sequence.seqlen_q, sequence.seqlen_k):
            continue
        one = {name: view_of(case, tensors, name, number)[None] for name in (*others, "q", "k", "v", "dout", "out")}
        inputs = (one[name] for name in ("q", "k", "v", "dout"))
        scale = case.head_dim**-0.5
        lse, bounds = oracle.attention(
            *inputs, causal=case.causal, scale=scale, window=case.window, out=one["out"].nan_to_num()
        )
        judgements = oracle.judge({name: one[name] for name in others}, None, lse, bounds, {})
        LEDGER.add(case.dtype, judgements)
        problems += [
            f"{case} sequence {number}: {problem}" for judged in judgements.values() for problem in judged.problems
        ]
    for name, rows in others.items():
        if not (tensors[name][rows] == 0).all():
            problems.append(f"{case}: {name} is not 0 in rows of no sequence")
    return problems


def check_all(cases: list[PackedCase], device: torch.device) -> None:
    problems = [problem for case in cases for problem in problems_of(case, device)]
    assert not problems, f"{len(problems)} problems in {len(cases)} cases:\n" + "\n".join(problems[:40])


def cases_of(head_dim: int, head_dim_v: int | None, dtype: str) -> Iterator[PackedCase]:
    masks = ((False, None), (True, None), (False, (100, 30)), (True, (257, -1)))
    sides = ((True, True), (True, False), (False, True), (False, False))
    for number, (sequences, (causal, window), (packed_q, packed_k)) in enumerate(
        itertools.product((MIXED, SKEWED, EQUAL), masks, sides)
    ):
        yield PackedCase(
            sequences,
            head_dim,
            dtype=dtype,
            causal=causal,
            window=window,
            heads=((4, 4), (6, 3), (4, 1))[number % 3],
            deterministic=number % 5 < 2,
            packed_q=packed_q,
            packed_k=packed_k,
            behind=number % 4 * 3,
            pad=(0, 8)[number % 7 == 0],
            head_dim_v=head_dim_v,
            seed=number,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), WIDTHS)
def test_gradients(head_dim: int, head_dim_v: int | None, dtype: str, device: torch.device) -> None:
    check_all(list(cases_of(head_dim, head_dim_v, dtype)), device)


@pytest.fixture
def sm80_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FA2CUPY_KERNEL=sm80, for calls that the process has made before too."""
    monkeypatch.setenv("FA2CUPY_KERNEL", "sm80")
    PREPARED.clear()
    yield
    PREPARED.clear()


@pytest.mark.parametrize("head_dim", [59, 64, 128, 256])
@pytest.mark.usefixtures("sm80_kernels")
def test_gradients_of_sm80(head_dim: int, device: torch.device) -> None:
    check_all(list(cases_of(head_dim, None, DTYPES[head_dim % 128 == 0]))[::2], device)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (300, 100)}], ids=str)
def test_deterministic_bits_repeat(head_dim: int, mask: dict[str, object], device: torch.device) -> None:
    """Whoever waits for a turn waits for somebody who runs: many blocks, of many sequences, a hundred times."""
    case = PackedCase(SKEWED, head_dim, heads=(6, 3), deterministic=True, **mask)  # type: ignore[arg-type]
    arrays = arrays_of(case, device)
    first = [x.clone() for x in gradients(arrays)]
    for _ in range(100):
        for x, y in zip(gradients(arrays), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dk_and_dv_repeat(head_dim: int, device: torch.device) -> None:
    """They do not depend on the order of the list, which is another each time."""
    arrays = arrays_of(PackedCase(SKEWED, head_dim, causal=True, heads=(4, 2)), device)
    first = [x.clone() for x in gradients(arrays)[1:]]
    for _ in range(30):
        for x, y in zip(gradients(arrays)[1:], first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_short_sequences(head_dim: int, device: torch.device) -> None:
    """8,192 sequences of 34 tokens beside the same as a dense batch, and one long one among small ones."""
    generator = torch.Generator(device=device).manual_seed(head_dim)
    shapes = {name: (8192, 34, 2 if name in ("q", "dout") else 1, head_dim) for name in ("q", "k", "v", "dout")}
    dense = {
        name: torch.randn(shape, device=device, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    out, lse = fa2cupy.attention(dense["q"], dense["k"], dense["v"], causal=True, return_lse=True)
    options = {"causal": True, "deterministic": True}
    expected = fa2cupy.attention_backward(dense["dout"], dense["q"], dense["k"], dense["v"], out, lse, **options)
    starts = torch.arange(0, 8193 * 34, 34, dtype=torch.int32, device=device)
    packed = [x.flatten(0, 1) for x in (dense["dout"], dense["q"], dense["k"], dense["v"], out)]
    found = fa2cupy.attention_backward(
        *packed, lse.permute(1, 0, 2).reshape(2, -1).contiguous(), cu_seqlens_q=starts, cu_seqlens_k=starts, **options
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y.flatten(0, 1), rtol=2**-7, atol=2e-3)
    long = (Sequence(5, 9), Sequence(100_000, 700), Sequence(64, 64), Sequence(700, 100_000), Sequence(0, 3))
    check_all([PackedCase(long, head_dim, heads=(1, 1), causal=True)], device)


def test_a_graph_serves_other_lengths(device: torch.device) -> None:
    """Captured once; then the lengths change where they lie, and the sum of them stays."""
    case = PackedCase(EQUAL, 128, causal=True, heads=(4, 2), deterministic=True)
    arrays = arrays_of(case, device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        gradients(arrays)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        gradients(arrays)
    for sequences in (
        lengths(*((512, 512),) * 6),
        lengths((1000, 1000), (24, 24), (0, 0), (513, 513), (1, 1), (1534, 1534)),
    ):
        other = arrays_of(dataclasses.replace(case, sequences=sequences), device)
        for name in ("q", "k", "v", "dout", "out", "lse"):
            arrays.tensors[name].copy_(other.tensors[name])
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            arrays.options[name].copy_(other.options[name])  # type: ignore[attr-defined]
        graph.replay()
        torch.cuda.synchronize(device)
        found = [arrays.tensors[name].clone() for name in ("dq", "dk", "dv")]
        assert all(torch.equal(x, y) for x, y in zip(found, gradients(other), strict=True))


def test_wrong_lengths_write_nowhere_else(device: torch.device) -> None:
    """Whatever they are, memory beside the results stays as it is, and the call ends."""
    case = PackedCase(MIXED, 128, causal=True, heads=(4, 2))
    for deterministic in (False, True):
        arrays = arrays_of(dataclasses.replace(case, deterministic=deterministic), device)
        starts = arrays.options["cu_seqlens_q"]
        assert isinstance(starts, Tensor)
        for wrong in (
            starts.flip(0),
            starts * 1000,
            starts - 10**6,
            torch.full_like(starts, -5),
            starts * 0 + 2**31 - 1,
        ):
            guarded = {name: torch.full((2, *arrays.tensors[name].shape), 7.0, device=device, dtype=torch.bfloat16)
                       for name in ("dq", "dk", "dv")}  # fmt: skip
            arrays.tensors |= {name: whole[0] for name, whole in guarded.items()}
            arrays.options |= {"cu_seqlens_q": wrong.contiguous()}
            gradients(arrays)
            assert all((whole[1] == 7).all() for whole in guarded.values())
