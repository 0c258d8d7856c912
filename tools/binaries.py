"""The kernels' binaries of the working tree and of a commit: which of them differ, and in what.

    python tools/binaries.py REV                 (make same-binaries REV=...)
    python tools/binaries.py REV --every 8       a fixed eighth of them

compiles the plain rows of both trees with the NVRTC that CuPy finds: on sm_80, sm_86, sm_90a and sm_120 everything in
bfloat16, and of float16 a fixed eighth. No GPU. Exit status 1 if a binary differs or is gone; new ones are only named.

Compared are code, constants, registers, spills, stack and shared memory: not line information, names, notes or the
order of tables, which vary without meaning. A tree is compiled by a process of its own, which knows of it only
`fa2cupy.kernels.compile_jobs(arch, all_rows)`, what a job has (source, name, arch, defines, label, shared_mem_bytes),
`fa2cupy.jit.source.load` and `fa2cupy.jit.compiler`'s `compile`, `options` and `nvrtc_build`. Digests are kept in
build/binaries.jsonl by all that makes a binary, so that what both trees share, and what was compiled before, is free.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEMO = ROOT / "build" / "binaries.jsonl"
ARCHS = ("sm_80", "sm_86", "sm_90a", "sm_120")

_SECTION_HEADER = "<IIQQQQIIQQ"  # an ELF64 section header
_ADDRESSES = 4  # the constant bank that holds the addresses of global variables


def sections(image: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each section of a cubin that has content."""
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from(_SECTION_HEADER, image, table + place * size) for place in range(count)]
    first = headers[names][4]
    for name, kind, _, _, offset, length, *_ in headers:
        if kind not in (0, 8):  # no section, or one without bytes
            end = image.index(b"\0", first + name)
            yield image[first + name : end].decode(), image[offset : offset + length]


def parts(image: bytes) -> dict[str, str]:
    """Digests of what runs: 'code', 'constant0' (its size is that of the parameters) and so on.

    Constants of the sources end up as global variables that no code reads. Their addresses (constant4) and values
    ('data') count only where an instruction names that bank.
    """
    found = dict.fromkeys(("code", "relocations"), b"")
    data = b""
    for name, content in sections(image):
        if name.startswith(".text."):
            found["code"] += content
        elif name.startswith((".rela.text.", ".rel.text.")):  # where and how, not the symbols' numbers
            step = 24 if name.startswith(".rela") else 16
            for offset in range(0, len(content), step):
                found["relocations"] += content[offset : offset + 12]
        elif name.startswith(".nv.constant") and not name.startswith(f".nv.constant{_ADDRESSES}"):
            kind = name.split(".")[2]
            found[kind] = found.get(kind, b"") + content
        elif name == ".nv.global.init":
            data = content
    if reads_addresses(found["code"]):
        found["data"] = data
    return {kind: f"{len(content)}:{hashlib.sha256(content).hexdigest()[:24]}" for kind, content in found.items()}


def reads_addresses(code: bytes) -> bool:
    """Whether an instruction may read the constant bank of addresses.

    Of 16 bytes, as on every architecture since sm_70, with the bank in bits 54 to 58 if bits 9 to 11 are 3 or 5.
    """
    words = memoryview(code).cast("Q")[::2]
    return any((word >> 54) & 31 == _ADDRESSES and (word >> 9) & 7 in (3, 5) for word in words)


def describe(cubin: Any, name: str, shared_mem_bytes: int) -> dict[str, Any]:
    """All that is compared of one binary, by names."""
    if not cubin.image.startswith(b"\x7fELF"):
        raise ValueError(f"{name} became PTX, not a cubin: this NVRTC does not know the architecture")
    return {**parts(cubin.image), **asdict(cubin.kernels[name]), "dynamic shared memory": shared_mem_bytes}


def digest(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sorted(description.items())).encode()).hexdigest()[:16]


