"""Attention on a KV cache: microseconds and TB/s of keys and values, beside the rate at which this GPU reads memory.

    python benchmarks/bench.py --cases decode                         every cell; ours, torch's flash and cuDNN
    python benchmarks/bench.py --cases decode --skeleton              two cells and what they have to reach; 20 s
    python benchmarks/bench.py --cases decode --cells 'b16*,p*' --peers flash
    python benchmarks/bench.py --cases decode --cells b16-s8k --tile 'slots=2|3,block_n=16|32' --tile num_warps=4
    python benchmarks/bench.py --cases decode --host                  the host's microseconds, beside torch's; 5 s
    python benchmarks/bench.py --cases decode --list | --rehearse     the cells; all of it on the CPU, tiny

Each call reads another set of arrays, more of them than the second-level cache holds. Results are compared with float64
on one head; what is off by more than 2% (8 bits: 15%) is marked `!`. The rate of pure reads is measured before and
after. Needs a GPU, torch and CuPy. Records: results/decode/<gpu>.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import decode_host, results
from benchmarks.timing import Clock, TorchClock, take_turns

FOLDER = results.RESULTS / "decode"
PEERS = ("flash", "sdpa")
RIGHT, RIGHT_OF_8_BITS = 0.02, 0.15
_READ_BYTES = 1 << 31


@dataclass(frozen=True)
class Cell:
    """batch sequences of seqlen keys, or of random lengths up to there; page 0: rows instead of pages."""

    name: str
    batch: int
    seqlen: int
    heads: int
    heads_k: int
    head_dim: int = 128
    queries: int = 1
    page: int = 0
    ragged: bool = False
    window: int | None = None
    kv_dtype: str | None = None

    @property
    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.seqlen] * self.batch
        least = min(128, self.seqlen)
        return [int(n) for n in np.random.default_rng(0).integers(least, self.seqlen + 1, self.batch)]

    @property
    def bytes(self) -> int:
        """Of the keys and values that are seen."""
        seen = [n if self.window is None else min(n, self.window + self.queries) for n in self.lengths]
        return sum(seen) * self.heads_k * 2 * self.head_dim * (1 if self.kv_dtype else 2)

    @property
    def pages(self) -> int:
        """Of a sequence."""
        return -(-self.seqlen // self.page) if self.page else 0


CELLS = (
    Cell("b1-s1k", 1, 1024, 32, 8),
    Cell("b1-s8k", 1, 8192, 32, 8),
    Cell("b1-s128k", 1, 131072, 32, 8),
    Cell("b8-s2k", 8, 2048, 32, 8),
    Cell("b16-s8k", 16, 8192, 32, 8),
    Cell("b17-s8k", 17, 8192, 32, 8),
    Cell("b64-s8k", 64, 8192, 32, 8),
    Cell("b128-s4k", 128, 4096, 32, 8),
    Cell("b16-s32k-g8", 16, 32768, 64, 8),
    Cell("b64-s4k-mha", 64, 4096, 32, 32),
    Cell("b32-s8k-mqa", 32, 8192, 32, 1),
    Cell("b64-ragged16k", 64, 16384, 32, 8, ragged=True),
    Cell("b64-s8k-d64", 64, 8192, 32, 8, head_dim=64),
    Cell("b32-s8k-d256", 32, 8192, 16, 8, head_dim=256),
    Cell("b16-s8k-q4", 16, 8192, 32, 8, queries=4),
    Cell("b16-s8k-q16", 16, 8192, 32, 8, queries=16),
    Cell("b32-s8k-mha-q4", 32, 8192, 32, 32, queries=4),
    Cell("p1-b16-s8k", 16, 8192, 32, 8, page=1),
    Cell("p16-b1-s8k", 1, 8192, 32, 8, page=16),
    Cell("p16-b16-s8k", 16, 8192, 32, 8, page=16),
    Cell("p64-b16-s8k", 16, 8192, 32, 8, page=64),
    Cell("p256-b16-s8k", 16, 8192, 32, 8, page=256),
    Cell("p16-b64-ragged16k", 64, 16384, 32, 8, page=16, ragged=True),
    Cell("p16-b64-s4k-mha", 64, 4096, 32, 32, page=16),
    Cell("p16-b16-s8k-q4", 16, 8192, 32, 8, queries=4, page=16),
    Cell("p16-b16-s32k-w1k", 16, 32768, 32, 8, page=16, window=1023),
    Cell("p64-b16-s32k-g8-fp8", 16, 32768, 64, 8, page=64, kv_dtype="float8_e4m3fn"),
    Cell("p64-b4-s16k-q512", 4, 16384, 32, 8, queries=512, page=64),
)
# The first that have to be reached, before any option is built: TB/s, or microseconds at most.
SKELETON = {"b16-s8k": ("TB/s", 4.2), "b1-s8k": ("us", 13.0)}


# ----------------------------------------------------------------------------------------------------------------------
# Arrays


class Data:
    """Sets of q, k and v of a cell, with lengths and a table that all share; torch tensors, or NumPy arrays."""

    def __init__(self, cell: Cell, l2_bytes: int, xp: Any) -> None:
        self.cell, self.xp = cell, xp
        self.sets = min(96, max(1, -(-5 * l2_bytes // cell.bytes)))
        rows = (cell.batch * cell.pages, cell.page) if cell.page else (cell.batch, cell.seqlen)
        self.lengths = self._integers(np.array(cell.lengths))
        self.table = None
        if cell.page:
            table = np.random.default_rng(1).permutation(rows[0]).reshape(cell.batch, cell.pages)
            for b, n in enumerate(cell.lengths):
                table[b, -(-n // cell.page) :] = 0
            self.table = self._integers(table)
        self.q, self.k, self.v = [], [], []
        for number in range(self.sets):
            self.q.append(self._normal(3 * number, (cell.batch, cell.queries, cell.heads, cell.head_dim), None))
            for i, arrays in enumerate((self.k, self.v)):
                shape = (*rows, cell.heads_k, cell.head_dim)
                arrays.append(self._normal(3 * number + 1 + i, shape, cell.kv_dtype))

    def _integers(self, x: np.ndarray) -> Any:
        x = x.astype(np.int32)
        return x if self.xp is np else self.xp.from_numpy(x).cuda()

    def _normal(self, seed: int, shape: tuple[int, ...], kv_dtype: str | None) -> Any:
        if self.xp is np:
            x = np.random.default_rng(seed).standard_normal(shape).astype(np.float16)
            return x if kv_dtype is None else np.full(shape, 0x38, np.uint8)
        torch = self.xp
        generator = torch.Generator(device="cuda").manual_seed(seed)
        x = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return x if kv_dtype is None else x.to(getattr(torch, kv_dtype))

    def cache_of(self, number: int) -> Any:
        import fa2cupy

        kv_dtype = self.cell.kv_dtype if self.xp is np else None
        return fa2cupy.KVCache(self.k[number], self.v[number], block_table=self.table, kv_dtype=kv_dtype)

    @property
    def options(self) -> dict[str, Any]:
        window = self.cell.window
        return {"causal": True, "window_size": None if window is None else (window, -1)}

    def error(self, out: Any) -> float:
        """Of set 0, relative: the first key head of the first sequence, against float64."""
        cell = self.cell
        n, group = cell.lengths[0], cell.heads // cell.heads_k

        def host(x: Any) -> np.ndarray:
            if self.xp is np:
                return np.ones(x.shape) if x.dtype == np.uint8 else x.astype(np.float64)
            return np.asarray(x.double().cpu())

        def rows(x: Any) -> np.ndarray:
            if self.table is None:
                return host(x[0, :n, 0])
            pages = self.table[0, : -(-n // cell.page)]
            return host(x[pages if self.xp is np else pages.long(), :, 0]).reshape(-1, cell.head_dim)[:n]

        k, v, q = rows(self.k[0]), rows(self.v[0]), host(self.q[0][0, :, :group])
        s = np.einsum("qgd,kd->qgk", q, k) * cell.head_dim**-0.5
        beside = np.arange(cell.queries)[:, None, None] + n - cell.queries
        j = np.arange(n)
        hidden = (j > beside) | (j < beside - (n if cell.window is None else cell.window))
        p = np.exp(np.where(hidden, -np.inf, s - s.max(-1, keepdims=True)))
        wanted = np.einsum("qgk,kd->qgd", p / p.sum(-1, keepdims=True), v)
        return float(np.linalg.norm(host(out[0, :, :group]) - wanted) / np.linalg.norm(wanted))


# ----------------------------------------------------------------------------------------------------------------------
# Who computes: a function of the number of a set that returns out


def ours(data: Data) -> Callable[[int], Any]:
    caches = [data.cache_of(number) for number in range(data.sets)]
    out = data.xp.empty_like(data.q[0])
    options = data.options
    return lambda i: caches[i].attend(data.q[i], cache_seqlens=data.lengths, out=out, **options)


def ours_by(data: Data, changes: dict[str, int]) -> Callable[[int], Any]:
    """With other numbers in the tile's row."""
    import torch

    from fa2cupy.cached.arguments import given
    from fa2cupy.cached.call import ARRAYS, Call
    from fa2cupy.cached.counters import counters
    from fa2cupy.cached.problem import CacheProblem
    from fa2cupy.jit import driver
    from fa2cupy.kernels.decode import plan_decode
    from fa2cupy.kernels.sm80 import flash_decode

    keywords = {**data.options, "cache_seqlens": data.lengths, "out": torch.empty_like(data.q[0])}
    calls = [
        Call.of(data.cache_of(i)._cache, data.q[i], given("KVCache.attend", (), keywords), None)
        for i in range(data.sets)
    ]
    problem, info = CacheProblem.of(calls[0]), driver.device_info(torch.cuda.current_device())
    row = dataclasses.replace(flash_decode.rows(problem, info)[0], **changes)
    plan = plan_decode(problem, info, row)
    launch, stream = plan.bind(info.index), torch.cuda.current_stream().cuda_stream
    lse = torch.empty(problem.batch * problem.num_heads * problem.seqlen_q, device="cuda")
    workspace = torch.empty(max(1, plan.workspace_bytes), dtype=torch.uint8, device="cuda")
    counting = counters(info.index, stream, plan.counters)
    ready = []
    for call in calls:
        arrays = {**call.arrays, "lse_out": lse}
        pointers = (arrays[name].data_ptr() if name in arrays else 0 for name in ARRAYS)
        ready.append((*pointers, workspace.data_ptr(), counting))

    def call_of(i: int) -> Any:
        launch(ready[i], stream)
        return keywords["out"]

    return call_of


