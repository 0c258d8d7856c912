"""The log "fa2cupy", and warnings: of a class of their own, at the line that called."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest

import fa2cupy
from fa2cupy import declared, errors, log


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    logger = logging.getLogger("fa2cupy")
    before = logger.level
    yield
    logger.setLevel(before)
    log.warn_once.cache_clear()


def test_debug_goes_to_handlers(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    log.debug("a plan with 100% of %s")
    assert caplog.record_tuples == [("fa2cupy", logging.DEBUG, "a plan with 100% of %s")]
    assert capsys.readouterr().err == ""


def test_a_level_that_was_set_counts(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("fa2cupy").setLevel(logging.INFO)
    log.debug("a plan")
    assert caplog.records == []


def test_debug_goes_to_stderr_without_a_handler() -> None:
    code = """
import logging, sys
from fa2cupy import log
log.debug("first")
logging.getLogger("fa2cupy").setLevel(logging.ERROR)
log.debug("second")
logging.getLogger("fa2cupy").setLevel(logging.NOTSET)
logging.basicConfig(stream=sys.stdout)
log.debug("third")
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stderr == "first\n"
    assert result.stdout == "DEBUG:fa2cupy:third\n"


def test_warnings_point_past_this_package() -> None:
    """Through two functions whose globals say that they are fa2cupy's, to this file."""
    names = {"__name__": "fa2cupy.made_up", "log": log}
    exec("def inner():\n    log.warn('slow')\ndef outer():\n    inner()\n", names)
    with pytest.warns(fa2cupy.Fa2Warning, match="slow") as caught:
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        names["outer"]()  # type: ignore[operator]
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)
    assert issubclass(errors.Fa2Warning, RuntimeWarning)


def test_the_filters_of_the_caller_hold() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=fa2cupy.Fa2Warning, module=__name__)
        with pytest.raises(fa2cupy.Fa2Warning, match="slow"):
            log.warn("slow")
        warnings.simplefilter("ignore", fa2cupy.Fa2Warning)
        log.warn("slow")


def test_warn_once() -> None:
    with pytest.warns(fa2cupy.Fa2Warning) as caught:
        for message in ("one", "two", "one"):
            log.warn_once(message)
    assert [str(warning.message) for warning in caught] == ["one", "two"]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("entry", declared.DECLARED, ids=lambda entry: entry.what)
def test_declared_errors_are_sentences(entry: declared.Declared) -> None:
    values = dict.fromkeys(("name", "dtype", "value", "index", "major", "minor", "width", "kilobytes", "most"), "x")
    error = entry.error(**values)
    assert isinstance(error, errors.Fa2Error)
    assert "{" not in str(error) and ": " in str(error)
