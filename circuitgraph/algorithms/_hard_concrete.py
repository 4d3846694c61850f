"""The hard-concrete distribution (Louizos, Welling & Kingma 2018, arXiv:1712.01312): a mask that is exactly 0, exactly 1 or between, and
still has a gradient in its one parameter, `log_alpha`.

    s = sigmoid((log u - log(1 - u) + log_alpha) / T),  u uniform;    mask = min(1, max(0, LOW + (HIGH - LOW) * s))

The temperature and the limits are those of Louizos et al., Cao et al. (2021) and Bhaskar et al. (2024).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    Array = Float[ndarray, ...]

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
_POINTS = 16  # of the midpoint rule
_MARGIN = 1e-6  # of u, from 0 and 1


def uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """What a sample is made of."""
    return rng.uniform(_MARGIN, 1 - _MARGIN, size=shape)


def sample(log_alpha: Array, u: Array) -> tuple[Array, Array]:
    """The mask, and its derivative in `log_alpha`: 0 where the mask is 0 or 1."""
    s = sigmoid((np.log(u) - np.log1p(-u) + log_alpha) / TEMPERATURE)
    stretched = LOW + (HIGH - LOW) * s
    slope = np.where((stretched > 0) & (stretched < 1), (HIGH - LOW) * s * (1 - s) / TEMPERATURE, 0.0)
    return np.clip(stretched, 0, 1), slope


def expected_l0(log_alpha: Array) -> tuple[Array, Array]:
    """The probability that a mask is not 0, whose sum is the expected number of them, and its derivative in `log_alpha`.

    >>> float(expected_l0(np.array(0.0))[0].round(3))
    0.832
    """
    p = sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))
    return p, p * (1 - p)


def expected_value(log_alpha: Array) -> tuple[Array, Array]:
    """The mean of a mask, which is the mean of P(mask > t) over t from 0 to 1, and its derivative in `log_alpha`.

    >>> float(expected_value(np.array(0.0))[0].round(3))
    0.5
    """
    total, slope = np.zeros(np.shape(log_alpha)), np.zeros(np.shape(log_alpha))
    for t in (np.arange(_POINTS) + 0.5) / _POINTS:
        s = (t - LOW) / (HIGH - LOW)
        p = sigmoid(log_alpha - TEMPERATURE * math.log(s / (1 - s)))
        total, slope = total + p / _POINTS, slope + p * (1 - p) / _POINTS
    return total, slope


def settled(log_alpha: Array) -> Array:
    """The mask without chance that stands for the distribution (Louizos et al., equation 13)."""
    mask: Array = np.clip(LOW + (HIGH - LOW) * sigmoid(log_alpha), 0, 1)
    return mask


def log_alpha_of(mask: float) -> float:
    """The parameter whose settled mask is this.

    >>> round(log_alpha_of(0.9), 3)
    1.609
    """
    s = (mask - LOW) / (HIGH - LOW)
    return math.log(s / (1 - s))


def sigmoid(x: Array) -> Array:
    """Without overflow."""
    y: Array = 0.5 * (1 + np.tanh(0.5 * x))
    return y
