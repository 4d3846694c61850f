"""Is one of two better than the other on about half of the prompts? The equivalence test of Shi et al. 2024, and how much it can see."""

from __future__ import annotations

import math


def sign_test(wins: float, n: int, epsilon: float) -> float:
    """The p-value of `|P(win) - 1/2| <= epsilon`: the chance of a share of wins at least as far from 1/2 where `P(win) = 1/2 + epsilon`.

    `wins` of `n`, a tie counted half.

    >>> sign_test(5, 10, 0.1), round(sign_test(10, 10, 0.1), 5)
    (1.0, 0.00615)
    """
    from scipy.stats import binom

    far = max(wins, n - wins)
    tail = binom.sf(math.ceil(far) - 1, n, 0.5 + epsilon) + binom.cdf(math.floor(n - far), n, 0.5 + epsilon)
    return min(1.0, float(tail))


def prompts_for_sign_test(epsilon: float, *, wins: float, alpha: float, power: float) -> int:
    """How many prompts it takes to reject with this power, where one side wins on the share `wins` of all prompts.

    >>> prompts_for_sign_test(0.1, wins=0.9, alpha=0.05, power=0.8)
    14
    """
    from scipy.stats import binom

    n = 0
    while True:
        n += 1
        least = max(math.ceil(n / 2), int(binom.isf(alpha, n, 0.5 + epsilon)))  # fewer wins are surely not rejected
        rejected = next((k for k in range(least, n + 1) if sign_test(k, n, epsilon) <= alpha), None)
        if rejected is not None and binom.sf(rejected - 1, n, wins) >= power:
            return n


def prompts_for_correlation(correlation: float, *, alpha: float, power: float) -> int:
    """How many prompts it takes to see a linear correlation with this power, by Fisher's transformation: a lower bound for other tests.

    >>> prompts_for_correlation(0.8, alpha=0.05, power=0.8)
    10
    """
    from scipy.stats import norm

    reach = float(norm.isf(alpha / 2) + norm.isf(1 - power))
    return math.ceil(3 + (reach / math.atanh(correlation)) ** 2)
