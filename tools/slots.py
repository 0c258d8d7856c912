"""Instructions of the kernels' steps, of the working tree and of a commit: what a change of the sources costs on paper.

    python tools/slots.py --rows 'forward bfloat16 head_dim 128 causal*'
    python tools/slots.py REV --rows '*head_dim 64*' --as band,list --define FA2_SOMETHING=0

compiles rows of the tile tables (labels as `python -m fa2cupy compile` prints them, by patterns) for --arch, as they
are plain, or as they are with a band, with lists, or both (`band+list`), from the sources of the tree and of the commit
REV, whose tables have to be the same; and from the tree's with each --define. No GPU. Needs nvdisasm, which comes with
CUDA and with Triton: on PATH, or --nvdisasm PATH.

A step is a loop around products (HMMA, HGMMA) that has no such loop inside. Of each, in the order of the code: the
instructions of the shortest and of the longest way through it, and of all of its code. The shortest way takes no branch
that it need not take (no mask), the longest takes all but loops that wait. Instructions are not time: what stands in
the shadow of a product costs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import binaries

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.\S+):")
_TARGET = re.compile(r"`\((\.\S+?)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_CONDITION = re.compile(r"^BRA\S*\s+!?U?P\w")
_ENDS = ("EXIT", "RET", "KILL")
_PRODUCTS = ("HMMA", "HGMMA", "DMMA")


@dataclasses.dataclass(frozen=True)
class Step:
    """Instructions: of the shortest way through a loop, of the longest, and of all of its code."""

    shortest: int
    longest: int
    code: int

    def __str__(self) -> str:
        return f"{self.shortest}..{self.longest} ({self.code})"


def opcode(instruction: str) -> str:
    return _PREDICATE.sub("", instruction).split()[0]


def blocks(text: str) -> tuple[list[list[str]], list[set[int]]]:
    """The basic blocks of nvdisasm's text, and whom each may be followed by."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(found[1])
    kinds = [opcode(instruction).split(".")[0] for instruction in code]
    starts = {0, *labels.values(), *(place + 1 for place, kind in enumerate(kinds) if kind in ("BRA", *_ENDS))}
    places = sorted(place for place in starts if place < len(code))
    number = {place: index for index, place in enumerate(places)}
    found_blocks, follow = [], []
    for index, place in enumerate(places):
        end = places[index + 1] if index + 1 < len(places) else len(code)
        last, kind = code[end - 1], kinds[end - 1]
        after = {index + 1} if index + 1 < len(places) else set()
        target = _TARGET.search(last) if kind == "BRA" else None
        conditional = last.startswith("@") or bool(_CONDITION.match(last)) or ".DIV" in opcode(last)
        if kind in ("BRA", *_ENDS) and not conditional:
            after = set()
        if target is not None:
            after |= {number[labels[target[1]]]} & set(range(len(places)))
        found_blocks.append(code[place:end])
        follow.append(after)
    return found_blocks, follow


def loops(follow: Sequence[set[int]]) -> tuple[dict[int, set[int]], dict[int, int]]:
    """Natural loops (head -> blocks), and the place of each block that is reached in an order without going back."""
    before: dict[int, set[int]] = defaultdict(set)
    for block, others in enumerate(follow):
        for other in others:
            before[other].add(block)
    done: list[int] = []
    seen, stack = {0}, [(0, iter(sorted(follow[0])))]
    while stack:
        block, others_left = stack[-1]
        other = next((o for o in others_left if o not in seen), None)
        if other is None:
            done.append(block)
            stack.pop()
        else:
            seen.add(other)
            stack.append((other, iter(sorted(follow[other]))))
    order = {block: place for place, block in enumerate(reversed(done))}
    above = {0: 0}  # immediate dominators

    def common(a: int, b: int) -> int:
        while a != b:
            a, b = (above[a], b) if order[a] > order[b] else (a, above[b])
        return a

    changed = True
    while changed:
        changed = False
        for block in list(order)[1:]:
            known = [b for b in before[block] if b in above]
            new = known[0]
            for other in known[1:]:
                new = common(new, other)
            changed |= above.get(block) != new
            above[block] = new
    found: dict[int, set[int]] = defaultdict(set)
    for block in order:
        for head in follow[block]:
            if common(head, block) != head:
                continue
            body, todo = {head}, [block]
            while todo:
                one = todo.pop()
                if one not in body:
                    body.add(one)
                    todo += [b for b in before[one] if b in order]
            found[head] |= body
    return found, order


