"""merge_attention on a GPU, by a kernel: what the first call of a signature leaves for the next ones, and their calls.

Whatever the kernels do not have (other dtypes, more pieces, arrays without elements) is left to the formula in
`merge.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fa2cupy.errors import InvalidArgument, UnsupportedDevice
from fa2cupy.frameworks.base import GpuFramework, TensorRef, contiguous_strides
from fa2cupy.locks import Lock

__all__ = ["differentiate", "has_kernel", "merge"]

Strides = tuple[int, int, int]
_DTYPES = ("float16", "bfloat16", "float32")
_MAX_PREPARED = 1024
_MAX_ROWS = 2**31  # which the kernels count in 32 bits, up to a thread block more


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Everything about one signature that does not depend on pointers.

    copied: positions of inputs whose elements the kernel could not find, and of which it gets C-contiguous copies.
    fresh: what allocates each output, behind the inputs among the pointers.
    """

    framework: GpuFramework
    device_index: int
    launchable: Callable[[tuple[int, ...], int], None]
    copied: tuple[int, ...]
    fresh: tuple[Callable[[], Any], ...]
    stream: Callable[[int], int]
    is_current: Callable[[], bool]
    guard: Callable[[int], AbstractContextManager[None]]

    def run(self, arrays: list[Any], pointers: list[int]) -> list[Any]:
        """The outputs."""
        if self.is_current():
            return self._launch(arrays, pointers)
        with self.guard(self.device_index):
            return self._launch(arrays, pointers)

    def _launch(self, arrays: list[Any], pointers: list[int]) -> list[Any]:
        framework, stream = self.framework, self.stream(self.device_index)
        if not framework.allocates_in_capture and framework.is_capturing(stream, self.device_index):
            raise InvalidArgument(
                f"fa2cupy.merge_attention inside a CUDA graph capture: {framework.name}'s memory pool cannot be used "
                "there; call it outside the capture"
            )
        copies = {position: framework.contiguous(arrays[position]) for position in self.copied}
        outputs = [allocate() for allocate in self.fresh]
        for position, copy in copies.items():
            pointers[position] = framework.address(copy)
        self.launchable((*pointers, *map(framework.address, outputs)), stream)
        return outputs


# (backward, signature) -> what runs it, or None where it is left to the formula
_PREPARED: dict[tuple[Any, ...], _Prepared | None] = {}
_lock = Lock()


def merge(framework: GpuFramework, outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any] | None:
    """(out, lse) of pieces on a GPU whose shapes and dtypes fit together; None: by the formula."""
    results = _run(framework, [*outs, *lses], len(outs), False)
    return None if results is None else (results[0], results[1])


def differentiate(
    framework: GpuFramework,
    gradients: tuple[Any, Any],
    outs: Sequence[Any],
    lses: Sequence[Any],
    out: Any,
    lse: Any,
) -> tuple[list[Any], list[Any]]:
    """The gradients of outs and of lses, from (dout, dlse), where `merge` has made out and lse of them."""
    pieces = len(outs)
    results = _run(framework, [*outs, *lses, out, lse, *gradients], pieces, True)
    assert results is not None, "what the kernel has merged it can differentiate"
    return results[:pieces], results[pieces:]


def has_kernel(framework: GpuFramework, outs: Sequence[Any], lses: Sequence[Any]) -> bool:
    """Whether `merge` has a result for such pieces."""
    return _found(framework, [*outs, *lses], len(outs), False)[0] is not None


def _run(framework: GpuFramework, arrays: list[Any], pieces: int, backward: bool) -> list[Any] | None:
    prepared, pointers = _found(framework, arrays, pieces, backward)
    return None if prepared is None else prepared.run(arrays, pointers)


def _found(
    framework: GpuFramework, arrays: list[Any], pieces: int, backward: bool
) -> tuple[_Prepared | None, list[int]]:
    """What runs a call, and the pointers of its inputs."""
    signature, pointers = framework.signature(arrays)
    key = (framework.name, pieces, backward, signature)
    if key not in _PREPARED:
        prepared = _prepare(framework, arrays, pieces, backward)
        with _lock:
            while len(_PREPARED) >= _MAX_PREPARED:
                del _PREPARED[next(iter(_PREPARED))]
            _PREPARED[key] = prepared
    else:
        prepared = _PREPARED.get(key)
    return prepared, pointers


