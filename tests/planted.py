"""An engine whose `F` is any function of the mask, so that every measure of it is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuitgraph import Circuit, Graph, LogitDiff, Metric
from circuitgraph._graph import transformer_graph
from circuitgraph.evaluation import Protocol, Scale

_LOGIT_DIFF = LogitDiff()


@dataclass(frozen=True, eq=False)
class Planted:
    """`metric_of` maps a mask to a value per prompt. What no measure asks for is not there."""

    graph: Graph
    metric_of: Callable[[Any], Any]
    n_prompts: int = 4
    metric: Metric = _LOGIT_DIFF
    spans: tuple[str, ...] = ()

    def evaluate(self, masks: Any, *, source: Any = None) -> Any:
        return np.stack([np.broadcast_to(self.metric_of(mask), (self.n_prompts,)) for mask in np.asarray(masks, dtype=float)])

    def scale(self, graph: Graph | None = None) -> Scale:
        return Scale(self, graph or self.graph, Protocol(self.metric.name, self.n_prompts))  # type: ignore[arg-type]


def independent_edges(n: int) -> Graph:
    """`n` edges from the input to the logits, each a path of its own: one for each of as many parts of the prompt."""
    return transformer_graph([]).by_span([str(i) for i in range(n)])


def linear(contributions: Any, n_prompts: int = 4) -> Planted:
    """`F` is the sum of what the kept edges contribute, `[edges]` or `[prompts, edges]`."""
    per_prompt = np.broadcast_to(np.atleast_2d(contributions), (n_prompts, np.shape(contributions)[-1]))
    return Planted(independent_edges(per_prompt.shape[1]), lambda mask: per_prompt @ mask[0], n_prompts)


def ranked(engine: Planted, scores: Any) -> Circuit:
    """Every edge, with these scores."""
    return Circuit(engine.graph, engine.graph.visible, np.asarray(scores, dtype=float)[None])


def some_edges(engine: Planted, kept: Any) -> Circuit:
    """The edges of these numbers."""
    return Circuit(engine.graph, np.isin(np.arange(engine.graph.n_edges), kept)[None])
