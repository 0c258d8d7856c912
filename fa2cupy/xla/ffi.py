"""XLA calls back: one typed FFI target, by ctypes, for the platforms "cpu" and "CUDA".

What is to be computed travels as a readable string attribute (`Call`), so that an executable from JAX's persistent
cache, or one exported to another process, finds its way here. On the CPU the target runs `host.py` on NumPy views of
XLA's buffers; on a GPU it launches the plan of the call on XLA's stream. The handler promises XLA that it may be
recorded into a command buffer (a CUDA graph): it queues kernels and does nothing else.

An exception that escapes a ctypes callback would be freed by XLA as if it were an error of its own, which ends the
process. So `frame.py` catches everything and makes an XLA error of it, which JAX raises as a `JaxRuntimeError`.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from fa2cupy import env, host
from fa2cupy.checks import GRADIENTS
from fa2cupy.errors import Fa2Error, LaunchError
from fa2cupy.frameworks import NUMPY
from fa2cupy.frameworks.base import WORKSPACE_ALIGNMENT, Device, TensorRef, contiguous_strides
from fa2cupy.options import Options
from fa2cupy.problem import AttentionProblem, Sizes, check_array, check_dtypes, with_features
from fa2cupy.xla.frame import (
    MEMORY,
    WORDS,
    Buffer,
    Frame,
    Words,
    args_of,
    attribute_of,
    device_ordinal,
    handler,
    places_of,
    rets_of,
    stream_of,
)

__all__ = ["TARGET", "Call", "capsule", "forget", "register", "workspace_bytes"]

TARGET = "fa2cupy"


@dataclass(frozen=True)
class Call:
    """What one FFI call computes: a public function, the arrays in the buffers' order, the options.

    extra: of the inputs those beyond dense attention, the last ones. buffers: (shape, dtype) of inputs and outputs. As
    part of the attribute they make it the whole key of a plan.
    """

    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    extra: tuple[str, ...]
    buffers: tuple[tuple[tuple[int, ...], str], ...]
    options: Mapping[str, Any] = field(hash=False)

    def attribute(self) -> str:
        """The call as the string that XLA keeps."""
        fields = {name: getattr(self, name) for name in ("function", "inputs", "outputs", "extra", "buffers")}
        return json.dumps({**fields, "options": dict(self.options)}, separators=(",", ":"))

    @classmethod
    def parse(cls, attribute: bytes) -> Call:
        fields = json.loads(attribute)
        options = fields.pop("options")
        options["features"] = tuple((name, value) for name, value in _hashable(options["features"]))
        return cls(options=options, **{name: _hashable(value) for name, value in fields.items()})

    @property
    def further(self) -> tuple[str, ...]:
        """Of the outputs those beyond dense attention, the last ones."""
        return tuple(name for name in self.outputs if name in GRADIENTS.values())

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, dtype) by name."""
        return dict(zip((*self.inputs, *self.outputs), self.buffers, strict=True))

    def checked(self, refs: Mapping[str, TensorRef], dtype: str | None = None) -> tuple[Options, str, Sizes]:
        """Options, dtype and lengths; `dtype` of what the buffers hold as uint16."""
        options = Options.checked(**{**self.options, "dtype": dtype or self.options["dtype"]})
        dense = {name: ref for name, ref in refs.items() if name not in self.extra + self.further}
        problem_dtype = check_dtypes(dense, options)
        sizes = Sizes.of(refs, options.layout)
        for name in self.extra:
            check_array(name, refs[name], sizes, problem_dtype)
        return options, problem_dtype, sizes


def _hashable(value: Any) -> Any:
    """JSON has lists where a call has tuples."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


_parse = functools.lru_cache(maxsize=4096)(Call.parse)


# ----------------------------------------------------------------------------------------------------------------------
# On the CPU


def _run_on_cpu(words: Words) -> None:
    frame = Frame(*words)
    call = _parse(attribute_of(frame))
    addresses = (*args_of(frame)[: len(call.inputs)], *rets_of(frame)[: len(call.outputs)])
    buffers = [Buffer.from_address(address) for address in addresses]
    arrays = {name: buffer.view() for name, buffer in zip((*call.inputs, *call.outputs), buffers, strict=True)}
    refs = {name: NUMPY.ref(array, name) for name, array in arrays.items()}
    is_bfloat16 = call.arrays()["q"][1] == "bfloat16"  # in NumPy uint16
    options, dtype, sizes = call.checked(refs, "bfloat16" if is_bfloat16 else None)
    if call.function == "attention_backward":
        host.backward(NUMPY, arrays, sizes, dtype, options, call.extra, further=call.further)
    else:
        host.forward(NUMPY, arrays, sizes, dtype, options, call.extra)


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


def _buffer_bytes(needed: int) -> int:
    """Of XLA's buffer, which is aligned to less than the kernels ask for: room to round the pointer up."""
    return needed + WORKSPACE_ALIGNMENT - 1 if needed else 0


def _plan(call: Call, device_index: int) -> tuple[Callable[[tuple[int, ...], int], None], int]:
    """What launches the call, and the bytes of workspace that it needs."""
    from fa2cupy.jit import driver
    from fa2cupy.kernels.planner import bound_plan

    driver.device_info(device_index)
    device = Device("cuda", device_index)
    refs = {
        name: TensorRef(0, shape, contiguous_strides(shape), dtype, device, None)
        for name, (shape, dtype) in call.arrays().items()
    }
    options, dtype, sizes = call.checked(refs)
    beyond = call.extra + call.further
    dense = {"lse" if name == "lse_out" else name: ref for name, ref in refs.items() if name not in beyond}
    problem = AttentionProblem.from_refs(dense, sizes, dtype, options)
    problem = with_features(problem, {**dict(options.features), **{name: refs[name] for name in beyond}})
    with driver.device_guard(device_index):
        return bound_plan(call.function, problem, device_index, options.deterministic, env.kernel())


