"""fa2cupy.jit.cache: what is stored, when it is trusted, and what several processes do at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

import fa2cupy
from fa2cupy.errors import MissingDependency
from fa2cupy.jit import cache, compiler, nvrtc
from fa2cupy.jit.cache import DiskCache, cache_key, open_cache
from fa2cupy.jit.compiler import Cubin, KernelResources
from fa2cupy.jit.source import Source

build = sys.modules["fa2cupy.jit.kernel"].build  # `fa2cupy.jit.kernel` the name is the function

SOURCE = Source(
    "k.cu", b'#include "a.cuh"\nextern "C" __global__ void k(int* p) { *p = A * B; }\n', (("a.cuh", b"\n"),)
)
DEFINES = {"A": 6, "B": 7}
CUBIN = Cubin(
    compiler.ELF_MAGIC + bytes(range(256)), "log\nline", {"k": KernelResources(8, 0, 16, 0)}, "12.9.86 CL-1", 0.5
)
KEY = "0123456789abcdef"
NVRTC = "12.9.86 CL-1"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(path))
    monkeypatch.setattr(cache, "_warned", set())
    return path


def stored(directory: Path) -> Path:
    path = open_cache().store(KEY, CUBIN, {"source": "k.cu"})
    assert path is not None
    assert path.parent == directory
    return path


def test_round_trip(directory: Path) -> None:
    disk = open_cache()
    assert disk.load(KEY) is None
    path = stored(directory)
    entry = disk.load(KEY)
    assert entry is not None
    assert (entry.cubin, entry.path, entry.compiled) == (CUBIN, path, False)
    assert path.read_bytes() == CUBIN.image  # what cuModuleLoad will read
    assert path.suffix == ".cubin"
    assert sorted(file.name for file in directory.iterdir()) == sorted([f"{KEY}.json", path.name])


def test_ptx_round_trip(directory: Path) -> None:
    ptx = Cubin(b".version 8.8\n\0", "", {}, NVRTC, 0.1)
    path = open_cache().store(KEY, ptx, {})
    assert path is not None
    assert path.suffix == ".ptx"
    entry = open_cache().load(KEY)
    assert entry is not None
    assert entry.cubin == ptx


def modes(path: Path) -> list[int]:
    return [each.stat().st_mode & 0o777 for each in (path, *sorted(path.iterdir()))]


@pytest.mark.parametrize(
    ("umask", "folder", "file"),
    [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0, 0o755, 0o644), (0o027, 0o750, 0o640)],
)
def test_fault_modes_follow_the_umask_and_never_let_others_write(
    directory: Path, umask: int, folder: int, file: int
) -> None:
    """A cache that root fills and ships is for everybody, or, with another umask, for nobody else."""
    old = os.umask(umask)
    try:
        stored(directory)
        with open_cache().lock(KEY):
            assert modes(directory) == [folder, file, file, file]
    finally:
        os.umask(old)


def test_missing_parents_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path / "a" / "b" / "c"))
    assert open_cache().directory == tmp_path / "a" / "b" / "c"
    assert (tmp_path / "a").stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("what", ["record", "binary"])
def test_fault_unreadable_is_not_called_damaged(directory: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """What another user filled with umask 077: said once in these words, and left as it is."""
    binary = stored(directory)
    record = directory / f"{KEY}.json"
    denied = record if what == "record" else binary
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:  # root, as whom the tests may run, reads everything
        if path == denied:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.warns(
        RuntimeWarning, match=r"cannot read its kernel cache .*Permission denied.*chmod -R a\+rX"
    ) as said:
        assert open_cache().load(KEY) is None
        assert open_cache().load(KEY) is None
    assert len(said) == 1 and "damaged" not in str(said[0].message)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert open_cache().load(KEY) is not None


def test_fault_files_of_killed_processes_go_after_an_hour(directory: Path) -> None:
    open_cache()
    names = {age: (f".{age}.tmp", f"{age}.lock") for age in (10, 3000, 3700, 10**6)}
    now = time.time()
    for age, both in names.items():
        for name in both:
            (directory / name).write_bytes(b"half")
            os.utime(directory / name, (now - age, now - age))
    stored(directory)
    left = {path.name for path in directory.iterdir()}
    assert left >= {*names[10], *names[3000]}
    assert not left & {*names[3700], *names[10**6]}


def test_fault_relative_directory_without_a_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    before = Path.cwd()
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", "relative")
    os.chdir(gone)
    try:
        gone.rmdir()
        assert opened_with_one_warning("no kernel cache .*No such file.*FA2CUPY_CACHE_DIR can name").directory is None
        entry = build(SOURCE, "sm_80", DEFINES)
    finally:
        os.chdir(before)
    assert (entry.path, entry.compiled) == (None, True)


def test_fault_full_cache_without_nvrtc(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped to where no NVRTC is, and other paths are set: what is in it is used, whatever made it."""
    library = tmp_path / "libnvrtc.so.12"
    library.write_bytes(b"nvrtc")
    disk = open_cache()
    disk.remember_nvrtc(str(library), "12.4.127 CL-0")
    monkeypatch.setenv("PYTHONPATH", "/where/it/was/filled")
    disk.remember_nvrtc(str(library), NVRTC)
    assert disk.remembered_builds() == [NVRTC, "12.4.127 CL-0"]
    disk.store(cache_key(SOURCE, "sm_80", DEFINES, "12.4.127 CL-0"), CUBIN, {})
    library.unlink()
    monkeypatch.setenv("PYTHONPATH", "/where/it/is/used")
    monkeypatch.setattr(compiler, "_build", "")

    def missing() -> None:
        raise MissingDependency("NVRTC was not found")

    monkeypatch.setattr(nvrtc, "load", missing)
    assert sys.modules["fa2cupy.jit.kernel"].expected_nvrtc_build() == NVRTC
    entry = build(SOURCE, "sm_80", DEFINES)
    assert (entry.cubin, entry.compiled) == (CUBIN, False)
    with pytest.raises(MissingDependency):
        build(SOURCE, "sm_86", DEFINES)


