"""fa2cupy.jit.source: which files go into a translation unit, and what its digest depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fa2cupy.errors import MissingDependency
from fa2cupy.jit import source
from fa2cupy.jit.source import Source


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


TREE = {
    "sm80/k.cu": '#pragma once\n#include "common/a.cuh"\n  #  include "sm80/b.cuh"  // both\nint k;\n',
    "common/a.cuh": '#include "common/c.cuh"\n#include "common/a.cuh"\n',
    "common/c.cuh": "int c;\n",
    "sm80/b.cuh": '#ifdef NEVER\n#include "not/there.cuh"\n#endif\n#include <cstdint>\n',
    "common/unused.cuh": "int unused;\n",
}


def test_headers_are_found_transitively(tmp_path: Path) -> None:
    loaded = source.load("sm80/k.cu", directory=write(tmp_path, TREE))
    assert loaded.path == "sm80/k.cu"
    assert loaded.code == TREE["sm80/k.cu"].encode()
    assert loaded.headers == tuple(
        (name, TREE[name].encode()) for name in ("common/a.cuh", "common/c.cuh", "sm80/b.cuh")
    )


def test_digest_covers_every_byte_that_goes_in(tmp_path: Path) -> None:
    directory = write(tmp_path, TREE)
    digest = source.load("sm80/k.cu", directory=directory).digest
    assert digest == source.load("sm80/k.cu", directory=directory).digest
    for name in ("sm80/k.cu", "common/a.cuh", "common/c.cuh", "sm80/b.cuh"):
        (directory / name).write_text(TREE[name] + " ")
        assert source.load("sm80/k.cu", directory=directory).digest != digest
        (directory / name).write_text(TREE[name])
    (directory / "common/unused.cuh").write_text("changed")
    assert source.load("sm80/k.cu", directory=directory).digest == digest


def test_digest_keeps_parts_apart() -> None:
    sources = [
        Source("k.cu", b"ab", (("h", b"c"),)),
        Source("k.cu", b"a", (("bh", b"c"),)),
        Source("k.cu", b"abh", (("", b"c"),)),
        Source("k.cua", b"b", (("h", b"c"),)),
        Source("k.cu", b"abhc"),
    ]
    assert len({one.digest for one in sources}) == len(sources)


def test_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match=r"sm80/gone\.cu cannot be read .*reinstall fa2cupy"):
        source.load("sm80/gone.cu", directory=tmp_path)


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_root_is_inside_the_package_or_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    package = tmp_path / "fa2cupy"
    monkeypatch.setattr(source, "__file__", str(package / "jit" / "source.py"))
    (package / "jit").mkdir(parents=True)
    with pytest.raises(MissingDependency, match=r"the CUDA sources are missing: no cuda_src in .*reinstall fa2cupy"):
        source.root()
    expected = (package if place == "inside" else tmp_path) / "cuda_src"
    expected.mkdir()
    assert source.root() == expected
    (tmp_path / "cuda_src").mkdir(exist_ok=True)
    assert source.root() == expected  # a wheel's own sources come first


def test_every_kernel_of_this_package_can_be_loaded() -> None:
    names = sorted(path.relative_to(source.root()).as_posix() for path in source.root().rglob("*.cu"))
    assert names
    for name in names:
        loaded = source.load(name)
        present = dict(loaded.headers)
        for content in (loaded.code, *present.values()):
            for match in source._INCLUDE.findall(content):
                if match.startswith(b"user/"):  # handed over, below
                    continue
                assert match.decode() in present, f"{name}: {match.decode()} does not exist in cuda_src"


def test_headers_that_are_no_files() -> None:
    """They are part of the digest, and what they include is found."""
    plain = source.load("smxx/classify_blocks.cu")
    given = {"user/mask_mod.cuh": b'#include "common/user.cuh"\n'}
    loaded = source.load("smxx/classify_blocks.cu", headers=given)
    assert set(dict(loaded.headers)) == {*dict(plain.headers), "user/mask_mod.cuh", "common/user.cuh"}
    assert loaded.digest != plain.digest == source.load("smxx/classify_blocks.cu").digest
    other = source.load("smxx/classify_blocks.cu", headers={"user/mask_mod.cuh": b"// another\n"})
    assert other.digest not in (loaded.digest, plain.digest)
