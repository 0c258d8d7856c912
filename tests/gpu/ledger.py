"""What the GPU tests saw, for the record: results compared, and the worst errors of each output and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.gpu.oracle import Judgement

__all__ = ["LEDGER", "Ledger"]


class Ledger:
    """`compared`: cases. `worst`: output -> dtype -> the largest of each number. `notes`: whatever a test reports."""

    def __init__(self) -> None:
        self.compared = 0
        self.worst: dict[str, dict[str, dict[str, float]]] = {}
        self.notes: dict[str, Any] = {}

    def add(self, dtype: str, judgements: dict[str, Judgement]) -> None:
        self.compared += 1
        for name, judgement in judgements.items():
            if name == "memory":
                continue
            worst = self.worst.setdefault(name, {}).setdefault(dtype, {"error_over_limit": 0.0})
            worst["error_over_limit"] = max(worst["error_over_limit"], round(judgement.max_ratio, 4))
            if name != "lse":
                worst["rms_over_limit"] = max(worst.get("rms_over_limit", 0.0), round(judgement.rms_ratio, 4))

    def merge(self, other: dict[str, Any]) -> None:
        """What another process saw: its `vars`."""
        self.compared += other["compared"]
        for name, dtypes in other["worst"].items():
            for dtype, numbers in dtypes.items():
                worst = self.worst.setdefault(name, {}).setdefault(dtype, {})
                for number, value in numbers.items():
                    worst[number] = max(worst.get(number, 0.0), value)
        for name, value in other["notes"].items():
            known = self.notes.get(name)
            self.notes[name] = {**known, **value} if isinstance(known, dict) else value

    def note(self, name: str, value: Any) -> None:
        self.notes[name] = value


LEDGER = Ledger()
