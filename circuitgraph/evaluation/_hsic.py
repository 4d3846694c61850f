"""Are two numbers per prompt independent? The Hilbert-Schmidt criterion with a permutation test (Gretton et al. 2007)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


def hsic_test(x: Float[ndarray, " prompts"], y: Float[ndarray, " prompts"], *, permutations: int, seed: int = 0) -> tuple[float, float]:
    """The criterion and its p-value: the share of permutations of `y`, the identity among them, that reach the observed value.

    Gaussian kernels whose width is the median distance of each variable's own values. A constant variable is independent of everything.

    >>> x = np.arange(20.0)
    >>> round(hsic_test(x, x**2, permutations=999)[1], 3), hsic_test(x, np.ones(20), permutations=999)[1]
    (0.001, 1.0)
    """
    n, draw = len(x), np.random.default_rng(seed)
    of_x, of_y = _centred(_kernel(x)), _kernel(y)
    observed = float((of_x * of_y).sum())
    reached = 1
    for _ in range(permutations):
        order = draw.permutation(n)
        reached += float((of_x * of_y[np.ix_(order, order)]).sum()) >= observed - 1e-9 * n  # equal up to rounding is reached
    return observed / (n - 1) ** 2, reached / (permutations + 1)


def _kernel(values: Float[ndarray, " prompts"]) -> Float[ndarray, "prompts prompts"]:
    distance = np.abs(values[:, None] - values[None, :])
    apart = distance[distance > 0]
    width = float(np.median(apart)) if len(apart) else 1.0
    kernel: Float[ndarray, "prompts prompts"] = np.exp(-(distance**2) / (2 * width**2))
    return kernel


def _centred(kernel: Float[ndarray, "prompts prompts"]) -> Float[ndarray, "prompts prompts"]:
    centred: Float[ndarray, "prompts prompts"] = kernel - kernel.mean(axis=0) - kernel.mean(axis=1, keepdims=True) + kernel.mean()
    return centred
