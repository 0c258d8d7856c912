"""XLA calls back: one typed FFI target, by ctypes, for the platforms "cpu" and "CUDA".

What is to be computed travels as a readable string attribute (`Call`), so that an executable from JAX's persistent
cache, or one exported to another process, finds its way here. On the CPU the target runs `host.py` on NumPy views of
XLA's buffers; on a GPU it launches the plan of the buffers' shapes on XLA's stream. The handler promises XLA
that it may be recorded into a command buffer (a CUDA graph): it queues kernels and does nothing else.

An exception that escapes a ctypes callback would be freed by XLA as if it were an error of its own, which ends the
process. So everything is caught and becomes an XLA error, which JAX raises as a `JaxRuntimeError`.

Layout of the structs: xla/ffi/api/c_api.h, whose versions 0.1 on only append.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from fa2cupy import env, host
from fa2cupy.errors import Fa2Error, InvalidArgument, InvalidType, LaunchError
from fa2cupy.frameworks import NUMPY
from fa2cupy.frameworks.base import WORKSPACE_ALIGNMENT, Device, TensorRef, contiguous_strides
from fa2cupy.options import Options
from fa2cupy.problem import AttentionProblem, Sizes, check_array, check_dtypes, with_features

__all__ = ["TARGET", "Call", "Workspace", "capsule", "register", "workspace_bytes"]

TARGET = "fa2cupy"

Shapes = tuple[tuple[tuple[int, ...], str], ...]  # (shape, dtype) of each array


@dataclass(frozen=True)
class Call:
    """What one FFI call computes: a public function, the names of the arrays in the buffers' order, the options.

    As a string it is the key of a plan. So it has all that plans depend on: shapes and dtypes of the buffers, too.
    """

    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    extra: tuple[str, ...]  # of the inputs those beyond dense attention: behind the others
    options: Mapping[str, Any] = field(hash=False)
    buffers: Shapes  # of inputs and outputs

    def attribute(self) -> str:
        """The call as the string that XLA keeps."""
        return json.dumps(
            {
                "function": self.function,
                "inputs": self.inputs,
                "outputs": self.outputs,
                "extra": self.extra,
                "options": dict(self.options),
                "buffers": [[dtype, list(shape)] for shape, dtype in self.buffers],
            }
        )

    @classmethod
    def parse(cls, attribute: str) -> Call:
        fields = json.loads(attribute)
        options = fields["options"]
        options["features"] = tuple((name, _hashable(value)) for name, value in options["features"])
        inputs, outputs, extra = (tuple(fields[key]) for key in ("inputs", "outputs", "extra"))
        buffers = tuple((tuple(shape), dtype) for dtype, shape in fields["buffers"])
        return cls(fields["function"], inputs, outputs, extra, options, buffers)

    def checked(self, refs: Mapping[str, TensorRef], dtype: str | None = None) -> tuple[Options, str, Sizes]:
        """Options, dtype and lengths; `dtype` of what the buffers hold as uint16."""
        options = Options.checked(**{**self.options, "dtype": dtype or self.options["dtype"]})
        dense = {name: ref for name, ref in refs.items() if name not in self.extra}
        problem_dtype = check_dtypes(dense, options)
        sizes = Sizes.of(refs["q"], refs["k"], refs["v"], options.layout)
        for name in self.extra:
            check_array(name, refs[name], sizes, problem_dtype)
        return options, problem_dtype, sizes


def _hashable(value: Any) -> Any:
    """JSON has lists where options have tuples."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------------------------
# Structs of XLA's C API

_Word = ctypes.c_uint64


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("size", _Word),
        ("extension", _Word),
        ("dtype", ctypes.c_int32),
        ("data", _Word),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Bytes(ctypes.Structure):
    _fields_ = (("data", _Word), ("size", _Word))


class _Frame(ctypes.Structure):
    _fields_ = (
        ("size", _Word),
        ("extension", _Word),
        ("api", _Word),
        ("context", _Word),
        ("stage", _Word),
        *((name, _Word) for name in ("args_size", "args_extension", "num_args", "arg_types")),
        ("args", ctypes.POINTER(ctypes.POINTER(_Buffer))),
        *((name, _Word) for name in ("rets_size", "rets_extension", "num_rets", "ret_types")),
        ("rets", ctypes.POINTER(ctypes.POINTER(_Buffer))),
        *((name, _Word) for name in ("attrs_size", "attrs_extension", "num_attrs", "attr_types", "attr_names")),
        ("attrs", ctypes.POINTER(ctypes.POINTER(_Bytes))),
    )


class _ErrorArguments(ctypes.Structure):
    _fields_ = (("size", _Word), ("extension", _Word), ("message", ctypes.c_char_p), ("code", ctypes.c_int))


