"""GPU time of calls that take turns, without the host's share.

A burst is a GPU-side delay, a start event, n calls, an end event: while the delay runs the host queues all n calls, so
that the GPU then works through them without gaps. A burst whose delay had already run out when its last call was queued
would charge the host's time, so it is thrown away and that call's delay is doubled. The contestants take turns burst by
burst. The clock of a burst follows the power that the burst before it took, so everybody comes after everybody else
equally often.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Clock", "Timing", "TorchClock", "order_of_round", "take_turns"]

MIN_CALLS, MAX_CALLS = 5, 25
FIRST_DELAY_MS = 5.0
MAX_DELAY_MS = 160.0


class Clock(Protocol):
    """What `take_turns` needs of a GPU; tests use a made-up one."""

    def burst(self, call: Callable[[], object], calls: int, delay_ms: float) -> tuple[float, bool]:
        """Milliseconds per call, and whether the delay still ran when the last call had been queued."""


class TorchClock:
    """Events and `torch.cuda._sleep` on the current stream of the current device."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._cycles_per_ms = 2e6
        self._cycles_per_ms *= 5.0 / self._sleep_ms(self._cycles_per_ms * 5.0)

    def _sleep_ms(self, cycles: float) -> float:
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._torch.cuda._sleep(int(cycles))
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def burst(self, call: Callable[[], object], calls: int, delay_ms: float) -> tuple[float, bool]:
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._torch.cuda._sleep(int(delay_ms * self._cycles_per_ms))
        start.record()
        for _ in range(calls):
            call()
        in_time = not start.query()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls, in_time


def order_of_round(turn: int, count: int) -> list[int]:
    """Who comes when, of `count` contestants.

    In `count` rounds (twice as many if that is odd) everybody has every place, and comes right after everybody else,
    equally often. E. J. Williams, Experimental designs balanced for the estimation of residual effects of treatments,
    1949.
    """
    zigzag = [place // 2 if place % 2 == 0 else count - 1 - place // 2 for place in range(count)]
    order = [(index + turn) % count for index in zigzag]
    return order[::-1] if count % 2 and turn % 2 else order


@dataclass(slots=True)
class Timing:
    """Bursts of one contestant: milliseconds per call of each, calls per burst, bursts thrown away."""

    calls: int = 0
    delay_ms: float = FIRST_DELAY_MS
    bursts: list[float] = field(default_factory=list)
    thrown_away: int = 0

    @property
    def ms(self) -> float:
        return statistics.median(self.bursts)


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    clock: Clock,
    *,
    bursts: int = 8,
    burst_ms: float = 20.0,
    warm_up: int = 3,
    min_calls: int = MIN_CALLS,
) -> dict[str, Timing]:
    """Median GPU milliseconds per call of each contestant, from `bursts` bursts each that were in time.

    Raises RuntimeError when a contestant's host cost outruns even the longest delay again and again.
    """
    timings = {name: Timing() for name in contestants}
    for name, call in contestants.items():
        for _ in range(warm_up):
            call()
        first_ms = clock.burst(call, 3, FIRST_DELAY_MS)[0]
        timings[name].calls = max(min_calls, min(MAX_CALLS, round(burst_ms / max(first_ms, 1e-6))))
    names = list(contestants)
    turn = 0
    while any(len(t.bursts) < bursts for t in timings.values()):
        for index in order_of_round(turn, len(names)):
            name = names[index]
            timing = timings[name]
            if len(timing.bursts) >= bursts:
                continue
            ms, in_time = clock.burst(contestants[name], timing.calls, timing.delay_ms)
            if in_time:
                timing.bursts.append(ms)
                continue
            timing.thrown_away += 1
            if timing.delay_ms >= MAX_DELAY_MS and timing.thrown_away > 2 * bursts:
                raise RuntimeError(f"{name}: queueing {timing.calls} calls takes longer than {timing.delay_ms:.0f} ms")
            timing.delay_ms = min(MAX_DELAY_MS, 2 * timing.delay_ms)
        turn += 1
    return timings
