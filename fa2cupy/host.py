"""Arrays on the CPU, whoever they belong to: views of them go through `cpu.py`, results go back in kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fa2cupy import cpu, env, sequences
from fa2cupy.cpu_mask import mask_of
from fa2cupy.frameworks.base import Framework, swap
from fa2cupy.options import Options
from fa2cupy.problem import Sizes, softmax_scale
from fa2cupy.spec import LENGTHS

__all__ = ["backward", "forward"]


class _Host:
    """The tensors of one call as `cpu.py` takes them: NumPy, in bshd order, bfloat16 as its bits in uint16.

    arrays: those of the caller, all checked, by argument name; outputs only if given. swapped: new outputs, but for
    lse, lie in memory as in the other layout.
    """

    def __init__(
        self,
        framework: Framework,
        arrays: Mapping[str, Any],
        sizes: Sizes,
        dtype: str,
        options: Options,
        swapped: bool,
    ):
        self._framework, self._arrays, self._sizes, self._options = framework, arrays, sizes, options
        self._dtype, self._swapped = dtype, swapped
        self._new: dict[str, np.ndarray] = {}

    def tensor(self, name: str) -> np.ndarray:
        """The argument `name`; new memory for an output that was not given."""
        dtype = self._dtype_of(name)
        bits = "uint16" if dtype == "bfloat16" else dtype
        if name in self._arrays:
            array = self._framework.to_numpy(self._arrays[name]).view(bits)
        else:
            shape = self._sizes.shape(name, self._options.layout)
            if self._swapped and len(shape) == 4:
                array = np.empty(swap(shape), bits).transpose(0, 2, 1, 3)
            else:
                array = np.empty(shape, bits)
            self._new[name] = array
        in_order = self._options.layout == "bshd" or array.ndim != 4
        return array if in_order else array.transpose(0, 2, 1, 3)

    def features(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Options by keyword, and those of the arrays `names` that are of one sequence like any other."""
        arrays = {name: self._framework.to_numpy(self._arrays[name]) for name in names if name not in LENGTHS}
        scale = softmax_scale(self._sizes, self._options)
        options = {"causal": self._options.causal, "softmax_scale": scale, **dict(self._options.features)}
        given = {name: value for name, value in (options | arrays).items() if name.startswith("mask")}
        features = {name: value for name, value in (options | arrays).items() if name not in given}
        return {**features, "mask": mask_of(given, self._sizes.seqlen_q, self._sizes.seqlen_k)} if given else features

    def lengths(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Those arrays of `names` that say where sequences lie."""
        found = {name: self._framework.to_numpy(self._arrays[name]) for name in names if name in LENGTHS}
        if found and env.check():
            sequences.check(found, self._sizes.batch, self._sizes.seqlen_q, self._sizes.seqlen_k)
        return found

    def result(self, name: str) -> Any:
        """What the caller gets for the output `name`."""
        if name in self._arrays:
            return self._arrays[name]
        return self._framework.from_numpy(self._new[name], self._dtype_of(name), self._arrays["q"])

    def _dtype_of(self, name: str) -> str:
        if name == "dsinks":
            return self._framework.dtype(self._arrays["sinks"])
        if name in ("lse", "lse_out"):
            return "float64" if self._dtype == "float64" else "float32"
        return self._dtype


def forward(
    framework: Framework,
    arrays: Mapping[str, Any],
    sizes: Sizes,
    dtype: str,
    options: Options,
    extra: tuple[str, ...] = (),
    swapped: bool = False,
) -> list[Any]:
    """out, lse of q, k, v and the `extra` arrays."""
    host = _Host(framework, arrays, sizes, dtype, options, swapped)
    q, k, v, out, lse = (host.tensor(name) for name in ("q", "k", "v", "out", "lse_out"))
    lengths, features = host.lengths(extra), host.features(extra)
    if lengths:
        sequences.forward(q, k, v, lengths=lengths, out=out, lse=lse, **features)
    else:
        cpu.forward(q, k, v, out=out, lse=lse, **features)
    return [host.result("out"), host.result("lse_out")]


def backward(
    framework: Framework,
    arrays: Mapping[str, Any],
    sizes: Sizes,
    dtype: str,
    options: Options,
    extra: tuple[str, ...] = (),
    swapped: bool = False,
    further: tuple[str, ...] = (),
) -> list[Any]:
    """dq, dk, dv of dout, q, k, v, out, lse and the `extra` arrays, and behind them the gradients called `further`."""
    host = _Host(framework, arrays, sizes, dtype, options, swapped)
    inputs = [host.tensor(name) for name in ("dout", "q", "k", "v", "out", "lse")]
    outputs = {name: host.tensor(name) for name in ("dq", "dk", "dv", *further)}
    lengths, features = host.lengths(extra), host.features(extra)
    compute: Callable[..., Any] = cpu.backward
    if lengths:
        compute, features["lengths"] = sequences.backward, lengths
    compute(*inputs, **outputs, **features)
    return [host.result(name) for name in outputs]
