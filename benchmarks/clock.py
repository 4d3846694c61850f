"""Wall and CPU seconds of a call, and of calls whose ratio is wanted, measured in turns on a machine that others use too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Seconds:
    """`cpu` counts all threads of the process, those that wait in a loop too."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, with the smallest and the largest."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


@dataclass(frozen=True)
class Comparison:
    """A call against a base call. A ratio is that of one round, so that a machine that slows down slows both."""

    base: Spread
    call: Spread
    wall_ratio: Spread
    cpu_ratio: Spread


def timed(call: Callable[[], object]) -> Seconds:
    """How long one call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def compared(call: Callable[[], object], base: Callable[[], object], *, rounds: int) -> Comparison:
    """Each round: `base` three times (the median counts, so that it runs as warm as it can), then `call` once. Warm both up first."""
    bases, calls = [], []
    for _ in range(rounds):
        three = [timed(base) for _ in range(3)]
        bases.append(Seconds(statistics.median(s.wall for s in three), statistics.median(s.cpu for s in three)))
        calls.append(timed(call))
    return Comparison(
        Spread.of([s.wall for s in bases]),
        Spread.of([s.wall for s in calls]),
        Spread.of([c.wall / b.wall for c, b in zip(calls, bases, strict=True)]),
        Spread.of([c.cpu / b.cpu for c, b in zip(calls, bases, strict=True)]),
    )
