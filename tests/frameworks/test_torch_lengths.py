"""Lengths through torch: autograd, operators, torch.compile, torch.func. Each sequence by itself is the judge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils import flop_counter
from torch.utils.checkpoint import checkpoint

import fa2cupy
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.spec import CARRIED
from fa2cupy.torch import backward_op, forward_op
from tests.lengths import FORMS, Case, draw, expect_sequences

PAIRS = ((3, 5), (0, 4), (1, 1), (7, 0), (6, 6))
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield


class Torch(NamedTuple):
    """A case whose q, k and v require grad."""

    case: Case
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    dout: torch.Tensor
    lengths: dict[str, Any]

    def check(self, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        """With a graph; of a causal call."""
        gradients = torch.autograd.grad(out, self.qkv, self.dout)
        results = dict(zip(("dq", "dk", "dv"), (x.numpy() for x in gradients), strict=True))
        if lse is not None:
            results["lse"] = lse.detach().numpy()
        expect_sequences(self.case.inputs, self.case.lengths, causal=True).check(out=out.detach().numpy(), **results)


def make(
    form: str, used: tuple[str, ...] = (), integers: Any = np.int32, *, pairs: Any = PAIRS, width: int = 8
) -> Torch:
    case = draw(3, form, pairs=pairs, used=used, head_dim=width, head_dim_v=2 * width, integers=integers)
    q, k, v, dout = (torch.from_numpy(x) for x in case.inputs)
    lengths = {
        name: tuple(map(torch.from_numpy, x)) if isinstance(x, tuple) else torch.from_numpy(x)
        for name, x in case.lengths.items()
    }
    return Torch(case, tuple(x.requires_grad_() for x in (q, k, v)), dout, lengths)


ALL = ("seqused_q", "seqused_k", "leftpad_k")


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str) -> None:
    for integers in (np.int32, np.int64):
        x = make(form, ALL, integers)
        x.check(*fa2cupy.attention(*x.qkv, causal=True, return_lse=True, **x.lengths))
        with torch.no_grad():
            out = fa2cupy.attention(*x.qkv, causal=True, **x.lengths)
        expect_sequences(x.case.inputs, x.case.lengths, causal=True).check(out=out.numpy())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(form: str, dynamic: bool) -> None:
    """Other lengths of the same total need no other graph."""
    compiled = torch.compile(fa2cupy.attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    x = make(form, ALL)
    x.check(compiled(*x.qkv, causal=True, max_seqlen_q=torch.tensor(7), max_seqlen_k=9, **x.lengths))


def test_compiled_graphs_serve_other_lengths() -> None:
    x = make("packed")
    compiled = torch.compile(fa2cupy.attention, backend="aot_eager", fullgraph=True)
    q, k, v = (y.detach().nan_to_num().requires_grad_() for y in x.qkv)
    starts = x.lengths["cu_seqlens_k"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shift in (0, 1, 2):
            moved = (starts - shift).clamp(min=0)
            out = compiled(q, k, v, causal=True, cu_seqlens_q=moved, cu_seqlens_k=moved)
            assert torch.equal(out, fa2cupy.attention(q, k, v, causal=True, cu_seqlens_q=moved, cu_seqlens_k=moved))


def test_compiled_errors_are_words() -> None:
    x = make("packed")
    compiled = torch.compile(fa2cupy.attention, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"k has 3 dimensions.* say where they start with cu_seqlens_k"):
        compiled(*x.qkv, cu_seqlens_q=x.lengths["cu_seqlens_q"])
    with pytest.raises(Exception, match="layout='bhsd' is not for packed sequences"):
        compiled(*x.qkv, layout="bhsd", **x.lengths)


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, starts: Any, used: Any) -> Any:
            return fa2cupy.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, seqused_k=used, causal=True)

    x = make("packed")
    starts = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    used = torch.tensor([2, 0, 6], dtype=torch.int32)
    arrays = (*(y.detach()[:9].nan_to_num() for y in x.qkv), starts, used)
    program = torch.export.export(Module(), arrays)
    assert sum(node.target is forward_op for node in program.graph.nodes) == 1
    assert torch.equal(program.module()(*arrays), Module()(*arrays))


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    x = make(form, ALL)
    q, k, v = (y.detach().nan_to_num().requires_grad_() for y in x.qkv)
    ids = x.lengths.get("segment_ids")
    of_sides = ids if isinstance(ids, tuple) else (ids, ids)
    arrays = {**x.lengths, **dict(zip(("segment_ids_q", "segment_ids_k"), of_sides, strict=True))}
    extra = [arrays.get(name) for name in CARRIED]
    options = (True, 0.3, "bshd", None, False, "")
    torch.library.opcheck(forward_op, (q, k, v, *options, *extra))
    out, lse = (y.detach() for y in forward_op(q, k, v, *options, *extra))
    q, k, v = (y.detach() for y in (q, k, v))
    lse = lse.nan_to_num(neginf=0)  # opcheck compares with tolerances that know no infinity
    torch.library.opcheck(backward_op, (x.dout.nan_to_num(), q, k, v, out, lse, lse, *options, *extra))


def test_gradcheck() -> None:
    for form in ("packed", "segments", "k packed"):
        x = make(form, ALL if form == "k packed" else (), pairs=((2, 3), (1, 2)), width=1)
        qkv = [y.detach().nan_to_num().requires_grad_() for y in x.qkv]

        def both(*qkv: torch.Tensor, lengths: dict[str, Any] = x.lengths) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = fa2cupy.attention(*qkv, window_size=(4, 1), return_lse=True, **lengths)
            return out, lse.masked_fill(lse.isneginf(), 0.0)

        assert torch.autograd.gradcheck(both, qkv)


def test_checkpoint_autocast_and_modes() -> None:
    x = make("packed", ("seqused_k",))
    x.check(checkpoint(lambda *qkv: fa2cupy.attention(*qkv, causal=True, **x.lengths), *x.qkv, use_reentrant=False))
    with torch.autocast("cpu", torch.bfloat16):
        single = [y.detach().float().requires_grad_() for y in x.qkv]
        out = fa2cupy.attention(*single, causal=True, **x.lengths)
        assert out.dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(out, fa2cupy.attention(*single, causal=True, **x.lengths))
    assert_close(out.double(), fa2cupy.attention(*x.qkv, causal=True, **x.lengths), atol=0.02, rtol=0.02)
    with flop_counter.FlopCounterMode(display=False) as counter:
        fa2cupy.attention(*(y[:20] for y in x.qkv), **{n: y for n, y in x.lengths.items() if n != "seqused_k"})
    assert counter.get_total_flops() == 2 * 4 * 20 * 20 * (8 + 16) // 5


def test_fake_tensors() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(n, h, d, dtype=torch.bfloat16) for n, h, d in ((9, 4, 8), (11, 2, 8), (11, 2, 16)))
        starts = torch.empty(4, dtype=torch.int32)
        out, lse = fa2cupy.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, return_lse=True)
        assert (out.shape, lse.shape, lse.dtype) == ((9, 4, 16), (4, 9), torch.float32)
        with pytest.raises(InvalidArgument, match=r"seqused_k has shape \(4,\): \(batch,\) is needed, here \(3,\)"):
            fa2cupy.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, seqused_k=starts)


def test_vmap() -> None:
    """The batch takes the mapped dimension, of used lengths and segments too; packed sequences have none."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 6, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    used = torch.tensor([[6, 3], [0, 4], [5, 6]], dtype=torch.int32)
    ids = torch.tensor([[0, 0, 1, 1, 1, -1], [3, 3, 3, 3, 5, 5]], dtype=torch.int32)

    def run(q: Any, k: Any, v: Any, used: Any) -> Any:
        return fa2cupy.attention(q, k, v, causal=True, seqused_k=used, segment_ids=ids)

    expected = torch.stack([run(*each) for each in zip(q, k, v, used, strict=True)])
    assert torch.equal(torch.vmap(run)(q, k, v, used), expected)
    per_sample = torch.vmap(torch.func.grad(lambda *x: run(*x).square().sum()))(q, k, v, used)
    for got, *each in zip(per_sample, q, k, v, used, strict=True):
        single = each[0].clone().requires_grad_()
        run(single, *each[1:]).square().sum().backward()
        assert_close(got, single.grad)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(InvalidArgument, match="cu_seqlens_q is not supported under vmap"):
        torch.vmap(lambda *x: fa2cupy.attention(*x, cu_seqlens_q=starts, cu_seqlens_k=starts))(q[0], k[0], v[0])


