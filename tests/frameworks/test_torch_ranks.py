"""Two processes on the CPU train what one process trains: DDP, FSDP2, heads split by DTensor, torch's ring."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """way -> the cells of its row in what benchmarks/distributed.py prints."""
    command = [sys.executable, ROOT / "benchmarks" / "distributed.py", "--device", "cpu", "--ranks", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == 6}


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "heads", "ring"])
def test_losses_and_gradients_are_those_of_one_process(table: dict[str, list[str]], way: str) -> None:
    losses, gradients, *_, verdict = table[way]
    assert float(losses) <= 1e-5 and float(gradients) <= 1e-5
    assert verdict == "equal"