def chosen(job: Any, every: int) -> bool:
    """Whether a job is compared. Depends on nothing but its architecture and label."""
    fixed = int.from_bytes(hashlib.sha256(f"{job.arch} {job.label}".encode()).digest()[:4], "big")
    return fixed % every == 0 and ("float16" not in job.label.split() or fixed // every % 8 == 0)


def compile_tree(every: int, threads: int) -> None:
    """In a process that imports the tree's fa2cupy: one line of JSON for each job."""
    from fa2cupy.jit import compiler, source
    from fa2cupy.kernels import compile_jobs

    memo = {}
    if MEMO.exists():
        for line in MEMO.read_text().splitlines():
            if line.endswith("}"):  # the last may have been cut off
                record = json.loads(line)
                memo[record["key"]] = record["description"]
    jobs = {}
    for arch in ARCHS:
        for job in compile_jobs(arch, True):
            if chosen(job, every):
                jobs[job.source, job.name, job.arch, job.label] = job
    build = compiler.nvrtc_build()
    print(json.dumps({"build": build, "jobs": len(jobs)}), flush=True)

    def one(job: Any) -> tuple[str, dict[str, Any], bool]:
        loaded = source.load(job.source)
        makes = (loaded.digest, job.name, job.shared_mem_bytes, compiler.options(job.arch, job.defines), build, _SELF)
        key = hashlib.sha256(json.dumps(makes).encode()).hexdigest()[:32]
        if key in memo:
            return key, memo[key], True
        cubin = compiler.compile(loaded, job.arch, job.defines, context=job.label)
        return key, describe(cubin, job.name, job.shared_mem_bytes), False

    MEMO.parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(threads) as pool, MEMO.open("a") as file:
        for place, (key, description, known) in zip(jobs, pool.map(one, jobs.values()), strict=True):
            if not known:
                file.write(json.dumps({"key": key, "description": description}) + "\n")
                file.flush()
            print(json.dumps({"job": place, "description": description}), flush=True)


_SELF = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def binaries(tree: Path, what: str, every: int, threads: int) -> tuple[str, dict[tuple[str, ...], dict[str, Any]]]:
    """NVRTC's build, and of each job of a tree the description of its binary."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "FA2CUPY_DEBUG": "0"}
    command = [sys.executable, str(Path(__file__).resolve()), "--compile", "--every", str(every)]
    command += ["--threads", str(threads)]
    found = {}
    with subprocess.Popen(command, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        head = json.loads(next(process.stdout, "{}"))
        for line in process.stdout:
            record = json.loads(line)
            found[tuple(record["job"])] = record["description"]
            if sys.stderr.isatty():
                print(f"\r{what}: {len(found)} of {head['jobs']}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if process.returncode or not head:
        sys.exit(f"{what} could not be compiled: see above")
    return head["build"], found


def export(revision: str, target: Path) -> str:
    """Write a commit's files to a directory; its short name and subject."""
    git = ["git", "-C", str(ROOT)]
    named = subprocess.run([*git, "log", "-1", "--format=%h %s", revision, "--"], capture_output=True, text=True)
    if named.returncode or not named.stdout:
        sys.exit(f"{revision} is not a commit of this repository: {named.stderr.strip()}")
    archive = subprocess.run([*git, "archive", "--format=tar", revision], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(target, filter="data")
        else:
            tar.extractall(target)
    return named.stdout.strip()


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In what two binaries differ, or the empty string."""
    words = []
    for kind in (*old, *(kind for kind in new if kind not in old)):
        before, after = old.get(kind), new.get(kind)
        if before == after:
            continue
        if isinstance(before, str) or isinstance(after, str):  # a digest after a length
            lengths = [int(str(value).split(":")[0]) if value else 0 for value in (before, after)]
            words.append(f"{kind} ({lengths[0]} -> {lengths[1]} bytes)")
        else:
            words.append(f"{kind.replace('_', ' ')} {before} -> {after}")
    return ", ".join(words)


def compare(
    old: dict[tuple[str, ...], dict[str, Any]], new: dict[tuple[str, ...], dict[str, Any]]
) -> tuple[list[str], list[str]]:
    """What is wrong (binaries that differ or are gone), and what is merely to be said (new and renamed ones)."""
    wrong, said = [], []
    for key in old:
        if key in new and (what := difference(old[key], new[key])):
            wrong.append(f"differs: {' '.join(key)}: {what}")
    gone = {key: value for key, value in old.items() if key not in new}
    for key in (key for key in new if key not in old):
        twin = next((other for other in gone if other[2] == key[2] and not difference(gone[other], new[key])), None)
        if twin is None:
            said.append(f"new: {' '.join(key)}")
        else:
            del gone[twin]
            said.append(f"renamed: {' '.join(twin)} is now {' '.join(key)}")
    wrong += [f"gone: {' '.join(key)}" for key in gone]
    return wrong, said


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("revision", nargs="?", help="a commit to compare the working tree with")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="compare a fixed Nth of the rows")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_tree(args.every, args.threads)
        return 0
    if not args.revision:
        parser.error("name a commit: make same-binaries REV=HEAD~1")
    with tempfile.TemporaryDirectory() as directory:
        subject = export(args.revision, Path(directory))
        build, old = binaries(Path(directory), args.revision, args.every, args.threads)
    _, new = binaries(ROOT, "working tree", args.every, args.threads)
    wrong, said = compare(old, new)
    for line in (*said, *wrong):
        print(line)
    same = sum(key in new and not difference(old[key], new[key]) for key in old)
    print(f"NVRTC {build}: {same} of {len(old)} binaries of {subject} are the same in the working tree", end="")
    print(f", {len(wrong)} differ or are gone" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
