"""The best connected circuit of a size, by integer programming."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._engine import Outcome
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph
from circuitgraph.selection._greedy import Greedy
from circuitgraph.selection._selector import Choice, checked_scores
from circuitgraph.selection._top import TopN

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

_WHOLE = 1e-5  # how far from 0 or 1 the solver's whole numbers may be


@dataclass(frozen=True)
class IntegerProgram:
    """Of all circuits with at most `size` edges and no dead one, that with the largest sum of |scores|.

        maximise    sum over edges of |score[r, w]| * kept[r, w]
        subject to  sum of kept <= size
                    kept[r, w] <= reached[w],   reached[w] <= sum of kept edges into the readers that feed w   (not for the input)
                    kept[r, w] <= needed[r],    needed[r] <= sum of kept edges from the writers that r feeds   (not for the logits)

    To choose edges by an integer programme instead of greedily is an idea of Nikankin et al. (2025, arXiv:2510.25786); these constraints
    are our own. As the graph is acyclic, they hold exactly where `Graph.prune_dead` drops nothing.

    It is solved as a linear programme first: where that comes out whole, as it mostly does for SmolLM2, 70,651 edges, in seconds, it is the
    optimum. Otherwise nodes, and at last edges, must be whole, which can take long: `time_limit` seconds stop a choice, a relative `gap` of
    the sum ends it early. The record says whether the choice is optimal, its sum, the bound on any circuit's, and whether the limit was
    hit; then the best that was found is kept, at least as good as `Greedy`'s and as `TopN`'s without its dead edges, and another run may
    find another. Circuits of equal sum: the solver picks, always the same.
    """

    time_limit: float = 300.0
    gap: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("time_limit", self.time_limit), ("gap", self.gap)):
            least = "above 0" if name == "time_limit" else "of at least 0"
            if not (isinstance(value, Real) and math.isfinite(value) and (value > 0 or (value == 0 and name == "gap"))):
                raise CircuitGraphError(f"integer-program: {name} is {value!r}; expected a number {least}")

    def choose(self, graph: Graph, outcome: Outcome, size: int) -> Choice:
        scores = checked_scores(graph, outcome, size)
        sizes = np.abs(scores)
        scale = float(np.nanmax(sizes, initial=0.0))
        if size == 0 or scale == 0.0:
            return Choice(np.zeros(graph.shape, dtype=bool), _record(0.0, 0.0, is_limit_hit=False))
        programme = _Programme.of(graph, sizes / scale, size)
        kept, bound, is_limit_hit = programme.solve(self.time_limit, self.gap)
        others = (Greedy().choose(graph, outcome, size).mask, graph.prune_dead(TopN().choose(graph, outcome, size).mask))
        best = max((mask for mask in (kept, *others) if mask is not None), key=lambda mask: float(sizes[mask].sum()))
        return Choice(best, _record(float(sizes[best].sum()), None if bound is None else bound * scale, is_limit_hit=is_limit_hit))


@dataclass(frozen=True)
class _Programme:
    """`maximise worth @ x  subject to  rows @ x <= limits`, where `x` are the edges, then the writers, then the readers, from 0 to 1."""

    graph: Graph
    edges: tuple[Any, Any]  # the readers and the writers of the edges
    worth: Float[ndarray, " variables"]
    rows: Any
    limits: Float[ndarray, " rows"]

    @staticmethod
    def of(graph: Graph, sizes: Float[ndarray, "readers writers"], size: int) -> _Programme:
        from scipy import sparse

        r, w = np.nonzero(np.isfinite(sizes))
        n, (n_readers, n_writers) = len(r), graph.shape
        edge, one = np.arange(n), np.ones(n)
        into = sparse.csr_array((one, (r, edge)), shape=(n_readers, n))
        out_of = sparse.csr_array((one, (w, edge)), shape=(n_writers, n))
        feeds = sparse.csr_array(graph.feeds.astype(float))
        is_inner = np.array([writer.kind != "input" for writer in graph.writers])
        is_used = np.array([reader.kind != "logits" for reader in graph.readers])
        blocks = [
            [sparse.eye_array(n), -out_of.T, None],  # a kept edge's writer is reached
            [sparse.eye_array(n), None, -into.T],  # and its reader needed
            [-(feeds.T @ into)[is_inner], sparse.eye_array(n_writers).tocsr()[is_inner], None],
            [-(feeds @ out_of)[is_used], None, sparse.eye_array(n_readers).tocsr()[is_used]],
            [sparse.csr_array(one[None]), None, None],
        ]
        rows = sparse.block_array(blocks, format="csc")
        limits = np.zeros(rows.shape[0])
        limits[-1] = size
        return _Programme(graph, (r, w), np.concatenate([sizes[r, w], np.zeros(n_writers + n_readers)]), rows, limits)

    def solve(self, time_limit: float, gap: float) -> tuple[Bool[ndarray, "readers writers"] | None, float | None, bool]:
        """The kept edges, if any were found; a bound on the worth of any circuit, if one was; and whether the time ran out.

        More and more must be whole, until the edges are: a relaxation whose edges are whole is the optimum.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        ends = time.monotonic() + time_limit
        bound = None
        for must_be_whole in self._relaxations():
            options = {"time_limit": max(ends - time.monotonic(), 0.01), "mip_rel_gap": gap}
            constraint = LinearConstraint(self.rows, -np.inf, self.limits)
            found = milp(-self.worth, integrality=must_be_whole, bounds=Bounds(0, 1), constraints=constraint, options=options)
            if found.status not in (0, 1):
                raise CircuitGraphError(f"integer-program: the solver gave up: {found.message}")
            bound = self._bound(found, bound)
            kept = None if found.x is None else self._whole(found.x)
            if kept is not None or found.status == 1:
                return kept, bound, found.status == 1
        raise CircuitGraphError("integer-program: the solver's whole numbers are not whole; choose with Greedy() instead")

    def _relaxations(self) -> Iterator[Float[ndarray, " variables"]]:
        n_edges, n = len(self.edges[0]), len(self.worth)
        for first in (n, n_edges, 0):  # nothing, the nodes, everything
            yield (np.arange(n) >= first).astype(float)

    def _whole(self, x: Float[ndarray, " variables"]) -> Bool[ndarray, "readers writers"] | None:
        """The mask, unless an edge is kept in part."""
        part = x[: len(self.edges[0])]
        if np.abs(part - np.round(part)).max() > _WHOLE:
            return None
        mask = np.zeros(self.graph.shape, dtype=bool)
        mask[self.edges] = part > 0.5
        return mask

    @staticmethod
    def _bound(found: Any, earlier: float | None) -> float | None:
        """The least upper bound yet: of a linear programme its own value, once it is solved."""
        is_mixed = getattr(found, "mip_dual_bound", None) is not None
        least = found.mip_dual_bound if is_mixed else (found.fun if found.status == 0 else None)
        if least is None or not math.isfinite(least):
            return earlier
        bound = -float(least)
        return bound if earlier is None else min(bound, earlier)


def _record(total: float, bound: float | None, *, is_limit_hit: bool) -> dict[str, Any]:
    is_optimal = bound is not None and bound - total <= 1e-6 * max(total, bound)
    return {"sum": total, "bound": bound, "is_optimal": is_optimal, "is_limit_hit": is_limit_hit}
