"""Run cases on torch tensors and judge them: NaN around and inside every buffer, guards and inputs checked after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import fa2cupy
from fa2cupy.autograd.known import KINDS
from fa2cupy.prepared import PREPARED
from tests.gpu import oracle
from tests.gpu.cases import GUARD, Case, place, sizes_of
from tests.gpu.ledger import LEDGER

__all__ = ["Arena", "Run", "check", "forget_calls", "inputs_of", "run"]

Tensor = torch.Tensor

# NaN in either 16-bit format, and in float32: bits that no kernel writes as a result.
NAN16, NAN32, BYTE = 0x7FC1, 0x7FC12345, 0x5A
WORKSPACE_GUARD = 4096  # bytes


def forget_calls() -> None:
    """What the process has prepared goes by the FA2CUPY_KERNEL of then: a test of other kernels begins without it."""
    PREPARED.clear()
    KINDS.clear()


@dataclass(slots=True)
class Arena:
    """The buffers of a case. Each lies in a larger one whose other elements are NaN and belong to nobody."""

    case: Case
    device: torch.device
    inputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # name -> (storage bits, copy of them)
    outputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # name -> (storage bits, a view of them)
    workspace: Tensor | None = None

    def _storage(self, name: str) -> tuple[Tensor, Tensor]:
        where = place(self.case, name)
        bits, dtype = (NAN32, torch.int32) if name in ("lse", "lse_out") else (NAN16, torch.int16)
        storage = torch.full((where.size,), bits, dtype=dtype, device=self.device)
        return storage, torch.as_strided(storage, where.shape, where.strides, where.offset)

    def _typed(self, bits: Tensor) -> Tensor:
        return bits.view(torch.float32 if bits.dtype == torch.int32 else getattr(torch, self.case.dtype))

    def put(self, name: str, values: Tensor) -> Tensor:
        """An input with these values, in the case's layout and strides."""
        storage, view = self._storage(name)
        typed = self._typed(storage).as_strided(view.shape, view.stride(), view.storage_offset())
        if self.case.expanded and name in ("k", "v"):
            head = 2 if self.case.layout == "bshd" else 1
            typed.narrow(head, 0, 1).copy_(values.narrow(head, 0, 1))
        else:
            typed.copy_(values)
        self.inputs[name] = storage, storage.clone()
        return typed

    def take(self, name: str) -> Tensor:
        """An output to be given to the call: NaN everywhere."""
        storage, view = self._storage(name)
        self.outputs[name] = storage, view
        return self._typed(storage).as_strided(view.shape, view.stride(), view.storage_offset())

    def take_workspace(self, size: int) -> Tensor:
        """`size` bytes that read as NaN, between guards."""
        block = torch.full((size + 2 * WORKSPACE_GUARD,), BYTE, dtype=torch.uint8, device=self.device)
        self.workspace = block
        inside = block[WORKSPACE_GUARD : WORKSPACE_GUARD + size]
        inside.fill_(0xFF)
        return inside

    def flags(self) -> dict[str, Tensor]:
        """Sentence about the memory -> whether it holds. Overwrites the outputs."""
        flags = {}
        for name, (storage, before) in self.inputs.items():
            flags[f"{name} was written"] = (storage == before).all()
        for name, (storage, view) in self.outputs.items():
            view.fill_(NAN32 if view.dtype == torch.int32 else NAN16)
            flags[f"memory beside {name} was written"] = (storage == storage[0]).all() & (
                storage[0] == (NAN32 if view.dtype == torch.int32 else NAN16)
            )
        if self.workspace is not None:
            guards = torch.cat([self.workspace[:WORKSPACE_GUARD], self.workspace[-WORKSPACE_GUARD:]])
            flags["memory beside the workspace was written"] = (guards == BYTE).all()
        return flags


