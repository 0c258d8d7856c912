"""compute-sanitizer over a small case of each kernel.

    python tests/gpu/sanitizer.py [--tools memcheck,racecheck,initcheck,synccheck] [--record tests/gpu/record.json]

Each tool runs the cases below in a process of its own, with CuPy's pool off: every array is an allocation that the tool
knows the bounds of. Fails when a tool reports an error; with --record the outcome goes into that record, if it is for
these sources.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import shutil
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

# seqlen_q, seqlen_k, (head_dim, head_dim_v), heads, dtype, causal, deterministic, unaligned, window. A tile and a bit
# in both directions and every kind of kernel: wide and narrow heads, a v of another width, GQA, 16-byte and 2-byte
# loads, empty rows, masked and unmasked blocks, windows.
CASES = (
    (200, 330, (64, 64), (2, 1), "bfloat16", True, False, False, None),
    (200, 330, (64, 64), (2, 2), "float16", False, True, False, None),
    (150, 280, (128, 128), (2, 1), "float16", True, False, False, None),
    (150, 280, (128, 128), (2, 2), "bfloat16", False, False, True, None),
    (130, 130, (59, 59), (2, 1), "bfloat16", True, True, False, None),
    (100, 140, (192, 192), (1, 1), "bfloat16", True, False, False, None),
    (100, 140, (256, 256), (2, 1), "bfloat16", True, True, False, None),
    (100, 140, (256, 256), (1, 1), "float16", False, False, True, None),
    (190, 70, (96, 96), (2, 2), "bfloat16", True, False, False, None),
    (
        40,
        3200,
        (64, 64),
        (8, 1),
        "bfloat16",
        True,
        True,
        False,
        None,
    ),  # query heads in each of those that share keys
    (40, 2300, (64, 64), (1, 1), "float16", False, False, False, None),  # so many key blocks that dQ is cleared before
    (150, 280, (192, 128), (4, 1), "bfloat16", True, False, False, None),
    (150, 280, (40, 72), (2, 2), "float16", False, True, False, None),
    (9, 0, (64, 64), (1, 1), "bfloat16", False, False, False, None),
    (200, 330, (64, 64), (2, 1), "float16", False, False, False, (70, 20)),
    (150, 480, (128, 128), (2, 1), "bfloat16", False, True, False, (200, 10)),
    (200, 140, (256, 256), (2, 1), "bfloat16", True, False, False, (30, 0)),
)

# (head_dim, head_dim_v), heads, dtype, causal, deterministic, window: of sequences whose lengths only the device knows,
# packed, padded, and segments: every kernel that takes its tiles from lists.
LISTED = (
    ((64, 64), (2, 1), "bfloat16", True, False, None),
    ((59, 59), (2, 2), "float16", False, False, None),
    ((128, 128), (4, 2), "float16", False, True, None),
    ((128, 128), (2, 1), "bfloat16", False, False, (100, 20)),
    ((192, 128), (2, 2), "bfloat16", True, True, None),
    ((256, 256), (2, 1), "float16", True, False, (60, 0)),
)


@contextlib.contextmanager
def sm80_kernels() -> Iterator[None]:
    """FA2CUPY_KERNEL=sm80, for calls that the process has made before too."""
    from fa2cupy.calls import PREPARED

    os.environ["FA2CUPY_KERNEL"] = "sm80"
    PREPARED.clear()
    yield
    del os.environ["FA2CUPY_KERNEL"]
    PREPARED.clear()


def run_cases() -> None:
    """What the tools watch: every case once, forward and backward, results finite."""
    import cupy
    import ml_dtypes
    import numpy as np

    import fa2cupy

    cupy.cuda.set_allocator(None)  # cudaMalloc and cudaFree of the exact size
    rng = np.random.default_rng(0)
    types = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    for seqlen_q, seqlen_k, (d, d_v), (heads, heads_k), dtype, causal, deterministic, unaligned, window in CASES:

        def array(seqlen: int, h: int, d: int, dtype: str = dtype, unaligned: bool = unaligned) -> Any:
            shape = (2, seqlen, h, d)
            flat = rng.standard_normal(math.prod(shape) + unaligned).astype(types[dtype])
            return cupy.asarray(flat)[int(unaligned) :].reshape(shape)

        q, dout = array(seqlen_q, heads, d), array(seqlen_q, heads, d_v)
        k, v = array(seqlen_k, heads_k, d), array(seqlen_k, heads_k, d_v)
        # Bulk stores initialise nothing in initcheck's eyes: `out` holds NaN already, and none may be left in it.
        out = cupy.full_like(dout, math.nan)
        seen = {"causal": causal, "window_size": window}
        out, lse = fa2cupy.attention(q, k, v, **seen, return_lse=True, out=out)
        with sm80_kernels():
            again = fa2cupy.attention(q, k, v, **seen)
        # Nor the workspace, where the Hopper backward's first key block writes dQ.
        options = {**seen, "deterministic": deterministic}
        workspace = cupy.full(fa2cupy.backward_workspace_bytes(q, k, v, **options), 0xFF, cupy.uint8)
        gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, **options, workspace=workspace)
        for x in (out, again, *gradients):
            assert np.isfinite(cupy.asnumpy(x).astype(np.float32)).all()
    run_listed_cases(cupy, np, rng, types)
    run_sinks_cases(cupy, np, rng, types)
    run_merge_cases(cupy, np, rng, types)
    run_cache_cases(cupy, np)
    cupy.cuda.Device().synchronize()


def run_listed_cases(cupy: Any, np: Any, rng: Any, types: dict[str, Any]) -> None:
    """NaN in rows of no sequence, and none in any result."""
    import fa2cupy

    def numbers(*values: int) -> Any:
        return cupy.asarray(np.array(values, np.int32))

    packed = {"cu_seqlens_q": numbers(3, 153, 153, 154, 354), "cu_seqlens_k": numbers(0, 280, 310, 311, 520)}
    padded = {"seqused_q": numbers(150, 70), "seqused_k": numbers(280, 200), "leftpad_k": numbers(0, 37)}
    # Two rows: of a long segment, many short ones, more than have room, and padding; and of a single one.
    ids_q, ids_k = (
        np.array(
            [np.concatenate([np.zeros(long), np.repeat(np.arange(1, 21), short), np.full(rest, -1)]), np.full(n, 3)]
        )
        for n, long, short, rest in ((150, 60, 3, 30), (280, 100, 5, 80))
    )
    ids = {"segment_ids": tuple(cupy.asarray(x.astype(np.int32)) for x in (ids_q, ids_k))}
    for (d, d_v), (heads, heads_k), dtype, causal, deterministic, window in LISTED:
        for lengths, rows_q, rows_k in (
            (packed, (360,), (523,)),
            (padded, (2, 150), (2, 280)),
            (ids, (2, 150), (2, 280)),
        ):

            def array(rows: tuple[int, ...], h: int, d: int, used: Any, dtype: str = dtype) -> Any:
                values = rng.standard_normal((*rows, h, d)).astype(types[dtype])
                values[~used] = np.nan
                return cupy.asarray(values)

            used_q, used_k = np.zeros(rows_q, bool), np.zeros(rows_k, bool)
            if lengths is packed:
                used_q[3:354], used_k[:520] = True, True
            elif lengths is ids:
                used_q, used_k = ids_q >= 0, ids_k >= 0
            else:
                used_q[0], used_q[1, :70], used_k[0], used_k[1, 37:200] = True, True, True, True
            q, dout = array(rows_q, heads, d, used_q), array(rows_q, heads, d_v, used_q)
            k, v = array(rows_k, heads_k, d, used_k), array(rows_k, heads_k, d_v, used_k)
            seen = {"causal": causal, "window_size": window, **lengths}
            out = cupy.full_like(dout, math.nan)
            workspace = cupy.full(fa2cupy.forward_workspace_bytes(q, k, v, **seen), 0xFF, cupy.uint8)
            out, lse = fa2cupy.attention(q, k, v, **seen, return_lse=True, out=out, workspace=workspace)
            options = {**seen, "deterministic": deterministic}
            gradients = []
            for kernels in (contextlib.nullcontext, sm80_kernels):
                with kernels():
                    gradients.append(fa2cupy.attention(q, k, v, **seen))
                    size = fa2cupy.backward_workspace_bytes(q, k, v, **options)
                    workspace = cupy.full(size, 0xFF, cupy.uint8)
                    gradients += fa2cupy.attention_backward(dout, q, k, v, out, lse, **options, workspace=workspace)
            for x in (out, *gradients):
                assert np.isfinite(cupy.asnumpy(x).astype(np.float32)).all()


def run_sinks_cases(cupy: Any, np: Any, rng: Any, types: dict[str, Any]) -> None:
    """With rows that see no key but the sink: dense, and packed with NaN in rows of no sequence."""
    import fa2cupy

    starts = cupy.asarray(np.array((3, 153, 153, 154, 354), np.int32))
    for d, dtype, packed in ((64, "bfloat16", False), (128, "float16", True), (256, "bfloat16", True)):

        def array(rows: int, h: int, d: int = d, dtype: str = dtype, packed: bool = packed) -> Any:
            values = rng.standard_normal((rows, h, d)).astype(types[dtype])
            if packed:
                values[:3], values[354:] = np.nan, np.nan
            return cupy.asarray(values if packed else values[None])

        q, dout, k, v = array(360, 4), array(360, 4), array(360 if packed else 200, 2), array(360 if packed else 200, 2)
        sinks = cupy.asarray(rng.standard_normal(4).astype(np.float32))
        dlse = cupy.asarray(rng.standard_normal((4, 360) if packed else (1, 4, 360)).astype(np.float32))
        keys = starts if d == 128 else cupy.asarray(np.array((3, 40, 100, 154, 354), np.int32))  # some are shorter
        lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": keys} if packed else {}
        options = {"causal": True, "sinks": sinks, **lengths}
        for kernels in (contextlib.nullcontext, sm80_kernels):
            with kernels():
                size = fa2cupy.forward_workspace_bytes(q, k, v, **options)
                given = {"workspace": cupy.full(size, 0xFF, cupy.uint8)} if size else {}
                out, lse = fa2cupy.attention(
                    q, k, v, **options, return_lse=True, out=cupy.full_like(dout, math.nan), **given
                )
                workspace = cupy.full(fa2cupy.backward_workspace_bytes(q, k, v, **options), 0xFF, cupy.uint8)
                gradients = fa2cupy.attention_backward(
                    dout, q, k, v, out, lse, **options, dlse=dlse, grad_of=("sinks",), workspace=workspace
                )
                for x in (out, *gradients):
                    assert np.isfinite(cupy.asnumpy(x).astype(np.float32)).all()


def run_merge_cases(cupy: Any, np: Any, rng: Any, types: dict[str, Any]) -> None:
    from fa2cupy import merged
    from fa2cupy.frameworks import CUPY
    from fa2cupy.merge import merge_attention

    for pieces, d, dtype in ((4, 128, "bfloat16"), (2, 59, "float16"), (9, 64, "float32")):
        kind = types.get(dtype, np.float32)
        outs = [cupy.asarray(rng.standard_normal((2, 13, 3, d)).astype(kind)) for _ in range(pieces)]
        lses = [cupy.asarray(rng.standard_normal((2, 3, 13)).astype(np.float32)) for _ in range(pieces)]
        out, lse = merge_attention(outs, lses)
        douts, dlses = merged.differentiate(CUPY, (out, lse), outs, lses, out, lse)
        for x in (out, lse, *douts, *dlses):
            assert np.isfinite(cupy.asnumpy(x).astype(np.float32)).all()


def run_cache_cases(cupy: Any, np: Any) -> None:
    """Caches with NaN where nobody may read: rows, pages, new keys, 8 bits; tiles that thread blocks share."""
    import fa2cupy
    from tests import caches
    from tests.host.caches import arguments

    usual: dict[str, Any] = {"heads": (4, 2), "causal": True}
    turned = (32, "neox", "float32")
    for case in (
        caches.CacheCase((700, 0, 17), 1, None, head_dim=128, capacity=704, **usual),
        caches.CacheCase((300, 0, 17), 9, None, head_dim=64, page=64, capacity=320, dtype="bfloat16", **usual),
        caches.CacheCase((300, 5), 2, 2, head_dim=128, page=17, capacity=306, rotary=turned, **usual),
        caches.CacheCase((90, 5), (70, 40), 1, head_dim=64, page=16, rotary=turned, **usual),
        caches.CacheCase((100, 7), 2, 1, head_dim=33, head_dim_v=7, leftpad=(30, 0), softcap=2.0, slopes="head",
                         sinks="float32", dtype="bfloat16", **usual),
        caches.CacheCase((40, 7), 2, 2, head_dim=64, page=16, kv_dtype=caches.FLOAT8, scales=("page", "head"), **usual),
        caches.CacheCase((300, 7), 1, 1, head_dim=256, page=16, capacity=320, kv_dtype=caches.INT8, **usual),
    ):  # fmt: skip
        drawn = caches.draw(case)
        q, k, v, of_cache, of_call = arguments(drawn)
        if case.rotary is not None:
            cos, sin, style = of_call["rotary"]
            of_call["rotary"] = cupy.asarray(cos), cupy.asarray(sin), style
        of_cache, of_call = (
            {name: cupy.asarray(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
            for given in (of_cache, of_call)
        )
        for split_size in (None, 64):
            cache = fa2cupy.KVCache(cupy.asarray(k), cupy.asarray(v), **of_cache)
            out = cache.attend(cupy.asarray(q), **of_call, split_size=split_size)
            assert np.isfinite(cupy.asnumpy(out).astype(np.float32)).all()


def errors_reported(output: str) -> int:
    """The number in the tool's summary line; -1 when there is none (it did not finish)."""
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", output)
    return int(found[-1]) if found else -1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--record", type=Path)
    parser.add_argument("--timeout", type=float, default=420.0, help="seconds for each tool")
    parser.add_argument("--run-cases", action="store_true", help="only what the tools watch, without a tool")
    args = parser.parse_args(arguments)
    if args.run_cases:
        run_cases()
        return 0
    sanitizer = shutil.which("compute-sanitizer") or next(
        iter(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None
    )
    if sanitizer is None:
        sys.exit("compute-sanitizer is not here: it comes with the CUDA toolkit")
    environment = dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )
    command = [sys.executable, str(Path(__file__).resolve()), "--run-cases"]
    subprocess.run(command, check=True, env=environment, timeout=args.timeout)  # compiles everything
    tools = args.tools.split(",")
    start = time.monotonic()
    # Side by side: most of their time is the host's.
    processes = {
        tool: subprocess.Popen(
            [sanitizer, "--tool", tool, "--error-exitcode", "9", *EXTRA[tool], *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for tool in tools
    }  # fmt: skip
    outcome: dict[str, Any] = {}
    for tool, process in processes.items():
        try:
            output, _ = process.communicate(timeout=max(1.0, args.timeout - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + "\nstopped: out of time"
        errors = errors_reported(output)
        clean = process.returncode == 0 and errors == 0
        outcome[tool] = "clean" if clean else f"{errors} errors" if errors > 0 else "did not finish"
        print(f"{tool}: {outcome[tool]} ({time.monotonic() - start:.0f} s)", flush=True)
        if not clean:
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
