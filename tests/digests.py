"""What the sampled rows compile to: a digest of every binary, per build of NVRTC, in tests/binaries/<version>.json.

    python -m tests.digests "why they are to differ"        (make new-binaries REASON=...)

renews the files. A digest covers what tools/binaries.py compares; it names which differ in what, between two commits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tests import nvrtc
from tests.compile_worker import ARCHS, compile_rows

FOLDER = Path(__file__).resolve().parent / "binaries"
_RENEW = 'if that is meant: make new-binaries REASON="..."'


def path_of(build: str) -> Path:
    """The file of a build: 12.9.86.json of "12.9.86 CL-36037853"."""
    return FOLDER / f"{build.split()[0]}.json"


def key_of(row: dict[str, Any]) -> str:
    return f"{row['arch']} {row['source']} {row['label']}"


def objections(build: str, arch: str, rows: list[dict[str, Any]], left_out: Collection[str] = ()) -> list[str]:
    """Which of the compiled rows for `arch` are not the binaries that they were, in words.

    left_out: the keys of rows that there are, and that were not compiled."""
    path = path_of(build)
    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get("build") != build:
        return [f"tests/binaries has nothing of NVRTC {build}: {_RENEW}"]
    expected = record["digests"].get(arch, {})
    compiled = {key_of(row): row["digest"] for row in rows if row["in_sample"] and not row["error"]}
    found = [
        f"{key}: {'another binary than' if key in expected else 'is not'} in {path.name}; {_RENEW}"
        for key, digest in compiled.items()
        if digest != expected.get(key)
    ]
    failed = {key_of(row) for row in rows if row["error"]}
    gone = expected.keys() - compiled.keys() - failed - set(left_out)
    return found + [f"{key}: in {path.name}, and no row any more; {_RENEW}" for key in sorted(gone)]


def renew(reason: str) -> None:
    """Compile the sample with every release; write what differs, and why."""
    for release in nvrtc.DISTRIBUTIONS:
        digests, builds, failed = {}, set(), []
        for arch in ARCHS:
            build, rows = compile_rows(release, arch, "sample")
            builds.add(build)
            failed += [row["error"] for row in rows if row["error"]]
            digests[arch] = {key_of(row): row["digest"] for row in rows}
            print(f"NVRTC {build}: {len(rows)} rows of {arch}", flush=True)
        if failed:
            sys.exit("\n\n".join(failed))
        (build,) = builds
        path = path_of(build)
        record = json.loads(path.read_text()) if path.exists() else {}
        before = record.get("digests", {})
        changed = sum(
            before.get(arch, {}).get(key) != value for arch in digests for key, value in digests[arch].items()
        )
        gone = sum(key not in digests.get(arch, {}) for arch in before for key in before[arch])
        if record.get("build") == build and not changed and not gone:
            print(f"{path.name}: every binary is what it was")
            continue
        FOLDER.mkdir(exist_ok=True)
        new = {"build": build, "reason": reason, "digests": digests}
        path.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")
        print(f"{path.name}: {changed} new or changed, {gone} gone")


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].strip():
        sys.exit('say why the binaries are to differ: make new-binaries REASON="..."')
    renew(sys.argv[1].strip())


if __name__ == "__main__":
    main()
