"""qkv or kv in one tensor, whose gradient is one tensor: the bits of q, k and v apart, whichever way the call goes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils import flop_counter
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fa2cupy.autograd import launching
from fa2cupy.autograd.features import in_order
from fa2cupy.autograd.operators import OPERATORS
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from fa2cupy.torch import backward_ops, forward_ops
from tests.frameworks.test_torch_distributed import distributed, mesh

__all__ = ["mesh"]

Tensor = torch.Tensor
BATCH, LENGTH, HEADS, DIM = 2, 9, 4, 8
SLOPES = torch.tensor([[0.5, 0.25, 0.125, 1.0], [0.3, 0.2, 0.1, 0.0]])
FEATURES: dict[str, dict[str, Any]] = {
    "none": {},
    "window": {"window_size": (3, 2)},
    "scores": {"softcap": 1.5, "alibi_slopes": SLOPES, "causal": True},
    "dropout": {"dropout_p": 0.3, "softmax_scale": 0.4},
    "all": {
        "dropout_p": 0.3, "softcap": 1.5, "alibi_slopes": SLOPES, "window_size": (6, 0), "causal": True,
        "deterministic": True,
    },
}  # fmt: skip


class Form(NamedTuple):
    """packed over tensors of these shapes is what separate is over q, k and v."""

    packed: Callable[..., Any]
    separate: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    lengths: tuple[Any, ...] = ()  # arguments of packed behind the tensors
    separate_lengths: tuple[Any, ...] = ()

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(shape).to(dtype).requires_grad_() for shape in self.shapes]

    def parts(self, tensors: Any) -> Any:
        return (*tensors[:-1], *tensors[-1].unbind(-3))

    def results(self, way: str, tensors: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        """out and the gradients of the tensors, without dropout lse as well, and through it."""
        function = torch.compile(self.packed, fullgraph=True, backend="aot_eager") if way == "compiled" else self.packed
        with_lse = "dropout_p" not in options  # which brings S_dmask along, which nothing compiles
        options["return_attn_probs"] = with_lse
        mode = flop_counter.FlopCounterMode(display=False) if way == "watched" else contextlib.nullcontext()
        torch.manual_seed(3)
        with mode:
            if way == "apart":
                found = self.separate(*self.parts(tensors), *self.separate_lengths, **options)
            else:
                found = function(*tensors, *self.lengths, **options)
            out, lse = found[:2] if with_lse else (found, None)
            loss = out.square().sum() + (0 if lse is None else lse.sin().sum())
            return out, *([] if lse is None else [lse]), *torch.autograd.grad(loss, tensors)


STARTS = torch.tensor([0, 5, 18], dtype=torch.int32)
STARTS_K = torch.tensor([0, 7, 15], dtype=torch.int32)
FORMS = {
    "qkv": Form(flash_attn_qkvpacked_func, flash_attn_func, ((BATCH, LENGTH, 3, HEADS, DIM),)),
    "kv": Form(
        flash_attn_kvpacked_func, flash_attn_func, ((BATCH, LENGTH, HEADS, DIM), (BATCH, LENGTH + 4, 2, 2, DIM))
    ),
    "varlen qkv": Form(
        flash_attn_varlen_qkvpacked_func, flash_attn_varlen_func, ((18, 3, HEADS, DIM),), (STARTS, 13),
        (STARTS, STARTS, 13, 13),
    ),
    "varlen kv": Form(
        flash_attn_varlen_kvpacked_func, flash_attn_varlen_func, ((18, HEADS, DIM), (15, 2, 2, DIM)),
        *((STARTS, STARTS_K, 13, 8),) * 2,
    ),
}  # fmt: skip
DENSE = ("qkv", "kv")


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_of_q_k_and_v_apart(form: str, features: str) -> None:
    case = FORMS[form]
    tensors = case.tensors()
    wanted = case.results("apart", tensors, **FEATURES[features])
    compiled = ("compiled",) if features in ("none", "all") else ()
    for way in ("eager", "watched", *compiled):
        found = case.results(way, tensors, **FEATURES[features])
        assert_same(found, wanted)
        assert all(gradient.is_contiguous() for gradient in found[-len(tensors) :])


@pytest.mark.parametrize("form", DENSE)
def test_one_graph_for_all_lengths(form: str) -> None:
    case = FORMS[form]
    torch.compiler.reset()
    compiled = torch.compile(case.packed, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for more in (0, 3, 1):
            tensors = [torch.randn(5 + more, shape[1] + more, *shape[2:], requires_grad=True) for shape in case.shapes]
            found = torch.autograd.grad(compiled(*tensors, causal=True).square().sum(), tensors)
            out = case.separate(*case.parts(tensors), causal=True)
            assert_same(found, torch.autograd.grad(out.square().sum(), tensors))


def test_a_compiled_step_copies_nothing() -> None:
    """Between two projections there are views and products, and one tensor is saved for q, k and v."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    inputs, weight, outputs = (torch.randn(*shape, requires_grad=True) for shape in ((6, 32), (32, 96), (32, 32)))

    def step(packed: bool) -> Tensor:
        qkv = (inputs @ weight).view(2, 3, 3, 4, 8)
        out = flash_attn_qkvpacked_func(qkv) if packed else flash_attn_func(*qkv.unbind(2))
        return out.flatten(0, 1).flatten(1) @ outputs

    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    for packed in (True, False):
        torch.compiler.reset()
        torch.compile(step, fullgraph=True, backend=compiler)(packed).sum().backward()
    names = [{str(node.target) for node in graph.graph.nodes if node.op == "call_function"} for graph in graphs]
    forward, backward, _, apart = ({name for name in each if "getitem" not in name} for each in names)
    views = {
        "aten.view.default",
        "aten._unsafe_view.default",
        "aten.t.default",
        "aten.expand.default",
        "aten.detach.default",
    }
    assert forward - views == {"aten.mm.default", "fa2cupy.forward_qkv.default"}
    assert backward - views == {"aten.mm.default", "fa2cupy.backward_qkv.default"}
    assert apart & {"aten.stack.default", "aten.cat.default"}  # what this spares
    (saved,) = graphs[0].graph.find_nodes(op="output")
    assert sum(tuple(node.meta["val"].shape) == (2, 3, 3, 4, 8) for node in saved.args[0]) == 1


