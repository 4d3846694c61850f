"""What every selector is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from circuitgraph._engine import Outcome
from circuitgraph._errors import CircuitGraphError, whole_number
from circuitgraph._graph import Graph

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class Choice:
    """The edges that a selector keeps, and what it wants on record (plain values only)."""

    mask: Bool[ndarray, "readers writers"]
    record: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Selector(Protocol):
    """A frozen dataclass with one method. Its own settings say how to choose; how many edges is asked each time."""

    def choose(self, graph: Graph, outcome: Outcome, size: int) -> Choice:
        """At most `size` edges of the graph that the outcome's scores are about, the same ones every time; a tie goes to the lower id.

        Only edges with a score can be chosen, whatever the outcome's own mask. Raises `CircuitGraphError` where there are no scores, or
        fewer than `size` of them.
        """
        ...


def checked_scores(graph: Graph, outcome: Outcome, size: int) -> Float[ndarray, "readers writers"]:
    """An outcome's scores, NaN where nobody asked or there is no edge. Raises `CircuitGraphError` for what no selector can do."""
    if outcome.scores is None:
        raise CircuitGraphError("selection: the algorithm gave no scores to choose from; take one that scores edges, such as eap")
    scores = np.asarray(outcome.scores, dtype=np.float64)
    if scores.shape != graph.shape:
        raise CircuitGraphError(f"selection: scores of shape {scores.shape}; expected [readers, writers] = {graph.shape}")
    scores = np.where(graph.visible & np.isfinite(scores), scores, np.nan)
    n_scored = n_scores(scores)
    if whole_number("selection: size", size, 0) > n_scored:
        raise CircuitGraphError(f"selection: {size:,} edges asked for; the graph has {n_scored:,} scored edges")
    return scores


def n_scores(scores: Float[ndarray, "readers writers"]) -> int:
    """How many edges were scored."""
    return int(np.isfinite(scores).sum())


def check_size(what: str, size: Any) -> None:
    """Raises `CircuitGraphError` for what is neither a number of edges nor a share of them."""
    is_number = isinstance(size, Integral) and not isinstance(size, bool) and int(size) >= 1
    is_share = isinstance(size, Real) and not isinstance(size, Integral) and 0 < float(size) <= 1
    if not (is_number or is_share):
        raise CircuitGraphError(f"{what} is {size!r}; expected a whole number of edges, or a share of them above 0 and up to 1.0")


def edges_asked(what: str, size: float, n_edges: int) -> int:
    """How many edges a size is: `1` is one edge, `1.0` all of them; a share is at least one edge."""
    if not isinstance(size, Integral):
        return min(n_edges, max(1, round(size * n_edges)))
    if size > n_edges:
        raise CircuitGraphError(f"{what} is {size:,}; the graph has {n_edges:,} edges")
    return int(size)


def default_size(n_edges: int) -> int:
    """How many edges to keep when nobody says: 1%, at least 20.

    >>> default_size(70_651), default_size(81), default_size(13)
    (707, 20, 13)
    """
    return min(n_edges, max(20, round(0.01 * n_edges)))