def inputs_of(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Fresh random q, k, v, dout of the case, contiguous (batch, seqlen, heads, d)."""
    generator = torch.Generator(device=device).manual_seed(1000003 * case.seed + case.head_dim)
    dtype = getattr(torch, case.dtype)
    widths = sizes_of(case)
    lengths = {"q": case.seqlen_q, "k": case.seqlen_k, "v": case.seqlen_k, "dout": case.seqlen_q}
    tensors = {}
    for name, seqlen in lengths.items():
        heads = case.heads[name in ("k", "v")]
        width = widths.head_dim_v if name in ("v", "dout") else widths.head_dim
        real = torch.float64 if case.dtype == "float64" else torch.float32
        x = torch.randn((case.batch, seqlen, heads, width), device=device, dtype=real, generator=generator) + case.mean
        if case.outliers and name != "dout":
            rare = torch.rand(x.shape, device=device, generator=generator) < 1e-3
            x += 10 * torch.randn(x.shape, device=device, generator=generator) * rare
        if case.expanded and name in ("k", "v"):
            x = x[:, :, :1].expand(x.shape)
        tensors[name] = x.to(dtype)
    return tensors


def extras_of(case: Case, device: torch.device) -> dict[str, Tensor]:
    """sinks and dlse of the case, if it has them. Of four heads one has no sink, and one a large one."""
    generator = torch.Generator(device=device).manual_seed(7 + case.seed)
    extras = {}
    if case.sinks is not None:
        sinks = torch.randn(case.heads[0], device=device, generator=generator) + 1
        sinks[1::4], sinks[2::4] = -torch.inf, 30
        extras["sinks"] = sinks.to(getattr(torch, case.sinks))
    if case.dlse:  # NaN of rows that see no key, if it does not matter
        shape = (case.batch, case.heads[0], case.seqlen_q)
        extras["dlse"] = torch.randn(shape, device=device, generator=generator)
        if case.sinks is None:
            extras["dlse"][:, :, : case.unseen[0]] = torch.nan
    return extras


@dataclass(frozen=True, slots=True)
class Run:
    """What a call made, in (batch, seqlen, heads, d), and the sentences about memory."""

    results: dict[str, Tensor]
    lse: Tensor
    flags: dict[str, Tensor]


def _poison(nbytes: Iterable[int], device: torch.device) -> None:
    """Leave NaN in the blocks that torch will hand out next for these sizes."""
    blocks = [torch.full((max(1, n),), 0xFF, dtype=torch.uint8, device=device) for n in nbytes]
    del blocks


def run(case: Case, tensors: dict[str, Tensor], backward: bool, device: torch.device) -> Run:
    """Forward, and if asked backward, of a case through the public functions."""
    arena = Arena(case, device)

    def user(x: Tensor) -> Tensor:
        return x if case.layout == "bshd" else x.transpose(1, 2)

    q, k, v = (arena.put(name, user(tensors[name])) for name in ("q", "k", "v"))
    options: dict[str, Any] = {"causal": case.causal, "softmax_scale": case.scale, "layout": case.layout}
    if case.window is not None:
        options["window_size"] = case.window
    extras = extras_of(case, device)
    if "sinks" in extras:
        options["sinks"] = extras["sinks"].clone()
    if case.given:
        out, lse = arena.take("out"), arena.take("lse_out")
        got, got_lse = fa2cupy.attention(q, k, v, return_lse=True, out=out, lse_out=lse, **options)
        assert got is out and got_lse is lse
    else:
        _poison((tensors["dout"].numel() * 2, case.batch * case.heads[0] * case.seqlen_q * 4), device)
        out, lse = fa2cupy.attention(q, k, v, return_lse=True, **options)
    results = {"out": user(out).clone()}
    lse_result = lse.clone()
    if backward:
        dout = arena.put("dout", user(tensors["dout"]))
        options["deterministic"] = case.deterministic
        more: dict[str, Any] = {"dlse": extras["dlse"]} if "dlse" in extras else {}
        if "sinks" in extras:
            more["grad_of"] = ("sinks",)
            more |= {"dsinks": torch.full_like(extras["sinks"], torch.nan)} if case.given else {}
        names = ("dq", "dk", "dv", "dsinks")[: 3 + ("sinks" in extras)]
        needed = fa2cupy.backward_workspace_bytes(q, k, v, **options)
        if case.given:
            gradients = [arena.take(name) for name in ("dq", "dk", "dv")]
            got = fa2cupy.attention_backward(
                dout, q, k, v, out, lse, workspace=arena.take_workspace(needed),
                **dict(zip(("dq", "dk", "dv"), gradients, strict=True)), **options, **more,
            )  # fmt: skip
            gradients += [more["dsinks"]] if "dsinks" in more else []
            assert all(x is y for x, y in zip(got, gradients, strict=True))
        else:
            _poison((needed, *(x.numel() * 2 for x in (q, k, v))), device)
            gradients = list(fa2cupy.attention_backward(dout, q, k, v, out, lse, **options, **more))
        results.update(
            {name: (user(x) if x.dim() == 4 else x).clone() for name, x in zip(names, gradients, strict=True)},
        )
    flags = arena.flags()
    if "sinks" in extras:
        flags["sinks was written"] = (extras["sinks"] == options["sinks"]).all()
    return Run(results, lse_result, flags)


def check(case: Case, backward: bool, device: torch.device) -> list[str]:
    """Run a case and compare it with the oracle; what is wrong with it, one sentence each."""
    tensors = inputs_of(case, device)
    made = run(case, tensors, backward, device)
    lse_ref, bounds = oracle.attention(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        tensors["dout"] if backward else None,
        causal=case.causal,
        scale=case.softmax_scale,
        window=case.window,
        out=made.results["out"],
        **extras_of(case, device),
    )
    queries, keys = case.unseen
    flags = {
        f"{name} is not 0 in rows of no use": (
            made.results[name][:, : keys if name in ("dk", "dv") else queries] == 0
        ).all()
        for name in made.results
        if name != "dsinks"
    }
    judgements = oracle.judge(made.results, made.lse, lse_ref, bounds, made.flags | flags)
    LEDGER.add(case.dtype, judgements)
    return [f"{case}: {problem}" for judgement in judgements.values() for problem in judgement.problems]


def check_all(cases: Sequence[Case], backward: bool, device: torch.device) -> None:
    """Check every case, then fail with all that is wrong."""
    problems = [problem for case in cases for problem in check(case, backward, device)]
    assert not problems, f"{len(problems)} problems in {len(cases)} cases:\n" + "\n".join(problems[:40])


assert GUARD * 2 % 16 == 0, "a shift of 0 must leave tensors aligned"
