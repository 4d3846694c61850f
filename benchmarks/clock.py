"""Wall and CPU seconds of a call, and of calls whose ratio is wanted, measured in turns on a machine that others use too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_END: Any = object()


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


@dataclass(frozen=True)
class Paced:
    """A long job against a base call that ran in its pauses: `ratio` is the sum, over the stretches between pauses, of the stretch's wall
    seconds over the base's in the pause after it. `last` is what the job yielded last."""

    seconds: Seconds
    base: Spread
    ratio: float
    last: Any


def timed(call: Callable[[], object]) -> Seconds:
    """How long one call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def compared(call: Callable[[], object], base: Callable[[], object], *, rounds: int) -> Comparison:
    """Each round: `base` three times (the median counts, so that it runs as warm as it can), then `call` once. Warm both up first."""
    bases, calls = [], []
    for _ in range(rounds):
        bases.append(_median_of_three(base))
        calls.append(timed(call))
    return Comparison(
        Spread.of([s.wall for s in bases]),
        Spread.of([s.wall for s in calls]),
        Spread.of([c.wall / b.wall for c, b in zip(calls, bases, strict=True)]),
        Spread.of([c.cpu / b.cpu for c, b in zip(calls, bases, strict=True)]),
    )


def paced(job: Iterable[Any], base: Callable[[], object], *, every: float = 10.0) -> Paced:
    """Run a job that can pause between what it yields. After every `every` seconds of it the clock stops and `base` runs three times (the
    median counts), so that a machine that slows down for some minutes slows both. Warm `base` up first."""
    pieces, bases = iter(job), []
    wall = cpu = stretch = ratio = 0.0
    piece = last = None
    while piece is not _END:
        last, wall_start, cpu_start = piece, time.perf_counter(), time.process_time()
        piece = next(pieces, _END)
        stretch += time.perf_counter() - wall_start
        cpu += time.process_time() - cpu_start
        if piece is _END or stretch >= every:
            bases.append(_median_of_three(base).wall)
            wall, ratio, stretch = wall + stretch, ratio + stretch / bases[-1], 0.0
    return Paced(Seconds(wall, cpu), Spread.of(bases), ratio, last)


def _median_of_three(call: Callable[[], object]) -> Seconds:
    three = [timed(call) for _ in range(3)]
    return Seconds(statistics.median(s.wall for s in three), statistics.median(s.cpu for s in three))
