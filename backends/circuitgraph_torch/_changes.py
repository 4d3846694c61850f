"""What the writers of some lanes say otherwise than in a kept run, and reading it through masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from circuitgraph_torch._bank import to_tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray


class Changes:
    """Differences `lane - kept` of some writers, `[lanes, writers, prompts, position, d_model]`, as they become known.

    `like` `[prompts, position, d_model]` has the positions in question.
    """

    def __init__(self, writers: Int[ndarray, " some"], n_lanes: int, like: Tensor) -> None:
        self._writers = writers
        self._said = like.new_empty(n_lanes, len(writers), *like.shape)

    def write(self, writers: Int[ndarray, " some"], differences: Tensor) -> None:
        """Keep `[some, lanes, prompts, position, d_model]`."""
        for slot, said in zip(np.searchsorted(self._writers, writers), differences, strict=True):
            self._said[:, slot] = said

    def mix(self, coefficients: Float[ndarray, "lanes readers visible"]) -> Tensor | None:
        """`[lanes, readers, prompts, position, d_model]` of readers that see the first writers; None where they hear of no change."""
        visible = self._writers[: np.searchsorted(self._writers, coefficients.shape[2])]
        weights = coefficients[:, :, visible]
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
