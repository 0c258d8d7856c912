"""compute-sanitizer over a small case of each kernel.

    python tests/gpu/sanitizer.py [--tools memcheck,racecheck,initcheck,synccheck] [--record tests/gpu/record.json]

The cases below are run once without a tool, which compiles their kernels, then by each tool, all side by side, with
CuPy's pool off: every array is an allocation that the tool knows the bounds of. The cases of a tool are shared by some
processes, for most of its time is the host's. Fails when a tool reports an error; with --record the outcome goes into
that record, if it is for these sources.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu import record

ROOT = record.ROOT

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
EXTRA = {
    "memcheck": ["--leak-check", "no", "--report-api-errors", "no"],  # CuPy probes; its real errors are exceptions
    "racecheck": ["--racecheck-report", "all"],
    "initcheck": [],
    "synccheck": [],
}

SHARES = {"memcheck": 2, "racecheck": 6, "initcheck": 3, "synccheck": 3}  # processes of each tool

# seqlen_q, seqlen_k, (head_dim, head_dim_v), heads, dtype, causal, deterministic, unaligned, window. A tile and a bit
# in both directions and every kind of kernel: wide and narrow heads, a v of another width, GQA, 16-byte and 2-byte
# loads, empty rows, masked and unmasked blocks, windows.
DENSE = (
    (150, 230, (64, 64), (2, 1), "bfloat16", True, False, False, None),
    (150, 230, (64, 64), (1, 1), "float16", False, True, False, None),
    (150, 230, (128, 128), (2, 1), "float16", True, False, False, None),
    (150, 230, (128, 128), (1, 1), "bfloat16", False, False, True, None),
    (130, 130, (59, 59), (2, 1), "bfloat16", True, True, False, None),
    (100, 140, (192, 192), (1, 1), "bfloat16", True, False, False, None),
    (100, 140, (256, 256), (2, 1), "bfloat16", True, True, False, None),
    (100, 140, (256, 256), (1, 1), "float16", False, False, True, None),
    (190, 70, (96, 96), (1, 1), "bfloat16", True, False, False, None),
    # Query heads in each of those that share keys; so many key blocks that dQ is cleared before.
    (40, 3200, (64, 64), (8, 1), "bfloat16", True, True, False, None),
    (40, 2300, (64, 64), (1, 1), "float16", False, False, False, None),
    (150, 230, (192, 128), (2, 1), "bfloat16", True, False, False, None),
    (150, 230, (40, 72), (1, 1), "float16", False, True, False, None),
    (9, 0, (64, 64), (1, 1), "bfloat16", False, False, False, None),
    (150, 330, (64, 64), (2, 1), "float16", False, False, False, (70, 20)),
    (150, 330, (128, 128), (2, 1), "bfloat16", False, True, False, (100, 10)),
    (200, 140, (256, 256), (1, 1), "bfloat16", True, False, False, (30, 0)),
)

# Which lengths, (head_dim, head_dim_v), heads, dtype, causal, deterministic, window: of sequences that only the device
# knows, which take their tiles from lists. Each kind of lengths has a narrow and a wide head, and both orders.
LISTED = (
    ("segments", (64, 64), (2, 1), "bfloat16", True, False, None),
    ("packed", (59, 59), (1, 1), "float16", False, False, None),
    ("padded", (128, 128), (2, 1), "float16", False, True, None),
    ("segments", (128, 128), (1, 1), "bfloat16", False, True, (100, 20)),
    ("packed", (192, 128), (1, 1), "bfloat16", True, True, None),
    ("segments", (256, 256), (2, 1), "float16", True, False, (60, 0)),
    ("padded", (256, 256), (1, 1), "bfloat16", True, False, None),
)

# head_dim, dtype, whether packed, which of tests/scores.py.
SCORED = (
    (64, "bfloat16", False, ("sinks",)),
    (128, "float16", True, ("sinks", "dropout_p")),
    (256, "bfloat16", True, ("softcap", "sinks")),
    (64, "float16", False, ("softcap", "alibi_slopes", "dropout_p")),
    (128, "bfloat16", False, ("alibi of batch", "dropout_p")),
    (256, "float16", False, ("softcap", "alibi_slopes", "dropout_p")),
)

MERGED = ((4, 128, "bfloat16"), (2, 59, "float16"), (9, 64, "float32"))  # pieces, head_dim_v, dtype

# Keys of each sequence before the call, and what else a cache and a call on it are (tests/caches.py): rows, pages, new
# keys that are turned, many of them, odd columns, scores, 8 bits.
_TURNED = (32, "neox", "float32")
CACHED: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((700, 0, 17), {"head_dim": 128, "capacity": 704}),
    ((300, 0, 17), {"queries": 9, "head_dim": 64, "page": 64, "capacity": 320, "dtype": "bfloat16"}),
    ((300, 5), {"queries": 2, "new": 2, "head_dim": 128, "page": 17, "capacity": 306, "rotary": _TURNED}),
    ((90, 5), {"queries": (70, 40), "new": 1, "head_dim": 64, "page": 16, "rotary": _TURNED}),
    ((100, 7), {"queries": 2, "new": 1, "head_dim": 33, "head_dim_v": 7, "leftpad": (30, 0), "softcap": 2.0,
                "slopes": "head", "sinks": "float32", "dtype": "bfloat16"}),
    ((40, 7), {"queries": 2, "new": 2, "head_dim": 64, "page": 16, "kv_dtype": "float8_e4m3fn",
               "scales": ("page", "head")}),
    ((300, 7), {"new": 1, "head_dim": 256, "page": 16, "capacity": 320, "kv_dtype": "int8"}),
)  # fmt: skip


@contextlib.contextmanager
def sm80_kernels() -> Iterator[None]:
    """FA2CUPY_KERNEL=sm80, for calls that the process has made before too."""
    from fa2cupy.calls import PREPARED

    os.environ["FA2CUPY_KERNEL"] = "sm80"
    PREPARED.clear()
    yield
    del os.environ["FA2CUPY_KERNEL"]
    PREPARED.clear()


class Tools:
    """What a case needs."""

    def __init__(self, seed: int) -> None:
        import cupy
        import ml_dtypes
        import numpy as np

        self.np, self.cupy, self.rng = np, cupy, np.random.default_rng(seed)
        self.types = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

    def normal(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        """On the host."""
        return self.rng.standard_normal(shape).astype(self.types[dtype])

    def int32(self, *values: int) -> Any:
        return self.cupy.asarray(self.np.array(values, self.np.int32))

    def nan_like(self, x: Any) -> Any:
        """For results. Bulk stores initialise nothing in initcheck's eyes: NaN is there already, none may be left."""
        return self.cupy.full_like(x, math.nan)

    def workspace(self, size: int) -> dict[str, Any]:
        """Likewise: there the Hopper backward's first key block writes dQ."""
        return {"workspace": self.cupy.full(size, 0xFF, self.cupy.uint8)} if size else {}

    def check(self, *results: Any) -> None:
        for x in results:
            assert self.np.isfinite(self.cupy.asnumpy(x).astype(self.np.float32)).all()


