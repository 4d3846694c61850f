"""From which run a lane is best computed: a kept run that it differs from in a few readers, or none.

An engine keeps one run with all that was said in it. A lane whose mask has the same rows but for some is that run, recomputed from
these readers on, as far as they are heard. When the lanes agree on rows that the kept run does not have, as those of a greedy search do
once it has gone on to the next reader, the kept run moves there first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._liveness import ALL, DEAD, Extent, Liveness
from circuitgraph._sites import Sites

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

MOST_MOVES = 64
"""After so many the kept run is made anew: every move adds a rounding error to what its readers hear."""

_MLP_WORK = 2.0  # of an MLP, where that of a layer's heads together is 1
_TOGETHER = 1.2  # how much more work two parts may be as one


@dataclass(frozen=True, eq=False)
class Part:
    """Lanes that differ from the kept run in the inputs of some readers only: what is needed of them, and what of that changes."""

    lanes: Int[ndarray, " some"]
    readers: Int[ndarray, " some"]
    needed: Extent
    changed: Extent


@dataclass(frozen=True, eq=False)
class Plan:
    """How to answer a stack of masks: make the kept run `anew` (the model itself), move it (`move`, of one lane, to `mask`), and go on
    from there for each part; all in this order, and each only if it is there. No parts at all: run every lane from the input."""

    parts: tuple[Part, ...] = ()
    anew: bool = False
    move: Part | None = None


@dataclass(frozen=True, eq=False)
class _Stack:
    """Masks, and in which rows each differs from the kept run's."""

    masks: Float[ndarray, "lanes readers writers"]
    differs: Bool[ndarray, "lanes readers"]


@dataclass(frozen=True)
class Cost:
    """What a node takes here, where it takes 1 in a run from the input, and how much more if its reader has another row."""

    node: float
    other_row: float


