"""Attention on a KV cache of JAX arrays: one FFI target of its own, "fa2cupy_attend", for "cpu" and "CUDA".

JAX's arrays are immutable, so caches that are written are results, whose buffers XLA takes from the operands: where
these are donated, or nobody needs them any more, nothing is copied. What is to be computed travels as a string, as in
`ffi.py`: all of a `Call` but its memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fa2cupy.cached import host
from fa2cupy.cached.arguments import Given
from fa2cupy.cached.cache import Cache
from fa2cupy.cached.call import ARRAYS, LENGTHS, Call
from fa2cupy.cached.problem import CacheProblem
from fa2cupy.errors import Fa2Error, InvalidType, LaunchError
from fa2cupy.first_call import _one_framework as one_framework
from fa2cupy.frameworks import NUMPY
from fa2cupy.frameworks.base import WORKSPACE_ALIGNMENT, Device, Framework, TensorRef, contiguous_strides
from fa2cupy.frameworks.jax import immutable, is_traced
from fa2cupy.xla import ffi
from fa2cupy.xla.frame import Buffer, Frame, Words, args_of, attribute_of, device_ordinal, handler, rets_of, stream_of

__all__ = ["attend"]

_TARGET = "fa2cupy_attend"
_WRITTEN = ("k_cache", "v_cache")
_OF_CALL = ("dtype", "batch", "seqlen_q", "num_heads", "seqlen_new", "is_packed")
_OF_CACHE = ("layout", "dtype", "rows", "page", "num_heads_k", "head_dim", "head_dim_v", "tables", "width")


# ----------------------------------------------------------------------------------------------------------------------
# For users


def attend(k_cache: Any, v_cache: Any, q: Any, given: Given, of_cache: set[str]) -> tuple[Any, ...]:
    """out, lse, and with new keys the caches, k's and v's. given: of the cache and of the call; of_cache: names of the
    cache's keywords.
    """
    for name in ("out", "lse_out", "workspace"):
        if name in given.arrays:
            raise immutable(name)
    numbers = dict(given.numbers)
    arrays = {"k_cache": k_cache, "v_cache": v_cache, "q": q, **given.arrays}
    one_framework(arrays)
    if "cache_seqlens" in numbers:  # as an array: another number is then no other program
        batch = given.arrays["cu_seqlens_q"].shape[0] - 1 if "cu_seqlens_q" in given.arrays else q.shape[0]
        arrays["cache_seqlens"] = jnp.full((batch,), numbers.pop("cache_seqlens"), jnp.int32)
    names = tuple(arrays)
    options = tuple(given.options.items()), tuple(numbers.items())
    appends = "k" in arrays
    donated = appends and not any(map(is_traced, (k_cache, v_cache)))
    return tuple(_function(names, options, frozenset(of_cache), donated)(*arrays.values()))


@functools.lru_cache(maxsize=1024)
def _function(names: tuple[str, ...], options: Any, of_cache: frozenset[str], donated: bool) -> Any:
    def run(*arrays: Any) -> tuple[Any, ...]:
        of_options, numbers = map(dict, options)
        return _traced(dict(zip(names, arrays, strict=True)), of_options, numbers, of_cache)

    def refuse(primals: Any, tangents: Any) -> Any:
        raise InvalidType("attention on a cache has no derivatives: use jax.lax.stop_gradient")

    once: Any = jax.custom_jvp(run)
    once.defjvp(refuse)
    return jax.jit(once, donate_argnums=(0, 1) if donated else ())


def _traced(
    arrays: dict[str, Any], options: dict[str, Any], numbers: dict[str, Any], of_cache: frozenset[str]
) -> tuple[Any, ...]:
    k, v, q = (arrays.pop(name) for name in ("k_cache", "v_cache", "q"))
    of = {wanted: _part((arrays, options, numbers), of_cache, wanted) for wanted in (True, False)}
    cache = Cache.of(k, v, of[True], _WRITTEN)
    call = Call.of(cache, q, of[False], None)
    held = {name: _as_passed(name, call.arrays[name]) for name in ARRAYS if name in call.arrays}
    out = jax.ShapeDtypeStruct(call.shape("out"), q.dtype)
    lse = jax.ShapeDtypeStruct(call.shape("lse_out"), jnp.float64 if q.dtype == jnp.float64 else jnp.float32)
    written = _WRITTEN if call.appends else ()
    attribute = _attribute(call, held)
    results = [out, lse, *(jax.ShapeDtypeStruct(held[name].shape, held[name].dtype) for name in written)]
    places = {name: place for place, name in enumerate(held)}
    aliases = {places[name]: 2 + number for number, name in enumerate(written)}
    operands = list(held.values())
    size, count = _needed(attribute)
    if count:  # counters, as what is written: then nobody else has them, however XLA orders calls
        aliases[len(operands)] = len(results)
        operands.append(jnp.zeros((count,), jnp.int32))
        results += [jax.ShapeDtypeStruct((count,), jnp.int32), jax.ShapeDtypeStruct((size,), jnp.uint8)]
    found = jax.ffi.ffi_call(_TARGET, results, input_output_aliases=aliases)(*operands, call=attribute)
    caches = [x.view(like.dtype) for x, like in zip(found[2 : 2 + len(written)], (k, v), strict=False)]
    return (*found[:2], *caches)


def _part(given: tuple[dict[str, Any], ...], of_cache: frozenset[str], wanted: bool) -> Given:
    """What of this belongs to a cache, or does not."""
    return Given(*({name: x for name, x in part.items() if (name in of_cache) == wanted} for part in given))


def _as_passed(name: str, array: Any) -> Any:
    """As the target takes it: integers of 32 bits, elements of 8 bits as bytes."""
    if name in LENGTHS and array.dtype != jnp.int32:
        return jnp.clip(array, -(2**31), 2**31 - 1).astype(jnp.int32)
    return array.view(jnp.uint8) if name in _WRITTEN and array.dtype.itemsize == 1 else array


# ----------------------------------------------------------------------------------------------------------------------
# A call as a string


@dataclass(frozen=True, slots=True)
class _Array:
    """What an array is, without its memory."""

    shape: tuple[int, ...]
    dtype: str
    device: Device


class _Shapes(Framework):
    """Of arrays without memory, C-contiguous ones."""

    name = "JAX"
    namespace = "jax.numpy"

    def check(self, array: Any, argument: str) -> None:
        pass

    def device(self, array: Any, argument: str) -> Device:
        device: Device = array.device
        return device

    def dtype(self, array: Any) -> str:
        return str(array.dtype)

    def itemsize(self, array: Any) -> int:
        return 1

    def byte_strides(self, array: Any) -> tuple[int, ...]:
        return contiguous_strides(array.shape)

    def pointer(self, array: Any, argument: str) -> int:
        return 0  # XLA aligns buffers to 64 bytes or more

    def ref(self, array: Any, argument: str) -> TensorRef:
        return TensorRef(0, array.shape, contiguous_strides(array.shape), array.dtype, array.device, array)

    def to_numpy(self, array: Any) -> np.ndarray:
        raise TypeError("there is no memory")

    def from_numpy(self, array: np.ndarray, dtype: str, like: Any) -> Any:
        raise TypeError("there is no memory")

    def seed(self, numbers: tuple[int, int], like: Any) -> Any:
        raise TypeError("there is no memory")

    def to_host(self, array: Any) -> np.ndarray:
        raise TypeError("there is no memory")

    def from_host(self, array: np.ndarray, like: Any) -> Any:
        raise TypeError("there is no memory")


_SHAPES = _Shapes()


def _attribute(call: Call, held: Mapping[str, Any]) -> str:
    fields = {
        "arrays": {name: (list(x.shape), str(x.dtype)) for name, x in held.items()},
        "call": {name: getattr(call, name) for name in _OF_CALL},
        "cache": {name: getattr(call.cache, name) for name in _OF_CACHE},
        "options": dict(call.options),
        "numbers": dict(call.numbers),
    }
    return json.dumps(fields, separators=(",", ":"))


@functools.lru_cache(maxsize=4096)
def _parse(attribute: bytes, device: Device) -> Call:
    """A call on this device; its arrays are `_Array`s, in the order of the buffers."""
    fields = json.loads(attribute)
    arrays = {name: _Array(tuple(shape), dtype, device) for name, (shape, dtype) in fields["arrays"].items()}
    options = {name: tuple(x) if isinstance(x, list) else x for name, x in fields["options"].items()}
    caches = {name: arrays[name] for name in _WRITTEN}
    cache = Cache(framework=_SHAPES, arrays=caches, device=device, numbers={}, **fields["cache"])
    return Call(cache=cache, arrays=arrays, options=options, numbers=fields["numbers"], **fields["call"])


# ----------------------------------------------------------------------------------------------------------------------
# On the CPU


def _run_on_cpu(words: Words) -> None:
    frame = Frame(*words)
    call = _parse(attribute_of(frame), Device("cpu", 0))
    results = [_numpy(address) for address in rets_of(frame)]
    arrays = dict(zip(call.arrays, map(_numpy, args_of(frame)), strict=False))
    arrays |= {"out": results[0], "lse_out": results[1]}
    if call.appends:
        arrays |= dict(zip(_WRITTEN, results[2:4], strict=True))
    caches = {name: arrays[name] for name in _WRITTEN}
    cache = dataclasses.replace(call.cache, framework=NUMPY, arrays=caches)
    host.attend(dataclasses.replace(call, cache=cache, arrays=arrays))


def _numpy(address: int) -> np.ndarray:
    buffer = Buffer.from_address(address)
    view = buffer.view()
    return view.view(ml_dtypes.bfloat16) if buffer.dtype == "bfloat16" else view


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


def _plan(attribute: bytes, device_index: int) -> tuple[Call, Any, int, int]:
    """The call, what launches it, the bytes of workspace and the counters that it needs."""
    from fa2cupy.cached.prepared import bound_plan
    from fa2cupy.jit import driver

    driver.device_info(device_index)
    call = _parse(attribute, Device("cuda", device_index))
    if call.dtype not in ("float16", "bfloat16"):
        raise InvalidType(f"q has dtype {call.dtype}, which is not supported: on a GPU float16, bfloat16")
    with driver.device_guard(device_index):
        return call, *bound_plan(CacheProblem.of(call), device_index)


def _needed(attribute: str) -> tuple[int, int]:
    """Bytes of a workspace, with room to align it, and counters; as `ffi.workspace_bytes`."""
    most = 0, 0
    for index in ffi._gpus():
        try:
            _, _, needed, count = _plan(attribute.encode(), index)
        except Fa2Error:
            continue
        most = max(most[0], needed + WORKSPACE_ALIGNMENT - 1), max(most[1], count)
    return most


_prepared: dict[tuple[bytes, int], tuple[Call, Any, int, int]] = {}


def _run_on_gpu(words: Words) -> None:
    from fa2cupy.jit import driver

    frame = Frame(*words)
    gpus = ffi._gpus()
    device = gpus[0] if len(gpus) == 1 else device_ordinal(words)
    key = attribute_of(frame), device
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepared[key] = _plan(*key)
    call, launchable, needed, count = prepared
    results = [Buffer.from_address(address) for address in rets_of(frame)]
    places = {name: Buffer.from_address(a).data for name, a in zip(call.arrays, args_of(frame), strict=False)}
    places |= {"out": results[0].data, "lse_out": results[1].data}
    if call.appends:
        places |= {name: result.data for name, result in zip(_WRITTEN, results[2:4], strict=True)}
    room = [buffer.shape[0] for buffer in results[2 + 2 * call.appends :]] or [0, 0]
    if room[0] < count or room[1] < needed + WORKSPACE_ALIGNMENT - 1:
        raise LaunchError(
            f"attention_with_kvcache was compiled with {room[0]} counters and a workspace of {room[1]} bytes but needs "
            f"{count} and {needed + WORKSPACE_ALIGNMENT - 1} on GPU {device}: another kind of GPU or another fa2cupy "
            "compiled it; compile it again here, and clear JAX's compilation cache if it comes from there"
        )
    counters, workspace = results[-2].data, results[-1].data
    pointers = (*(places.get(name, 0) for name in ARRAYS), workspace + -workspace % WORKSPACE_ALIGNMENT, counters)
    with driver.device_guard(device):
        launchable(pointers, stream_of(words))


_callbacks = {"cpu": handler(_run_on_cpu), "CUDA": handler(_run_on_gpu)}
for _platform, _callback in _callbacks.items():
    _address = ctypes.cast(_callback, ctypes.c_void_p).value
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_address), platform=_platform)
