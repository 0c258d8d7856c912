"""The registered operators `fa2cupy::forward` and `fa2cupy::backward`: pure, of fixed arity, one node in a graph.

There is a pair for every form of q, k and v (`forms.py`): `forward_kv`, `backward_kv` take q and kv, and `forward_qkv`,
`backward_qkv` one tensor, so that a graph has a gradient in one piece too.

Their autograd kernels are our own rather than `register_autograd`'s: those cannot be used under torch.func and give
tangents of zero, silently, in forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction  # Function without what it does for torch.func
from torch.utils.flop_counter import register_flop_formula

from fa2cupy.autograd.features import by_name, features_of, refuse_gradients
from fa2cupy.autograd.forms import FORMS, separate, separate_shapes
from fa2cupy.autograd.launching import launch_backward, launch_forward
from fa2cupy.autograd.watchers import in_forward_mode
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks.base import Device, TensorRef
from fa2cupy.options import Options
from fa2cupy.problem import MAX_LENGTH, Sizes, check_array, check_dtypes
from fa2cupy.spec import CARRIED, DIFFERENTIABLE, MASK_ARRAYS

__all__ = ["OPERATORS", "Operators", "backward_op", "backward_ops", "forward_op", "forward_ops"]

# features: the options beyond dense attention, as `features_text` writes them. Behind them the arrays beyond it.
_OPTIONS = 'bool causal, float? softmax_scale, str layout, str? dtype, bool deterministic, str features=""'
_COUNT = 6  # of these
_EXTRA = ", ".join(f"Tensor? {name}=None" for name in CARRIED)
_RESULTS = ("out", "lse", "dlse")  # of the backward's tensors those behind the inputs, of which one may be missing

_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_fixed_stride_order") if hasattr(torch.Tag, name)
)
_library = torch.library.Library("fa2cupy", "DEF")


class Operators(NamedTuple):
    """Those of one form. suffix: of their names."""

    suffix: str
    forward: Any
    backward: Any


def _defined(form: tuple[str, ...]) -> Operators:
    suffix = "" if len(form) == 3 else f"_{form[-1]}"
    inputs = ", ".join(f"Tensor {name}" for name in form)
    gradients = ", ".join(f"Tensor d{name}" for name in (*form, *DIFFERENTIABLE))
    _library.define(f"forward{suffix}({inputs}, {_OPTIONS}, {_EXTRA}) -> (Tensor out, Tensor lse)", tags=_TAGS)
    _library.define(
        f"backward{suffix}(Tensor dout, {inputs}, Tensor out, Tensor lse, Tensor? dlse, {_OPTIONS}, {_EXTRA}) "
        f"-> ({gradients})",
        tags=_TAGS,
    )
    operators = torch.ops.fa2cupy
    return Operators(
        suffix, getattr(operators, f"forward{suffix}").default, getattr(operators, f"backward{suffix}").default
    )


OPERATORS = {count: _defined(form) for count, form in FORMS.items()}  # by the number of inputs
forward_op, backward_op = OPERATORS[3].forward, OPERATORS[3].backward
forward_ops = tuple(operators.forward for operators in OPERATORS.values())
backward_ops = tuple(operators.backward for operators in OPERATORS.values())


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


def _forward(count: int) -> Callable[..., tuple[Any, Any]]:
    def kernel(*arguments: Any) -> tuple[Any, Any]:
        inputs, rest = arguments[:count], arguments[count:]
        with torch.no_grad():
            options = _launched(inputs, *rest[:_COUNT])
            return launch_forward(*separate(inputs), options, by_name(rest[_COUNT:]))

    return kernel


def _backward(count: int) -> Callable[..., tuple[Any, ...]]:
    def kernel(dout: Any, *arguments: Any) -> tuple[Any, ...]:
        """Of the inputs, and of the arrays in `DIFFERENTIABLE` that there are the gradients, of the others empty
        tensors."""
        inputs, (out, lse, dlse, *rest) = arguments[:count], arguments[count:]
        extra = by_name(rest[_COUNT:])
        with torch.no_grad():
            wanted = tuple(name for name in DIFFERENTIABLE if name in extra)
            options = _launched(inputs, *rest[:_COUNT])
            gradients = launch_backward(dout, inputs, out, lse, dlse, options, extra, wanted=wanted)
            found = dict(zip(wanted, gradients[count:], strict=True))
            empty = (found[name] if name in found else out.new_empty(0) for name in DIFFERENTIABLE)
            return *gradients[:count], *empty

    return kernel


def _launched(
    inputs: tuple[Any, ...], causal: bool, softmax_scale: float | None, layout: str, dtype: str | None,
    deterministic: bool, features: str = "",
) -> tuple[Any, ...]:  # fmt: skip
    """The options of an operator as those of a launch."""
    _check_layout(inputs, layout)
    return causal, softmax_scale, layout, dtype, deterministic, features_of(features)


def _check_layout(inputs: tuple[Any, ...], layout: str) -> None:
    if len(inputs) < 3 and layout != "bshd":
        raise InvalidArgument(f"layout={layout!r} is given for {FORMS[len(inputs)][-1]}: packed tensors are 'bshd'")


for _count, _operators in OPERATORS.items():
    for _device in ("CPU", "CUDA"):
        _library.impl(f"forward{_operators.suffix}", _forward(_count), _device)
        _library.impl(f"backward{_operators.suffix}", _backward(_count), _device)


# ----------------------------------------------------------------------------------------------------------------------
# Shapes without data


def _forward_shapes(count: int) -> Callable[..., tuple[Any, Any]]:
    def fake(*arguments: Any) -> tuple[Any, Any]:
        inputs = arguments[:count]
        sizes, layout = _checked(inputs, {}, *arguments[count:])
        lse_dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
        out, lse = (sizes.shape(name, layout) for name in ("out", "lse"))
        return inputs[0].new_empty(out), inputs[0].new_empty(lse, dtype=lse_dtype)

    return fake


def _backward_shapes(count: int) -> Callable[..., tuple[Any, ...]]:
    def fake(dout: Any, *arguments: Any) -> tuple[Any, ...]:
        inputs, rest = arguments[:count], arguments[count + len(_RESULTS) :]
        results = dict(zip(_RESULTS, arguments[count:], strict=False))
        given = {name: tensor for name, tensor in {"dout": dout, **results}.items() if tensor is not None}
        _checked(inputs, given, *rest)
        extra = by_name(rest[_COUNT:])
        like = [*inputs, *(extra.get(name) for name in DIFFERENTIABLE)]
        return tuple(dout.new_empty(0) if x is None else x.new_empty(x.shape) for x in like)

    return fake


for _count, _operators in OPERATORS.items():
    for _name, _fake in (("forward", _forward_shapes), ("backward", _backward_shapes)):
        torch.library.register_fake(f"fa2cupy::{_name}{_operators.suffix}", _fake(_count), lib=_library)


def _checked(
    inputs: tuple[Any, ...],
    results: Mapping[str, Any],
    causal: bool,
    softmax_scale: object,
    layout: str,
    dtype: str | None,
    deterministic: bool,
    features: str = "",
    *arrays: Any,
) -> tuple[Sizes, str]:
    """The errors of a real call that need no data. The scale, which may be a symbol here, is left to the kernels.

    results: the backward's tensors beyond the inputs.
    """
    _check_layout(inputs, layout)
    options = Options.checked(causal, None, layout, dtype, deterministic)
    refs = {}
    extra = by_name(arrays)
    for name, tensor in {**dict(zip("qkv", separate(inputs), strict=True)), **results, **extra}.items():
        device = Device("cuda" if tensor.device.type == "cuda" else "cpu", tensor.device.index or 0)
        refs[name] = TensorRef(0, tuple(tensor.shape), (), str(tensor.dtype).removeprefix("torch."), device, None)
        if refs[name].device != next(iter(refs.values())).device:
            raise InvalidArgument(f"{name} is on {tensor.device} but {next(iter(refs))} is not: one device is needed")
        for length in tensor.shape:
            if isinstance(length, torch.SymInt):
                torch._check(length <= MAX_LENGTH)  # said of a length that nobody knows yet, it can be relied on below
    further = [name for name in refs if name == "dlse" or name in extra]
    dense = {name: ref for name, ref in refs.items() if name not in further}
    problem_dtype = check_dtypes(dense, options)
    sizes = Sizes.of(refs, layout)
    for name, ref in dense.items():
        sizes.check_shape(name, ref.shape, layout)
    for name in further:
        check_array(name, refs[name], sizes, problem_dtype)
    return sizes, layout


# ----------------------------------------------------------------------------------------------------------------------
# Autograd


def _needs_graph(tensors: tuple[Any, ...]) -> bool:
    """Whether a gradient, or a tangent, of one of these tensors is wanted."""
    return in_forward_mode() or (
        torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    )


def _below_autograd(operator: Any, arguments: tuple[Any, ...], grad_mode: bool) -> Any:
    # An autograd.Function turns grad mode off around its forward; under torch.func the next level needs it as it was.
    with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(grad_mode):
        return operator(*arguments)


class _Function(_SingleLevelFunction):
    """One level of autograd, below torch.func, whose own way with a Function begins above the dispatcher."""

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[Any, ...]:  # as torch.autograd.Function has it
        return (ctx._autograd_function_id,)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise InvalidType(
            "an argument of fa2cupy.attention has a tangent: forward-mode autograd (jvp, jacfwd, hessian) is not "
            "supported, reverse mode is"
        )


class _Forward(_Function):
    @staticmethod
    def forward(ctx: Any, count: int, grad_mode: bool, *arguments: Any) -> Any:
        """count: of the inputs, which come first."""
        outputs = _below_autograd(OPERATORS[count].forward, arguments, grad_mode)
        end = count + _COUNT
        ctx.save_for_backward(*outputs, *arguments[:count], *arguments[end:])
        ctx.count, ctx.options = count, arguments[count:end]
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * len(needed)
        out, lse, *tensors = ctx.saved_tensors
        inputs, extra = tensors[: ctx.count], tensors[ctx.count :]
        if dout is None:
            dout = torch.zeros_like(out)
        results = OPERATORS[ctx.count].backward(dout, *inputs, out, lse, dlse, *ctx.options, *extra)
        first = 2 + ctx.count + _COUNT  # of the arrays: behind count and grad_mode, the inputs and the options
        gradients = [None, None, *results[: ctx.count], *(None,) * (len(needed) - 2 - ctx.count)]
        for name, gradient in zip(DIFFERENTIABLE, results[ctx.count :], strict=True):
            place = first + CARRIED.index(name)
            if place < len(needed) and needed[place]:
                gradients[place] = gradient
        return tuple(gradients)


class _Backward(_Function):
    @staticmethod
    def forward(ctx: Any, count: int, grad_mode: bool, *arguments: Any) -> Any:
        return _below_autograd(OPERATORS[count].backward, arguments, grad_mode)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise InvalidArgument(
            "the gradient of fa2cupy.attention has been differentiated: it has no derivative of its own (no double "
            "backward); take the first gradient without create_graph=True, or use torch's SDPA math for this loss"
        )


def _autograd_kernel(function: Any, operator: Any, count: int, tensors: int) -> Callable[..., Any]:
    """What runs at the Autograd key. count: of the inputs; tensors: that come first, in all."""

    def kernel(*arguments: Any) -> Any:
        grad_mode = torch.is_grad_enabled()
        extra = by_name(arguments[tensors + _COUNT :])
        if grad_mode:
            refuse_gradients(extra)
        if not _needs_graph((*arguments[:tensors], *(extra.get(name) for name in DIFFERENTIABLE))):
            return _below_autograd(operator, arguments, grad_mode)
        with enable_single_level_autograd_function():  # under torch.func we are one level of it, as a C++ kernel is
            return function.apply(count, grad_mode, *arguments)

    return kernel


def _backward_tensors(count: int) -> int:
    return 1 + count + len(_RESULTS)


for _count, _operators in OPERATORS.items():
    _suffix, _tensors = _operators.suffix, _backward_tensors(_count)
    _kernel = _autograd_kernel(_Forward, _operators.forward, _count, _count)
    _library.impl(f"forward{_suffix}", _kernel, "Autograd")
    _kernel = _autograd_kernel(_Backward, _operators.backward, _count, _tensors)
    _library.impl(f"backward{_suffix}", _kernel, "Autograd")


# ----------------------------------------------------------------------------------------------------------------------
# vmap, FLOP counters


_OF_HEADS = ("alibi_slopes", "sinks")  # (num_heads,) of all sequences alike; slopes also (batch, num_heads)


def _vmap(operator: Any, count: int, outputs: int, of_gradients: bool) -> Callable[..., Any]:
    """The mapped dimension becomes part of the batch, which comes first in either layout and in lse.

    count: of the tensors in front of the options; outputs: that have a batch.
    """

    def rule(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
        size = info.batch_size
        end = count + _COUNT
        extra = by_name(arguments[end:])
        if of_gradients and "sinks" in extra:
            raise InvalidArgument("sinks is not supported under vmap of a gradient: make one call with a batch")
        for name in extra:
            if name == "dropout_seed":
                raise InvalidArgument(
                    "dropout_seed is not supported under vmap: the problems would have to share a mask, or their order "
                    "would decide; make one call with a batch"
                )
            if name == "mask" or name in MASK_ARRAYS:
                raise InvalidArgument("mask is not supported under vmap: make one call with a batch")
            if name.startswith("cu_seqlens"):
                raise InvalidArgument(
                    f"{name} is not supported under vmap: pack the sequences of all problems, or pass seqused"
                )

        def leading(x: Any, dim: int | None) -> Any:
            return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)

        def of_all(name: str, x: Any, dim: int | None) -> Any:
            """An array of keywords for size * batch sequences; what is for every sequence stays so, if it can."""
            if name not in _OF_HEADS or x.dim() - (dim is not None) > 1:
                return leading(x, dim).flatten(0, 1)
            if dim is None:
                return x
            if name == "sinks":
                raise InvalidArgument("sinks is mapped by vmap, and there is one array for a call: make several calls")
            return x.movedim(dim, 0)[:, None].expand(size, batch, -1).flatten(0, 1)

        tensors: list[Any] = [
            x if x is None else leading(x, dim) for x, dim in zip(arguments[:count], in_dims, strict=False)
        ]
        batch = tensors[0].shape[1]
        folded = (x if x is None else x.flatten(0, 1) for x in tensors)
        more = (
            x if x is None else of_all(name, x, dim)
            for name, x, dim in zip(CARRIED, arguments[end:], in_dims[end:], strict=False)
        )
        results = operator(*folded, *arguments[count:end], *more)
        unfolded = tuple(x.unflatten(0, (size, batch)) for x in results[:outputs])
        return (*unfolded, *results[outputs:]), (*(0,) * outputs, *(None,) * (len(results) - outputs))

    return rule


for _count, _operators in OPERATORS.items():
    _rule = _vmap(_operators.forward, _count, 2, False)
    torch.library.register_vmap(f"fa2cupy::forward{_operators.suffix}", _rule, lib=_library)
    _rule = _vmap(_operators.backward, _backward_tensors(_count), _count, True)
    torch.library.register_vmap(f"fa2cupy::backward{_operators.suffix}", _rule, lib=_library)


def _sizes_of_shapes(inputs: Sequence[Any], rest: Sequence[Any]) -> Sizes:
    """rest: the operator's arguments from its options on."""
    extra = by_name(rest[_COUNT:])
    shapes = {**dict(zip("qkv", separate_shapes(inputs), strict=True)), **extra}
    layout: str = rest[2]
    return Sizes.of(
        {n: TensorRef(0, tuple(shape), (), "", Device("cpu", 0), None) for n, shape in shapes.items()}, layout
    )