# ----------------------------------------------------------------------------------------------------------------------
# The operators


def arguments(form: str, detached: bool = False) -> tuple[list[Any], list[Any]]:
    """Tensors, and the options with the arrays of a call."""
    case = FORMS[form]
    tensors: list[Any] = [x.detach() if detached else x for x in case.tensors()]
    starts = STARTS, (STARTS_K if len(tensors) == 2 else STARTS)
    lengths = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True)) if case.lengths else {}
    return tensors, [True, 0.4, "bshd", None, False, "", *in_order(lengths)]


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    tensors, rest = arguments(form)
    operators = OPERATORS[len(tensors)]
    torch.library.opcheck(operators.forward, (*tensors, *rest))
    tensors, rest = arguments(form, detached=True)
    out, lse = operators.forward(*tensors, *rest)
    lse = lse.nan_to_num(neginf=0)
    for dlse in (None, lse):
        torch.library.opcheck(operators.backward, (torch.ones_like(out), *tensors, out, lse, dlse, *rest))


@pytest.mark.parametrize("form", FORMS)
def test_flops_are_those_of_three_tensors(form: str) -> None:
    case, counts = FORMS[form], []
    for packed in (True, False):
        tensors = case.tensors()
        with flop_counter.FlopCounterMode(display=False) as counter:
            if packed:
                out = case.packed(*tensors, *case.lengths)
            else:
                out = case.separate(*case.parts(tensors), *case.separate_lengths)
            out.sum().backward()
        counts.append(list(counter.get_flop_counts()["Global"].values()))
    assert counts[0] == counts[1] and len(counts[0]) == 2


