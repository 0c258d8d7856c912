"""How far out, lse and the gradients are from float64: ours, FA2 and cuDNN (torch's), on the same inputs.

    python benchmarks/numerics.py               # on a GPU; status 1 if a bar is missed
    python benchmarks/numerics.py --rehearse    # on the CPU, small, printed only; FA2 is then the CPU's flash attention

Appends to results/numerics/<gpu>.jsonl and renews the tables of docs/numerics.md. The reference is the formula in
float64 of the rounded inputs. "format" is the same in float64, but with P, dS and the results rounded to the inputs'
format, which every kernel must do: nobody can be expected far below.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.plans import plan_of
from fa2cupy.jit.driver import DeviceInfo

PAGE = results.ROOT / "docs" / "numerics.md"
MARKED = re.compile(r"(?<=<!-- numerics: begin -->\n).*?(?=<!-- numerics: end -->)", re.DOTALL)
WHO = ("fa2cupy", "fa2", "cudnn", "format")
LABELS = {"fa2cupy": "fa2cupy", "fa2": "FA2", "cudnn": "cuDNN", "format": "format"}
OUTPUTS = ("out", "dq", "dk", "dv")
BAR = 1.05
BATCH, HEADS = 8, 4
CASES = ("dtype", "inputs", "head_dim", "causal", "seqlen")

Record = Mapping[str, Any]


def cases(seqlens: Sequence[int]) -> Iterator[dict[str, Any]]:
    kinds = (("bfloat16", "float16"), ("normal", "outliers"), (64, 128), (False, True), seqlens)
    return (dict(zip(CASES, values, strict=True)) for values in itertools.product(*kinds))


def inputs(case: Record, device: str, seed: int) -> list[Any]:
    """q, k, v, dout: (batch, seqlen, heads, head_dim), normal; outliers add 10 times a normal number to 0.1% of the
    entries of q, k and v."""
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)
    shape, made = (BATCH if device == "cuda" else 2, case["seqlen"], HEADS, case["head_dim"]), []
    for name in ("q", "k", "v", "dout"):
        x = torch.randn(shape, device=device, generator=generator)
        if case["inputs"] == "outliers" and name != "dout":
            chosen = torch.rand(shape, device=device, generator=generator) < 1e-3
            x += 10 * torch.randn(shape, device=device, generator=generator) * chosen
        made.append(x.to(getattr(torch, case["dtype"])))
    return made


def compute(who: str, q: Any, k: Any, v: Any, dout: Any, causal: bool) -> dict[str, Any]:
    """out, lse, dq, dk, dv of one library. torch's operators are called by name, so that no choice comes between."""
    import torch

    if who == "format":
        from tests.reference import attention_backward_model, attention_model

        out, lse = attention_model(q, k, v, causal, xp=torch)
        gradients = attention_backward_model(dout, q, k, v, causal, out=out, xp=torch)
        return {"out": out, "lse": lse, **dict(zip(OUTPUTS[1:], gradients, strict=True))}
    if who == "fa2cupy":
        import fa2cupy

        out, lse = fa2cupy.attention(q, k, v, causal=causal, return_lse=True)
        gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=causal)
        return {"out": out, "lse": lse, **dict(zip(OUTPUTS[1:], gradients, strict=True))}
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    by_head = [x.transpose(1, 2) for x in leaves]
    if who == "cudnn":
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*by_head, None, True, 0.0, causal)[:2]
    elif q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(*by_head, 0.0, causal)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*by_head, 0.0, causal)[:2]
    out = out.transpose(1, 2)
    gradients = torch.autograd.grad(out, leaves, dout)
    lse = lse.detach().squeeze(3) if lse.dim() == 4 else lse.detach()
    return {"out": out.detach(), "lse": lse, **dict(zip(OUTPUTS[1:], gradients, strict=True))}


def reference(q: Any, k: Any, v: Any, dout: Any, causal: bool) -> dict[str, Any]:
    import torch

    from tests.reference import attention_backward_reference, attention_reference

    out, lse = attention_reference(q, k, v, causal, xp=torch)
    gradients = attention_backward_reference(dout, q, k, v, causal, xp=torch)
    return {"out": out, "lse": lse, **dict(zip(OUTPUTS[1:], gradients, strict=True))}


def errors(got: Mapping[str, Any], right: Mapping[str, Any], dtype: str) -> dict[str, dict[str, float]]:
    """By output: rms error over the rms of the reference, largest error over it, share of the elements that are the
    reference rounded to the format. Of lse the largest error."""
    import torch

    found = {"lse": {"max": float((got["lse"].double() - right["lse"]).abs().max())}}
    for name in OUTPUTS:
        x, ref = got[name], right[name]
        unit, error = ref.square().mean().sqrt(), x.double() - ref
        exact = x.double() == ref.to(getattr(torch, dtype)).double()
        found[name] = {
            "rms": float(error.square().mean().sqrt() / unit),
            "max": float(error.abs().max() / unit),
            "exact": float(exact.double().mean()),
        }
    return found


def plans(seqlens: Sequence[int], device: DeviceInfo) -> list[Any]:
    """What ours launches, case by case."""
    return [
        plan_of(
            Case(mode, case["head_dim"], case["seqlen"], case["causal"], BATCH, HEADS, HEADS, case["dtype"]), device
        )
        for case in cases(seqlens)
        for mode in ("fwd", "bwd")
    ]