class _ContextArguments(ctypes.Structure):
    """Of Stream_Get and DeviceOrdinal_Get; `result` is what they fill in (an int32 of DeviceOrdinal_Get)."""

    _fields_ = (("size", _Word), ("extension", _Word), ("context", _Word), ("result", _Word))


# Byte offsets of function pointers in XLA_FFI_Api.
_ERROR_CREATE, _STREAM_GET, _DEVICE_ORDINAL_GET = 48, 80, 184
_ApiFunction = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_INVALID_ARGUMENT, _INTERNAL = 3, 13
_METADATA = 1  # type of the extension that asks what a handler promises
_COMMAND_BUFFER_COMPATIBLE = 1

# XLA_FFI_DataType -> dtype, and how NumPy holds it.
_DTYPES = {
    1: "bool",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "uint8",
    7: "uint16",
    8: "uint32",
    9: "uint64",
    10: "float16",
    11: "float32",
    12: "float64",
    16: "bfloat16",
}


def _answer_metadata(extension: int) -> None:
    """XLA asks, at registration: API version 0.1, and that the handler may be recorded into a command buffer."""
    if ctypes.c_int32.from_address(extension + 8).value != _METADATA:
        return
    metadata = _Word.from_address(extension + 24).value
    ctypes.c_int32.from_address(metadata + 24).value = 0
    ctypes.c_int32.from_address(metadata + 28).value = 1
    ctypes.c_uint32.from_address(metadata + 32).value = _COMMAND_BUFFER_COMPATIBLE


def _api_function(api: int, offset: int) -> Callable[[int], int | None]:
    function: Callable[[int], int | None] = _ApiFunction(_Word.from_address(api + offset).value)
    return function


def _error(api: int, error: BaseException) -> int | None:
    """An XLA_FFI_Error, which XLA frees."""
    code = _INVALID_ARGUMENT if isinstance(error, (InvalidArgument, InvalidType)) else _INTERNAL
    text = str(error) if isinstance(error, Fa2Error) else f"{type(error).__name__}: {error}"
    arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), 0, f"fa2cupy: {text}".encode(), code)
    return _api_function(api, _ERROR_CREATE)(ctypes.addressof(arguments))


def _from_context(frame: _Frame, offset: int) -> int:
    arguments = _ContextArguments(ctypes.sizeof(_ContextArguments), 0, frame.context, 0)
    if _api_function(frame.api, offset)(ctypes.addressof(arguments)):
        raise LaunchError("XLA does not say on which stream or device it calls")
    return int(arguments.result)


def _handler(run: Callable[[_Frame, str], None]) -> Callable[[int], int | None]:
    def handle(address: int) -> int | None:
        frame = _Frame.from_address(address)
        if frame.extension:
            _answer_metadata(frame.extension)
            return None
        try:
            attribute = frame.attrs[0].contents
            run(frame, ctypes.string_at(attribute.data, attribute.size).decode())
        except BaseException as error:
            return _error(frame.api, error)
        return None

    return handle


def _shape(buffer: _Buffer) -> tuple[int, ...]:
    return tuple(buffer.dims[axis] for axis in range(buffer.rank))


def _dtype(buffer: _Buffer) -> str:
    try:
        return _DTYPES[buffer.dtype]
    except KeyError:
        raise InvalidType(f"XLA passes a buffer of data type {buffer.dtype}, which is not supported") from None


# ----------------------------------------------------------------------------------------------------------------------
# On the CPU


def _view(buffer: _Buffer) -> np.ndarray:
    """NumPy over a buffer; bfloat16 as uint16."""
    shape, dtype = _shape(buffer), _dtype(buffer)
    numpy_dtype = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    size = math.prod(shape) * numpy_dtype.itemsize
    if not size:
        return np.empty(shape, numpy_dtype)
    memory: Any = (ctypes.c_char * size).from_address(buffer.data)
    view: np.ndarray = np.ndarray(shape, numpy_dtype, memory)
    return view


_parse = functools.lru_cache(maxsize=4096)(Call.parse)


def _run_on_cpu(frame: _Frame, attribute: str) -> None:
    call = _parse(attribute)
    arrays = {name: _view(frame.args[i].contents) for i, name in enumerate(call.inputs)}
    arrays |= {name: _view(frame.rets[i].contents) for i, name in enumerate(call.outputs)}
    refs = {name: NUMPY.ref(array, name) for name, array in arrays.items()}
    is_bfloat16 = _dtype(frame.args[call.inputs.index("q")].contents) == "bfloat16"  # in NumPy uint16
    options, dtype, sizes = call.checked(refs, "bfloat16" if is_bfloat16 else None)
    compute = host.backward if call.function == "attention_backward" else host.forward
    compute(NUMPY, arrays, sizes, dtype, options, call.extra)


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