def run_cases(share: int, shares: int) -> None:
    """What the tools watch: a share of the cases, forward and backward, results finite."""
    import cupy

    cupy.cuda.set_allocator(None)  # cudaMalloc and cudaFree of the exact size
    runs = [(run, case) for run, cases in RUNS.items() for case in cases]
    for number in range(share, len(runs), shares):
        run, case = runs[number]
        start = time.monotonic()
        run(Tools(number), *case)
        cupy.cuda.Device().synchronize()
        print(f"{time.monotonic() - start:6.1f} s  {run.__name__}{case}", flush=True)


def dense(
    tools: Tools, seqlen_q: int, seqlen_k: int, widths: tuple[int, int], all_heads: tuple[int, int], dtype: str,
    causal: bool, deterministic: bool, unaligned: bool, window: tuple[int, int] | None,
) -> None:  # fmt: skip
    import fa2cupy

    def array(seqlen: int, heads: int, width: int) -> Any:
        shape = (1, seqlen, heads, width)
        return tools.cupy.asarray(tools.normal((math.prod(shape) + unaligned,), dtype))[int(unaligned) :].reshape(shape)

    (d, d_v), (heads, heads_k) = widths, all_heads
    q, dout = array(seqlen_q, heads, d), array(seqlen_q, heads, d_v)
    k, v = array(seqlen_k, heads_k, d), array(seqlen_k, heads_k, d_v)
    seen = {"causal": causal, "window_size": window}
    out, lse = fa2cupy.attention(q, k, v, **seen, return_lse=True, out=tools.nan_like(dout))
    with sm80_kernels():
        again = fa2cupy.attention(q, k, v, **seen)
    options = {**seen, "deterministic": deterministic}
    workspace = tools.workspace(fa2cupy.backward_workspace_bytes(q, k, v, **options))
    tools.check(out, again, *fa2cupy.attention_backward(dout, q, k, v, out, lse, **options, **workspace))


