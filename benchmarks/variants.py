"""Try tiles: compile many variants of a kernel at once, check each, time them in turns, print a table.

    python benchmarks/variants.py fwd:d128:b4:s4096:h16:causal+fwd:d128:b4:s4096:h16:full \\
        "block_m=128,block_n=64,num_warps=4" "block_m=128,block_n=128,num_warps=8,q_steps_in_regs=8" "FA2_SOMETHING=1"

The first variant is always the row of the table as it is. A variant changes fields of that row (lower case: FwdTile
and the others in fa2cupy/kernels/sm80 and sm90) and defines (FA2_...), separated by commas. `a|b` after `=` stands for
either, so that "block_n=32|64,num_warps=4|8" is four variants. --file reads variants from a file, one a line (#
comments).
--compile-only needs no GPU: registers, spills and shared memory for the architecture that --arch names.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import Case, parse_case
from benchmarks.plans import plan_of
from benchmarks.timing import TorchClock, take_turns
from fa2cupy.jit import compile_many, driver
from fa2cupy.kernels import CompileJob
from fa2cupy.kernels.tiles import SHARED_MEMORY

POINTERS = {"fwd": ("q", "k", "v", "out", "lse"), "bwd": ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")}
HEADER = f"{'smem KB':>7s}{'regs':>5s}{'spill':>7s}"
TOLERANCE = 1.5  # a variant's rms error, relative to that of the row of the table


@dataclass(frozen=True, slots=True)
class Variant:
    """Changes to a tile row and to the defines; an empty one is the row as it is."""

    tile: tuple[tuple[str, Any], ...] = ()
    defines: tuple[tuple[str, int | str], ...] = ()

    def __str__(self) -> str:
        return ",".join(f"{k}={v}" for k, v in (*self.tile, *self.defines)) or "(the row as it is)"


def expand(text: str) -> list[Variant]:
    """``a=1|2,FA2_B=3`` -> two variants. ValueError for anything else."""
    options = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, values = part.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{part!r} is not of the form name=value")
        options.append([(name, _value(v)) for v in values.split("|")])
    return [
        Variant(
            tuple((k, v) for k, v in choice if not k.startswith("FA2_")),
            tuple((k, v) for k, v in choice if k.startswith("FA2_")),
        )
        for choice in itertools.product(*options)
    ]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def plan_variant(case: Case, info: driver.DeviceInfo, variant: Variant, deterministic: bool) -> Any:
    """The case's plan with the variant's tile and defines. ValueError for a field that the tile does not have."""
    row = plan_of(case, info, deterministic=deterministic).tile
    unknown = [name for name, _ in variant.tile if name not in {f.name for f in fields(row)}]
    if unknown:
        raise ValueError(f"{type(row).__name__} has no {unknown[0]!r}: {', '.join(f.name for f in fields(row))}")
    plan = plan_of(case, info, deterministic=deterministic, tile=replace(row, **dict(variant.tile)))
    if not variant.defines:
        return plan
    extra: Mapping[str, int | str] = dict(variant.defines)
    return replace(plan, launches=tuple(replace(x, defines={**x.defines, **extra}) for x in plan.launches))


def main_launch(plan: Any) -> Any:
    """The launch of the kernel that the tile belongs to."""
    return next(launch for launch in plan.launches if not launch.source.startswith("smxx/"))


def jobs_of(plans: Sequence[Any]) -> list[CompileJob]:
    jobs = {}
    for plan in plans:
        for x in plan.launches:
            key = (x.source, x.name, tuple(sorted(x.defines.items())))
            jobs[key] = CompileJob(x.source, x.name, x.arch, x.defines, x.name, x.config.shared_mem_bytes, 0)
    return list(jobs.values())


def compile_plans(plans: Sequence[Any]) -> list[tuple[str, str]]:
    """For each plan (what there is to say about its main kernel, the error or nothing)."""
    results = {
        (r.job.source, r.job.name, tuple(sorted(r.job.defines.items()))): r for r in compile_many(jobs_of(plans))
    }
    rows = []
    for plan in plans:
        of_plan = [results[(x.source, x.name, tuple(sorted(x.defines.items())))] for x in plan.launches]
        error = next((str(r.error) for r in of_plan if r.error is not None), "")
        main = main_launch(plan)
        resources = results[(main.source, main.name, tuple(sorted(main.defines.items())))].resources
        text = f"{main.config.shared_mem_bytes / 1024:6.1f}"
        text += (
            f"{resources.registers:6d}{resources.spill_bytes:7d}" if resources is not None else f"{'-':>6s}{'-':>7s}"
        )
        rows.append((text, error))
    return rows


def device_of(arch: str) -> driver.DeviceInfo:
    """An architecture as a device to plan for; the numbers of an H100 but for its shared memory."""
    digits = arch.removeprefix("sm_").removesuffix("a")
    cc = int(digits[:-1]), int(digits[-1])
    return driver.DeviceInfo(0, arch, cc, 132, SHARED_MEMORY[f"sm_{digits}"], 50 << 20)


class Runner:
    """The case's arrays on the GPU, and calls of plans on them."""

    def __init__(self, case: Case) -> None:
        import torch

        import fa2cupy
        from benchmarks import peers

        self.torch, self.case = torch, case
        tensors = peers.make_tensors(case)
        q, k, v = tensors.q.detach(), tensors.k.detach(), tensors.v.detach()
        out, lse = fa2cupy.attention(q, k, v, causal=case.causal, return_lse=True)
        inputs = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": tensors.dout}
        self.inputs = {name: x for name, x in inputs.items() if name in POINTERS[case.mode]}
        names = ("out", "lse") if case.mode == "fwd" else ("dq", "dk", "dv")
        like = dict(inputs, dq=q, dk=k, dv=v)
        self.outputs = {name: torch.empty_like(like[name]) for name in names}
        self.expected = self._reference(tensors)

    def _reference(self, tensors: Any) -> dict[str, Any]:
        """The outputs of the first (batch, key head) in float64, by the plain formula: enough to catch a wrong tile."""
        torch, case = self.torch, self.case
        group = case.num_heads // case.num_heads_k
        with torch.enable_grad():
            q = tensors.q.detach()[:1, :, :group].transpose(1, 2).double().requires_grad_()
            k, v = (x.detach()[:1, :, :1].transpose(1, 2).double().requires_grad_() for x in (tensors.k, tensors.v))
            scores = q @ k.mT * case.head_dim**-0.5
            if case.causal:
                rows = torch.arange(case.seqlen, device="cuda")
                scores = scores.masked_fill(rows[None, :] > rows[:, None], float("-inf"))
            out = torch.softmax(scores, -1) @ v
            if case.mode == "fwd":
                return {"out": out.detach().transpose(1, 2)}
            dout = tensors.dout[:1, :, :group].transpose(1, 2).double()
            gradients = torch.autograd.grad(out, (q, k, v), dout)
        return {name: x.transpose(1, 2) for name, x in zip(("dq", "dk", "dv"), gradients, strict=True)}

    def call(self, plan: Any) -> Any:
        """A function without arguments that launches the plan, its workspace filled with NaN once."""
        torch = self.torch
        launch = plan.bind(torch.cuda.current_device())
        workspace = torch.full((plan.workspace_bytes + 256,), 255, dtype=torch.uint8, device="cuda")
        aligned = workspace.data_ptr() + -workspace.data_ptr() % 256
        arrays = {**self.inputs, **self.outputs}
        pointers = tuple(arrays[name].data_ptr() for name in POINTERS[self.case.mode])
        pointers += (aligned,) if self.case.mode == "bwd" else ()
        stream = torch.cuda.current_stream().cuda_stream

        def call(_keep: Any = workspace) -> None:
            launch(pointers, stream)

        return call

    def error(self, call: Any) -> float:
        """Largest relative rms error of the outputs; NaN if something is not written."""
        for x in self.outputs.values():
            x.fill_(float("nan"))
        call()
        errors = []
        for name, expected in self.expected.items():
            got = self.outputs[name][:1, :, : expected.shape[2]].double()
            errors.append(float((got - expected).norm() / expected.norm()))
        finite = all(bool(self.torch.isfinite(x).all()) for x in self.outputs.values())
        return max(errors) if finite else float("nan")