def compile_ahead(seqlens: Sequence[int]) -> None:
    """All of our kernels at once, into the cache on disk."""
    from benchmarks.variants import jobs_of
    from fa2cupy.jit import compile_many, driver

    for result in compile_many(jobs_of(plans(seqlens, driver.device_info(0)))):
        if result.error is not None:
            raise result.error


def measure(args: argparse.Namespace) -> list[Record]:
    import torch

    device = "cpu" if args.rehearse else "cuda"
    if not args.rehearse:
        compile_ahead(args.seqlens)
    common = {
        "run": results.new_run_id(),
        "gpu": "CPU" if args.rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": results.new_run_id()[:10],
        "commit": args.commit or results.commit(),
        "command": results.command("numerics.py", sys.argv[1:]),
    }
    who = [name for name in WHO if not (args.rehearse and name == "cudnn")]
    records = []
    for seed, case in enumerate(cases(args.seqlens)):
        tensors = inputs(case, device, seed)
        right = reference(*tensors, case["causal"])
        found = {name: errors(compute(name, *tensors, case["causal"]), right, case["dtype"]) for name in who}
        records.append({**common, **case, "errors": found})
    return records


# ----------------------------------------------------------------------------------------------------------------------


def worst(records: Sequence[Record]) -> tuple[float, str]:
    """Our rms error over that of the better peer, where it is largest; NaN is larger than anything."""
    found = []
    for row in records:
        peers = [row["errors"][name] for name in ("fa2", "cudnn") if name in row["errors"]]
        for name in OUTPUTS:
            ratio = row["errors"]["fa2cupy"][name]["rms"] / min(peer[name]["rms"] for peer in peers)
            found.append((ratio if math.isfinite(ratio) else math.inf, f"{name}, {describe(row)}"))
    return max(found)


def describe(row: Record) -> str:
    mask = "causal" if row["causal"] else "full"
    return f"{row['dtype']}, {row['inputs']}, head_dim {row['head_dim']}, {mask}, S {row['seqlen']:,}"


def block(records: Sequence[Record]) -> str:
    """The tables in Markdown."""
    row = records[0]
    who = [name for name in WHO if name in row["errors"]]
    ratio, where = worst(records)
    said = (
        f"{row['gpu']}, {row['date']}, `{row['command']}`, torch {row['torch']}, commit {row['commit']}. Our rms error "
        f"over that of the better peer: at most {ratio:.3f} ({where}); the bar is {BAR}."
    )
    summary = (
        "Over all shapes: the mean relative rms error, the largest error of an element over the rms of its tensor, and "
        "how many elements are the float64 result rounded to the format."
    )
    lines = [
        said,
        "",
        summary,
        "",
        "| dtype, inputs | | " + " | ".join(f"{LABELS[name]} rms | max | exact" for name in who) + " |",
        "|---|---|" + "---:|---:|---:|" * len(who),
    ]
    kinds = list(dict.fromkeys((row["dtype"], row["inputs"]) for row in records))
    for kind, output in itertools.product(kinds, OUTPUTS):
        cells = []
        for name in who:
            found = [row["errors"][name][output] for row in records if (row["dtype"], row["inputs"]) == kind]
            rms, exact = (sum(e[key] for e in found) / len(found) for key in ("rms", "exact"))
            cells += [f"{rms:.2e}", f"{max(e['max'] for e in found):.1e}", f"{exact:.1%}"]
        lines.append(f"| {', '.join(kind)} | {output} | " + " | ".join(cells) + " |")
    heads = " / ".join(LABELS[name] for name in who)
    lines += [
        "",
        f"Every shape, {heads}: relative rms errors in units of 10^-4, of lse the largest error in units of 10^-6.",
        "",
        "| dtype | inputs | head_dim | mask | S | out | dq | dk | dv | lse |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in records:
        cells = [" / ".join(f"{1e4 * row['errors'][name][output]['rms']:.2f}" for name in who) for output in OUTPUTS]
        cells.append(" / ".join(f"{1e6 * row['errors'][name]['lse']['max']:.2f}" for name in who))
        mask = "causal" if row["causal"] else "full"
        start = [row["dtype"], row["inputs"], str(row["head_dim"]), mask, f"{row['seqlen']:,}"]
        lines.append("| " + " | ".join(start + cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seqlens", type=lambda text: [int(x) for x in text.split(",")], default=None)
    parser.add_argument("--commit", help="default: what git says")
    parser.add_argument("--out", type=Path, help="folder of the records (default: results/numerics)")
    parser.add_argument("--from", dest="records", type=Path, help="no measuring: the last run of this file")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small, printed only")
    args = parser.parse_args(arguments)
    args.seqlens = args.seqlens or ([16, 48] if args.rehearse else [512, 1024, 2048, 4096])
    if args.records:
        found = [json.loads(line) for line in args.records.read_text().splitlines()]
        records: list[Record] = [row for row in found if row["run"] == found[-1]["run"]]
    else:
        records = measure(args)
    text = block(records)
    print(text)
    if not args.rehearse:
        if not args.records:
            path = (args.out or results.RESULTS / "numerics") / results.file_name(records[0]["gpu"])
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        page = PAGE.read_text(encoding="utf-8")
        if not MARKED.search(page):
            raise ValueError(f"{PAGE} has no block between <!-- numerics: begin --> and <!-- numerics: end -->")
        PAGE.write_text(MARKED.sub(lambda _: f"\n{text}\n", page), encoding="utf-8")
    ratio, where = worst(records)
    print(f"our error over the better peer's: at most {ratio:.3f} ({where}); the bar is {BAR}")
    return 0 if ratio <= BAR or args.rehearse else 1


if __name__ == "__main__":
    raise SystemExit(main())