def listed(
    tools: Tools, kind: str, widths: tuple[int, int], all_heads: tuple[int, int], dtype: str, causal: bool,
    deterministic: bool, window: tuple[int, int] | None,
) -> None:  # fmt: skip
    """NaN in rows of no sequence, and none in any result."""
    import fa2cupy

    np, (d, d_v), (heads, heads_k) = tools.np, widths, all_heads
    if kind == "packed":
        used_q, used_k = np.arange(230) >= 3, np.arange(333) < 330
        lengths = {
            "cu_seqlens_q": tools.int32(3, 153, 153, 154, 230),
            "cu_seqlens_k": tools.int32(0, 200, 230, 231, 330),
        }
    elif kind == "padded":
        used_q = np.arange(150) < np.array([[150], [70]])
        used_k = (np.arange(200) < np.array([[200], [160]])) & (np.arange(200) >= np.array([[0], [37]]))
        lengths = {
            "seqused_q": tools.int32(150, 70),
            "seqused_k": tools.int32(200, 160),
            "leftpad_k": tools.int32(0, 37),
        }
    else:
        # Two rows: of a long segment, many short ones, more than have room, and padding; and of a single one.
        ids = [
            np.array(
                [np.concatenate([np.zeros(long), np.repeat(np.arange(1, 21), short), np.full(rest, -1)]), np.full(n, 3)]
            )
            for n, long, short, rest in ((150, 60, 3, 30), (230, 100, 5, 30))
        ]
        used_q, used_k = (x >= 0 for x in ids)
        lengths = {"segment_ids": tuple(tools.cupy.asarray(x.astype(np.int32)) for x in ids)}

    def array(used: Any, heads: int, width: int) -> Any:
        values = tools.normal((*used.shape, heads, width), dtype)
        values[~used] = np.nan
        return tools.cupy.asarray(values)

    q, dout = array(used_q, heads, d), array(used_q, heads, d_v)
    k, v = array(used_k, heads_k, d), array(used_k, heads_k, d_v)
    run_both(tools, fa2cupy, (q, k, v, dout), {"causal": causal, "window_size": window, **lengths}, deterministic)


def scored(tools: Tools, d: int, dtype: str, packed: bool, names: tuple[str, ...]) -> None:
    """With rows that see no key but the sink: dense, and packed with NaN in rows of no sequence."""
    import fa2cupy
    from tests.reference import as_ml_dtypes
    from tests.scores import draw_features

    np, batch = tools.np, 4 if packed else 1
    features = {
        name: tools.cupy.asarray(as_ml_dtypes(value)) if isinstance(value, np.ndarray) else value
        for name, value in draw_features(names, d // 64, batch, 2, dtype).items()
    }
    lengths = {}
    if packed:
        lengths["cu_seqlens_q"] = tools.int32(3, 103, 103, 104, 204)
        # At 256 some are shorter: rows that see nothing.
        lengths["cu_seqlens_k"] = lengths["cu_seqlens_q"] if d == 128 else tools.int32(3, 40, 70, 104, 204)

    def array(rows: int, heads: int) -> Any:
        values = tools.normal((rows, heads, d), dtype)
        if packed:
            values[:3], values[204:] = np.nan, np.nan
        return tools.cupy.asarray(values if packed else values[None])

    rows_k = 210 if packed else 140
    inputs = array(210, 2), array(rows_k, 1), array(rows_k, 1), array(210, 2)
    more: dict[str, Any] = {}
    if "sinks" in names:
        more = {"dlse": tools.cupy.asarray(tools.normal((2, 210) if packed else (1, 2, 210))), "grad_of": ("sinks",)}
    run_both(tools, fa2cupy, inputs, {"causal": True, **features, **lengths}, False, **more)


def run_both(
    tools: Tools, fa2cupy: Any, inputs: Any, options: dict[str, Any], deterministic: bool, **more: Any
) -> None:
    """Forward and backward, by the kernels of this GPU and those of every GPU."""
    q, k, v, dout = inputs
    for kernels in (contextlib.nullcontext, sm80_kernels):
        with kernels():
            workspace = tools.workspace(fa2cupy.forward_workspace_bytes(q, k, v, **options))
            given = {"out": tools.nan_like(dout), **workspace}
            out, lse = fa2cupy.attention(q, k, v, **options, return_lse=True, **given)
            backward = {**options, "deterministic": deterministic}
            workspace = tools.workspace(fa2cupy.backward_workspace_bytes(q, k, v, **backward))
            gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, **backward, **more, **workspace)
            tools.check(out, *gradients)


def merging(tools: Tools, pieces: int, d: int, dtype: str) -> None:
    from fa2cupy import merged
    from fa2cupy.frameworks import CUPY
    from fa2cupy.merge import merge_attention

    outs = [tools.cupy.asarray(tools.normal((2, 13, 3, d), dtype)) for _ in range(pieces)]
    lses = [tools.cupy.asarray(tools.normal((2, 3, 13))) for _ in range(pieces)]
    out, lse = merge_attention(outs, lses)
    douts, dlses = merged.differentiate(CUPY, (out, lse), outs, lses, out, lse)
    tools.check(out, lse, *douts, *dlses)


