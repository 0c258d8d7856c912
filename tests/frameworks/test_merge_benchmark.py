"""benchmarks/merge.py: what it says of a merge that is as fast as a copy, and of one that is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import merge


class Clock:
    """A copy takes a millisecond."""

    def __init__(self, merge_ms: float) -> None:
        self.merge_ms = merge_ms

    def burst(self, call: Callable[[], object], calls: int, delay_ms: float) -> tuple[float, bool]:
        return (self.merge_ms if isinstance(call(), tuple) else 1.0), True


@pytest.mark.parametrize(("merge_ms", "status"), [(1.1, 0), (1.2, 1)])
def test_the_bar(merge_ms: float, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge.main(["--rehearse", "--bursts", "2", "--check"], Clock(merge_ms)) == status
    assert merge.main(["--rehearse", "--bursts", "2"], Clock(merge_ms)) == 0
    printed = capsys.readouterr().out
    assert printed.count("GB/s  copy") == 4 * len(merge.CELLS)
    assert ("0.83 of a copy, 0.9 is wanted" in printed) == bool(status)


def test_bytes() -> None:
    cell = merge.Cell(4, "bfloat16", 1, 100, 2, 64)
    assert cell.moved(False) == 5 * 200 * (64 * 2 + 4) and cell.moved(True) == 10 * 200 * (64 * 2 + 4)


def test_a_wrong_result_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import fa2cupy.merge as module

    monkeypatch.setattr(module, "merge_attention", lambda outs, lses: (outs[0], lses[0]))
    with pytest.raises(SystemExit, match="a result is off by"):
        merge.main(["--rehearse", "--bursts", "2"], Clock(1.0))
