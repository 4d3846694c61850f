"""Batches of activations for training, in an order that depends on the seed and the step alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from circuitgraph._errors import CircuitGraphError
from circuitgraph._training import SAETraining
from circuitgraph_torch._places import Spot, rows_seen

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

_PROMPTS, _ROWS = 1, 2  # what a random stream is for


class Activations:
    """What a dictionary reads and what it is to reconstruct, over and over the prompts.

    Prompts are shuffled once and cut into chunks of about `settings.buffer` positions; an epoch goes through the chunks, in each of them
    through its positions in an order of that epoch. One chunk is in memory at a time, and where there is one only, the model runs once.
    Raises `CircuitGraphError` where all positions together make no batch.
    """

    def __init__(self, model: nn.Module, wanted: tuple[Spot, Spot], prompts: Sequence[Int[ndarray, " position"]], settings: SAETraining):
        self._model, self._wanted, self._settings = model, wanted, settings
        order = np.random.default_rng([settings.seed, _PROMPTS]).permutation(len(prompts))
        self._chunks = _cut([prompts[i] for i in order], settings)
        self._held: tuple[int, tuple[Tensor, Tensor]] | None = None
        self._order: tuple[tuple[int, int], Tensor] | None = None

    @cached_property
    def _ends(self) -> list[int]:
        """How many batches of an epoch are done at the end of each chunk."""
        return [*accumulate(_positions(chunk, self._settings) // self._settings.batch for chunk in self._chunks)]

    @property
    def device(self) -> torch.device:
        return next(self._model.parameters()).device

    def first(self) -> tuple[Tensor, Tensor]:
        """All rows of the first chunk."""
        return self._loaded(0)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """What is read, and what is reconstructed, in one step: `[batch, d_in]`, `[batch, d_out]`."""
        epoch, at = divmod(step, self._ends[-1])
        chunk = bisect_right(self._ends, at)
        at -= self._ends[chunk - 1] if chunk else 0
        x, y = self._loaded(chunk)
        size = self._settings.batch
        rows = self._ordered(epoch, chunk)[at * size : (at + 1) * size]
        return x[rows], y[rows]

    def _loaded(self, chunk: int) -> tuple[Tensor, Tensor]:
        if self._held is None or self._held[0] != chunk:
            self._held = None  # before the next is loaded: two chunks may be more than there is memory for
            x, y = rows_seen(self._model, self._wanted, self._chunks[chunk], first_position=self._settings.first_position)
            self._held = chunk, (x, y)
        return self._held[1]

    def _ordered(self, epoch: int, chunk: int) -> Tensor:
        if self._order is None or self._order[0] != (epoch, chunk):
            n = _positions(self._chunks[chunk], self._settings)
            order = np.random.default_rng([self._settings.seed, _ROWS, epoch, chunk]).permutation(n)
            self._order = (epoch, chunk), torch.from_numpy(order).to(self.device)
        return self._order[1]


def _positions(prompts: Sequence[Int[ndarray, " position"]], settings: SAETraining) -> int:
    return sum(max(0, len(prompt) - settings.first_position) for prompt in prompts)


def _cut(prompts: Sequence[Int[ndarray, " position"]], settings: SAETraining) -> list[list[Int[ndarray, " position"]]]:
    """Into chunks of about `buffer` positions; what is left at the end and makes no batch goes to the chunk before."""
    total, size = _positions(prompts, settings), max(settings.buffer, settings.batch)
    if total < settings.batch:
        raise CircuitGraphError(
            f"train: the prompts have {total:,} positions, and a batch has {settings.batch:,}; give more, or a smaller batch"
        )
    chunks: list[list[Int[ndarray, " position"]]] = [[]]
    filled = 0
    for prompt in prompts:
        if filled >= size:
            chunks.append([])
            filled = 0
        chunks[-1].append(prompt)
        filled += max(0, len(prompt) - settings.first_position)
    if len(chunks) > 1 and filled < settings.batch:
        rest = chunks.pop()
        chunks[-1] += rest
    return chunks
