"""`ConstantValues`: what every writer says, the same at every position of every prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._engine import WriterValues

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class ConstantValues:
    """Writer values from one vector per writer, for prompts of these lengths.

    >>> ConstantValues(np.zeros((4, 8)), lengths=(3, 5))[1].shape
    (4, 5, 8)
    """

    constants: Float[ndarray, "writers d_model"]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, prompt: int) -> Float[ndarray, "writers position d_model"]:
        writers, d_model = self.constants.shape
        return np.broadcast_to(self.constants[:, None], (writers, self.lengths[prompt], d_model))


@dataclass(frozen=True, eq=False)
class WriterMeans:
    """What writers say on average over prompts and positions, and how far it is from that: root mean square over vectors."""

    mean: Float[ndarray, "writers d_model"]
    spread: Float[ndarray, " writers"]
    lengths: tuple[int, ...]


def writer_means(values: WriterValues) -> WriterMeans:
    """One pass over what every writer says."""
    total = squares = 0.0
    lengths = []
    for prompt in range(len(values)):
        said = np.asarray(values[prompt], dtype=np.float64)
        lengths.append(said.shape[1])
        total = total + said.sum(axis=1)
        squares = squares + (said**2).sum(axis=1)
    mean = np.asarray(total / sum(lengths))
    variance = np.asarray(squares / sum(lengths)) - mean**2
    return WriterMeans(mean, np.sqrt(np.maximum(variance, 0).mean(axis=1)), tuple(lengths))
