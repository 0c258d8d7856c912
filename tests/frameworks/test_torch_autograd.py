"""`fa2cupy.attention` on torch tensors that want more than a result: gradients, tracing, somebody who watches.

On the CPU, where every way ends in `cpu.py`; what is looked at is the way. References are torch's own autograd through
the plain formula.
"""

from __future__ import annotations

import contextlib
import functools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils import flop_counter
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fa2cupy
from fa2cupy import cpu, host
from fa2cupy.autograd.dispatch import way
from fa2cupy.autograd.features import features_of, features_text
from fa2cupy.autograd.watchers import are_watched
from fa2cupy.checks import check_scale
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.keywords import KEYWORDS, Keyword
from fa2cupy.operations import STRAIGHT
from fa2cupy.torch import backward_op, forward_op

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def math_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """bshd out and lse by the formula, in the inputs' type, differentiable any number of times."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool).triu(s.shape[-1] - s.shape[-2] + 1)
        s = s.masked_fill(hidden, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v), s.logsumexp(-1)


class Case(NamedTuple):
    """q, k, v that require grad, dout, and what out and the gradients are (causal)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    out: torch.Tensor
    grads: Tensors

    @property
    def qkv(self) -> Tensors:
        return self.q, self.k, self.v

    @property
    def detached(self) -> Tensors:
        return self.q.detach(), self.k.detach(), self.v.detach()

    def check(self, out: torch.Tensor) -> None:
        """An `out` with a graph."""
        assert_close(out, self.out)
        for got, wanted in zip(torch.autograd.grad(out, self.qkv, self.dout), self.grads, strict=True):
            assert_close(got, wanted)


