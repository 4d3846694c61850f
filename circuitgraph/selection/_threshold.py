"""The edges above a line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np

from circuitgraph._engine import Outcome
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph
from circuitgraph.selection._selector import Choice, checked_scores


@dataclass(frozen=True)
class Threshold:
    """The edges with |score| >= t; where they are more than the size asked for, the strongest of them.

    A score is in the units of the metric, so the same line means the same for other prompts and other models, while the number of edges
    varies. Some edges may be dead.
    """

    t: float

    def __post_init__(self) -> None:
        if not (isinstance(self.t, Real) and math.isfinite(self.t) and self.t >= 0):
            raise CircuitGraphError(f"threshold: t is {self.t!r}; expected a number that is at least 0; it is compared with |score|")

    def choose(self, graph: Graph, outcome: Outcome, size: int) -> Choice:
        sizes = np.abs(checked_scores(graph, outcome, size))
        return Choice(graph.largest(np.where(sizes >= self.t, sizes, np.nan), size))