@dataclass(frozen=True)
class Workspace:
    """What a call needs beside its results. `is_pointer`: whether the kernels take a pointer to it."""

    size: int
    is_pointer: bool

    @property
    def buffer_bytes(self) -> int:
        """Of XLA's buffer, which is aligned to less than the kernels ask for: room to round the pointer up."""
        return self.size + WORKSPACE_ALIGNMENT - 1 if self.size else 0


def _problem(call: Call, device: Device) -> tuple[Any, Options]:
    refs = {
        name: TensorRef(0, shape, contiguous_strides(shape), dtype, device, None)
        for name, (shape, dtype) in zip((*call.inputs, *call.outputs), call.buffers, strict=True)
    }
    options, dtype, sizes = call.checked(refs)
    dense = {"lse" if name == "lse_out" else name: refs[name] for name in refs if name not in call.extra}
    problem = AttentionProblem.from_refs(dense, sizes, dtype, options)
    extra = {name: refs[name] for name in call.extra}
    return with_features(problem, {**dict(options.features), **extra}), options


def _plan(call: Call, device_index: int) -> tuple[Any, Workspace]:
    from fa2cupy.jit import driver
    from fa2cupy.kernels.planner import bound_plan

    driver.device_info(device_index)
    problem, options = _problem(call, Device("cuda", device_index))
    with driver.device_guard(device_index):
        launchable, size = bound_plan(call.function, problem, device_index, options.deterministic, env.kernel())
    return launchable, Workspace(size, bool(size) or call.function == "attention_backward")


def workspace_bytes(call: Call) -> int:
    """Bytes of a workspace buffer for a call, while it is traced; 0 where JAX has no GPU or it is impossible there.

    Whether it will run on a GPU is not known yet. If it is impossible, the handler says why.
    """
    index = _first_gpu()
    if index is None:
        return 0
    try:
        return _plan(call, index)[1].buffer_bytes
    except (InvalidArgument, InvalidType):
        return 0


@functools.cache
def _first_gpu() -> int | None:
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return int(devices[0].local_hardware_id)


_device_of_stream: dict[int, int] = {}
_Launchable = Callable[[tuple[int, ...], int], None]
_prepared: dict[tuple[str, int], tuple[_Launchable, Workspace, int, int]] = {}


def _run_on_gpu(frame: _Frame, attribute: str) -> None:
    from fa2cupy.jit import driver

    stream = _from_context(frame, _STREAM_GET)
    device = _device_of_stream.get(stream)
    if device is None:
        device = _device_of_stream[stream] = _from_context(frame, _DEVICE_ORDINAL_GET) & 0xFFFFFFFF
    key = (attribute, device)
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepared[key] = _prepare(frame, attribute, device)
    launchable, workspace, num_dense, num_results = prepared
    args, rets = frame.args, frame.rets
    pointers = [args[i].contents.data for i in range(num_dense)]
    pointers += [rets[i].contents.data for i in range(num_results)]
    pointers += [args[i].contents.data for i in range(num_dense, frame.num_args)]
    if workspace.is_pointer:
        pointer = rets[num_results].contents.data if workspace.size else 0
        pointers.append(pointer + -pointer % WORKSPACE_ALIGNMENT)
    with driver.device_guard(device):
        launchable(tuple(pointers), stream)


def _prepare(frame: _Frame, attribute: str, device: int) -> tuple[_Launchable, Workspace, int, int]:
    """What launches, its workspace, how many inputs stand in front of the outputs in its pointers, how many outputs."""
    call = _parse(attribute)
    launchable, workspace = _plan(call, device)
    if workspace.size:
        given = _shape(frame.rets[len(call.outputs)].contents)[0] if frame.num_rets > len(call.outputs) else 0
        if given < workspace.buffer_bytes:
            raise LaunchError(
                f"{call.function} was compiled with a workspace of {given} bytes but needs {workspace.buffer_bytes} on "
                f"GPU {device}: another kind of GPU, or another fa2cupy, compiled it; clear JAX's compilation cache"
            )
    return launchable, workspace, len(call.inputs) - len(call.extra), len(call.outputs)


# ----------------------------------------------------------------------------------------------------------------------

_Callback = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_callbacks = {"cpu": _Callback(_handler(_run_on_cpu)), "CUDA": _Callback(_handler(_run_on_gpu))}


def capsule(platform: str) -> Any:
    """The handler of a platform as JAX takes it."""
    return jax.ffi.pycapsule(ctypes.cast(_callbacks[platform], ctypes.c_void_p).value)


@functools.cache
def register() -> None:
    """Tell JAX about the target, once in a process."""
    for platform in _callbacks:
        jax.ffi.register_ffi_target(TARGET, capsule(platform), platform=platform)