@pytest.mark.parametrize("form", DENSE)
def test_a_policy_can_save_attention(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, launches = FORMS[form], []
    real = launching.call
    monkeypatch.setattr(launching, "call", lambda *x: (launches.append(x[0].is_backward), real(*x))[1])

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in forward_ops else CheckpointPolicy.PREFER_RECOMPUTE

    tensors = case.tensors()
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(lambda *x: case.packed(*x) * 1, *tensors, use_reentrant=False, context_fn=contexts)
    found = torch.autograd.grad(out.sum(), tensors)
    assert launches == [False, True]
    assert_same(found, torch.autograd.grad(case.separate(*case.parts(tensors)).sum(), tensors))


@pytest.mark.parametrize("form", DENSE)
def test_vmap_and_per_sample_gradients(form: str) -> None:
    case = FORMS[form]
    many = [torch.randn(3, *shape) for shape in case.shapes]

    def loss(*tensors: Tensor) -> Tensor:
        return case.packed(*tensors, causal=True).square().sum()

    found = torch.vmap(torch.func.grad(loss, tuple(range(len(many)))))(*many)
    outs = torch.vmap(functools.partial(case.packed, causal=True))(*many)
    for number in range(3):
        tensors = [x[number].clone().requires_grad_() for x in many]
        out = case.separate(*case.parts(tensors), causal=True)
        wanted = torch.autograd.grad(out.square().sum(), tensors)
        torch.testing.assert_close([outs[number], *(x[number] for x in found)], [out, *wanted])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", DENSE)
def test_autocast(form: str, compiled: bool) -> None:
    case = FORMS[form]
    tensors = case.tensors()
    function = torch.compile(case.packed, fullgraph=True, backend="aot_eager") if compiled else case.packed
    with torch.autocast("cpu", torch.bfloat16):
        out, wanted = function(*tensors), case.separate(*case.parts(tensors))
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)
    assert_same(*(torch.autograd.grad(x.float().square().sum(), tensors) for x in (out, wanted)))


def test_no_second_derivative_and_no_tangents() -> None:
    qkv = FORMS["qkv"].tensors()[0]
    for way in ("eager", "watched"):
        mode = flop_counter.FlopCounterMode(display=False) if way == "watched" else contextlib.nullcontext()
        with mode, pytest.raises(InvalidArgument, match="no double backward"):
            out = flash_attn_qkvpacked_func(qkv)
            (gradient,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
            gradient.sum().backward()
    with pytest.raises(InvalidArgument, match="no double backward"):
        inner = torch.func.grad(lambda x: flash_attn_qkvpacked_func(x).square().sum())
        torch.func.grad(lambda x: inner(x).sum())(qkv.detach())
    with forward_ad.dual_level(), pytest.raises(InvalidType, match="has a tangent"):
        flash_attn_qkvpacked_func(forward_ad.make_dual(qkv.detach(), qkv.detach()))


def test_three_tensors_are_saved() -> None:
    """And one that was changed in place is noticed."""
    saved: list[Tensor] = []
    (qkv,) = FORMS["qkv"].tensors()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        flash_attn_qkvpacked_func(qkv)
    assert [tuple(x.shape) for x in saved] == [(2, 9, 4, 8), (2, 4, 9), (2, 9, 3, 4, 8)]
    out = flash_attn_qkvpacked_func(qkv)
    with torch.no_grad():
        qkv.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_fake_and_meta_tensors_and_export() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 5, 3, 4, 8, dtype=torch.bfloat16, requires_grad=True)
        out, lse, _ = flash_attn_qkvpacked_func(x, return_attn_probs=True)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 5, 4, 8), x.dtype, (2, 4, 5), torch.float32)
        assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    q, kv = (torch.empty(shape, device="meta", requires_grad=True) for shape in FORMS["kv"].shapes)
    gradients = torch.autograd.grad(flash_attn_kvpacked_func(q, kv).sum(), (q, kv))
    assert [x.shape for x in gradients] == [q.shape, kv.shape]

    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Any:
            return flash_attn_qkvpacked_func(qkv, causal=True)

    (qkv,) = FORMS["qkv"].tensors()
    program = torch.export.export(Module(), (qkv.detach(),))
    assert sum(node.target in forward_ops for node in program.graph.nodes) == 1
    assert torch.equal(program.module()(qkv.detach()), Module()(qkv.detach()))