def damage_truncate(record: Path, binary: Path) -> None:
    binary.write_bytes(binary.read_bytes()[:100])


def damage_empty(record: Path, binary: Path) -> None:
    binary.write_bytes(b"")


def damage_bit(record: Path, binary: Path) -> None:
    content = bytearray(binary.read_bytes())
    content[200] ^= 1
    binary.write_bytes(content)


def damage_record(record: Path, binary: Path) -> None:
    record.write_bytes(record.read_bytes()[:-20])


def damage_bytes_of_record(record: Path, binary: Path) -> None:
    record.write_bytes(b"\xff\xfe\0")


def damage_shape_of_record(record: Path, binary: Path) -> None:
    record.write_text("[1, 2]")


def damage_missing_field(record: Path, binary: Path) -> None:
    content = json.loads(record.read_text())
    del content["kernels"]
    record.write_text(json.dumps(content))


def damage_foreign_field(record: Path, binary: Path) -> None:
    content = json.loads(record.read_text())
    content["kernels"]["k"]["colour"] = 3
    record.write_text(json.dumps(content))


def damage_kind(record: Path, binary: Path) -> None:
    ptx = binary.with_suffix(".ptx")
    binary.rename(ptx)
    record.write_text(record.read_text().replace(binary.name, ptx.name))


@pytest.mark.parametrize("damage", [value for name, value in sorted(globals().items()) if name.startswith("damage_")])
def test_damaged_entry_is_deleted(directory: Path, damage: Any) -> None:
    binary = stored(directory)
    record = directory / f"{KEY}.json"
    damage(record, binary)
    assert open_cache().load(KEY) is None
    assert not record.exists()
    assert stored(directory) == binary
    entry = open_cache().load(KEY)
    assert entry is not None
    assert entry.cubin == CUBIN


def test_missing_binary_is_a_miss(directory: Path) -> None:
    stored(directory).unlink()
    assert open_cache().load(KEY) is None


def test_record_does_not_lead_out_of_the_directory(directory: Path, tmp_path: Path) -> None:
    binary = stored(directory)
    outside = tmp_path / binary.name
    outside.write_bytes(binary.read_bytes())
    record = directory / f"{KEY}.json"
    record.write_text(record.read_text().replace(binary.name, f"../{binary.name}"))
    binary.unlink()
    assert open_cache().load(KEY) is None
    open_cache().discard(KEY)
    assert outside.exists()


def test_damaged_entry_is_compiled_again_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    compile_ = compiler.compile

    def counted(source: Source, arch: str, *args: Any, **kwargs: Any) -> Cubin:
        calls.append(arch)
        return compile_(source, arch, *args, **kwargs)

    monkeypatch.setattr(compiler, "compile", counted)
    first = build(SOURCE, "sm_80", DEFINES)
    assert first.compiled
    assert not build(SOURCE, "sm_80", DEFINES).compiled
    first.path.write_bytes(b"\x7fELF but not much more")
    again = build(SOURCE, "sm_80", DEFINES)
    assert again.compiled
    assert again.cubin.image == first.cubin.image == again.path.read_bytes()
    assert not build(SOURCE, "sm_80", DEFINES).compiled
    assert calls == ["sm_80", "sm_80"]


