"""fa2cupy in flash_attn's place, as far as that shows without torch: what importlib answers, refusals, run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fa2cupy
from fa2cupy import __main__
from fa2cupy.cli import run
from fa2cupy.errors import InvalidArgument

ROOT = Path(__file__).parent.parent
STARTUP = ROOT / "fa2cupy" / "startup"


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("a real flash-attn is installed")
    monkeypatch.delenv("FA2CUPY_FLASH_ATTN", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    fa2cupy.uninstall_flash_attn()


def _real(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str | None = "2.8.1") -> None:
    """A flash-attn on the path."""
    package = folder / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("who = 'real'\n")
    (package / "flash_attn_interface.py").write_text("")
    if version is not None:
        info = folder / f"flash_attn-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)


def _version() -> str | None:
    try:
        return importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return None


def test_what_is_found() -> None:
    assert (_version(), importlib.util.find_spec("flash_attn")) == (None, None)
    fa2cupy.install_as_flash_attn()
    fa2cupy.install_as_flash_attn()
    assert _version() == importlib.metadata.version("flash_attn") == "2.8.3+fa2cupy"
    packages = importlib.metadata.packages_distributions()
    for name in ("flash_attn", "flash_attn_2_cuda", "flash_attn_interface"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        assert Path(spec.origin).is_file()
        assert packages[name] == ["flash-attn"]
    distribution = importlib.metadata.distribution("Flash-Attn")
    assert distribution.metadata["Name"] == "flash-attn"
    assert distribution.read_text("INSTALLER") == "fa2cupy\n"
    assert "numpy" in {d.metadata["Name"] for d in importlib.metadata.distributions()}
    assert importlib.metadata.version("numpy") != "2.8.3+fa2cupy"
    fa2cupy.uninstall_flash_attn()
    fa2cupy.uninstall_flash_attn()
    assert (_version(), importlib.util.find_spec("flash_attn")) == (None, None)
    assert "flash_attn" not in importlib.metadata.packages_distributions()


def test_installing_imports_no_framework() -> None:
    code = "import sys, fa2cupy; fa2cupy.install_as_flash_attn(); print({'torch', 'cupy', 'jax'} & set(sys.modules))"
    assert _python("-c", code) == "set()\n"


@pytest.mark.parametrize("version", ["2.8.1", None])
def test_a_real_one_is_not_replaced_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    _real(tmp_path, monkeypatch, version)
    said = f"flash-attn {version} is installed" if version else "a flash_attn is on the path"
    with pytest.raises(InvalidArgument, match=f"{said}: install_as_flash_attn\\(force=True\\) replaces it"):
        fa2cupy.install_as_flash_attn()
    assert _version() == version
    fa2cupy.install_as_flash_attn(force=True)
    assert _version() == "2.8.3+fa2cupy"
    fa2cupy.uninstall_flash_attn()
    assert _version() == version


def test_one_that_is_imported_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _real(tmp_path, monkeypatch)
    import flash_attn

    monkeypatch.setattr(sys, "path", sys.path[1:])  # not to be found any more
    try:
        with pytest.raises(InvalidArgument, match="flash_attn is already imported"):
            fa2cupy.install_as_flash_attn()
        fa2cupy.install_as_flash_attn(force=True)
        assert "flash_attn" not in sys.modules
        fa2cupy.uninstall_flash_attn()
        assert sys.modules["flash_attn"] is flash_attn
    finally:
        del sys.modules["flash_attn"]


def test_the_extension_alone_is_a_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn_2_cuda.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidArgument, match="a flash_attn is on the path"):
        fa2cupy.install_as_flash_attn()


def test_flash_attention_3_stays_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for force in (False, True):
        fa2cupy.install_as_flash_attn(force)
        spec = importlib.util.find_spec("flash_attn_interface")
        assert spec is not None
        assert (spec.origin == str(tmp_path / "flash_attn_interface.py")) is not force
        fa2cupy.uninstall_flash_attn()


def test_flash_attention_4_lives_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the folder flash_attn/cute and nothing else there."""
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (cute / "__init__.py").write_text("who = 4\n")
    (cute / "interface.py").write_text("who = 'four'\n")
    monkeypatch.syspath_prepend(tmp_path)
    fa2cupy.install_as_flash_attn()
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # ours needs torch
    sys.modules["flash_attn"].__path__ = []
    try:
        import flash_attn.cute.interface

        assert (flash_attn.cute.who, flash_attn.cute.interface.who) == (4, "four")
    finally:
        for name in ("flash_attn.cute", "flash_attn.cute.interface"):
            sys.modules.pop(name, None)


def test_too_late_for_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    with pytest.warns(RuntimeWarning, match="transformers may have looked for flash-attn already"):
        fa2cupy.install_as_flash_attn()


# ----------------------------------------------------------------------------------------------------------------------
# python -m fa2cupy run


def _python(*arguments: str | Path, **variables: str) -> str:
    """What Python says on stdout. fa2cupy is this checkout's."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FA2CUPY_FLASH_ATTN")
    }
    environment |= {"PYTHONPATH": str(ROOT)} | variables
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


SCRIPT = """
import importlib.metadata, importlib.util, multiprocessing, sys