def time_variants(case: Case, plans: Mapping[Variant, Any], texts: Mapping[Variant, str], bursts: int) -> None:
    """Check each plan against the row of the table (the first one), time those that are right, print the table."""
    runner, calls, problems = Runner(case), {}, {}
    allowed = 0.0
    for variant, plan in plans.items():
        try:
            call = runner.call(plan)
            found = runner.error(call)
        except Exception as failure:
            problems[variant] = f"{type(failure).__name__}: {failure}".splitlines()[0]
            continue
        allowed = allowed or TOLERANCE * found
        if found <= allowed:
            calls[variant] = call
        else:
            problems[variant] = f"WRONG: rms error {found:.2e}, allowed {allowed:.2e}"
    timings = take_turns({str(v): call for v, call in calls.items()}, TorchClock(), bursts=bursts) if calls else {}
    print(f"     ms  TFLOP/s {HEADER}  variant")
    for variant in sorted(calls, key=lambda v: timings[str(v)].ms):
        ms = timings[str(variant)].ms
        print(f"{ms:7.3f}{case.flops / ms / 1e9:9.0f} {texts[variant]}  {variant}")
    for variant, problem in problems.items():
        print(f"      -        - {texts[variant]}  {variant}: {problem}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", help="fwd:d128:b4:s4096:h16:causal, or several with + between them")
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--file", type=Path, help="more variants, one a line")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--arch", default="sm_90", help="with --compile-only")
    parser.add_argument("--bursts", type=int, default=8)
    args = parser.parse_args(arguments)
    try:
        cases = [parse_case(text) for text in args.cases.split("+")]
        lines = args.file.read_text().splitlines() if args.file else []
        texts = args.variants + [line.split("#")[0].strip() for line in lines]
        variants = list(dict.fromkeys([Variant(), *(v for text in texts if text for v in expand(text))]))
        info = device_of(args.arch) if args.compile_only else driver.device_info(0)
        plans = [plan_variant(case, info, variant, args.deterministic) for case in cases for variant in variants]
    except ValueError as mistake:
        parser.error(str(mistake))
    compiled = compile_plans(plans)
    for number, case in enumerate(cases):
        mine = slice(number * len(variants), (number + 1) * len(variants))
        told = dict(zip(variants, compiled[mine], strict=True))
        print(f"\n{case.label}{' deterministic' if args.deterministic else ''}")
        if args.compile_only:
            print(HEADER)
            for variant, (text, _) in told.items():
                print(f"{text}  {variant}")
        else:
            good = {v: p for v, p in zip(variants, plans[mine], strict=True) if not told[v][1]}
            time_variants(case, good, {v: text for v, (text, _) in told.items()}, args.bursts)
        for variant, (_, error) in told.items():
            if error:
                first = next((line for line in error.splitlines() if "error:" in line), error)
                print(f"does not compile: {variant}\n    {first[:300]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
