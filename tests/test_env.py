"""fa2cupy.env: the variables, read when asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fa2cupy import env
from fa2cupy.errors import InvalidArgument


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def test_every_variable_is_in_the_table_once() -> None:
    names = [variable.name for variable in env.VARIABLES]
    assert len(set(names)) == len(names)
    for variable in env.VARIABLES:
        assert variable.name.startswith("FA2CUPY_")
        assert variable.meaning
        assert variable.default


@pytest.mark.parametrize(
    ("value", "expected"), [("", False), ("0", False), ("off", False), ("1", True), (" True ", True)]
)
def test_debug(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    assert env.debug() is False
    monkeypatch.setenv("FA2CUPY_DEBUG", value)
    assert env.debug() is expected


def test_debug_that_is_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA2CUPY_DEBUG", "maybe")
    with pytest.raises(InvalidArgument, match="FA2CUPY_DEBUG='maybe' is not understood: use 1 or 0"):
        env.debug()


def test_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.strict() is False
    monkeypatch.setenv("FA2CUPY_STRICT", "1")
    assert env.strict() is True
    monkeypatch.setenv("FA2CUPY_STRICT", "very")
    with pytest.raises(InvalidArgument, match="FA2CUPY_STRICT='very' is not understood"):
        env.strict()


def test_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.kernel() is None
    for value, expected in (("sm80", "sm80"), ("sm90", "sm90"), (" SM90 ", "sm90"), ("", None)):
        monkeypatch.setenv("FA2CUPY_KERNEL", value)
        assert env.kernel() == expected
    monkeypatch.setenv("FA2CUPY_KERNEL", "volta")
    with pytest.raises(
        InvalidArgument, match="FA2CUPY_KERNEL='volta' is not a kernel family: use sm80 or sm90, or unset"
    ):
        env.kernel()


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert env.cache_dir() == tmp_path / ".cache" / "fa2cupy"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert env.cache_dir() == tmp_path / ".cache" / "fa2cupy"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert env.cache_dir() == tmp_path / "xdg" / "fa2cupy"
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", "~/mine")
    assert env.cache_dir() == tmp_path / "mine"


def test_current_lists_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.current() == {}
    monkeypatch.setenv("FA2CUPY_DEBUG", "1")
    assert env.current() == {"FA2CUPY_DEBUG": "1"}


def test_check_is_asked_for_cheaply(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not env.may_check() and not env.check()
    for value in ("1", "0"):
        monkeypatch.setenv("FA2CUPY_CHECK", value)
        assert env.may_check() and env.check() is (value == "1")
    monkeypatch.setattr(env, "_encoded", None)
    monkeypatch.delenv("FA2CUPY_CHECK")
    assert env.may_check() and not env.check()
