"""The registered operators `fa2cupy::forward` and `fa2cupy::backward`: pure, of fixed arity, one node in a graph.

Their autograd kernels are our own rather than `register_autograd`'s: those cannot be used under torch.func and give
tangents of zero, silently, in forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction  # Function without what it does for torch.func
from torch.utils.flop_counter import register_flop_formula

from fa2cupy.autograd.features import by_name, features_of, refuse_gradients
from fa2cupy.autograd.launching import launch_backward, launch_forward
from fa2cupy.autograd.watchers import in_forward_mode
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks.base import Device, TensorRef
from fa2cupy.options import Options
from fa2cupy.problem import MAX_LENGTH, Sizes, check_array, check_dtypes
from fa2cupy.spec import CARRIED, DIFFERENTIABLE, MASK_ARRAYS

__all__ = ["backward_op", "forward_op"]

# features: the options beyond dense attention, as `features_text` writes them. Behind them the arrays beyond it.
_OPTIONS = 'bool causal, float? softmax_scale, str layout, str? dtype, bool deterministic, str features=""'
_COUNT = 6  # of these
_EXTRA = ", ".join(f"Tensor? {name}=None" for name in CARRIED)
_BACKWARD_TENSORS = ("dout", "q", "k", "v", "out", "lse", "dlse")

_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_fixed_stride_order") if hasattr(torch.Tag, name)
)
_library = torch.library.Library("fa2cupy", "DEF")
_library.define(f"forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}, {_EXTRA}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    f"{_OPTIONS}, {_EXTRA}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    tags=_TAGS,
)
forward_op = torch.ops.fa2cupy.forward.default
backward_op = torch.ops.fa2cupy.backward.default


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


def _forward(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any]:
    with torch.no_grad():
        return launch_forward(q, k, v, _launched(*rest[:_COUNT]), by_name(rest[_COUNT:]))


def _backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, *rest: Any) -> tuple[Any, ...]:
    """dq, dk, dv, and of the arrays in `DIFFERENTIABLE` that there are the gradients, of the others empty tensors."""
    extra = by_name(rest[_COUNT:])
    with torch.no_grad():
        wanted = tuple(name for name in DIFFERENTIABLE if name in extra)
        dq, dk, dv, *further = launch_backward(
            dout, q, k, v, out, lse, dlse, _launched(*rest[:_COUNT]), extra, wanted=wanted
        )
        found = dict(zip(wanted, further, strict=True))
        return dq, dk, dv, *(found[name] if name in found else q.new_empty(0) for name in DIFFERENTIABLE)


def _launched(
    causal: bool, softmax_scale: float | None, layout: str, dtype: str | None, deterministic: bool, features: str = ""
) -> tuple[Any, ...]:
    """The options of an operator as those of a launch."""
    return causal, softmax_scale, layout, dtype, deterministic, features_of(features)


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _device)
    _library.impl("backward", _backward, _device)


# ----------------------------------------------------------------------------------------------------------------------
# Shapes without data


@torch.library.register_fake("fa2cupy::forward", lib=_library)
def _forward_shapes(q: Any, k: Any, v: Any, *options: Any) -> tuple[Any, Any]:
    sizes, layout = _checked({"q": q, "k": k, "v": v}, *options)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(sizes.shape("out", layout)), q.new_empty(sizes.shape("lse", layout), dtype=lse_dtype)


@torch.library.register_fake("fa2cupy::backward", lib=_library)
def _backward_shapes(*arguments: Any) -> tuple[Any, ...]:
    count = len(_BACKWARD_TENSORS)
    tensors = dict(zip(_BACKWARD_TENSORS, arguments[:count], strict=True))
    _checked({name: tensor for name, tensor in tensors.items() if tensor is not None}, *arguments[count:])
    extra = by_name(arguments[count + _COUNT :])
    like = [*(tensors[name] for name in ("q", "k", "v")), *(extra.get(name) for name in DIFFERENTIABLE)]
    return tuple(tensors["q"].new_empty(0) if x is None else x.new_empty(x.shape) for x in like)


def _checked(
    tensors: Mapping[str, Any],
    causal: bool,
    softmax_scale: object,
    layout: str,
    dtype: str | None,
    deterministic: bool,
    features: str = "",
    *arrays: Any,
) -> tuple[Sizes, str]:
    """The errors of a real call that need no data. The scale, which may be a symbol here, is left to the kernels."""
    options = Options.checked(causal, None, layout, dtype, deterministic)
    refs = {}
    extra = by_name(arrays)
    for name, tensor in {**tensors, **extra}.items():
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


_PLACE_OF_EXTRA = 1 + 3 + _COUNT  # behind grad_mode, q, k, v and the options


class _Forward(_Function):
    @staticmethod
    def forward(ctx: Any, grad_mode: bool, *arguments: Any) -> Any:
        outputs = _below_autograd(forward_op, arguments, grad_mode)
        end = 3 + _COUNT
        ctx.save_for_backward(*arguments[:3], *outputs, *arguments[end:])
        ctx.options = arguments[3:end]
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
        count = len(ctx.needs_input_grad)
        if dout is None and dlse is None:
            return (None,) * count
        q, k, v, out, lse, *extra = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv, *further = backward_op(dout, q, k, v, out, lse, dlse, *ctx.options, *extra)
        gradients = [None, dq, dk, dv, *(None,) * (count - 4)]
        for name, gradient in zip(DIFFERENTIABLE, further, strict=True):
            place = _PLACE_OF_EXTRA + CARRIED.index(name)
            if place < count and ctx.needs_input_grad[place]:
                gradients[place] = gradient
        return tuple(gradients)


class _Backward(_Function):
    @staticmethod
    def forward(ctx: Any, grad_mode: bool, *arguments: Any) -> Any:
        return _below_autograd(backward_op, arguments, grad_mode)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise InvalidArgument(
            "the gradient of fa2cupy.attention has been differentiated: it has no derivative of its own (no double "
            "backward); take the first gradient without create_graph=True, or use torch's SDPA math for this loss"
        )


def _autograd_kernel(function: Any, operator: Any, count: int) -> Callable[..., Any]:
    """What runs at the Autograd key. `count`: of the operator's tensors."""

    def kernel(*arguments: Any) -> Any:
        grad_mode = torch.is_grad_enabled()
        extra = by_name(arguments[count + _COUNT :])
        if grad_mode:
            refuse_gradients(extra)
        if not _needs_graph((*arguments[:count], *(extra.get(name) for name in DIFFERENTIABLE))):
            return _below_autograd(operator, arguments, grad_mode)
        with enable_single_level_autograd_function():  # under torch.func we are one level of it, as a C++ kernel is
            return function.apply(grad_mode, *arguments)

    return kernel


