"""The first call of a signature: every check, the copies that are needed, the plan; or the CPU, or JAX.

The order is: keywords, types and frameworks, devices, dtypes, shapes, autograd, memory (strides, overlap), GPU, plan.
Nothing is launched or allocated before all of them have passed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from fa2cupy import env
from fa2cupy.checks import GRADIENTS
from fa2cupy.errors import CompilationError, InvalidArgument, InvalidType, LaunchError
from fa2cupy.frameworks import JAX, framework_of
from fa2cupy.frameworks.base import (
    ITEMSIZE,
    Device,
    Framework,
    GpuFramework,
    TensorRef,
    contiguous_strides,
    describe,
    swap,
)
from fa2cupy.frameworks.dlpack import from_producer
from fa2cupy.frameworks.jax import immutable, is_movable
from fa2cupy.frameworks.overlap import has_duplicates
from fa2cupy.operations import Operation
from fa2cupy.options import Options, RawOptions
from fa2cupy.prepared import (
    PREPARED,
    PreparedCall,
    check_overlap,
    remember,
    shared_scratch,
    signature_key,
    workspace_block,
)
from fa2cupy.problem import (
    ARRAY_RULES,
    AttentionProblem,
    Sizes,
    check_array,
    check_block_mask,
    check_dtypes,
    with_features,
)
from fa2cupy.spec import LENGTHS

__all__ = ["first_call"]

Arrays = dict[str, Any]


def first_call(operation: Operation, raw_arrays: list[Any], workspace: Any, raw_options: RawOptions) -> list[Any]:
    options = Options.checked(*raw_options)
    named = dict(zip(operation.names(), raw_arrays, strict=True))
    framework, arrays = _one_framework(
        {name: array for name, array in named.items() if array is not None or name not in operation.outputs}
    )
    given = {name: arrays[name] for name in operation.outputs if name in arrays}
    if framework is JAX and (given or workspace is not None):
        raise immutable(next(iter(given), "workspace"))
    refs = {name: framework.ref(array, name) for name, array in arrays.items()}
    fixed = {name: ref for name, ref in refs.items() if not is_movable(ref.owner)}
    device = _one_device(fixed) if fixed else refs["q"].device
    refs = {name: dataclasses.replace(ref, device=device) for name, ref in refs.items()}
    dtype, sizes = _check_arrays(operation, refs, options)
    if framework is JAX:  # XLA allocates and calls back for the computation
        from fa2cupy.xla import door

        return door.first_call(operation, arrays, options, raw_options, (_check_arrays, first_call))
    if not operation.asked:
        framework.check_call(_ordered(operation, arrays), operation.name, operation.names)
    _check_memory(framework, arrays, refs, given)

    if device.kind == "cpu":
        from fa2cupy import host

        if workspace is not None:
            block = workspace_block(framework, workspace, device, 0)
            blocks = [(name, refs[name].ptr, framework.extent(array)) for name, array in arrays.items()]
            check_overlap([*blocks, block], {"workspace"})
        how = sizes, dtype, options, operation.extra, operation.swapped
        if operation.is_backward:
            results = host.backward(framework, arrays, *how, operation.further)
        else:
            results = host.forward(framework, arrays, *how)
        for array in given.values():
            framework.written(array)
        return results
    from fa2cupy.jit import driver

    driver.device_info(device.index)  # no driver, or a GPU that is too old, before anything is copied or allocated
    assert isinstance(framework, GpuFramework)
    with driver.device_guard(device.index):
        arrays = _copy_where_needed(operation, framework, arrays, device)
    ordered = _ordered(operation, arrays)
    signature, pointers = framework.signature(ordered)
    key = signature_key(operation, signature, raw_options)
    prepared = PREPARED.get(key)  # known when a copy or a conversion brought us here
    if prepared is None:
        prepared = _prepare(operation, framework, arrays, sizes, dtype, options, device)
        remember(key, type(ordered[0]), framework, prepared)
    return prepared.run(ordered, pointers, workspace)


def _ordered(operation: Operation, arrays: Arrays) -> list[Any]:
    return [arrays.get(name) for name in operation.names()]


def _one_framework(arrays: Arrays) -> tuple[Framework, Arrays]:
    """The framework of all arrays, `__dlpack__` producers of other libraries replaced by CuPy or NumPy arrays."""
    converted: Arrays = {}
    framework: Framework | None = None
    first = next(iter(arrays))
    for name, array in arrays.items():
        if name == "dropout_seed" and isinstance(array, tuple):  # beside a producer of another library
            assert framework is not None
            converted[name] = framework.seed(array, converted["q"])
            continue
        found = framework_of(array)
        if found is None:
            if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
                hint = f"; pass cupy.asarray({name})" if hasattr(array, "__cuda_array_interface__") else ""
                raise InvalidType(
                    f"{name} is a {describe(array)}: an array of CuPy, PyTorch, JAX or NumPy, or another object with "
                    f"__dlpack__, is needed{hint}"
                )
            array = from_producer(array, name)
            found = framework_of(array)
            assert found is not None
        found.check(array, name)
        if framework is None:
            framework = found
        elif found is not framework:
            raise InvalidType(
                f"{name} is a {describe(arrays[name])} but {first} is a {describe(arrays[first])}: "
                "all arrays must come from the same framework"
            )
        converted[name] = array
    assert framework is not None
    return framework, converted


def _one_device(refs: Mapping[str, TensorRef]) -> Device:
    first = next(iter(refs))
    for name, ref in refs.items():
        if ref.device != refs[first].device:
            raise InvalidArgument(
                f"{name} is on {ref.device} but {first} is on {refs[first].device}: all arrays must be on one device"
            )
    return refs[first].device


def _check_arrays(operation: Operation, refs: Mapping[str, TensorRef], options: Options) -> tuple[str, Sizes]:
    """The dtype and the lengths of the problem; raises where dtypes or shapes do not fit together."""
    dense = {name: ref for name, ref in refs.items() if name not in operation.extra + operation.further}
    dtype = check_dtypes(dense, options)
    sizes = Sizes.of(refs, options.layout)
    for name, ref in dense.items():
        sizes.check_shape(name, ref.shape, options.layout)
    for name in operation.extra:
        check_array(name, refs[name], sizes, dtype)
    block_mask = dict(options.features).get("mask")
    if block_mask is not None:
        check_block_mask(block_mask, sizes)
    for name in operation.further:
        if name in refs:
            sizes.check_shape(name, refs[name].shape, options.layout)
            wanted = refs[_source_of(name)].dtype
            if refs[name].dtype != wanted:
                raise InvalidType(
                    f"{name} has dtype {refs[name].dtype} but {_source_of(name)} has {wanted}: they must be the same"
                )
    return dtype, sizes


def _source_of(gradient: str) -> str:
    """What it is the gradient of."""
    return next(name for name, output in GRADIENTS.items() if output == gradient)


def _check_memory(framework: Framework, arrays: Arrays, refs: Mapping[str, TensorRef], given: Arrays) -> None:
    """What strides and pointers must fulfil."""
    for name, ref in refs.items():
        itemsize = ITEMSIZE[ref.dtype]
        if ref.device.kind == "cuda" and ref.ptr % itemsize and 0 not in ref.shape:
            raise InvalidArgument(
                f"{name} starts at address {ref.ptr:#x}: a multiple of its {itemsize}-byte elements is needed"
            )
    for name, array in given.items():
        if framework.readonly(array):
            raise InvalidArgument(f"{name} is read-only: an output must be writable")
        if not framework.has_contiguous_rows(array) or not framework.is_strided_by_element(array):
            raise InvalidArgument(
                f"{name} has strides {framework.byte_strides(array)} (bytes): its last dimension must be contiguous"
            )
        if has_duplicates(framework.extent(array)):
            raise InvalidArgument(
                f"{name} has strides {framework.byte_strides(array)} (bytes) for shape {refs[name].shape}: "
                "an output must not hold an element twice"
            )
    if given:
        blocks = [(name, ref.ptr, framework.extent(arrays[name])) for name, ref in refs.items()]
        check_overlap(blocks, set(given))


def _copy_where_needed(operation: Operation, framework: GpuFramework, arrays: Arrays, device: Device) -> Arrays:
    """Copies of the inputs whose last dimension is not contiguous; of lengths, int32 without any gap; of other extra
    inputs C-contiguous ones, unless the kernels know strides of theirs; the other arrays as they are.
    """
    copies: Arrays = {}
    for name in (*operation.inputs, *operation.extra):
        is_wide = name in LENGTHS and framework.dtype(arrays[name]) != "int32"
        contiguous = framework.has_contiguous_rows(arrays[name]) and framework.is_strided_by_element(arrays[name])
        has_no_strides = name in operation.extra and not ARRAY_RULES[name].strided
        if has_no_strides and not _without_gaps(framework, arrays[name]):
            contiguous = False
        if is_wide or not contiguous:
            if not framework.allocates_in_capture and framework.is_capturing(
                framework.stream(device.index)(device.index), device.index
            ):
                why, wanted = "it is not int32", "an int32"
                if not is_wide:
                    why, wanted = "its last dimension is not contiguous", "a contiguous"
                    if has_no_strides:
                        why = "it is not contiguous"
                raise InvalidArgument(
                    f"{name} must be copied because {why}, which {framework.name} cannot do inside a CUDA graph "
                    f"capture: pass {wanted} array"
                )
            copies[name] = framework.as_int32(arrays[name]) if is_wide else framework.contiguous(arrays[name])
    return {**arrays, **copies}


def _without_gaps(framework: Framework, array: Any) -> bool:
    """Whether an array is C-contiguous."""
    shape, itemsize = framework.shape(array), framework.itemsize(array)
    wanted = contiguous_strides(shape)
    strides = zip(shape, framework.byte_strides(array), wanted, strict=True)
    return 0 in shape or all(n < 2 or step == itemsize * elements for n, step, elements in strides)


def _prepare(
    operation: Operation,
    framework: GpuFramework,
    arrays: Arrays,
    sizes: Sizes,
    dtype: str,
    options: Options,
    device: Device,
) -> PreparedCall:
    from fa2cupy.jit import driver
    from fa2cupy.kernels.planner import bound_plan

    problem = _problem(operation, framework, arrays, sizes, dtype, options, device)
    stream = framework.stream(device.index)
    try:
        launchable, needed = bound_plan(operation.name, problem, device.index, options.deterministic, env.kernel())
    except (LaunchError, CompilationError) as error:
        if framework.is_capturing(stream(device.index), device.index):
            raise LaunchError(
                f"fa2cupy.{operation.name} could not load its kernel inside a CUDA graph capture: call it once with "
                "the same shapes before the capture"
            ) from error
        raise
    names = operation.names()
    storage = framework.dtype(arrays["q"])
    fresh, shared = [], []
    for position, name in enumerate(names):
        if name not in arrays:
            shape = sizes.shape(name, options.layout)
            element = storage if name != "lse_out" else "float64" if dtype == "float64" else "float32"
            if name in operation.further:
                element = framework.dtype(arrays[_source_of(name)])
            if name in operation.scratch:
                size = math.prod(shape) * ITEMSIZE[element]
                with driver.device_guard(device.index):
                    pointer = shared_scratch(framework, device.index, size, arrays["q"])
                if pointer is not None:
                    shared.append((position, pointer))
                    continue
                allocate, address = framework.scratch(size, arrays["q"])
            else:
                swapped = operation.swapped and len(shape) == 4
                allocate, address = framework.allocator(shape, element, arrays["q"], swapped), framework.address
            fresh.append((position, allocate, address))
    return PreparedCall(
        operation=operation,
        framework=framework,
        device=device,
        launchable=launchable,
        device_index=device.index,
        first_output=len(operation.inputs),
        results=slice(len(operation.inputs), len(operation.inputs) + len(operation.outputs)),
        fresh=tuple(fresh),
        shared=tuple(shared),
        given=frozenset(name for name in operation.outputs if name in arrays),
        extents=tuple(framework.extent(arrays[name]) if name in arrays else None for name in names),
        workspace_bytes=needed,
        takes_workspace=operation.is_backward or needed > 0,
        allocate_workspace=framework.allocator((needed,), "uint8", arrays["q"]),
        address=framework.address,
        no_capture=bool(fresh or needed) and not framework.allocates_in_capture,
        stream=stream,
        is_current=driver.context_check(device.index),
        guard=driver.device_guard,
        check=_check_of_lengths(operation, framework, sizes, device),
    )


def _check_of_lengths(
    operation: Operation, framework: GpuFramework, sizes: Sizes, device: Device
) -> Callable[[list[Any]], None] | None:
    """What FA2CUPY_CHECK=1 asks for, of the arrays in `operation.names()`; None without lengths."""
    places = {name: position for position, name in enumerate(operation.names()) if name in LENGTHS}
    if not places:
        return None

    def check(arrays: list[Any]) -> None:
        if not env.check():
            return
        from fa2cupy import sequences
        from fa2cupy.jit import driver

        if framework.is_capturing(framework.stream(device.index)(device.index), device.index):
            raise InvalidArgument(
                f"{env.CHECK.name}=1 waits for {next(iter(places))}, which a CUDA graph capture cannot do: unset it"
            )
        with driver.device_guard(device.index):
            held = {name: framework.to_host(arrays[position]) for name, position in places.items()}
        sequences.check(held, sizes.batch, sizes.seqlen_q, sizes.seqlen_k)

    return check


def _problem(
    operation: Operation,
    framework: Framework,
    arrays: Arrays,
    sizes: Sizes,
    dtype: str,
    options: Options,
    device: Device,
) -> AttentionProblem:
    """The problem with the outputs that are still to be allocated: C-contiguous in the user's layout (or in the other
    one, where the operation says so), aligned."""
    tensors: dict[str, TensorRef] = {}
    further: dict[str, TensorRef] = {}
    for name in operation.inputs + operation.outputs:
        if name in arrays:
            ref = framework.ref(arrays[name], name)
        else:
            shape = sizes.shape(name, options.layout)
            strides = contiguous_strides(shape)
            if operation.swapped and len(shape) == 4:
                strides = swap(contiguous_strides(swap(shape)))
            element = framework.dtype(arrays[_source_of(name)]) if name in operation.further else dtype
            ref = TensorRef(0, shape, strides, element, device, None)
        (further if name in operation.further else tensors)["lse" if name == "lse_out" else name] = ref
    problem = AttentionProblem.from_refs(tensors, sizes, dtype, options)
    if operation.extra or options.features:
        extra = {name: framework.ref(arrays[name], name) for name in operation.extra}
        problem = with_features(problem, {**dict(options.features), **extra, **further})
        assert problem.extra_arrays == operation.extra, "the specs of a problem stand in the order of the keywords"
    return problem


def workspace_bytes(operation: Operation, raw_arrays: list[Any], raw_options: RawOptions) -> int:
    """Bytes of workspace that the operation needs. `raw_arrays`: q, k, v and its extra inputs."""
    options = Options.checked(*raw_options)
    framework, arrays = _one_framework(dict(zip(("q", "k", "v", *operation.extra), raw_arrays, strict=True)))
    refs = {name: framework.ref(array, name) for name, array in arrays.items()}
    device = _one_device(refs)
    dtype, sizes = _check_arrays(operation, refs, options)
    if device.kind == "cpu":
        return 0
    from fa2cupy.kernels.planner import plan_call

    problem = _problem(operation, framework, arrays, sizes, dtype, options, device)
    return plan_call(operation.name, problem, device.index, options.deterministic, env.kernel()).workspace_bytes