def cached(tools: Tools, before: tuple[int, ...], changes: dict[str, Any]) -> None:
    """NaN where nobody may read; tiles that thread blocks share, cut as they come and where split_size says."""
    import fa2cupy
    from tests import caches
    from tests.host.caches import arguments

    drawn = caches.draw(caches.CacheCase(before, heads=(4, 2), causal=True, **changes))
    q, k, v, of_cache, of_call = arguments(drawn)

    def on_gpu(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(on_gpu, x))
        return tools.cupy.asarray(x) if isinstance(x, tools.np.ndarray) else x

    of_cache, of_call = ({name: on_gpu(x) for name, x in given.items()} for given in (of_cache, of_call))
    for split_size in (None, 64):
        cache = fa2cupy.KVCache(on_gpu(k), on_gpu(v), **of_cache)
        q = on_gpu(q)
        out = tools.nan_like(q[..., : drawn.case.head_dim_v] if drawn.case.head_dim_v else q)
        tools.check(cache.attend(q, **of_call, split_size=split_size, out=out, **tools.workspace(1 << 23)))


RUNS = {dense: DENSE, listed: LISTED, scored: SCORED, merging: MERGED, cached: CACHED}


def errors_reported(output: str) -> int:
    """The number in the tool's summary line; -1 when there is none (it did not finish)."""
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", output)
    return int(found[-1]) if found else -1


def started(prefix: list[str], shares: int) -> list[subprocess.Popen[str]]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [*prefix, sys.executable, str(Path(__file__).resolve()), "--run-cases"]
    return [
        subprocess.Popen(
            [*command, f"{share}/{shares}"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )
        for share in range(shares)
    ]  # fmt: skip


def ended(process: subprocess.Popen[str], end: float) -> str:
    """Its output. A tool and what it watches are processes of one session."""
    try:
        return process.communicate(timeout=max(1.0, end - time.monotonic()))[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0] + "\nstopped: out of time"


def without_a_tool(end: float) -> float:
    """How many seconds the cases take, mostly to compile; exits if one fails."""
    start = time.monotonic()
    processes = started([], len(os.sched_getaffinity(0)))
    for process, output in [(process, ended(process, end)) for process in processes]:
        if process.returncode:
            sys.exit(f"the cases fail without a tool:\n{output}")
    return time.monotonic() - start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--record", type=Path)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for all of it")
    parser.add_argument("--run-cases", metavar="SHARE/OF", help="only what the tools watch, without a tool")
    args = parser.parse_args(arguments)
    if args.run_cases:
        run_cases(*(int(number) for number in args.run_cases.split("/")))
        return 0
    sanitizer = shutil.which("compute-sanitizer") or next(
        iter(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None
    )
    if sanitizer is None:
        sys.exit("compute-sanitizer is not here: it comes with the CUDA toolkit")
    tools = args.tools.split(",")
    end = time.monotonic() + args.timeout
    print(f"without a tool: {without_a_tool(end):.0f} s", flush=True)
    start = time.monotonic()
    running = {
        tool: started([sanitizer, "--tool", tool, "--error-exitcode", "9", *EXTRA[tool]], SHARES[tool])
        for tool in tools
    }
    outcome: dict[str, Any] = {}
    for tool, processes in running.items():
        outputs = [ended(process, end) for process in processes]
        errors = [errors_reported(output) for output in outputs]
        clean = [process.returncode == 0 and found == 0 for process, found in zip(processes, errors, strict=True)]
        found = sum(max(0, n) for n in errors)
        outcome[tool] = "clean" if all(clean) else f"{found} errors" if found else "did not finish"
        seconds = re.findall(r"^ *([\d.]+ s  .*)$", "\n".join(outputs), re.MULTILINE)
        slowest = max(seconds, key=lambda line: float(line.split()[0]), default="no case")
        print(f"{tool}: {outcome[tool]} ({time.monotonic() - start:.0f} s; the slowest: {slowest})", flush=True)
        for output, is_clean in zip(outputs, clean, strict=True):
            if not is_clean:
                lines = output.splitlines()
                print("\n".join([*lines[:60], "...", *lines[-20:]] if len(lines) > 80 else lines), flush=True)
    print("all: " + ", ".join(f"{tool} {text}" for tool, text in outcome.items()), flush=True)
    if args.record:
        current = record.read(args.record)
        if current.get("digest") != record.digest():
            print(f"{args.record} is of other sources: not written")
            return 1
        record.write({**current, "sanitizer": {**current.get("sanitizer", {}), **outcome}}, args.record)
    return 0 if all(text == "clean" for text in outcome.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
