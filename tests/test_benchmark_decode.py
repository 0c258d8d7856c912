"""The benchmark of attention on a KV cache, as far as it goes without a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import bench, decode, decode_host
from benchmarks.decode import CELLS, Cell, Data, measure, ours, reached, tiles_of


def test_rehearsal(capsys: pytest.CaptureFixture[str]) -> None:
    """Cells of each kind, right on the CPU; no record is written."""
    assert bench.main(["--cases", "decode", "--rehearse", "--cells", "b1-s1k,*ragged*,*w1k,*fp8,*q4,*mqa"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and not any("!" in line for line in lines)


def test_what_is_wrong_is_marked() -> None:
    data = Data(Cell("c", 2, 64, 4, 2, head_dim=16), 1, np)
    right = ours(data)
    found = measure(data, {"a": right, "b": lambda i: right(i) + np.float16(0.1)}, None, 1)
    assert found["a"][1] and not found["b"][1]
    assert decode.line(data.cell, found, 1.0).count("!") == 1
    off_by_one = Data(Cell("c", 1, 64, 4, 2, head_dim=16, window=20), 1, np)
    cell = off_by_one.cell
    off_by_one.cell = Cell("c", 1, 64, 4, 2, head_dim=16, window=19)
    out = ours(off_by_one)(0)
    off_by_one.cell = cell
    assert off_by_one.error(out) > decode.RIGHT


def test_bars_of_the_skeleton() -> None:
    cells = {cell.name: cell for cell in CELLS}
    assert len(cells) == len(CELLS) == 28
    big, small = cells["b16-s8k"], cells["b1-s8k"]
    assert big.bytes == 536870912 and small.bytes == 33554432
    assert reached(big, {"fa2cupy": (127.0, True)}) and not reached(big, {"fa2cupy": (129.0, True)})
    assert reached(small, {"fa2cupy": (12.9, True)}) and not reached(small, {"fa2cupy": (13.1, True)})
    assert not reached(big, {"fa2cupy": (1.0, False)}) and not reached(big, {})


def test_tiles_by_text() -> None:
    assert list(tiles_of(["slots=2|3,block_n=32", "num_warps=4"])) == [
        {"slots": 2, "block_n": 32},
        {"slots": 3, "block_n": 32},
        {"num_warps": 4},
    ]


def test_unknown_cells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decode.main(["--cells", "nothing"])
    assert "no cell is called nothing" in capsys.readouterr().err
    assert decode.main(["--list", "--cells", "p1-*"]) == 0
    assert capsys.readouterr().out.startswith("p1-b16-s8k")


def test_bars_of_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    times = {"attend(out=)": [6.0, 7.0, 6.5], "attend()": [8.0, 7.0, 7.5], "torch flash SDPA": [10.0, 10.0, 10.0]}
    assert decode_host.report(times) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("0.65 of torch's, at most 0.64 (missed)") and "missed" not in lines[1]
    times["attend(out=)"] = [6.0, 6.0, 7.0]
    assert decode_host.report(times) == 0


def test_calls_of_the_host() -> None:
    torch = pytest.importorskip("torch")
    calls = decode_host.calls("cpu")
    for number in (0, 3):
        *ours, theirs = (call(number) for call in calls.values())
        for out in ours:
            torch.testing.assert_close(out, theirs.transpose(1, 2))
    assert all(min(each) > 0 for each in decode_host.measure({"a": lambda i: i}, lambda: None, 2).values())
