"""What tensor cores make of sums in tf32, and what it costs not to trust them: settles `promote` of float32's rows.

    python tests/gpu/tf32_sums.py

Four tables. Sums: a chain of mma of growing length, by one product of tf32 and by three, in one accumulator or begun
anew and added in float32, against float64, relative to the sum of magnitudes; `bias` is the mean error in the sum's own
direction, which truncation makes negative. Bits: whether mma looks at the 13 low bits of an operand. Rates: of loops
over products in registers, in TFLOP/s of what they compute. Rows: the forward and the backward of float32 with
`promote` and without, in turns: TFLOP/s, and the largest relative rms error of their results against float64.

If the rows without `promote` are at most as wrong as those with it, and faster, `promote=False` belongs into
fa2cupy/kernels/sm80; else the tables stay as they are.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.cases import Case
from fa2cupy.jit import source
from fa2cupy.jit.source import Source

HERE = Path(__file__).resolve().parent
CHAINS = {
    "1 product, one accumulator": 0,
    "1 product, anew every 16": 1,
    "3 products, one accumulator": 2,
    "3 products, anew every 16": 3,
    "3 products, anew every 32": 4,
    "3 products, anew every 64": 5,
    "fma, one accumulator": 6,
}
_WARPS, _BLOCKS_PER_SM = 8, 2
# name -> (which, FLOPs of a step of a warp)
RATES = {
    "tf32, 1 product": (10, 16 * 2 * 16 * 8 * 8),
    "float32, 3 products, one accumulator": (11, 16 * 2 * 16 * 8 * 8),
    "float32, 3 products, anew every 16": (12, 16 * 2 * 16 * 8 * 8),
    "float64, m16n8k8 (sm_90)": (20, 16 * 2 * 16 * 8 * 8),
    "float64, m8n8k4": (21, 16 * 2 * 16 * 8 * 8),
}
CASES = tuple(
    Case(mode, head_dim, 4096, True, 2, 16, 16, "float32") for mode in ("fwd", "bwd") for head_dim in (64, 128)
)


class Params(ctypes.Structure):
    """The twin of `SumsParams`."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("a", "b", "out")),
        *((name, ctypes.c_int32) for name in ("steps", "which", "threads")),
    )


def load() -> Source:
    root = source.root()
    headers = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.cuh")}
    return source.load("tf32_sums.cu", directory=HERE, headers=headers)


def inputs(steps: int, mean: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape) + mean for shape in ((16, 8 * steps), (8 * steps, 8)))
    return a.astype(np.float32), b.astype(np.float32)


def errors(out: np.ndarray, a: np.ndarray, b: np.ndarray, rounds: bool) -> tuple[float, float]:
    """rms, and bias, relative to the rms sum of magnitudes. rounds: of operands rounded to tf32, whose sum is meant."""
    x, y = (tf32(each).astype(np.float64) if rounds else each.astype(np.float64) for each in (a, b))
    right, unit = x @ y, np.sqrt(np.mean((abs(x) @ abs(y)) ** 2))
    error = out.reshape(16, 8) - right
    return float(np.sqrt(np.mean(error**2)) / unit), float(np.mean(error * np.sign(right)) / unit)


def tf32(x: np.ndarray) -> np.ndarray:
    """Rounded as `split` in tf32_sums.cu does."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


class Gpu:
    """Launches of tf32_sums on the current GPU."""

    def __init__(self) -> None:
        import torch

        from fa2cupy.jit import driver, kernel
        from fa2cupy.kernels import common

        self.torch = torch
        self.device = driver.device_info(torch.cuda.current_device())
        loaded = kernel(load(), "tf32_sums", common.arch_of(self.device), {})
        self.function = loaded.function(self.device.index)

    def launch(self, which: int, a: Any, b: Any, out: Any, steps: int, blocks: int, threads: int) -> None:
        from fa2cupy.jit.driver import LaunchConfig, Launcher

        pointers = (0 if x is None else x.data_ptr() for x in (a, b, out))
        params = Params(*pointers, steps, which, threads)
        launcher = Launcher(self.function, LaunchConfig((blocks, 1, 1), (threads, 1, 1)))
        launcher(ctypes.addressof(params), self.torch.cuda.current_stream().cuda_stream)

    def chain(self, which: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        torch = self.torch
        out = torch.zeros(128, device="cuda")
        self.launch(which, torch.from_numpy(a).cuda(), torch.from_numpy(b).cuda(), out, len(b) // 8, 1, 32)
        return np.asarray(out.cpu())

    def rate(self, which: int, flops: int, steps: int = 2000) -> float:
        """TFLOP/s."""
        torch = self.torch
        blocks, threads = _BLOCKS_PER_SM * self.device.sm_count, 32 * _WARPS
        out = torch.zeros(blocks * threads, device="cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for timed in (False, True):
            if timed:
                start.record()
            self.launch(which, None, None, out, steps, blocks, threads)
        end.record()
        end.synchronize()
        return flops * steps * blocks * _WARPS / start.elapsed_time(end) / 1e9


def sums(gpu: Gpu) -> None:
    print("Sums: rms error and bias over the sum of magnitudes")
    for mean in (0.0, 1.0):
        for length in (64, 512, 4096, 32768):
            a, b = inputs(length // 8, mean)
            print(f"  inputs of mean {mean:g}, {length} terms")
            for name, which in CHAINS.items():
                rms, bias = errors(gpu.chain(which, a, b), a, b, name.startswith("1"))
                print(f"    {name:30s} {rms:.2e} {bias:+.1e}")


def bits(gpu: Gpu) -> None:
    """The first operands once with their low bits, once without: single products must not differ."""
    a, b = inputs(2, 0.0)
    a, b = tf32(a), tf32(b)
    noise = np.random.default_rng(1).integers(0, 1 << 12, a.shape).astype(np.uint32)  # below what `split` rounds at
    same = np.array_equal(gpu.chain(0, a, b), gpu.chain(0, (a.view(np.uint32) | noise).view(np.float32), b))
    print(f"Bits: mma {'drops' if same else 'LOOKS AT'} the low 13 bits of an operand")


def rates(gpu: Gpu) -> None:
    print("Rates, TFLOP/s")
    for name, (which, flops) in RATES.items():
        if which == 20 and gpu.device.cc < (9, 0):
            continue
        print(f"  {name:38s} {gpu.rate(which, flops):7.1f}")


def rows(gpu: Gpu) -> None:
    from benchmarks.plans import plan_of
    from benchmarks.timing import TorchClock, take_turns
    from benchmarks.variants import Runner

    print("Rows: TFLOP/s, and the largest rms error of the results against float64")
    for case in CASES:
        runner, calls, found = Runner(case), {}, {}
        row = plan_of(case, gpu.device).tile
        for promote in (True, False):
            plan = plan_of(case, gpu.device, tile=dataclasses.replace(row, promote=promote))
            name = "promote" if promote else "one accumulator"
            calls[name] = runner.call(plan)
            found[name] = runner.error(calls[name])
        timings = take_turns(calls, TorchClock(), bursts=8)
        text = ", ".join(f"{name} {case.flops / timings[name].ms / 1e9:.1f} ({found[name]:.1e})" for name in calls)
        print(f"  {case.label}: {text}")


def main() -> None:
    gpu = Gpu()
    print(f"{gpu.device.name}, compute capability {gpu.device.cc[0]}.{gpu.device.cc[1]}")
    sums(gpu)
    bits(gpu)
    rates(gpu)
    rows(gpu)


if __name__ == "__main__":
    main()
