"""Where the parts of a run are needed, and where they change: what an engine can leave out.

A metric reads the logits at the last position only. Attention alone mixes positions, through its keys and values; so a node is needed
nowhere (`DEAD`), at the last position (`LAST`) or at every position (`ALL`), by the kept paths from it to the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._graph import Graph

if TYPE_CHECKING:
    from jaxtyping import Bool, Int8
    from numpy import ndarray

DEAD, LAST, ALL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Extent:
    """At which positions each reader and each writer is in question: `DEAD`, `LAST` or `ALL`."""

    readers: Int8[ndarray, " readers"]
    writers: Int8[ndarray, " writers"]

    def covers(self, other: Extent) -> bool:
        """Whether every node is in question wherever it is in the other."""
        return bool((self.readers >= other.readers).all() and (self.writers >= other.writers).all())

    def union(self, other: Extent) -> Extent:
        """Where a node is in question in one of the two."""
        return Extent(np.maximum(self.readers, other.readers), np.maximum(self.writers, other.writers))


class Liveness:
    """Liveness in one graph, whose readers of one depth do not depend on each other.

    >>> from circuitgraph._graph import Layer, transformer_graph
    >>> graph = transformer_graph([Layer(n_heads=1, n_kv_heads=1)])
    >>> live = Liveness(graph)
    >>> dict(zip((r.name for r in graph.readers), live.needed(graph.visible).readers.tolist()))
    {'a0.h0<q>': 1, 'a0.h0<k>': 2, 'a0.h0<v>': 2, 'm0': 1, 'logits': 1}
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        starts = np.flatnonzero(np.diff([reader.depth for reader in graph.readers], prepend=-np.inf))
        self._steps = [slice(*ends) for ends in pairwise([*starts.tolist(), len(graph.readers)])]
        self._spread = np.array([ALL if reader.kind in ("k", "v") else LAST for reader in graph.readers], dtype=np.int8)
        self._is_end = np.array([reader.kind == "logits" for reader in graph.readers])

    def needed(self, kept: Bool[ndarray, "readers writers"]) -> Extent:
        """Where each node has a kept path to the logits of the last position."""
        readers = np.where(self._is_end, LAST, DEAD).astype(np.int8)
        writers = np.zeros(len(self._graph.writers), dtype=np.int8)
        for rows in reversed(self._steps):
            fed = (self._graph.feeds[rows] * writers).max(axis=1, initial=DEAD)
            readers[rows] = np.maximum(readers[rows], np.where(fed > DEAD, np.maximum(fed, self._spread[rows]), DEAD))
            np.maximum(writers, (kept[rows] * readers[rows][:, None]).max(axis=0), out=writers)
        return Extent(readers, writers)

    def changed(self, kept: Bool[ndarray, "readers writers"], sources: Bool[ndarray, " readers"], needed: Extent) -> Extent:
        """Of what is needed, what hears of a change in the inputs of some readers, and where."""
        readers = np.zeros(len(self._graph.readers), dtype=np.int8)
        writers = np.zeros(len(self._graph.writers), dtype=np.int8)
        is_told = np.zeros(len(writers), dtype=bool)
        first = int(np.argmax(sources))
        for rows in self._steps:
            if rows.stop <= first:
                continue
            told = (sources[rows] | (kept[rows] & is_told).any(axis=1)) & (needed.readers[rows] > DEAD)
            if told.any():
                readers[rows] = np.where(told, needed.readers[rows], DEAD)
                is_told |= self._graph.feeds[rows][told].any(axis=0) & (needed.writers > DEAD)
        writers[is_told] = needed.writers[is_told]
        return Extent(readers, writers)
