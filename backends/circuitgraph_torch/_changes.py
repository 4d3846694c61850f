"""What the writers of some lanes say otherwise than in a kept run, and reading it through masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from circuitgraph_torch._bank import to_tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

_NEARLY_ALL = 0.8  # of the changes: whoever hears so many is told their sum, less the others


class Changes:
    """Differences `lane - kept` of some writers, `[lanes, writers, prompts, position, d_model]`, as they become known.

    `like` `[prompts, position, d_model]` has the positions in question. Readers come in the order of the model.
    """

    def __init__(self, writers: Int[ndarray, " some"], n_lanes: int, like: Tensor) -> None:
        self._writers = writers
        self._said = like.new_empty(n_lanes, len(writers), *like.shape)
        self._sum, self._n_summed = like.new_zeros(n_lanes, *like.shape), 0

    def write(self, writers: Int[ndarray, " some"], differences: Tensor) -> None:
        """Keep `[some, lanes, prompts, position, d_model]`."""
        for slot, said in zip(np.searchsorted(self._writers, writers), differences, strict=True):
            self._said[:, slot] = said

    def mix(self, coefficients: Float[ndarray, "lanes readers visible"]) -> Tensor | None:
        """`[lanes, readers, prompts, position, d_model]` of readers that see the first writers; None where they hear of no change.

        What this gives is to be used before the next call.
        """
        n = int(np.searchsorted(self._writers, coefficients.shape[2]))
        weights = coefficients[:, :, self._writers[:n]]
        hears_most = _hears_most(weights)
        mixed = self._product(np.where(hears_most[..., None], weights - 1, weights))
        if not hears_most.any():
            return mixed
        told = self._sum_of(n)[:, None].expand(-1, weights.shape[1], *(-1,) * 3)
        if not hears_most.all():
            told = told * to_tensor(hears_most, told)[..., None, None, None]
        return told if mixed is None else mixed + told

    def _product(self, weights: Float[ndarray, "lanes readers first"]) -> Tensor | None:
        """None where every weight is zero."""
        heard = np.flatnonzero(weights.any(axis=(0, 1)))
        if len(heard) == 0:
            return None
        first, stop = int(heard[0]), int(heard[-1]) + 1
        if 2 * len(heard) >= stop - first:
            said, weights = self._said[:, first:stop], weights[:, :, first:stop]
        else:
            said, weights = self._said[:, torch.from_numpy(heard).to(self._said.device)], weights[:, :, heard]
        mixed = to_tensor(weights, said) @ said.flatten(2)
        return mixed.view(*mixed.shape[:2], *said.shape[2:])

    def _sum_of(self, n: int) -> Tensor:
        """Of the first writers, which are never fewer than in the call before."""
        for slot in range(self._n_summed, n):
            self._sum += self._said[:, slot]
        self._n_summed = n
        return self._sum


def _hears_most(weights: Float[ndarray, "lanes readers first"]) -> Bool[ndarray, "lanes readers"]:
    """Whether nearly all weights are 1. (Little, taken off the sum of much, would be left with the rounding of much.)"""
    n_ones: Int[ndarray, "lanes readers"] = np.count_nonzero(weights == 1, axis=2)
    hears_most: Bool[ndarray, "lanes readers"] = (n_ones > 0) & (n_ones >= _NEARLY_ALL * weights.shape[2])
    return hears_most
