"""A call on a cache whose arrays live on the CPU: new keys are written, then each sequence is computed by itself."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from fa2cupy import cpu, env
from fa2cupy.cached import rows
from fa2cupy.cached.call import LENGTHS, Call
from fa2cupy.cached.formats import dequantised, numbers, quantised, rotated, rounded
from fa2cupy.cached.rows import Sequence, Sizes

Array = npt.NDArray[Any]

__all__ = ["attend"]


def attend(call: Call) -> tuple[Any, Any]:
    """out, lse; the new keys and values are in the cache then."""
    host = _Host(call)
    lengths, number = host.lengths, call.numbers.get("cache_seqlens")
    counted = None if number is None else int(number)
    if env.check():
        rows.check(lengths, counted, host.sizes)
    host.out[...], host.lse[...] = 0, -np.inf
    for index, sequence in enumerate(rows.sequences(lengths, counted, host.sizes)):
        host.compute(index, sequence)
    for name in call.written:
        call.cache.framework.written(call.arrays[name])
    return host.result("out", host.out), host.result("lse_out", host.lse)


class _Host:
    """The arrays of a call as NumPy, in bshd order (packed ones with a batch of one), bfloat16 as bits in uint16."""

    def __init__(self, call: Call) -> None:
        self._call, cache = call, call.cache
        self._fresh: dict[str, Array] = {}
        self._in_order = cache.layout == "bshd"
        self.sizes = Sizes(
            call.batch, call.seqlen_q, call.seqlen_new or 0, cache.rows, cache.page, cache.width, call.is_packed,
            len(call.arrays["rotary_cos"]) if "rotary_cos" in call.arrays else 0,
        )  # fmt: skip
        self.lengths = {name: self._numpy(name) for name in LENGTHS if name in call.arrays}
        self._k, self._v = self._bshd("k_cache"), self._bshd("v_cache")
        self._q = self._bshd("q")
        self._new = {name: self._bshd(name) for name in ("k_new", "v_new") if name in call.arrays}
        self.out = self._result_array("out")
        self.lse = self._result_array("lse_out")
        self._scales: dict[str, Any] = {"k_scale": 1.0, "v_scale": 1.0, **call.numbers}
        self._scales |= {name: self._numpy(name) for name in ("k_scale", "v_scale") if name in call.arrays}
        options = call.options
        scale = options.get("softmax_scale")
        self._turns_each = options.get("causal", False) or "window_size" in options
        names = ("causal", "window_size", "softcap")
        self._options = {"causal": False, **{name: options[name] for name in names if name in options}}
        self._slopes = self._numpy("alibi_slopes") if "alibi_slopes" in call.arrays else None
        if "sinks" in call.arrays:
            self._options["sinks"] = self._numpy("sinks")
        self._options["softmax_scale"] = cache.head_dim**-0.5 if scale is None else scale

    def compute(self, index: int, sequence: Sequence) -> None:
        """One sequence: its new keys go into the cache, its results to their place."""
        self._append(index, sequence)
        own = slice(sequence.first_q, sequence.first_q + sequence.length_q)
        q = self._q[sequence.batch_q, own]
        if "rotary_cos" in self._call.arrays:
            steps = np.arange(sequence.length_q) if self._turns_each else np.zeros(sequence.length_q, np.int64)
            q = self._rotated(q, sequence.before + steps)
        positions = np.arange(sequence.first, sequence.end)
        k = self._read(self._k, "k_scale", index, sequence, positions)
        v = self._read(self._v, "v_scale", index, sequence, positions)
        out, lse = self.out[sequence.batch_q, own][None], self.lse[sequence.batch_q, :, own][None]
        slopes = self._slopes
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[index : index + 1]
        cpu.forward(q[None], k[None], v[None], alibi_slopes=slopes, out=out, lse=lse, **self._options)

    def _append(self, index: int, sequence: Sequence) -> None:
        """New keys and values to where there is room for them."""
        if not self._new:
            return
        positions = sequence.before + np.arange(sequence.length_new)
        positions = positions[(positions >= 0) & (positions < sequence.end)]
        pages = rows.pages_of(self.lengths, sequence, positions, self.sizes)
        positions, pages = positions[pages >= 0], pages[pages >= 0]
        for name, cache, scale in (("k_new", self._k, "k_scale"), ("v_new", self._v, "v_scale")):
            new = self._new[name][sequence.batch_q, sequence.first_q + positions - sequence.before]
            if name == "k_new" and "rotary_cos" in self._call.arrays:
                new = self._rotated(new, positions)
            if self._call.cache.is_quantised:
                new = quantised(numbers(new), self._call.cache.dtype, self._scale_of(scale, index, pages))
            cache[pages, positions % self.sizes.page] = new

    def _read(self, cache: Array, scale: str, index: int, sequence: Sequence, positions: Array) -> Array:
        """Keys or values of a sequence: (keys, num_heads_k, head_dim). A page that is none's is page 0."""
        pages = np.maximum(rows.pages_of(self.lengths, sequence, positions, self.sizes), 0)
        if self._call.cache.tables is None:
            stored = cache[sequence.row, sequence.first : sequence.end]
        else:
            stored = cache[pages, positions % self.sizes.page]
        if not self._call.cache.is_quantised:
            return stored
        wide = np.float64 if self._q.dtype == np.float64 else np.float32
        return dequantised(stored, self._call.cache.dtype, self._scale_of(scale, index, pages), wide)

    def _scale_of(self, name: str, index: int, pages: Array | None) -> Any:
        """Broadcast over (keys, num_heads_k, head_dim)."""
        scale = self._scales[name]
        if not isinstance(scale, np.ndarray):
            return scale
        if scale.ndim == 3:
            return scale[pages, 0][:, :, None]
        return (scale[index] if scale.ndim == 2 else scale)[None, :, None]

    def _rotated(self, x: Array, positions: Array) -> Array:
        """Rounded to x's dtype. Positions beyond the tables are their last."""
        places = np.clip(positions, 0, self.sizes.positions - 1)
        wide = np.float64 if x.dtype == np.float64 else np.float32
        cos, sin = (numbers(self._numpy(name))[places].astype(wide) for name in ("rotary_cos", "rotary_sin"))
        turned = rotated(numbers(x), cos, sin, self._call.options["rotary_style"])
        return rounded(turned, x.dtype)

    def result(self, name: str, array: Array) -> Any:
        """What the caller gets."""
        call = self._call
        if name in call.arrays:
            return call.arrays[name]
        wide = "float64" if call.dtype == "float64" else "float32"
        dtype = wide if name == "lse_out" else call.dtype
        return call.cache.framework.from_numpy(self._fresh[name], dtype, call.arrays["q"])

    def _result_array(self, name: str) -> Array:
        if name not in self._call.arrays:
            wide = "float64" if self._call.dtype == "float64" else "float32"
            dtype = wide if name == "lse_out" else "uint16" if self._call.dtype == "bfloat16" else self._call.dtype
            self._fresh[name] = np.empty(self._call.shape(name), dtype)
        return self._bshd(name)

    def _numpy(self, name: str) -> Array:
        """A view; bfloat16 as uint16, 8 bits as uint8."""
        if name in self._fresh:
            return self._fresh[name]
        framework, array = self._call.cache.framework, self._call.arrays[name]
        dtype = framework.dtype(array)
        if dtype == "float8_e4m3fn" and framework.name == "PyTorch":  # NumPy has none
            array = array.detach().view(sys.modules["torch"].uint8)
        view = framework.to_numpy(array)
        bits = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "int8": np.uint8}
        return view.view(bits[dtype]) if dtype in bits else view

    def _bshd(self, name: str) -> Array:
        array = self._numpy(name)
        if self._call.is_packed and name not in ("k_cache", "v_cache"):
            return array[None]
        return array if self._in_order or name == "lse_out" else array.transpose(0, 2, 1, 3)
