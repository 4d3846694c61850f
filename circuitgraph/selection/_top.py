"""The strongest edges, each for itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuitgraph._engine import Outcome
from circuitgraph._graph import Graph
from circuitgraph.selection._selector import Choice, checked_scores


@dataclass(frozen=True)
class TopN:
    """The edges with the largest |score|: what matters most, for or against the behaviour (the ranking of MIB's CMD).

    A smaller size gives a subset. Edges are judged alone, so some may be dead: on no kept path from the input to the logits.

    >>> from circuitgraph._graph import Layer, transformer_graph
    >>> graph = transformer_graph([Layer(n_heads=0, n_kv_heads=0)])
    >>> outcome = Outcome(graph.visible, np.array([[0.5, 0.0], [0.1, -0.7]]))
    >>> print(*graph.edges_of(TopN().choose(graph, outcome, 2).mask))
    input->m0 m0->logits
    """

    def choose(self, graph: Graph, outcome: Outcome, size: int) -> Choice:
        return Choice(graph.largest(np.abs(checked_scores(graph, outcome, size)), size))


@dataclass(frozen=True)
class SignedTopN:
    """The edges with the largest score: what supports the behaviour most (the ranking of MIB's CPR).

    Edges that work against it come last, so a circuit of it may do better than the model, which is not what faithful means. A smaller
    size gives a subset. Some edges may be dead.
    """

    def choose(self, graph: Graph, outcome: Outcome, size: int) -> Choice:
        return Choice(graph.largest(checked_scores(graph, outcome, size), size))