def _prepare(framework: GpuFramework, arrays: list[Any], pieces: int, backward: bool) -> _Prepared | None:
    from fa2cupy.jit import driver
    from fa2cupy.kernels import launch
    from fa2cupy.kernels.params import MAX_PIECES
    from fa2cupy.kernels.smxx import merge as host

    names = [f"outs[{i}]" for i in range(pieces)] + [f"lses[{i}]" for i in range(pieces)]
    names += ["out", "lse", "dout", "dlse"][: len(arrays) - len(names)]
    devices = [framework.device(array, name) for array, name in zip(arrays, names, strict=True)]
    for name, device in zip(names, devices, strict=True):
        if device != devices[0]:
            raise InvalidArgument(f"{name} is on {device} but outs[0] on {devices[0]}: one device is needed")
    shape, dtype = framework.shape(arrays[0]), framework.dtype(arrays[0])
    if (
        devices[0].kind != "cuda" or dtype not in _DTYPES or framework.dtype(arrays[pieces]) != "float32"
        or pieces > MAX_PIECES or 0 in shape
    ):  # fmt: skip
        return None
    batch, rows, heads, cols = (1,) * (4 - len(shape)) + shape
    index = devices[0].index
    try:
        info = driver.device_info(index)
    except UnsupportedDevice:
        return None
    if batch * (rows + 7) * heads >= _MAX_ROWS:
        return None
    refs, copied = _laid_out(framework, arrays, names, pieces)
    lse_shape = framework.shape(arrays[pieces])
    out_of = TensorRef(0, shape, contiguous_strides(shape), dtype, devices[0], None)
    lse_of = TensorRef(0, lse_shape, contiguous_strides(lse_shape), "float32", devices[0], None)
    described = {"outs": refs[0], "lses": refs[pieces]}
    if backward:
        described |= dict(zip(("out", "lse", "dout", "dlse"), refs[2 * pieces :], strict=True))
        described |= {"douts": out_of, "dlses": lse_of}
    else:
        described |= {"out": out_of, "lse": lse_of}
    item = framework.itemsize(arrays[0])
    wide = [ref for name, ref in described.items() if "out" in name] + refs[:pieces]
    aligned = cols * item % 16 == 0 and all(
        ref.ptr % 16 == 0 and all(step * item % 16 == 0 for step in _strides(ref, True)) for ref in wide
    )
    steps = tuple((name, _strides(ref, "out" in name)) for name, ref in described.items())
    problem = host.MergeProblem(pieces, batch, rows, heads, cols, dtype, steps, aligned, backward)
    out_and_lse = [
        framework.allocator(shape, dtype, arrays[0]),
        framework.allocator(lse_shape, "float32", arrays[pieces]),
    ]
    count = pieces if backward else 1
    return _Prepared(
        framework=framework,
        device_index=index,
        launchable=launch.bind((host.launch(problem, info),), index, str(problem)),
        copied=copied,
        fresh=tuple(allocate for allocate in out_and_lse for _ in range(count)),
        stream=framework.stream(index),
        is_current=driver.context_check(index),
        guard=driver.device_guard,
    )


def _laid_out(
    framework: GpuFramework, arrays: list[Any], names: list[str], pieces: int
) -> tuple[list[TensorRef], tuple[int, ...]]:
    """The inputs as numbers, and the positions of those that have to be copied: since their columns are no neighbours,
    or since the pieces, which the kernels take to be laid out alike, are not.
    """

    def strides(position: int) -> tuple[int, ...]:
        return framework.byte_strides(arrays[position])

    copied = set()
    for position, array in enumerate(arrays):
        is_wide = len(framework.shape(array)) > 0 and not names[position].startswith(("lse", "dlse"))
        if (is_wide and not framework.has_contiguous_rows(array)) or not framework.is_strided_by_element(array):
            copied.add(position)
    for first in (0, pieces):
        group = range(first, first + pieces)
        if copied.intersection(group) or any(strides(position) != strides(first) for position in group):
            copied |= set(group)
    refs = []
    for position, (array, name) in enumerate(zip(arrays, names, strict=True)):
        if position in copied:
            shape = framework.shape(array)
            device = framework.device(array, name)
            refs.append(TensorRef(0, shape, contiguous_strides(shape), framework.dtype(array), device, None))
        else:
            refs.append(framework.ref(array, name))
    return refs, tuple(sorted(copied))


def _strides(ref: TensorRef, is_wide: bool) -> Strides:
    """In elements along batch, rows and heads, of lse along batch, heads and rows; 0 of a batch that is not there, and
    of dimensions of one element."""
    shape, strides = (x[:-1] if is_wide else x for x in (ref.shape, ref.strides))
    known = tuple(0 if n == 1 else step for n, step in zip(shape, strides, strict=True))
    first, second, third = (0,) * (3 - len(known)) + known
    return first, second, third
