"""Bootstrap over prompts (Efron 1979): how much a mean, or a ratio of means, would move with other prompts of the same kind.

Prompts are drawn with replacement, all quantities of a prompt together, and the percentiles of the statistic are the interval.
Deterministic by seed. One prompt has no interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

CONFIDENCE = 0.95
RESAMPLES = 2000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """`value` with its bootstrap interval over prompts, which one prompt does not have.

    >>> print(Estimate(0.5, (0.25, -1e-9)))
    0.500 (95%: 0.250 to 0.000)
    """

    value: float
    interval: Interval | None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{rounded(self.value)} (one prompt: no interval)"
        low, high = self.interval
        return f"{rounded(self.value)} ({CONFIDENCE:.0%}: {rounded(low)} to {rounded(high)})"


def resampled_means(samples: Float[ndarray, "quantities prompts"], *, seed: int = 0) -> Float[ndarray, "resamples quantities"]:
    """The mean of each quantity over prompts, for `RESAMPLES` draws of the prompts."""
    n = samples.shape[1]
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    means: Float[ndarray, "resamples quantities"] = counts @ np.asarray(samples, dtype=np.float64).T / n
    return means


def mean_interval(values: Float[ndarray, " prompts"], *, seed: int = 0) -> Interval | None:
    """The interval of a mean over prompts; `None` for one prompt.

    >>> mean_interval(np.array([1.0, 1.0, 1.0]))
    (1.0, 1.0)
    """
    if len(values) < 2:
        return None
    return interval_of(resampled_means(values[None], seed=seed)[:, 0])


def ratio_interval(over: Float[ndarray, " prompts"], under: Float[ndarray, " prompts"], *, seed: int = 0) -> Interval | None:
    """The interval of `mean(over) / mean(under)`; `None` for one prompt."""
    if len(over) < 2:
        return None
    means = resampled_means(np.stack([over, under]), seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = means[:, 0] / means[:, 1]
    return interval_of(ratios)


def interval_of(statistic: Float[ndarray, " resamples"]) -> Interval | None:
    """The percentiles of a resampled statistic, without the resamples where it is not a number."""
    statistic = statistic[np.isfinite(statistic)]
    if len(statistic) == 0:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic, [tail, 1 - tail])
    return float(low), float(high)


def rounded(value: float) -> str:
    """Three decimals, and never -0.000.

    >>> rounded(-1e-9)
    '0.000'
    """
    return f"{round(value, 3) + 0.0:.3f}"
