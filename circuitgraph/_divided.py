"""The two matrices of a graph, `[readers, writers]`, while a refinement puts parts in the place of a component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray

    Both = tuple[Bool[ndarray, "readers writers"], Bool[ndarray, "readers writers"]]


@dataclass(frozen=True, eq=False)
class Matrices:
    """`visible` and `feeds`; new readers come at `row`, new writers at `first`."""

    visible: Bool[ndarray, "readers writers"]
    feeds: Bool[ndarray, "readers writers"]
    row: int
    first: int

    def divided(self, n_old: int, n_new: int) -> Both:
        """Some writers replaced by others, which all of their readers feed."""
        place = slice(self.first, self.first + n_old)

        def divided(matrix: Bool[ndarray, "readers writers"]) -> Bool[ndarray, "readers writers"]:
            is_any: Bool[ndarray, " readers"] = np.logical_or.reduce(matrix[:, place], axis=1)
            return _replaced(matrix, place, np.repeat(is_any[:, None], n_new, axis=1))

        return divided(self.visible), divided(self.feeds)

    def divided_by_reader(self, n_readers: int, n_new: int) -> Both:
        """One writer replaced by others, of which the first ones have readers of their own; its own reader, just before, feeds the rest."""
        visible, feeds = self.divided(1, n_new)
        own = self.row - 1
        feeds[own, self.first : self.first + n_readers] = False
        added = np.zeros((n_readers, feeds.shape[1]), dtype=bool)
        added[np.arange(n_readers), self.first + np.arange(n_readers)] = True
        return np.insert(visible, [self.row] * n_readers, visible[own], axis=0), np.insert(feeds, [self.row] * n_readers, added, axis=0)

    def split(self, n_new: int) -> Both:
        """The stream cut in two: whoever comes later and saw what was before sees the new writers instead."""
        hears = self.visible[self.row :, : self.first]
        before = np.concatenate([hears[0], np.zeros(self.visible.shape[1] - self.first, dtype=bool)])
        is_cut = np.concatenate([np.zeros(self.row, dtype=bool), hears.any(1)])
        visible = self.visible & ~(is_cut[:, None] & (np.arange(self.visible.shape[1]) < self.first))
        place = slice(self.first, self.first)
        hears_parts = np.repeat(np.insert(is_cut, self.row, False)[:, None], n_new, axis=1)
        visible = _replaced(np.insert(visible, self.row, before, axis=0), place, hears_parts)
        nothing = np.zeros((len(self.feeds) + 1, n_new), dtype=bool)
        feeds = _replaced(np.insert(self.feeds, self.row, False, axis=0), place, nothing)
        feeds[self.row, self.first : self.first + n_new] = True
        return visible, feeds


def _replaced(
    matrix: Bool[ndarray, "readers writers"], place: slice, columns: Bool[ndarray, "readers some"]
) -> Bool[ndarray, "readers writers"]:
    return np.concatenate([matrix[:, : place.start], columns, matrix[:, place.stop :]], axis=1)
