"""CUDA sources as values: a file of cuda_src, the headers that it includes, and a digest of all their bytes.

Includes are written from the root of cuda_src (`#include "common/types.cuh"`), so one name means one file everywhere,
and headers can be handed to NVRTC in memory: no -I, no temporary directory, nothing on disk that the digest misses.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fa2cupy.errors import MissingDependency

__all__ = ["Source", "load", "root"]

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Source:
    """One translation unit.

    `path` is relative to cuda_src and is what error messages show; `headers` are the transitively included files as
    (name, bytes), sorted by name; `digest` is a sha256 over every name and byte.
    """

    path: str
    code: bytes = field(repr=False)
    headers: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for name, content in ((self.path, self.code), *self.headers):
            for part in (name.encode(), content):  # lengths keep "ab" + "c" apart from "a" + "bc"
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        object.__setattr__(self, "digest", digest.hexdigest())


def root() -> Path:
    """The cuda_src directory: inside the package in a wheel, beside it in a checkout and in an editable install."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "cuda_src", package.parent / "cuda_src"):
        if candidate.is_dir():
            return candidate
    raise MissingDependency(
        f"the CUDA sources are missing: no cuda_src in {package} or in {package.parent}; reinstall fa2cupy"
    )


def load(path: str, *, directory: Path | None = None, headers: Mapping[str, bytes] | None = None) -> Source:
    """Read `path` ("sm80/flash_fwd.cu") and what it includes from cuda_src, or from `directory`.

    headers: what is no file there, by the names by which it is included: functions of the user's own.

    An included file that does not exist is left out: it may sit in a branch that is never compiled, and if it does not,
    NVRTC names it and the line that asked for it.
    """
    directory = root() if directory is None else directory
    try:
        code = (directory / path).read_bytes()
    except OSError as error:
        raise MissingDependency(f"the CUDA source {path} cannot be read ({error}); reinstall fa2cupy") from error
    given, found = headers or {}, dict[str, bytes]()
    pending = [code]
    while pending:
        for match in _INCLUDE.findall(pending.pop()):
            name = match.decode()
            header = directory / name
            if name not in found and (name in given or header.is_file()):
                found[name] = given[name] if name in given else header.read_bytes()
                pending.append(found[name])
    return Source(path, code, tuple(sorted(found.items())))