def steps(text: str) -> Iterator[Step]:
    """Of nvdisasm's text, in the order of the code."""
    code, follow = blocks(text)
    found, order = loops(follow)
    with_products = {
        head: body
        for head, body in found.items()
        if any(opcode(i).split(".")[0] in _PRODUCTS for block in body for i in code[block])
    }
    for head, body in sorted(with_products.items()):
        if any(other < body for other in with_products.values()):
            continue
        waits = {b for other, inner in found.items() if other not in with_products and inner < body for b in inner}

        def way(pick: Callable[[list[int]], int], head: int = head, body: set[int] = body - waits) -> int:
            lengths: dict[int, int] = {}
            for block in sorted(body, key=order.__getitem__, reverse=True):
                ends = [lengths[n] for n in follow[block] & body if n in lengths and order[n] > order[block]]
                ends += [0] if head in follow[block] else []
                if ends:
                    lengths[block] = len(code[block]) + pick(ends)
            return lengths[head]

        yield Step(way(min), way(max), sum(len(code[block]) for block in body))


def disassembled(image: bytes, nvdisasm: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        return subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout


def jobs_as(kind: str, arch: str) -> list[Any]:
    """The rows of the main kernels, as they are compiled for what `kind` says."""
    from fa2cupy.kernels import compile_jobs
    from tests.test_compile import band_jobs, list_jobs

    if kind == "plain":
        return [job for job in compile_jobs(arch, True) if not job.source.startswith("smxx/")]
    if kind == "band":
        return band_jobs(arch)
    return list_jobs(arch, kind == "band+list")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", help="a commit to set beside the working tree")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--rows", action="append", metavar="PATTERN", help="labels; may be given again")
    parser.add_argument("--as", dest="kinds", default="plain", metavar="plain,band,list,band+list")
    parser.add_argument("--define", action="append", default=[], metavar="FA2_X=1", help="the tree once more, with it")
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"))
    args = parser.parse_args(arguments)
    kinds = args.kinds.split(",")
    if set(kinds) - {"plain", "band", "list", "band+list"}:
        parser.error("--as takes plain, band, list and band+list")
    if not args.nvdisasm:
        parser.error("nvdisasm is not on PATH: --nvdisasm says where it is")
    from fa2cupy.jit import compiler, source

    variants: list[tuple[str, Path | None, dict[str, str]]] = [("tree", None, {})]
    variants += [(text, None, dict([text.split("=", 1)])) for text in args.define]
    with tempfile.TemporaryDirectory() as directory:
        if args.revision:
            binaries.export(args.revision, Path(directory))
            variants.insert(0, (args.revision, Path(directory) / "cuda_src", {}))
        print(f"NVRTC {compiler.nvrtc_build()}; {args.arch}; a step: shortest..longest way (code)", flush=True)
        for kind in kinds:
            for job in jobs_as(kind, args.arch):
                if job.arch != args.arch or not any(fnmatch.fnmatch(job.label, p) for p in args.rows or ["*"]):
                    continue
                print(job.label)
                for name, folder, defines in variants:
                    loaded = source.load(job.source, directory=folder)
                    cubin = compiler.compile(loaded, job.arch, {**job.defines, **defines})
                    found = ", ".join(map(str, steps(disassembled(cubin.image, args.nvdisasm))))
                    kernel = cubin.kernels[job.name]
                    warned = f", {len(cubin.warnings)} WARNINGS" if cubin.warnings else ""
                    print(
                        f"  {name}: {found}; {kernel.registers} registers, {kernel.spill_bytes} spilled{warned}",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
