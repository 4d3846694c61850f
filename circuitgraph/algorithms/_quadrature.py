"""Where to stand on the way from 0 to 1, and with which weights, to take the mean of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    Knots = tuple[Float[ndarray, " points"], Float[ndarray, " points"]]

Quadrature = Literal["midpoint", "gauss-legendre", "trapezoid", "left", "right"]


def knots(rule: Quadrature, n: int) -> Knots:
    """`n` points in [0, 1] with their weights, which sum to 1. "trapezoid" stands at both ends: it needs two points.

    >>> points, weights = knots("midpoint", 2)
    >>> points.tolist(), weights.tolist()
    ([0.25, 0.75], [0.5, 0.5])
    """
    return RULES[rule](n)


def by_weight(rule: Quadrature, n: int) -> list[tuple[float, tuple[float, ...]]]:
    """The same in groups of equal weight: the weight of a whole group, and its points. A mean within each group, weighted, is the integral.

    >>> by_weight("trapezoid", 3)
    [(0.5, (0.0, 1.0)), (0.5, (0.5,))]
    """
    points, weights = knots(rule, n)
    rounded = np.round(weights, 12)  # a rule's equal weights differ in the last bit
    groups = [rounded == weight for weight in dict.fromkeys(rounded.tolist())]
    return [(float(weights[group].sum()), tuple(points[group].tolist())) for group in groups]


def _midpoint(n: int) -> Knots:
    return (np.arange(n) + 0.5) / n, np.full(n, 1 / n)


def _gauss_legendre(n: int) -> Knots:
    points, weights = np.polynomial.legendre.leggauss(n)  # on [-1, 1]
    return (points + 1) / 2, weights / 2


def _trapezoid(n: int) -> Knots:
    weights = np.full(n, 1 / (n - 1))
    weights[[0, -1]] /= 2
    return np.linspace(0, 1, n), weights


def _left(n: int) -> Knots:
    return np.arange(n) / n, np.full(n, 1 / n)


def _right(n: int) -> Knots:
    return np.arange(1, n + 1) / n, np.full(n, 1 / n)


RULES: dict[Quadrature, Callable[[int], Knots]] = {
    "midpoint": _midpoint,
    "gauss-legendre": _gauss_legendre,
    "trapezoid": _trapezoid,
    "left": _left,
    "right": _right,
}