def flash(data: Data) -> Callable[[int], Any]:
    """torch's FlashAttention-2: the same length for all, no pages."""
    cell, torch = data.cell, data.xp
    if cell.page or cell.kv_dtype or cell.ragged or cell.window is not None:
        raise ValueError("dense and of one length only")
    forward = torch.ops.aten._flash_attention_forward
    scale, causal = cell.head_dim**-0.5, cell.queries > 1
    q, k, v = data.q, data.k, data.v
    lengths = (None, None, cell.queries, cell.seqlen, 0.0, causal, False)
    return lambda i: forward(q[i], k[i], v[i], *lengths, scale=scale)[0]


def sdpa(data: Data) -> Callable[[int], Any]:
    """cuDNN by torch's SDPA."""
    cell = data.cell
    if cell.page or cell.kv_dtype or cell.ragged or cell.window is not None or cell.queries > 1:
        raise ValueError("one query, dense, of one length only")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call(i: int) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (data.q[i], data.k[i], data.v[i]))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, enable_gqa=cell.heads != cell.heads_k).transpose(1, 2)

    return call


_READ = r"""extern "C" __global__ void read_all(const uint4* from, long long count, unsigned* to) {
  unsigned x = 0;
  const long long step = 8LL * blockDim.x;
  for (long long i = blockIdx.x * step + threadIdx.x; i + step - blockDim.x < count; i += gridDim.x * step) {
    uint4 v[8];
    #pragma unroll
    for (int j = 0; j < 8; ++j)
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w) : "l"(from + i + j * blockDim.x));
    #pragma unroll
    for (int j = 0; j < 8; ++j) x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (x == 0x12345678u) *to = x;
}"""


