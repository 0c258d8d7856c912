"""Settings that every test shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import covering
from tests.fake_gpu import copies, gpu  # noqa: F401 - fixtures for the tests of the front end


def pytest_report_header() -> str:
    return f"covering arrays: seed {covering.SEED} (FA2_TEST_SEED chooses another)"


@pytest.fixture(autouse=True)
def _default_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests do not depend on the FA2CUPY_* settings of the shell; the cache's place is kept, it saves compiling."""
    for name in ("FA2CUPY_DEBUG", "FA2CUPY_KERNEL"):
        monkeypatch.delenv(name, raising=False)
    yield
