"""A circuit that grows from the logits."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._engine import Outcome
from circuitgraph._graph import Graph
from circuitgraph.selection._selector import Choice, checked_scores

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray


@dataclass(frozen=True)
class Greedy:
    """Edge by edge from the logits (Hanna et al. 2024, arXiv:2403.17806): always the strongest edge into a node that is in already.

        the readers in the circuit: the logits
        `size` times: add the edge with the largest |score| into one of them; with its writer, the readers that feed the writer are in
        drop the edges that nothing from the input reaches

    So no edge is dead, and what is dropped at the end is not made up for: the circuit may be much smaller than `size`, empty where the
    strongest edges end in heads whose own inputs are weak. `IntegerProgram` weighs a path as a whole.
    """

    def choose(self, graph: Graph, outcome: Outcome, size: int) -> Choice:
        sizes = np.abs(checked_scores(graph, outcome, size))
        return Choice(graph.prune_dead(_grown(graph, sizes, size)))


def _grown(graph: Graph, sizes: Float[ndarray, "readers writers"], n: int) -> Bool[ndarray, "readers writers"]:
    """The edges in the order in which they can be reached, the strongest first."""
    order = np.argsort(-sizes, axis=None, kind="stable")  # NaN sorts last
    place = np.full(graph.shape, -1)
    place.flat[order] = np.arange(order.size)
    place[np.isnan(sizes)] = -1
    candidates: list[int] = []
    is_in = np.zeros(len(graph.readers), dtype=bool)
    kept = np.zeros(graph.shape, dtype=bool)

    def admit(readers: Bool[ndarray, " readers"]) -> None:
        for at in place[readers & ~is_in].flat:
            if at >= 0:
                heappush(candidates, int(at))
        is_in[readers] = True

    admit(np.array([reader.kind == "logits" for reader in graph.readers]))
    while candidates and n > 0:
        r, w = np.unravel_index(order[heappop(candidates)], graph.shape)
        kept[r, w] = True
        n -= 1
        admit(graph.feeds[:, w])
    return kept