def test_what_is_refused() -> None:
    tensors, rest = arguments("qkv", detached=True)
    with pytest.raises(InvalidArgument, match=r"qkv has shape \(2, 9, 4, 8\): \(batch, seqlen, 3, num_heads"):
        OPERATORS[1].forward(tensors[0][:, :, 0], *rest)
    with pytest.raises(InvalidArgument, match=r"kv has shape .*\(total, 2, num_heads, head_dim\), is needed"):
        OPERATORS[2].forward(*arguments("kv", detached=True)[0][:1] * 2, *rest)
    with pytest.raises(InvalidArgument, match="layout='bhsd' is given for qkv: packed tensors are 'bshd'"):
        OPERATORS[1].forward(*tensors, True, None, "bhsd", None, False)
    with pytest.raises(Exception, match="qkv has shape"):
        torch.compile(flash_attn_qkvpacked_func, fullgraph=True, backend="aot_eager")(torch.zeros(2, 9, 2, 4, 8))
    slopes = SLOPES.clone().requires_grad_()
    for function in (flash_attn_qkvpacked_func, torch.compile(flash_attn_qkvpacked_func, backend="aot_eager")):
        with pytest.raises(Exception, match="alibi_slopes requires grad"):
            function(FORMS["qkv"].tensors()[0], alibi_slopes=slopes)


@pytest.mark.parametrize("form", FORMS)
def test_batch_and_heads_of_distributed_tensors(mesh: Any, form: str) -> None:
    """Batch and heads stay split; of sequences end to end heads alone."""
    case, varlen = FORMS[form], form.startswith("varlen")
    batch = Replicate() if varlen else Shard(0)
    shapes = [(*shape[:-2], 8 if shape is case.shapes[0] else 4, DIM) for shape in case.shapes]
    tensors = [distributed(mesh, shape, batch, Shard(len(shape) - 2)) for shape in shapes]
    lengths = [
        DTensor.from_local(x, mesh, (Replicate(), Replicate())) if isinstance(x, Tensor) else x for x in case.lengths
    ]
    out = case.packed(*tensors, *lengths, causal=True)
    assert out.placements == (batch, Shard(out.ndim - 2))
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert [x.placements for x in gradients] == [x.placements for x in tensors]
    local = [x.to_local().detach().requires_grad_() for x in tensors]
    wanted = case.packed(*local, *case.lengths, causal=True)
    assert torch.equal(out.to_local(), wanted)
    assert_same(tuple(x.to_local() for x in gradients), torch.autograd.grad(wanted.sum(), local))


def test_heads_are_split_only_into_whole_groups(mesh: Any) -> None:
    for heads, kept in ((2, False), (4, True)):
        q = distributed(mesh, (4, 6, 8, 16), Replicate(), Shard(2))
        kv = distributed(mesh, (4, 6, 2, heads, 16), Replicate(), Shard(3))
        assert (Shard(2) in flash_attn_kvpacked_func(q, kv).placements) == kept


def test_every_form_has_its_operators() -> None:
    names = [(op.name(), [x.name for x in op._schema.returns]) for op in (*forward_ops, *backward_ops)]
    assert names == [
        *((f"fa2cupy::forward{suffix}", ["out", "lse"]) for suffix in ("", "_kv", "_qkv")),
        ("fa2cupy::backward", ["dq", "dk", "dv", "dsinks"]),
        ("fa2cupy::backward_kv", ["dq", "dkv", "dsinks"]),
        ("fa2cupy::backward_qkv", ["dqkv", "dsinks"]),
    ]