def make(dtype: torch.dtype = torch.float64, seqlen_q: int = 6, seqlen_k: int = 9, heads: int = 4) -> Case:
    torch.manual_seed(seqlen_q)
    q, k, v, dout = (
        torch.randn(2, seqlen, h, d, dtype=dtype)
        for seqlen, h, d in ((seqlen_q, heads, 8), (seqlen_k, 2, 8), (seqlen_k, 2, 16), (seqlen_q, heads, 16))
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, _ = math_attention(q, k, v, True)
    return Case(q, k, v, dout, out.detach(), torch.autograd.grad(out, (q, k, v), dout))


@pytest.fixture
def case() -> Case:
    return make()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the passes that were computed."""
    names: list[str] = []
    for function in ("forward", "backward"):

        def computed(*arguments: Any, name: str, compute: Any) -> Any:
            names.append(name)
            return compute(*arguments)

        real = getattr(host, function)
        monkeypatch.setattr(host, function, functools.partial(computed, name=function, compute=real))
    return names


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield


# ----------------------------------------------------------------------------------------------------------------------
# Eager


def test_gradients(case: Case) -> None:
    out = fa2cupy.attention(*case.qkv, causal=True)
    assert out.grad_fn is not None and out.is_contiguous()
    case.check(out)


def test_without_grad_there_is_no_function(case: Case) -> None:
    plain = fa2cupy.attention(*case.detached, causal=True)
    with torch.no_grad():
        same = fa2cupy.attention(*case.qkv, causal=True)
    with torch.inference_mode():
        inference = fa2cupy.attention(*case.qkv, causal=True)
    assert plain.grad_fn is None and same.grad_fn is None
    assert torch.equal(plain, same) and torch.equal(plain, inference)


def test_inference_mode(case: Case) -> None:
    with torch.inference_mode():
        q, k, v = (x.clone() for x in case.qkv)
        out = fa2cupy.attention(q, k, v, causal=True)
        assert out.is_inference()
    assert_close(out.clone(), case.out)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_one_of_them_requires_grad(case: Case, name: str) -> None:
    tensors = dict(zip("qkv", case.detached, strict=True))
    leaf = tensors[name] = tensors[name].clone().requires_grad_()
    (got,) = torch.autograd.grad(fa2cupy.attention(**tensors, causal=True), leaf, case.dout)
    assert_close(got, case.grads["qkv".index(name)])


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_through_lse(case: Case, causal: bool, with_out: bool) -> None:
    def loss(function: Callable[..., Any], *keywords: Any, **more: Any) -> torch.Tensor:
        out, lse = function(*case.qkv, *keywords, **more)
        return (lse.sin() * lse).sum() + ((out * case.dout).sum() if with_out else 0)

    wanted = torch.autograd.grad(loss(math_attention, causal), case.qkv, allow_unused=True)
    got = torch.autograd.grad(loss(fa2cupy.attention, causal=causal, return_lse=True), case.qkv)
    for x, y in zip(got, wanted, strict=True):
        assert_close(x, torch.zeros_like(x) if y is None else y)


@pytest.mark.parametrize("operator", [False, True])
def test_gradcheck(operator: bool) -> None:
    """Finite differences of out and lse, in float64; the second time through the operator's autograd kernel."""
    q, k, v = (torch.randn(1, s, h, 4, dtype=torch.float64).requires_grad_() for s, h in ((3, 2), (5, 1), (5, 1)))

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        if operator:
            return forward_op(q, k, v, True, 0.7, "bshd", None, False)
        return fa2cupy.attention(q, k, v, causal=True, softmax_scale=0.7, return_lse=True)

    assert torch.autograd.gradcheck(function, (q, k, v))


def test_options_reach_the_gradient() -> None:
    case = make()
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in case.qkv)
    out, lse = fa2cupy.attention(q, k, v, layout="bhsd", softmax_scale=0.3, return_lse=True)
    wanted, wanted_lse = math_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.3)
    assert_close(out.transpose(1, 2), wanted)
    assert_close(lse, wanted_lse)
    got = torch.autograd.grad(out.sin().sum(), (q, k, v))
    for x, y in zip(got, torch.autograd.grad(wanted.sin().sum(), (q, k, v)), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    case = make()
    leaves = [x.detach().to(dtype).requires_grad_() for x in case.qkv]
    out, lse = fa2cupy.attention(*leaves, causal=True, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    for got, wanted in zip(torch.autograd.grad(out, leaves, case.dout.to(dtype)), case.grads, strict=True):
        assert got.dtype is dtype
        tolerance = 1e-5 if dtype is torch.float32 else 0.05
        assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_parameters_are_trained(case: Case) -> None:
    parameter = torch.nn.Parameter(case.q.detach())
    fa2cupy.attention(parameter, *case.detached[1:], causal=True).backward(case.dout)
    assert_close(parameter.grad, case.grads[0])


def test_double_backward_raises(case: Case) -> None:
    """Also where only saved tensors require grad, which a plain Function gets wrong in silence."""
    for operator in (False, True):
        out = forward_op(*case.qkv, True, None, "bshd", None, False)[0] if operator else fa2cupy.attention(*case.qkv)
        (dq,) = torch.autograd.grad(out.sum(), case.q, create_graph=True)
        with pytest.raises(InvalidArgument, match="no double backward"):
            dq.square().sum().backward()
    (dq,) = torch.autograd.grad(fa2cupy.attention(*case.qkv, causal=True), case.q, case.dout, create_graph=True)
    assert_close(dq.detach(), case.grads[0])


def test_tangents_raise(case: Case) -> None:
    q, k, v = case.detached
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        for grad_mode in (True, False):
            with torch.set_grad_enabled(grad_mode), pytest.raises(InvalidType, match="has a tangent"):
                fa2cupy.attention(dual, k, v)
        with pytest.raises(InvalidType, match="has a tangent"):
            forward_op(q, k, forward_ad.make_dual(v, v), True, None, "bshd", None, False)
        with pytest.raises(InvalidArgument, match="q has a tangent"):
            fa2cupy.attention(dual, k, v, out=torch.empty_like(case.out))
        assert_close(fa2cupy.attention(q, k, v, causal=True), case.out)
    with pytest.raises(InvalidType, match="has a tangent"):
        torch.func.jvp(lambda x: fa2cupy.attention(x, k, v), (q,), (q,))
    with pytest.raises(InvalidType, match="has a tangent"):
        torch.func.hessian(lambda x: fa2cupy.attention(x, k, v).sum())(q)


def test_outputs_that_are_given_have_no_graph(case: Case) -> None:
    q, k, v = case.qkv
    for name, shape in (("out", case.out.shape), ("lse_out", (2, 4, 6)), ("workspace", (8,))):
        with pytest.raises(InvalidArgument, match=r"q requires grad.*torch\.no_grad\(\)"):
            fa2cupy.attention(q, k, v, **{name: torch.empty(shape, dtype=q.dtype)})


def test_deterministic_is_decided_when_the_backward_runs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = host.backward

    def computed(framework: Any, arrays: Any, sizes: Any, dtype: str, options: Any, *more: Any) -> Any:
        seen.append(options.deterministic)
        return real(framework, arrays, sizes, dtype, options, *more)

    monkeypatch.setattr(host, "backward", computed)

    def backward(out: torch.Tensor, switch: bool) -> bool:
        torch.use_deterministic_algorithms(switch)
        try:
            torch.autograd.grad(out, case.qkv, case.dout, retain_graph=True)
        finally:
            torch.use_deterministic_algorithms(False)
        return seen.pop()

    for flag in (False, True):
        out = fa2cupy.attention(*case.qkv, causal=True, deterministic=flag)
        assert [backward(out, switch) for switch in (False, True)] == [flag, True]
    compiled = torch.compile(fa2cupy.attention, backend="aot_eager", fullgraph=True)
    for flag in (False, True):
        assert backward(compiled(*case.qkv, causal=True, deterministic=flag), False) == flag
    assert not seen


def test_hooks_see_what_is_saved(case: Case) -> None:
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (packed.append(x), x.clone())[1], lambda x: x):
        out = fa2cupy.attention(*case.qkv, causal=True)
    assert len(packed) == 5
    case.check(out)


def test_saved_tensors_that_were_changed_are_noticed(case: Case) -> None:
    out = fa2cupy.attention(*case.qkv, causal=True)
    with torch.no_grad():
        case.k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ----------------------------------------------------------------------------------------------------------------------
# Autocast, checkpointing, FLOPs, dispatch modes


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_casts_as_sdpa_does(grad: bool, compiled: bool) -> None:
    case = make(torch.float32)
    attention: Any = fa2cupy.attention
    if compiled:
        attention = torch.compile(fa2cupy.attention, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        out = attention(case.q, case.k.bfloat16(), case.v, causal=True)
        double = attention(*(x.double() for x in case.qkv))
        x = torch.zeros(1, 1, 2, 8)
        sdpa = [torch.nn.functional.scaled_dot_product_attention(y, y, y) for y in (x, x.double())]
    assert [out.dtype, double.dtype] == [x.dtype for x in sdpa] == [torch.bfloat16, torch.float64]
    assert out.requires_grad == grad
    if grad:
        (dq,) = torch.autograd.grad(out, case.q, case.dout.bfloat16())
        assert dq.dtype is torch.float32
        assert_close(dq, case.grads[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(case: Case, launches: list[str], reentrant: bool) -> None:
    out = checkpoint(lambda *x: fa2cupy.attention(*x, causal=True) * 1, *case.qkv, use_reentrant=reentrant)
    if reentrant:
        torch.autograd.backward(out, case.dout)
        assert_close(case.k.grad, case.grads[1])
    else:
        case.check(out)
    assert launches == ["forward", "forward", "backward"]


def test_a_policy_can_save_attention(case: Case, launches: list[str]) -> None:
    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator == forward_op else CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint(
        lambda *x: fa2cupy.attention(*x, causal=True) * 1,
        *case.qkv,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    case.check(out)
    assert launches == ["forward", "backward"]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_flops_are_counted_as_for_sdpa(layout: str) -> None:
    q, k, v = (torch.randn(2, 5, 4, 8, requires_grad=True) for _ in range(3))
    shapes = [x.shape if layout == "bhsd" else x.transpose(1, 2).shape for x in (q, k, v)]
    with flop_counter.FlopCounterMode(display=False) as counter:
        fa2cupy.attention(q, k, v, causal=True, layout=layout).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts == {
        torch.ops.fa2cupy.forward: flop_counter.sdpa_flop_count(*shapes),
        torch.ops.fa2cupy.backward: flop_counter.sdpa_backward_flop_count(shapes[0], *shapes),
    }


def test_a_mode_around_the_backward_alone(case: Case) -> None:
    out = fa2cupy.attention(*case.qkv, causal=True)
    with flop_counter.FlopCounterMode(display=False) as counter:
        case.check(out)
    assert list(counter.get_flop_counts()["Global"]) == [torch.ops.fa2cupy.backward]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device: str) -> None:
    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, s, h, d, device=device, dtype=torch.float16)
            for s, h, d in ((5, 4, 8), (7, 2, 8), (7, 2, 24))
        )
        if device == "cpu":  # a CPU build of torch has no autograd thread for CUDA and aborts
            for x in (q, k, v):
                x.requires_grad_()
        out, lse = fa2cupy.attention(q, k, v, return_lse=True)
        assert (out.shape, out.dtype, out.device.type) == ((2, 5, 4, 24), torch.float16, device)
        assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)
        grads = torch.autograd.grad(out.sum(), (q, k, v)) if device == "cpu" else ()
        assert all(grad.shape == x.shape for grad, x in zip(grads, (q, k, v), strict=False))
        with pytest.raises(InvalidArgument, match=r"k has head_dim 24 but q has 8"):
            fa2cupy.attention(q, v, v)


def test_meta_tensors() -> None:
    q = torch.empty(2, 5, 4, 8, device="meta")
    assert fa2cupy.attention(q, q, q).is_meta
    fa2cupy.attention(q.requires_grad_(), q, q).sum().backward()
    assert q.grad.is_meta


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(case: Case, mode: str) -> None:
    graph = make_fx(lambda q, k, v: fa2cupy.attention(q, k, v, causal=True), tracing_mode=mode)(*case.detached)
    assert sum(node.target is forward_op for node in graph.graph.nodes) == 1
    assert_close(graph(*case.detached), case.out)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace(case: Case) -> None:
    """What is traced computes, rather than hold the result of the trace."""
    traced = torch.jit.trace(lambda q, k, v: fa2cupy.attention(q, k, v, causal=True), case.detached)
    assert "fa2cupy::forward" in str(traced.graph)
    q, k, v = case.detached
    assert_close(traced(q, k, 2 * v), 2 * case.out)


class Sub(torch.Tensor):
    pass


def test_plain_subclasses_stay_themselves(case: Case) -> None:
    out = fa2cupy.attention(case.detached[0].as_subclass(Sub), *case.detached[1:], causal=True)
    assert type(out) is Sub
    assert_close(out.as_subclass(torch.Tensor), case.out)


# ----------------------------------------------------------------------------------------------------------------------
# Operators, compile, export


def test_opcheck(case: Case) -> None:
    q, k, v = case.detached
    for causal, scale, layout in ((True, None, "bshd"), (False, 0.5, "bshd")):
        torch.library.opcheck(forward_op, (*case.qkv, causal, scale, layout, None, False))
    turned = [x.transpose(1, 2) for x in case.detached]
    torch.library.opcheck(forward_op, (*turned, True, None, "bhsd", None, False))
    out, lse = forward_op(q, k, v, True, None, "bshd", None, False)
    for dlse in (None, torch.ones_like(lse)):
        torch.library.opcheck(backward_op, (case.dout, q, k, v, out, lse, dlse, True, None, "bshd", None, True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph(case: Case, launches: list[str], backend: str) -> None:
    compiled = torch.compile(lambda *x: fa2cupy.attention(*x, causal=True), backend=backend, fullgraph=True)
    for _ in range(2):
        case.check(compiled(*case.qkv))
    with torch.no_grad():
        assert_close(compiled(*case.qkv), case.out)
    assert launches == ["forward", "backward"] * 2 + ["forward"]


def test_compile_lse_and_its_gradient(case: Case) -> None:
    def loss(function: Callable[..., Any], **keywords: Any) -> torch.Tensor:
        out, lse = function(*case.qkv, **keywords)
        return out.sum() + lse.sin().sum()

    compiled = torch.compile(fa2cupy.attention, backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(loss(math_attention), case.qkv)
    got = torch.autograd.grad(loss(compiled, return_lse=True), case.qkv)
    for x, y in zip(got, wanted, strict=True):
        assert_close(x, y)


def test_compile_dynamic_shapes() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *x: fa2cupy.attention(*x, causal=True), backend=counter, fullgraph=True, dynamic=True
    )
    for seqlen in (6, 8, 40, 7):
        case = make(seqlen_q=seqlen, seqlen_k=seqlen + 3)
        case.check(compiled(*case.qkv))
    assert counter.frame_count == 1


def test_compile_a_length_that_nobody_knows(case: Case) -> None:
    def rows(keep: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        some = q[:, keep.nonzero().squeeze(-1)]
        return fa2cupy.attention(some, some, some)

    keep = torch.tensor([True, False, True, True, False, True])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(rows, backend="aot_eager", fullgraph=True)
        assert_close(compiled(keep, case.detached[0]), rows(keep, case.detached[0]))


def test_compile_first_call_of_all() -> None:
    """fa2cupy imported before torch, nothing of it called before the trace."""
    code = """
import fa2cupy, torch
q = torch.randn(2, 300, 4, 16, requires_grad=True)
def f(q): return 2 * fa2cupy.attention(q, q, q, causal=True)
compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
got = compiled(q)
got.sum().backward()
grad, q.grad = q.grad, None
plain = f(q)
plain.sum().backward()
assert torch.equal(got, plain) and torch.equal(grad, q.grad)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiled_errors_are_words(case: Case) -> None:
    q, k, v = case.detached
    for words, call in (
        ("k has head_dim 16 but q has 8", lambda: fa2cupy.attention(q, v, v)),
        ("layout='bsh' is unknown", lambda: fa2cupy.attention(q, k, v, layout="bsh")),
        ("q has dtype int32", lambda: fa2cupy.attention(q.int(), k.int(), v.int())),
    ):
        with pytest.raises(Exception, match=words):
            torch.compile(call, backend="aot_eager", fullgraph=True)()
        torch.compiler.reset()


def test_compiled_calls_that_launch_leave_the_graph(case: Case) -> None:
    q, k, v = case.detached
    out = torch.empty_like(case.out)
    torch.compile(lambda: fa2cupy.attention(q, k, v, causal=True, out=out), backend="aot_eager")()
    assert_close(out, case.out)

    def backward() -> Any:
        out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)
        return fa2cupy.attention_backward(case.dout, q, k, v, out, lse, causal=True)

    for got, wanted in zip(torch.compile(backward, backend="aot_eager")(), case.grads, strict=True):
        assert_close(got, wanted)
    torch.compiler.reset()
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"fa2cupy launches its kernels itself|function attention_backward"
    ):
        torch.compile(backward, backend="aot_eager", fullgraph=True)()


def test_compile_keywords_that_mean_nothing(case: Case) -> None:
    compiled = torch.compile(
        lambda *x: fa2cupy.attention(*x, causal=True, window_size=(-1, -1), softcap=0.0, mask=None),
        backend="aot_eager",
        fullgraph=True,
    )
    case.check(compiled(*case.qkv))


def test_compile_numpy(case: Case) -> None:
    q, k, v = (x.numpy() for x in case.detached)
    got = torch.compile(lambda q, k, v: fa2cupy.attention(q, k, v, causal=True), backend="aot_eager")(q, k, v)
    assert_close(torch.from_numpy(got), case.out)


@pytest.mark.parametrize("strict", [False, True])
def test_export(case: Case, strict: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return fa2cupy.attention(q, k, v, causal=True)

    program = torch.export.export(Module(), case.detached, strict=strict)
    assert sum(node.target is forward_op for node in program.graph.nodes) == 1
    assert_close(program.module()(*case.detached), case.out)


def test_compile_a_backward_inside(case: Case) -> None:
    """A training step whose .backward() breaks the graph runs what was not traced as it is."""

    def step() -> torch.Tensor:
        out = fa2cupy.attention(*case.qkv, causal=True)
        out.backward(case.dout)
        return out

    eager = fa2cupy.attention(*case.qkv, causal=True)
    torch.compile(step, backend="aot_eager")()
    assert_close(case.q.grad, case.grads[0])
    torch.compile(lambda: eager.backward(case.dout), backend="aot_eager")()
    assert_close(case.q.grad, 2 * case.grads[0])


@pytest.mark.parametrize("operator", [False, True])
def test_compiled_autograd(case: Case, operator: bool) -> None:
    if operator:
        out = forward_op(*case.qkv, True, None, "bshd", None, False)[0]
    else:
        out = fa2cupy.attention(*case.qkv, causal=True)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        out.backward(case.dout)
    for x, wanted in zip(case.qkv, case.grads, strict=True):
        assert_close(x.grad, wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Options beyond dense attention


@pytest.fixture
def lift(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keyword, a number by which lse is higher, forward and backward: what loses it on the way is found out."""
    functions = ("attention", "attention_backward")
    keyword = Keyword("lift", "float | None", None, functions, "a dummy", "0.2", (None, 0.0), check_scale)
    monkeypatch.setitem(KEYWORDS, "lift", keyword)
    forward, backward = cpu.forward, cpu.backward

    def lifted(*arrays: Any, lift: float = 0.0, lse: Any, **keywords: Any) -> Any:
        out, lse = forward(*arrays, lse=lse, **keywords)
        lse += lift
        return out, lse

    def lowered(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *, lift: float = 0.0, **keywords: Any) -> Any:
        return backward(dout, q, k, v, out, lse - lift, **keywords)

    monkeypatch.setattr(cpu, "forward", lifted)
    monkeypatch.setattr(cpu, "backward", lowered)


@pytest.mark.usefixtures("lift")
@pytest.mark.parametrize("way", ["eager", "operator", "compile"])
def test_an_option_reaches_forward_and_backward(case: Case, way: str) -> None:
    def attend(*tensors: torch.Tensor) -> Any:
        return fa2cupy.attention(*tensors, causal=True, lift=2.5, return_lse=True)

    if way == "compile":
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    modes = flop_counter.FlopCounterMode(display=False) if way == "operator" else contextlib.nullcontext()
    with modes:
        out, lse = attend(*case.qkv)
        case.check(out)
    with torch.no_grad():
        plain = fa2cupy.attention(*case.qkv, causal=True, return_lse=True)[1]
        assert_close(fa2cupy.attention(*case.qkv, causal=True, return_lse=True, lift=2.5)[1], plain + 2.5)
    assert_close(lse, plain + 2.5)


def test_options_as_text() -> None:
    for features in ((), (("window_size", (128, 0)),), (("softcap", 0.1), ("window_size", (-1, 3)))):
        assert features_of(features_text(features)) == features
    with pytest.raises(InvalidArgument, match="score_mod: not supported yet where torch traces"):
        features_text((("score_mod", object()),))


# ----------------------------------------------------------------------------------------------------------------------
# torch.func


def loss(case: Case) -> Callable[..., torch.Tensor]:
    return lambda q, k, v: (fa2cupy.attention(q, k, v, causal=True) * case.dout).sum()


def sample_loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    return (fa2cupy.attention(q[None], k[None], v[None], causal=True)[0] * dout).sum()


def test_func_grad(case: Case) -> None:
    got = torch.func.grad(loss(case), (0, 1, 2))(*case.detached)
    for x, y in zip(got, case.grads, strict=True):
        assert_close(x, y)


def test_func_grad_of_lse(case: Case) -> None:
    q, k, v = case.detached
    got = torch.func.grad(lambda k: fa2cupy.attention(q, k, v, return_lse=True)[1].sum())(k)
    wanted = torch.func.grad(lambda k: math_attention(q, k, v)[1].sum())(k)
    assert_close(got, wanted)


def test_vmap(case: Case) -> None:
    q, k, v = case.detached
    attend = torch.func.vmap(lambda q, k, v: fa2cupy.attention(q, k, v, causal=True), in_dims=(0, None, 1))
    out = attend(torch.stack([q, 2 * q]), k, torch.stack([v, -v], 1))
    assert_close(out[0], case.out)
    assert_close(out[1], -math_attention(2 * q, k, v, True)[0])
    assert torch.func.vmap(lambda q: fa2cupy.attention(q, q, q))(torch.empty(0, *q.shape)).shape == (0, *q.shape)


def test_per_sample_gradients(case: Case) -> None:
    got = torch.func.vmap(torch.func.grad(sample_loss, (0, 1, 2)))(*case.detached, case.dout)
    for x, y in zip(got, case.grads, strict=True):
        assert_close(x, y)


def test_grad_of_vmap(case: Case) -> None:
    got = torch.func.grad(lambda *x: torch.func.vmap(sample_loss)(*x, case.dout).sum(), (0, 1, 2))(*case.detached)
    for x, y in zip(got, case.grads, strict=True):
        assert_close(x, y)


def test_jacrev(case: Case) -> None:
    q, k, v = case.detached
    got = torch.func.jacrev(lambda q: fa2cupy.attention(q, k, v).sum((1, 3)))(q)
    assert_close(got, torch.func.jacrev(lambda q: math_attention(q, k, v)[0].sum((1, 3)))(q))


def test_batched_gradients(case: Case) -> None:
    out = fa2cupy.attention(*case.qkv, causal=True)
    (got,) = torch.autograd.grad(out, case.q, torch.stack([case.dout, -case.dout]), is_grads_batched=True)
    assert_close(got, torch.stack([case.grads[0], -case.grads[0]]))


def test_func_grad_twice_raises(case: Case) -> None:
    q, k, v = case.detached
    inner = torch.func.grad(lambda q: fa2cupy.attention(q, k, v).square().sum())
    for outer in (torch.func.grad(lambda q: inner(q).sum()), torch.func.jacrev(inner)):
        with pytest.raises(InvalidArgument, match="no double backward"):
            outer(q)


def test_compile_over_torch_func(case: Case) -> None:
    compiled = torch.compile(torch.func.grad(loss(case), (0, 1, 2)), backend="aot_eager", fullgraph=True)
    for x, y in zip(compiled(*case.detached), case.grads, strict=True):
        assert_close(x, y)
    torch.compiler.reset()
    per_sample = torch.compile(torch.func.vmap(torch.func.grad(sample_loss)), backend="aot_eager", fullgraph=True)
    assert_close(per_sample(*case.detached, case.dout), case.grads[0])
    torch.compiler.reset()
    q, k, v = case.detached
    tangent = torch.compile(
        lambda q: torch.func.jvp(lambda q: fa2cupy.attention(q, k, v), (q,), (q,))[1],
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="has a tangent"):
        tangent(q)


def test_nobody_watches_an_ordinary_call() -> None:
    """On a torch that has lost one of the names that `watchers.py` asks, all calls would go through the operator."""
    assert not are_watched()
    q = torch.zeros(1, 3, 2, 8)
    assert way(q, q, q) is STRAIGHT
