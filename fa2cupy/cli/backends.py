"""Where the demo's attention runs: NumPy arrays on the CPU, or the same through CuPy on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fa2cupy
from fa2cupy.errors import Fa2Error
from fa2cupy.jit import driver, expected_nvrtc_build
from fa2cupy.jit.cupy import require_cupy

Array = NDArray[Any]


@dataclass(frozen=True)
class Backend:
    """A device: `name` for people, `dtype` of its arrays, and how to get arrays there, back, and a call timed."""

    name: str
    is_gpu: bool
    dtype: Any
    to_device: Callable[[Array], Any]
    to_host: Callable[[Any], Array]
    seconds: Callable[[Callable[[], object]], float]

    def round(self, x: Array) -> Array:
        """`x` as the device sees it (rounded to `dtype`), in its own dtype."""
        return x.astype(self.dtype).astype(x.dtype)

    def forward(self, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Causal attention of host arrays, computed on the device; out comes back in q's dtype, lse in float32."""
        out, lse = fa2cupy.attention(*map(self._send, (q, k, v)), causal=True, return_lse=True)
        return self.to_host(out).astype(q.dtype), self.to_host(lse)

    def backward(self, dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array) -> tuple[Array, Array, Array]:
        """Gradients of host arrays, computed on the device, in q's dtype."""
        dout, q_, k, v, out = (self._send(x) for x in (dout, q, k, v, out))
        grads = fa2cupy.attention_backward(dout, q_, k, v, out, self.to_device(lse), causal=True)
        dq, dk, dv = (self.to_host(x).astype(q.dtype) for x in grads)
        return dq, dk, dv

    def _send(self, x: Array) -> Any:
        return self.to_device(x.astype(self.dtype, copy=False))


def _best_of(run: Callable[[], object], repeats: int, clock: Callable[[Callable[[], object]], float]) -> float:
    run()
    return min(clock(run) for _ in range(repeats))


def cpu() -> Backend:
    """The CPU backend, in float32."""

    def clock(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return Backend(
        name="CPU (NumPy)",
        is_gpu=False,
        dtype=np.dtype(np.float32),
        to_device=lambda x: x,
        to_host=lambda x: x,
        seconds=lambda run: _best_of(run, 2, clock),
    )


def missing() -> str:
    """What of driver, CuPy and NVRTC is missing here, each with its remedy; empty if nothing is."""
    reasons = []
    for find in (driver.device_count, require_cupy, expected_nvrtc_build):
        try:
            find()
        except Fa2Error as error:
            reasons.append(" ".join(str(error).split()))
    return "; ".join(reasons)


def gpu() -> Backend | str:
    """The GPU backend in bfloat16 (float16 without ml_dtypes), or the reason why there is none."""
    if reason := missing():
        return reason
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no usable GPU ({error})"
    if not count:
        return "CuPy finds no GPU"
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    name, major, minor = properties["name"].decode(), properties["major"], properties["minor"]
    if major < 8:
        return f"{name} is sm_{major}{minor}, and the kernels need sm_80 (Ampere) or newer"
    try:
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    except ImportError:
        dtype = np.dtype(np.float16)

    def clock(run: Callable[[], object]) -> float:
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        calls = 10
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        milliseconds: float = cupy.cuda.get_elapsed_time(start, stop)
        return milliseconds * 1e-3 / calls

    return Backend(
        name=f"{name} (CuPy {cupy.__version__}, sm_{major}{minor})",
        is_gpu=True,
        dtype=dtype,
        to_device=cupy.asarray,
        to_host=cupy.asnumpy,
        seconds=lambda run: _best_of(run, 5, clock),
    )


def unfused(q: Array, k: Array, v: Array) -> Callable[[], Any] | str:
    """The plain formula on the GPU, causal, all scores in memory, or the reason why it cannot run. Host arrays.

    Matrix products in float16 by cuBLAS, the softmax in float32, as one would write it with CuPy.
    """
    import cupy

    half = np.float16
    group = q.shape[2] // k.shape[2]
    queries = cupy.asarray(q.astype(half).transpose(0, 2, 1, 3).copy())
    keys, values = (cupy.asarray(np.repeat(x.astype(half).transpose(0, 2, 1, 3), group, axis=1)) for x in (k, v))
    visible = cupy.asarray(np.tri(q.shape[1], k.shape[1], dtype=bool))
    scale = np.float32(q.shape[-1] ** -0.5)

    def run() -> Any:
        scores = cupy.matmul(queries, keys.swapaxes(-1, -2)).astype(np.float32)
        scores = cupy.where(visible, scores * scale, np.float32(-np.inf))
        scores -= scores.max(axis=-1, keepdims=True)
        cupy.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return cupy.matmul(scores.astype(half), values)

    try:
        run()
    except ImportError:
        return "cuBLAS is not installed (pip install 'fa2cupy[demo-cuda12]', or demo-cuda13)"
    except cupy.cuda.memory.OutOfMemoryError as error:
        return f"its scores do not fit into memory ({error})"
    return run