def _matmul_flops(sizes: Sizes, head_dims: int) -> int:
    """Of matrix products between all queries and all keys, `head_dims` wide in all. As for torch's own attention,
    what a mask spares is not taken off. Nobody reads lengths: packed sequences count as equally long."""
    batch = max(1, sizes.batch)
    packed = batch if sizes.packed_q else 1
    packed *= batch if sizes.packed_k else 1
    return 2 * sizes.batch * sizes.num_heads * sizes.seqlen_q * sizes.seqlen_k * head_dims // packed


def _forward_flops(count: int) -> Callable[..., int]:
    def flops(*arguments: Any, **_: Any) -> int:
        sizes = _sizes_of_shapes(arguments[:count], arguments[count:])
        return _matmul_flops(sizes, sizes.head_dim + sizes.head_dim_v)

    return flops


def _backward_flops(count: int) -> Callable[..., int]:
    def flops(dout: Any, *arguments: Any, **_: Any) -> int:
        sizes = _sizes_of_shapes(arguments[:count], arguments[count + len(_RESULTS) :])
        return _matmul_flops(sizes, 3 * sizes.head_dim + 2 * sizes.head_dim_v)

    return flops


for _count, _operators in OPERATORS.items():
    register_flop_formula(_operators.forward.overloadpacket)(_forward_flops(_count))
    register_flop_formula(_operators.backward.overloadpacket)(_backward_flops(_count))
