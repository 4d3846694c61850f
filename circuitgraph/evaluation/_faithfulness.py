"""How much of the model's behaviour a mask keeps, normalised: 1 is the model itself, 0 the source run.

    f(C) = (mean F(C) - mean F(0)) / (mean F(1) - mean F(0))

A ratio of means over prompts, never a mean of ratios: one prompt with a small denominator would drown the rest. (Hanna et al. 2024; MIB.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._errors import DegenerateError
from circuitgraph.evaluation._bootstrap import Estimate, mean_interval, ratio_interval

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

_NOISE = 1e-6  # of the metric's own size, in float32: below this F(1) and F(0) are one number


Faithfulness = Estimate  # the name it had first


def faithfulness(
    kept: Float[ndarray, " prompts"], clean: Float[ndarray, " prompts"], source: Float[ndarray, " prompts"], *, seed: int = 0
) -> Estimate:
    """`f` of a run from the metric per prompt there, in the model itself and in the source run.

    >>> clean, source = np.array([2.0, 4.0]), np.array([0.0, 0.0])
    >>> faithfulness(np.array([1.0, 2.0]), clean, source).value
    0.5
    """
    over, under = kept - source, clean - source
    return Estimate(float(over.mean() / under.mean()), ratio_interval(over, under, seed=seed))


def are_apart(clean: Float[ndarray, " prompts"], source: Float[ndarray, " prompts"], *, seed: int = 0) -> bool:
    """Whether the mean difference is more than rounding, and 0 is not in its interval."""
    gap = clean - source
    interval = mean_interval(gap, seed=seed)
    size = max(1.0, float(np.abs(clean).max()), float(np.abs(source).max()))
    return abs(float(gap.mean())) > _NOISE * size and not (interval and interval[0] <= 0 <= interval[1])


def check_gap(clean: Float[ndarray, " prompts"], source: Float[ndarray, " prompts"], metric: str, *, seed: int = 0) -> None:
    """Raises `DegenerateError` when `F(1)` and `F(0)` cannot be told apart: every circuit would look perfect."""
    if are_apart(clean, source, seed=seed):
        return
    gap = clean - source
    interval = mean_interval(gap, seed=seed)
    within = f", 95% interval {interval[0]:.4g} to {interval[1]:.4g} over {len(gap)} prompts" if interval else ""
    raise DegenerateError(
        f"{metric}: the model {clean.mean():.4g} and the source run {source.mean():.4g} cannot be told apart "
        f"(difference {gap.mean():.4g}{within}), so every circuit would look perfect; "
        "use more prompts, a corruption that changes the answer, or another source or metric"
    )