class Incremental:
    """The mask of the kept run, and where what was said in it is known.

    `length`: of the prompts; what goes on from the kept run is computed from position `first` on. `cost`: what an engine takes for a
    node there.
    """

    def __init__(self, sites: Sites, length: int, cost: Cost, first: int = 0) -> None:
        graph = sites.graph
        self._sites, self._visible, self._cost = sites, graph.visible, cost
        self._liveness = Liveness(graph)
        heads = np.array([writer.kind == "head" for writer in graph.writers])
        n_heads = max((len(layer.attention_writers) for layer in sites.layers), default=1) or 1
        self._work_of_writer = np.where(heads, 1 / n_heads, _MLP_WORK)
        self._share = np.array([0, 1 / length, 1 - first / length])  # of the positions, by extent
        self._previous: Float[ndarray, "readers writers"] | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self.mask, self._kept = self._visible.astype(np.float32), self._visible
        n_readers, n_writers = self._visible.shape
        self._known = Extent(np.full(n_readers, ALL, dtype=np.int8), np.full(n_writers, ALL, dtype=np.int8))
        self._n_moves, self._first_moved = 0, len(self._sites.layers)

    def plan(self, masks: Float[ndarray, "lanes readers writers"]) -> Plan:
        """What to do for these masks. It must be done: the kept run is then taken to be where the plan leaves it."""
        previous, self._previous = self._previous, masks[-1].copy()
        found = None if self._n_moves >= MOST_MOVES else self._planned(masks, previous, anew=False)
        if found is None:
            self._start_anew()
            found = self._planned(masks, previous, anew=True)
        return found or Plan(anew=True)

    def _planned(
        self, masks: Float[ndarray, "lanes readers writers"], previous: Float[ndarray, "readers writers"] | None, *, anew: bool
    ) -> Plan | None:
        """From the kept run as it is; None where it does not know enough."""
        differs = ((masks != self.mask) & self._visible).any(axis=2)
        settled = self._settled(masks, previous, differs)
        stack = _Stack(masks, differs)
        parts = [self._part(stack, lanes, differs[lanes[0]] & ~settled) for lanes in _alike(differs & ~settled)]
        move, mask, known = None, self.mask, self._known
        if settled.any():
            mask = np.where(settled[:, None], masks[0], self.mask)
            move = self._part(_Stack(mask[None], settled[None]), np.zeros(1, dtype=np.int64), settled)
            known = move.needed
        to_move = 0.0 if move is None else self._work_of_rows(move)  # its nodes are work that later questions save
        if to_move + sum(map(self._work_here, parts)) > self._fresh_work(parts, differs):
            return Plan(anew=anew)
        if not self._known.covers(known):
            return None
        if not all(known.covers(part.needed) for part in parts):
            return None
        if move is not None:
            self.mask, self._kept = mask, (mask != 0) & self._visible
            self._known, self._n_moves = known, self._n_moves + 1
            self._first_moved = min(self._first_moved, int(self._sites.layer_of_row[move.readers[0]]))
        return Plan(tuple(self._together(stack, parts)), anew, move)

    def _settled(
        self,
        masks: Float[ndarray, "lanes readers writers"],
        previous: Float[ndarray, "readers writers"] | None,
        differs: Bool[ndarray, "lanes readers"],
    ) -> Bool[ndarray, " readers"]:
        """The rows that two lanes or more agree on and that the kept run does not have. A single lane is compared with the one before."""
        settled: Bool[ndarray, " readers"] = np.logical_and.reduce(differs, axis=0)
        others = masks[1:] if len(masks) > 1 else None if previous is None else previous[None]
        if others is None:
            return np.zeros_like(settled)
        rows = np.flatnonzero(settled)
        settled[rows] = ((others[:, rows] == masks[0, rows]) | ~self._visible[rows]).all(axis=(0, 2))
        return settled

    def _part(self, stack: _Stack, lanes: Int[ndarray, " some"], readers: Bool[ndarray, " readers"]) -> Part:
        """What recomputing these readers takes, in lanes that keep what any of them keeps."""
        kept, rows = self._kept.copy(), np.flatnonzero(stack.differs[lanes].any(axis=0))
        kept[rows] = (stack.masks[np.ix_(lanes, rows)] != 0).any(axis=0) & self._visible[rows]
        needed = self._liveness.needed(kept)
        return Part(lanes, np.flatnonzero(readers), needed, self._liveness.changed(kept, readers, needed))

    def _together(self, stack: _Stack, parts: Sequence[Part]) -> list[Part]:
        """Neighbouring parts as one where they recompute nearly the same, so that they share a run."""
        joined: list[Part] = []
        for part in sorted(parts, key=lambda part: part.readers.tolist()):
            if joined:
                lanes = np.concatenate([joined[-1].lanes, part.lanes])
                apart = sum(self._work(one.changed) * len(one.lanes) for one in (joined[-1], part))
                if self._work(joined[-1].changed.union(part.changed)) * len(lanes) <= _TOGETHER * apart:
                    readers = np.isin(np.arange(len(self._visible)), [*joined[-1].readers, *part.readers])
                    joined[-1] = self._part(stack, lanes, readers)
                    continue
            joined.append(part)
        return joined

    def _work(self, changed: Extent) -> float:
        """Of one lane, in the heads of a layer on all positions."""
        return float(self._work_of_writer @ self._share[changed.writers])

    def _work_here(self, part: Part) -> float:
        """Of all its lanes."""
        return self._cost.node * self._work(part.changed) * len(part.lanes) + self._work_of_rows(part)

    def _work_of_rows(self, part: Part) -> float:
        """Of its other rows, in all its lanes."""
        share = len(part.readers) / max(1, int(np.count_nonzero(part.changed.readers)))
        return self._cost.other_row * share * self._work(part.changed) * len(part.lanes)

    def _fresh_work(self, parts: Sequence[Part], differs: Bool[ndarray, "lanes readers"]) -> float:
        """Of all lanes, run from the first layer in which they differ from the model itself."""
        first = np.where(differs, self._sites.layer_of_row, len(self._sites.layers)).min(axis=1)
        starts = np.minimum(first, self._first_moved)
        work = 0.0
        for part in parts:
            of_writer = self._work_of_writer * (part.needed.writers > DEAD)
            work += sum(float(of_writer[at:].sum()) for at in map(self._sites.writers_before, starts[part.lanes]))
        return work


def _alike(differs: Bool[ndarray, "lanes readers"]) -> list[Int[ndarray, " some"]]:
    """The lanes that differ in the same readers, together."""
    lots: dict[bytes, list[int]] = {}
    for lane, readers in enumerate(differs):
        lots.setdefault(readers.tobytes(), []).append(lane)
    return [np.array(lanes) for lanes in lots.values()]