def read_rate(clock: Clock) -> float:
    """TB/s of plain reads, the best of a few grids."""
    import cupy
    import torch

    data = torch.empty(_READ_BYTES, dtype=torch.uint8, device="cuda").random_(0, 255)
    to = torch.zeros(1, dtype=torch.int32, device="cuda")
    kernel = cupy.RawKernel(_READ, "read_all")
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    arguments = (np.uint64(data.data_ptr()), np.int64(_READ_BYTES // 16), np.uint64(to.data_ptr()))
    processors = torch.cuda.get_device_properties(0).multi_processor_count

    def call(blocks: int, threads: int) -> Callable[[], None]:
        def read() -> None:
            with stream:
                kernel((blocks * processors,), (threads,), arguments)

        return read

    grids = {f"{b}x{t}": call(b, t) for b, t in ((2, 1024), (4, 512), (8, 256))}
    times = take_turns(grids, clock, bursts=3, burst_ms=10.0)
    return _READ_BYTES / min(t.ms for t in times.values()) / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# The run


def tiles_of(texts: Sequence[str]) -> Iterator[dict[str, int]]:
    """'slots=2|3,block_n=16' -> changes of a row."""
    for text in texts:
        changes: list[dict[str, int]] = [{}]
        for part in filter(None, text.split(",")):
            name, _, values = part.partition("=")
            changes = [{**each, name.strip(): int(value)} for each in changes for value in values.split("|")]
        yield from changes


def measure(
    data: Data, calls: dict[str, Callable[[int], Any]], clock: Clock | None, bursts: int
) -> dict[str, tuple[float, bool]]:
    """name -> (microseconds, whether it is right)."""
    limit = RIGHT_OF_8_BITS if data.cell.kv_dtype else RIGHT
    right = {name: data.error(call(0)) <= limit for name, call in calls.items()}
    turn = dict.fromkeys(calls, 0)

    def next_set(name: str) -> Callable[[], Any]:
        def call() -> Any:
            turn[name] = (turn[name] + 1) % data.sets
            return calls[name](turn[name])

        return call

    if clock is None:
        start = time.perf_counter()
        for name in calls:
            next_set(name)()
        return {name: (1e6 * (time.perf_counter() - start), right[name]) for name in calls}
    times = take_turns({name: next_set(name) for name in calls}, clock, bursts=bursts, burst_ms=8.0)
    return {name: (1e3 * timing.ms, right[name]) for name, timing in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py --cases decode", description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default="*", help="patterns of names, with commas")
    parser.add_argument("--peers", default=",".join(PEERS), help="some of flash,sdpa; empty for none")
    parser.add_argument("--tile", action="append", default=[], metavar="slots=2|3,...", help="try other rows, too")
    parser.add_argument("--skeleton", action="store_true", help="the first cells, and what they have to reach")
    parser.add_argument("--host", action="store_true", help="what a call costs the host; status 1 if above its bar")
    parser.add_argument("--bursts", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no cell later than that")
    parser.add_argument("--run", help="the run that this command continues")
    parser.add_argument("--out", type=Path, help="file of the records")
    parser.add_argument("--commit", help="default: what git says")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, written nowhere")
    args = parser.parse_args(arguments)
    patterns = ",".join(SKELETON) if args.skeleton else args.cells
    cells = [c for c in CELLS if any(fnmatch.fnmatch(c.name, pattern) for pattern in patterns.split(","))]
    if not cells:
        parser.error(f"no cell is called {patterns}: --list has them")
    if args.list:
        for cell in cells:
            print(f"{cell.name:22s} {cell.bytes / 1e6:7.0f} MB  {cell}")
        return 0
    if args.rehearse:
        return _rehearse(cells)
    import torch

    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU, and torch sees none (--rehearse does without)")
    if args.host:
        return decode_host.report(decode_host.measure(decode_host.calls("cuda"), torch.cuda.synchronize, rounds=30))
    return _measure_all(args, cells)


def _measure_all(args: argparse.Namespace, cells: Sequence[Cell]) -> int:
    import torch

    gpu, clock, begin = torch.cuda.get_device_name(), TorchClock(), time.monotonic()
    path = args.out or FOLDER / results.file_name(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    run, commit = args.run or results.new_run_id(), args.commit or results.commit()
    ceiling = read_rate(clock)
    print(f"run {run}, commit {commit}, {gpu}; reads {ceiling:.2f} TB/s; into {path}", flush=True)
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    peers = {name: globals()[name] for name in args.peers.split(",") if name in PEERS}
    tiles = list(tiles_of(args.tile))
    missed, left = [], []
    for cell in cells:
        if time.monotonic() - begin > args.seconds:
            left.append(cell.name)
            continue
        torch.cuda.empty_cache()
        data = Data(cell, l2_bytes, torch)
        calls: dict[str, Callable[[int], Any]] = {}
        makers: dict[str, Callable[[Data], Callable[[int], Any]]] = {"fa2cupy": ours, **peers}
        for changes in tiles:
            text = ",".join(f"{k}={v}" for k, v in changes.items())
            makers[f"[{text}]"] = lambda data, changes=changes: ours_by(data, changes)
        for name, make in makers.items():
            try:
                calls[name] = make(data)
                calls[name](0)
                torch.cuda.synchronize()
            except Exception as error:  # of a peer that cannot, or ours before an option is built: said, not hidden
                calls.pop(name, None)
                print(f"  {cell.name}: {name} does not run ({type(error).__name__}: {str(error)[:160]})", flush=True)
        if not calls:
            continue
        found = measure(data, calls, clock, args.bursts)
        with path.open("a", encoding="utf-8") as file:
            for name, (us, right) in found.items():
                record = {"run": run, "cell": cell.name, "peer": name, "mode": "decode", "ms": us / 1e3,
                          "tbps": cell.bytes / us / 1e6, "ceiling": ceiling, "wrong": not right, "gpu": gpu,
                          "commit": commit}  # fmt: skip
                file.write(json.dumps(record) + "\n")
        print(line(cell, found, ceiling), flush=True)
        if args.skeleton and not reached(cell, found):
            missed.append(f"{cell.name}: {SKELETON[cell.name][1]} {SKELETON[cell.name][0]}")
        del data, calls
    print(f"reads {read_rate(clock):.2f} TB/s at the end; {time.monotonic() - begin:.0f} s")
    if left:
        print(f"next: the same command with --run {run} --cells '{','.join(left)}'")
    if missed:
        print(f"missed: {'; '.join(missed)}")
    return 1 if missed else 0


def line(cell: Cell, found: dict[str, tuple[float, bool]], ceiling: float) -> str:
    """What is printed of a cell; `!` behind who is wrong."""
    parts = []
    for name, (us, right) in found.items():
        rate = cell.bytes / us / 1e6
        parts.append(f"{name} {us:.1f} us {rate:.2f} TB/s ({rate / ceiling:.0%})" + "!" * (not right))
    return f"{cell.name:22s} {cell.bytes / 1e6:7.0f} MB  " + "  ".join(parts)


def reached(cell: Cell, found: dict[str, tuple[float, bool]]) -> bool:
    """Whether ours is right, and as fast as `SKELETON` says."""
    if "fa2cupy" not in found or not found["fa2cupy"][1]:
        return False
    us, (unit, bar) = found["fa2cupy"][0], SKELETON[cell.name]
    return us <= bar if unit == "us" else cell.bytes / us / 1e6 >= bar


def _rehearse(cells: Sequence[Cell]) -> int:
    wrong = []
    for cell in cells:
        tiny = dataclasses.replace(
            cell, batch=min(cell.batch, 3), seqlen=max(64, cell.seqlen // 128), queries=min(cell.queries, 5),
            window=None if cell.window is None else 20,
        )  # fmt: skip
        data = Data(tiny, 1, np)
        found = measure(data, {"fa2cupy": ours(data)}, None, 1)
        print(line(tiny, found, 1.0))
        if not found["fa2cupy"][1]:
            wrong.append(cell.name)
    if wrong:
        print(f"wrong: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