def test_what_is_saved_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that were changed in place between the passes are noticed."""
    x = make("packed")
    out = fa2cupy.attention(*x.qkv, causal=True, **x.lengths)
    x.lengths["cu_seqlens_k"].sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, x.qkv, x.dout)


# ----------------------------------------------------------------------------------------------------------------------
# Nested tensors


def nested(holes: bool = False) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any], dict[str, Any]]:
    """q, k and v as jagged tensors, the values that are their leaves, and the lengths that say the same."""
    torch.manual_seed(0)
    leaves = tuple(torch.randn(n, h, 8, dtype=torch.float64, requires_grad=True) for n, h in ((9, 4), (11, 2), (11, 2)))
    starts = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 2, 5, 11])
    used = (torch.tensor([2, 0, 5]), torch.tensor([2, 1, 4])) if holes else (None, None)
    tensors = tuple(
        torch.nested.nested_tensor_from_jagged(x, starts[side], used[side])
        for x, side in zip(leaves, (0, 1, 1), strict=True)
    )
    lengths = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
    return tensors, leaves, lengths | ({"seqused_q": used[0], "seqused_k": used[1]} if holes else {})


@pytest.mark.parametrize(
    ("holes", "compiled"), [(False, False), (False, True), (True, False)]
)  # torch compiles no holes
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_jagged(holes: bool, layout: str, compiled: bool) -> None:
    (q, k, v), leaves, lengths = nested(holes)
    expected, expected_lse = fa2cupy.attention(*leaves, causal=True, window_size=(3, 0), return_lse=True, **lengths)
    run = torch.compile(fa2cupy.attention, backend="aot_eager", fullgraph=True) if compiled else fa2cupy.attention
    arrays = [x.transpose(1, 2) for x in (q, k, v)] if layout == "bhsd" else (q, k, v)
    out, lse = run(*arrays, causal=True, window_size=(3, 0), layout=layout, return_lse=True)
    out = out.transpose(1, 2) if layout == "bhsd" else out
    assert out.shape == q.shape and torch.equal(out.offsets(), q.offsets())
    assert torch.equal(out.values(), expected) and torch.equal(lse, expected_lse)
    weights = torch.randn_like(expected)
    got = torch.autograd.grad((out.values() * weights).sum(), leaves)
    for x, y in zip(got, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():
        assert torch.equal(fa2cupy.attention(q, k, v, causal=True, window_size=(3, 0)).values(), expected)


def test_nested_tensors_that_do_not_fit() -> None:
    (q, k, v), leaves, lengths = nested()
    with pytest.raises(InvalidType, match=r"k is no nested tensor of layout torch\.strided: q, k and v of layout"):
        fa2cupy.attention(q, leaves[1], v)
    with pytest.raises(InvalidArgument, match="seqused_k is given beside nested tensors"):
        fa2cupy.attention(q, k, v, seqused_k=lengths["cu_seqlens_k"])
    with pytest.raises(InvalidArgument, match="dimension 2 is ragged"):
        fa2cupy.attention(*(x.transpose(1, 2) for x in (q, k, v)))
    other = torch.nested.nested_tensor_from_jagged(leaves[2], torch.tensor([0, 3, 5, 11]))
    with pytest.raises(InvalidArgument, match="k and v are nested tensors with other offsets"):
        fa2cupy.attention(q, k, other)