def workspace_bytes(call: Call) -> int:
    """Bytes of a workspace buffer for a call, while it is traced; 0 where JAX has no GPU or it is impossible there.

    Of several GPUs the most that one needs. All of them load their kernels now: when the handler runs first, XLA may be
    recording. Whether the call will run on a GPU is not known yet; if it is impossible there, the handler says why.
    """
    most = 0
    for index in _gpus():
        try:
            most = max(most, _buffer_bytes(_plan(call, index)[1]))
        except Fa2Error:
            continue
    return most


@functools.cache
def _gpus() -> tuple[int, ...]:
    """The ordinals of this process's GPUs."""
    try:
        return tuple(int(device.local_hardware_id) for device in jax.local_devices(backend="cuda"))
    except RuntimeError:
        return ()


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A call on a device: what launches it, and how its pointers follow from XLA's buffers.

    order: where among the inputs and outputs of the frame the pointers are.
    workspace: the bytes of one, which is then the last; None where the kernels do not even take a pointer to it.
    """

    attribute: bytes
    launchable: Callable[[tuple[int, ...], int], None]
    order: tuple[int, ...]
    workspace: int | None
    is_current: Callable[[], bool]


_prepared: dict[tuple[bytes, int, int], _Prepared] = {}

# XLA keeps the tables of a call, from one execution to the next, where they were: (device, counts and addresses) ->
# (how to read them, what was there, how to read the pointers and the attribute, the attribute, the call). What the
# addresses held before counts only if they hold it still, which is looked at each time: another executable may have
# come to lie there.
_sites: dict[tuple[int, Words], tuple[Any, Words, Any, bytes, _Prepared]] = {}
_MAX_SITES = 4096  # of some 500 bytes


def forget() -> None:
    """What calls left on the GPUs."""
    _prepared.clear()
    _sites.clear()


def _run_on_gpu(frame: Words) -> None:
    gpus = _gpus()
    # A stream does not stand for a device: those that XLA records command buffers on come and go.
    device = gpus[0] if len(gpus) == 1 else device_ordinal(frame)
    site = _sites.get((device, frame[3:]))
    if site is not None:
        read, tables, gather, attribute, prepared = site
        if read(WORDS) == tables:
            found = gather(WORDS)
            if MEMORY[found[-2] : found[-2] + found[-1]] == attribute:
                _launch(prepared, found[:-2], device, frame)
                return
    read, gather, prepared = _learn(Frame(*frame), device)
    if len(_sites) >= _MAX_SITES:
        _sites.clear()
    _sites[device, frame[3:]] = read, read(WORDS), gather, prepared.attribute, prepared
    _launch(prepared, gather(WORDS)[:-2], device, frame)


def _learn(frame: Frame, device: int) -> tuple[Any, Any, _Prepared]:
    """How to read frames such as this one, and the call."""
    key = attribute_of(frame), device, frame.num_rets
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepared[key] = _prepare(frame, key[0], device)
    return *places_of(frame, prepared.order), prepared


def _launch(prepared: _Prepared, pointers: tuple[int, ...], device: int, frame: Words) -> None:
    if prepared.workspace is not None:
        if prepared.workspace:
            pointers = (*pointers[:-1], pointers[-1] + -pointers[-1] % WORKSPACE_ALIGNMENT)
        else:
            pointers += (0,)
    if prepared.is_current():
        prepared.launchable(pointers, stream_of(frame))
        return
    from fa2cupy.jit import driver

    with driver.device_guard(device):
        prepared.launchable(pointers, stream_of(frame))


def _prepare(frame: Frame, attribute: bytes, device: int) -> _Prepared:
    from fa2cupy.jit import driver

    call = _parse(attribute)
    launchable, needed = _plan(call, device)
    results = len(call.outputs)
    if needed:
        given = Buffer.from_address(rets_of(frame)[results]).shape[0] if frame.num_rets > results else 0
        if given < _buffer_bytes(needed):
            raise LaunchError(
                f"{call.function} was compiled with a workspace of {given} bytes but needs {_buffer_bytes(needed)} on "
                f"GPU {device}: another kind of GPU, another FA2CUPY_KERNEL or another fa2cupy compiled it; compile it "
                "again here, and clear JAX's compilation cache if it comes from there"
            )
    takes_workspace = bool(needed) or call.function == "attention_backward"
    inputs, dense = len(call.inputs), len(call.inputs) - len(call.extra)
    order = (*range(dense), *range(inputs, inputs + results), *range(dense, inputs))
    if needed:
        order += (inputs + results,)
    return _Prepared(
        attribute=attribute,
        launchable=launchable,
        order=order,
        workspace=needed if takes_workspace else None,
        is_current=driver.context_check(device),
    )


# ----------------------------------------------------------------------------------------------------------------------

_callbacks = {"cpu": handler(_run_on_cpu), "CUDA": handler(_run_on_gpu)}


def capsule(platform: str) -> Any:
    """The handler of a platform as JAX takes it."""
    return jax.ffi.pycapsule(ctypes.cast(_callbacks[platform], ctypes.c_void_p).value)


@functools.cache
def register() -> None:
    """Tell JAX about the target, once in a process."""
    for platform in _callbacks:
        jax.ffi.register_ffi_target(TARGET, capsule(platform), platform=platform)