def test_key_covers_what_makes_the_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FA2CUPY_DEBUG", raising=False)
    keys = {
        cache_key(SOURCE, "sm_80", DEFINES, NVRTC),
        cache_key(SOURCE, "sm_86", DEFINES, NVRTC),
        cache_key(SOURCE, "sm_80", {"A": 6, "B": 8}, NVRTC),
        cache_key(SOURCE, "sm_80", {"A": 6}, NVRTC),
        cache_key(SOURCE, "sm_80", DEFINES, "12.9.41 CL-1"),
        cache_key(Source("k.cu", SOURCE.code + b" ", SOURCE.headers), "sm_80", DEFINES, NVRTC),
        cache_key(Source("k.cu", SOURCE.code, (("a.cuh", b" "),)), "sm_80", DEFINES, NVRTC),
        cache_key(Source("l.cu", SOURCE.code, SOURCE.headers), "sm_80", DEFINES, NVRTC),
    }
    assert len(keys) == 8
    assert cache_key(SOURCE, "sm_80", {"B": 7, "A": 6}, NVRTC) in keys
    monkeypatch.setenv("FA2CUPY_DEBUG", "1")
    assert cache_key(SOURCE, "sm_80", DEFINES, NVRTC) not in keys
    monkeypatch.delenv("FA2CUPY_DEBUG")
    monkeypatch.setattr(fa2cupy, "__version__", "0.0.0.test")
    assert cache_key(SOURCE, "sm_80", DEFINES, NVRTC) not in keys


def opened_with_one_warning(match: str) -> DiskCache:
    with pytest.warns(fa2cupy.Fa2Warning, match=match) as caught:
        disk = open_cache()
    assert {warning.filename for warning in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_cache().directory is disk.directory
    return disk


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_directory_that_others_can_write_is_not_used(directory: Path, mode: int) -> None:
    stored(directory)
    directory.chmod(mode)
    disk = opened_with_one_warning(r"does not use its kernel cache .*others can write to it \(mode 7..\).*chmod go-w")
    assert disk.directory is None
    entry = build(SOURCE, "sm_80", DEFINES)
    assert (entry.path, entry.compiled) == (None, True)
    directory.chmod(0o755)
    assert open_cache().load(KEY) is not None


@pytest.mark.parametrize("through_link", [False, True])
def test_directory_of_somebody_else_is_not_used(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through_link: bool
) -> None:
    stored(directory)
    victim = directory
    if through_link:
        victim = tmp_path / "link"
        victim.symlink_to(directory, target_is_directory=True)
        monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(victim))
        assert open_cache().load(KEY) is not None
    if os.getuid() == 0:
        os.chown(victim, 12345, -1, follow_symlinks=False)
    else:
        user = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert opened_with_one_warning("it belongs to another user").directory is None


