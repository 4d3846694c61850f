"""How much sets of edges have in common, and how much they would by chance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray


def jaccard(a: Bool[ndarray, ...], b: Bool[ndarray, ...]) -> float:
    """`|A and B| / |A or B|`; 1 for two empty sets.

    >>> jaccard(np.array([True, True, False]), np.array([True, False, False]))
    0.5
    """
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0


def jaccard_by_chance(n_a: int, n_b: int, n: int) -> float:
    """The mean Jaccard index of random sets of `n_a` and `n_b` among `n`: over the hypergeometric number that they share.

    >>> jaccard_by_chance(1, 1, 2)
    0.5
    """
    if n_a + n_b == 0:
        return 1.0
    from scipy.stats import hypergeom

    shared = np.arange(max(0, n_a + n_b - n), min(n_a, n_b) + 1)
    return float((hypergeom.pmf(shared, n, n_a, n_b) * shared / (n_a + n_b - shared)).sum())


def mean_jaccard(sets: Sequence[Bool[ndarray, ...]]) -> float:
    """Over all pairs; 1 for a single set."""
    pairs = [*combinations(sets, 2)]
    return float(np.mean([jaccard(a, b) for a, b in pairs])) if pairs else 1.0


def mean_jaccard_by_chance(sizes: Sequence[int], n: int) -> float:
    """What random sets of these sizes would have on average."""
    pairs = [*combinations(sizes, 2)]
    return float(np.mean([jaccard_by_chance(a, b, n) for a, b in pairs])) if pairs else 1.0