_library.impl("forward", _autograd_kernel(_Forward, forward_op, 3), "Autograd")
_library.impl("backward", _autograd_kernel(_Backward, backward_op, len(_BACKWARD_TENSORS)), "Autograd")


# ----------------------------------------------------------------------------------------------------------------------
# vmap, FLOP counters


_OF_HEADS = ("alibi_slopes", "sinks")  # (num_heads,) of all sequences alike; slopes also (batch, num_heads)


def _vmap(operator: Any, count: int, outputs: int) -> Callable[..., Any]:
    """The mapped dimension becomes part of the batch, which comes first in either layout and in lse."""

    def rule(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
        size = info.batch_size
        end = count + _COUNT
        extra = by_name(arguments[end:])
        if outputs > 2 and "sinks" in extra:
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


torch.library.register_vmap("fa2cupy::forward", _vmap(forward_op, 3, 2), lib=_library)
torch.library.register_vmap("fa2cupy::backward", _vmap(backward_op, len(_BACKWARD_TENSORS), 3), lib=_library)


def _sizes_of_shapes(q: Any, k: Any, v: Any, layout: str, extra: Mapping[str, Any]) -> Sizes:
    shapes = {"q": q, "k": k, "v": v, **{name: shape for name, shape in extra.items() if shape is not None}}
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


@register_flop_formula(torch.ops.fa2cupy.forward)
def _forward_flops(q: Any, k: Any, v: Any, causal: bool, softmax_scale: Any, layout: str, *rest: Any, **__: Any) -> int:
    sizes = _sizes_of_shapes(q, k, v, layout, by_name(rest[_COUNT - 3 :]))
    return _matmul_flops(sizes, sizes.head_dim + sizes.head_dim_v)


@register_flop_formula(torch.ops.fa2cupy.backward)
def _backward_flops(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, causal: bool, softmax_scale: Any, layout: str,
    *rest: Any, **__: Any,
) -> int:  # fmt: skip
    sizes = _sizes_of_shapes(q, k, v, layout, by_name(rest[_COUNT - 3 :]))
    return _matmul_flops(sizes, 3 * sizes.head_dim + 2 * sizes.head_dim_v)
