"""merge_attention: GB/s, and what share it is of the rate of a copy of the same run. Needs a GPU and torch.

    python benchmarks/merge.py                 every cell, forward and backward
    python benchmarks/merge.py --check         the same; exit status 1 if one of four pieces stays below 0.9 of a copy
    python benchmarks/merge.py --rehearse      on the CPU, tiny: nothing that it prints is a time

Bytes are those that must be moved: forward the pieces and the result, backward the pieces, out and its gradient, and
the pieces' gradients. The copy moves as many, and takes turns with the call. Results are compared with the formula by
torch's operators in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import Clock, TorchClock, take_turns

BAR = 0.9
RIGHT = 1e-2  # relative error; a piece that is left out shows with 0.3 and more


@dataclass(frozen=True)
class Cell:
    """Of attention whose keys were cut: out (batch, seqlen, heads, head_dim) of each piece."""

    pieces: int
    dtype: str
    batch: int
    seqlen: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.pieces} x {self.dtype} b{self.batch} s{self.seqlen} h{self.heads} d{self.head_dim}"

    def moved(self, backward: bool) -> int:
        """Bytes."""
        rows = self.batch * self.seqlen * self.heads
        row = self.head_dim * (4 if self.dtype == "float32" else 2) + 4  # and lse
        return rows * row * (2 * self.pieces + 2 if backward else self.pieces + 1)


CELLS = (
    Cell(4, "bfloat16", 1, 16384, 32, 128),
    Cell(4, "float16", 4, 8192, 32, 64),
    Cell(4, "float32", 1, 8192, 32, 128),
    Cell(2, "bfloat16", 1, 16384, 32, 128),
    Cell(8, "bfloat16", 1, 8192, 32, 128),
    Cell(4, "bfloat16", 2, 8192, 16, 256),
)


def calls_of(cell: Cell, backward: bool, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The call, whose result was found right, and the copy."""
    import torch

    from fa2cupy import merged
    from fa2cupy.frameworks import TORCH
    from fa2cupy.merge import _by_torch, merge_attention

    generator = torch.Generator(device).manual_seed(0)
    shape = (cell.batch, cell.seqlen, cell.heads, cell.head_dim)
    lse_shape = (cell.batch, cell.heads, cell.seqlen)

    def draw(size: tuple[int, ...], dtype: Any) -> Any:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    dtype = getattr(torch, cell.dtype)
    outs, lses = (
        [draw(shape, dtype) for _ in range(cell.pieces)],
        [draw(lse_shape, torch.float32) for _ in range(cell.pieces)],
    )
    dout, dlse = draw(shape, dtype), draw(lse_shape, torch.float32)
    out, lse = merge_attention(outs, lses)
    some = [[x[:1, :64].double() for x in outs], [x[:1, :, :64].double() for x in lses]]
    for x in (*some[0], *some[1]):
        x.requires_grad_(backward)
    wanted: Sequence[Any] = _by_torch(*some)
    results: Sequence[Any] = (out, lse)
    if backward and device == "cuda":
        results = [x for each in merged.differentiate(TORCH, (dout, dlse), outs, lses, out, lse) for x in each]
        upper = dout[:1, :64].double(), dlse[:1, :, :64].double()
        wanted = torch.autograd.grad(wanted, [*some[0], *some[1]], upper)
    for got, want in zip(results, wanted, strict=True):
        part = got[:1, :64] if got.dim() == 4 else got[:1, :, :64]
        error = float((part.double() - want).norm() / want.norm())
        if not error < RIGHT:
            sys.exit(f"{cell}: a result is off by {error:.1e}")
    source = torch.empty(cell.moved(backward) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if backward and device == "cuda":
        return lambda: merged.differentiate(TORCH, (dout, dlse), outs, lses, out, lse), lambda: target.copy_(source)
    return lambda: merge_attention(outs, lses), lambda: target.copy_(source)


def measure(cells: Sequence[Cell], device: str, clock: Clock, bursts: int) -> list[str]:
    """Prints a line for each cell and direction; those below the bar that is theirs, in words."""
    below = []
    for cell in cells:
        for backward in (False, True):
            call, copy = calls_of(cell, backward, device)
            timings = take_turns({"merge": call, "copy": copy}, clock, bursts=bursts)
            rate, copied = (cell.moved(backward) / timings[name].ms / 1e6 for name in ("merge", "copy"))
            name = f"{cell} {'bwd' if backward else 'fwd'}"
            print(f"{name:44s} {rate:7.0f} GB/s  copy {copied:7.0f} GB/s  {rate / copied:5.2f}", flush=True)
            if cell.pieces == 4 and not rate / copied >= BAR:
                below.append(f"{name}: {rate / copied:.2f} of a copy, {BAR} is wanted")
    return below


def main(arguments: Sequence[str] | None = None, clock: Clock | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--bursts", type=int, default=8)
    args = parser.parse_args(arguments)
    cells: Sequence[Cell] = CELLS
    if args.rehearse:
        cells = [replace(cell, seqlen=70, heads=2, head_dim=16) for cell in CELLS]
    below = measure(cells, "cpu" if args.rehearse else "cuda", clock or TorchClock(), args.bursts)
    print("\n".join(below))
    return int(args.check and bool(below))


if __name__ == "__main__":
    sys.exit(main())