def test_path_that_is_a_file(directory: Path) -> None:
    directory.write_text("")
    assert opened_with_one_warning("does not use its kernel cache").directory is None


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.delenv("FA2CUPY_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert opened_with_one_warning("fa2cupy has no kernel cache .*FA2CUPY_CACHE_DIR can name").directory is None


def test_directory_that_cannot_be_written(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that root filled for everybody: what is there is used, the rest is compiled, and said once."""
    stored(directory)

    open_ = os.open

    def refuse(path: Any, flags: int, *args: Any, **keywords: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return open_(path, flags, *args, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(RuntimeWarning, match="cannot write to its kernel cache .*Permission denied"):
        entry = build(SOURCE, "sm_80", DEFINES)
    assert (entry.path, entry.compiled) == (None, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_cache().store("other", CUBIN, {}) is None
        assert open_cache().load(KEY) is not None


def test_failed_write_leaves_nothing_behind(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_cache()

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert disk.store(KEY, CUBIN, {}) is None
    assert list(directory.iterdir()) == []


def test_nvrtc_is_remembered_while_its_file_is_the_same(directory: Path, tmp_path: Path, monkeypatch: Any) -> None:
    library = tmp_path / "libnvrtc.so.12"
    library.write_bytes(b"1234")
    disk = open_cache()
    assert disk.recall_nvrtc() is None
    disk.remember_nvrtc(None, NVRTC)
    assert disk.recall_nvrtc() is None
    assert disk.remembered_builds() == [NVRTC]
    disk.remember_nvrtc(str(library), NVRTC)
    assert disk.recall_nvrtc() == NVRTC
    with monkeypatch.context() as patched:
        patched.setenv("LD_LIBRARY_PATH", "/somewhere/else")
        assert disk.recall_nvrtc() is None
    os.utime(library, ns=(1, 1))
    assert disk.recall_nvrtc() is None
    disk.remember_nvrtc(str(library), "13.0.88 CL-2")
    assert disk.recall_nvrtc() == "13.0.88 CL-2"
    library.unlink()
    assert disk.recall_nvrtc() is None
    (directory / "nvrtc.json").write_text("][")
    library.write_bytes(b"12345")
    assert disk.recall_nvrtc() is None
    disk.remember_nvrtc(str(library), NVRTC)
    assert disk.recall_nvrtc() == NVRTC
    assert DiskCache(None).recall_nvrtc() is None


def test_lock_is_given_back_and_its_file_removed(directory: Path) -> None:
    disk = open_cache()
    for _ in range(2):
        with disk.lock(KEY, timeout=5):
            assert (directory / f"{KEY}.lock").exists()
    with pytest.raises(ZeroDivisionError), disk.lock(KEY):
        raise ZeroDivisionError
    assert list(directory.iterdir()) == []


def test_lock_that_is_not_given_back_delays_but_never_stops(directory: Path) -> None:
    disk = open_cache()
    with disk.lock(KEY):
        started = time.monotonic()
        with disk.lock(KEY, timeout=0.1):
            assert 0.1 <= time.monotonic() - started < 5
        assert (directory / f"{KEY}.lock").exists()  # still ours


def test_without_locks(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_cache()
    with DiskCache(None).lock(KEY):
        pass
    monkeypatch.setattr(cache, "fcntl", None)
    with disk.lock(KEY):
        assert list(directory.iterdir()) == []


def run(code: str, directory: Path, *args: str) -> subprocess.Popen[str]:
    preamble = f"""
        import sys, time
        from pathlib import Path
        from fa2cupy import jit
        from fa2cupy.jit.cache import open_cache
        from fa2cupy.jit.source import Source
        SOURCE = Source({SOURCE.path!r}, {SOURCE.code!r}, {SOURCE.headers!r})
        DEFINES = {DEFINES!r}
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(preamble) + textwrap.dedent(code), *args],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "FA2CUPY_CACHE_DIR": str(directory), "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_lock_of_a_killed_process_is_free(directory: Path) -> None:
    with run(
        f"with open_cache().lock({KEY!r}):\n    print('locked', flush=True)\n    time.sleep(60)", directory
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        other.send_signal(signal.SIGKILL)
    started = time.monotonic()
    with open_cache().lock(KEY, timeout=30):
        assert time.monotonic() - started < 10


def test_processes_that_start_together_compile_once(directory: Path, tmp_path: Path) -> None:
    code = """
        from fa2cupy.jit import compiler
        compiler.nvrtc_build()
        print("ready", flush=True)
        while not Path(sys.argv[1]).exists():
            time.sleep(0.001)
        kernel = jit.kernel(SOURCE, "k", "sm_80", DEFINES)
        print(kernel._entry.compiled, len(kernel.cubin.image))
    """
    start = tmp_path / "start"
    processes = [run(code, directory, str(start)) for _ in range(8)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    start.touch()
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(compiled for compiled, _ in outputs) == ["False"] * 7 + ["True"]
    assert len({size for _, size in outputs}) == 1
    assert not list(directory.glob("*.lock"))
    assert not list(directory.glob(".*"))


def test_warm_start_loads_neither_nvrtc_nor_cupy(directory: Path) -> None:
    code = """
        started = time.perf_counter()
        kernel = jit.kernel(SOURCE, "k", "sm_80", DEFINES)
        seconds = time.perf_counter() - started
        loaded = [name for name in ("cupy", "torch", "jax") if name in sys.modules]
        maps = Path("/proc/self/maps")
        if maps.exists() and "nvrtc" in maps.read_text():
            loaded.append("nvrtc")
        print(kernel._entry.compiled, seconds, *loaded)
    """
    for cold in (True, False):
        with run(code, directory) as process:
            compiled, seconds, *loaded = process.communicate(timeout=60)[0].split()
        assert process.returncode == 0
        assert compiled == str(cold)
        assert ("cupy" in loaded) == cold
    assert loaded == []
    assert float(seconds) < 0.05


def test_expected_build_comes_from_what_is_known(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the NVRTC that is loaded, else from the cache's memory; NVRTC is loaded only where neither knows."""
    library = directory.parent / "libnvrtc.so.12"
    library.write_bytes(b"nvrtc")
    loaded: list[str] = []

    def load() -> str:
        loaded.append("12.8.93 CL-2")
        return loaded[-1]

    monkeypatch.setattr(compiler, "nvrtc_is_loaded", lambda: bool(loaded))
    monkeypatch.setattr(compiler, "nvrtc_build", load)
    expected = sys.modules["fa2cupy.jit.kernel"].expected_nvrtc_build
    open_cache().remember_nvrtc(str(library), NVRTC)
    assert expected() == NVRTC and not loaded
    library.write_bytes(b"another nvrtc")
    assert expected() == "12.8.93 CL-2" and loaded
    open_cache().remember_nvrtc(str(library), NVRTC)
    assert expected() == "12.8.93 CL-2"  # what is loaded counts
