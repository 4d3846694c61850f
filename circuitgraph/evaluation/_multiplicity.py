"""p-values of several tests at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

Correction = Literal["holm", "benjamini-hochberg"]


def adjusted(p: Float[ndarray, " tests"], correction: Correction) -> Float[ndarray, " tests"]:
    """Adjusted p-values: to reject those of at most `alpha` keeps the chance of any false rejection (`holm`; Holm 1979) or the expected
    share of false ones (`benjamini-hochberg`; Benjamini & Hochberg 1995) below `alpha`.

    >>> adjusted(np.array([0.01, 0.04, 0.03]), "holm").tolist()
    [0.03, 0.06, 0.06]
    >>> adjusted(np.array([0.01, 0.04, 0.03]), "benjamini-hochberg").tolist()
    [0.03, 0.04, 0.04]
    """
    order = np.argsort(p)
    n = len(p)
    out: Float[ndarray, " tests"] = np.empty(n)
    if correction == "holm":
        stepped = np.maximum.accumulate(p[order] * (n - np.arange(n)))
    else:
        stepped = np.minimum.accumulate((p[order] * n / np.arange(1, n + 1))[::-1])[::-1]
    out[order] = np.minimum(stepped, 1.0)
    return out