def look(_):
    return importlib.metadata.version("flash-attn"), importlib.util.find_spec("flash_attn").origin

if __name__ == "__main__":
    print(sys.argv[1:], sys.flags.optimize, __file__ == sys.argv[0], "numpy" in sys.modules, *look(0))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(look, [0]))
"""


def _said(arguments: list[str], optimize: int = 0) -> str:
    origin = str(ROOT / "fa2cupy" / "flash_attn" / "__init__.py")
    return f"{arguments} {optimize} True False 2.8.3+fa2cupy {origin}\n('2.8.3+fa2cupy', {origin!r})\n"


def test_run_of_a_script_and_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    said = _python("-O", "-m", "fa2cupy", "run", script, "--force", "-m", "x", "--lr=1")
    assert said == _said(["--force", "-m", "x", "--lr=1"], optimize=1)


def test_run_of_a_module_from_a_folder_where_fa2cupy_is_not(tmp_path: Path) -> None:
    """python -m finds fa2cupy here by the working directory, which the module's processes have no use for."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "training.py").write_text(SCRIPT)
    code = (
        f"import os, runpy, sys; sys.path.insert(0, {str(ROOT)!r}); os.chdir({str(tmp_path / 'elsewhere')!r});"
        "sys.argv = ['fa2cupy', 'run', '-m', 'training', '--steps', '2'];"
        "runpy.run_module('fa2cupy', run_name='__main__', alter_sys=True)"
    )
    assert _python("-c", code, PYTHONPATH="") == _said(["--steps", "2"])


def test_run_of_a_program(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launcher = tmp_path / "launch"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    launcher.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PATH', '')}"
    assert _python("-m", "fa2cupy", "run", "launch", script, "a", PATH=path) == _said(["a"])


def test_run_chains_to_the_sitecustomize_that_it_hides(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.customized = __file__\n")
    script = tmp_path / "train.py"
    script.write_text(
        "import importlib.metadata, sys; print(sys.customized, importlib.metadata.version('flash-attn'));"
        "print(sys.modules['sitecustomize'].__file__)"
    )
    mine = str(tmp_path / "sitecustomize.py")
    said = _python("-m", "fa2cupy", "run", script, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert said == f"{mine} 2.8.3+fa2cupy\n{mine}\n"


def test_the_startup_folder_alone_does_nothing(tmp_path: Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('flash_attn'))"
    assert _python("-c", code, PYTHONPATH=str(STARTUP)) == "None\n"
    assert _python("-c", code, PYTHONPATH=str(STARTUP), FA2CUPY_FLASH_ATTN="0") == "None\n"


def test_run_and_a_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _real(tmp_path / "site", monkeypatch)
    script = tmp_path / "train.py"
    script.write_text("import importlib.metadata as m; print(m.version('flash-attn'))")
    assert __main__.main(["run", str(script)]) == 1
    assert "flash-attn 2.8.1 is installed" in capsys.readouterr().err
    paths = f"{ROOT}{os.pathsep}{tmp_path / 'site'}"
    assert _python("-m", "fa2cupy", "run", "--force", script, PYTHONPATH=paths) == "2.8.3+fa2cupy\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run needs a Python file, -m MODULE, or a program on the PATH"),
        (["no/such.py"], "no/such.py is neither a file nor a program on the PATH"),
        (["no-such-program"], "no-such-program is neither a file nor a program on the PATH"),
    ],
)
def test_run_of_nothing(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["run", *arguments]) == 1
    assert capsys.readouterr().err == f"fa2cupy: {message}\n"


def test_run_needs_the_environment() -> None:
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from fa2cupy.__main__ import main"
    command = [sys.executable, "-E", "-c", f"{start}; sys.exit(main(['run', 'x.py']))"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, "-E, -I or -S" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["-m", "fa2cupy"], []),
        (["-X", "dev", "-u", "-m", "fa2cupy"], ["-X", "dev", "-u"]),
        (["-um", "fa2cupy"], ["-u"]),
        (["fa2cupy/__main__.py"], []),
    ],
)
def test_options_of_the_interpreter(given: list[str], options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["run", "-m", "fa2cupy", "-m"]
    monkeypatch.setattr(sys, "argv", ["fa2cupy", *arguments])
    monkeypatch.setattr(sys, "orig_argv", ["python", *given, *arguments])
    assert run._interpreter_options() == options


def test_variables_are_added_once() -> None:
    def paths(environment: dict[str, Any]) -> list[str]:
        assert environment["HOME"] == "/h"
        return environment["PYTHONPATH"].split(os.pathsep)

    first = run.environment({"HOME": "/h", "PYTHONPATH": f"/a{os.pathsep}"}, force=False)
    assert (paths(first), first["FA2CUPY_FLASH_ATTN"]) == ([str(STARTUP), "/a", ""], "1")
    second = run.environment(first, force=True)
    assert (paths(second), second["FA2CUPY_FLASH_ATTN"]) == ([str(STARTUP), "/a", ""], "force")
    assert paths(run.environment({"HOME": "/h"}, force=False)) == [str(STARTUP)]
