"""`Circuit`: a graph, the edges kept, their scores, and where it all came from. Holds no model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._errors import CircuitGraphError, whole_number
from circuitgraph._graph import Graph
from circuitgraph._names import Edge, Reader

if TYPE_CHECKING:
    import networkx as nx
    from jaxtyping import Bool, Float
    from numpy import ndarray

    from circuitgraph.drawing import Detail

# Facts about one mask: they do not hold for another one, so a circuit made from this one does not inherit them.
MEASURED = frozenset(
    {"edges_kept", "metric_circuit", "metric_complement", "minimality"}
    | {"faithfulness", "faithfulness_interval", "node_faithfulness", "complement", "completeness", "completeness_interval"}
)


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """The edges of a graph that do a job. A value: every method returns a new one.

    `mask[r, w]`: reader `r` still sees writer `w`. `scores[r, w]`: how much the edge matters, NaN where nobody asked; 0 where there
    is no edge. `provenance`: what it takes to find the circuit again. `record`: what the algorithm put on record. Both are plain JSON
    values; numbers that JSON cannot hold (NaN, infinity) become None. `confidence[r, w]`: how sure the edge is, from 0 to 1, such as the
    share of repeated discoveries that kept it; NaN where nobody knows.

    >>> from circuitgraph._graph import Layer, transformer_graph
    >>> graph = transformer_graph([Layer(n_heads=2, n_kv_heads=2)])
    >>> Circuit(graph, mask=graph.visible, scores=graph.visible * 1.0).top(3)
    Circuit(3 of 13 edges, 3 of 5 nodes, scored)
    """

    graph: Graph
    mask: Bool[ndarray, "readers writers"]
    scores: Float[ndarray, "readers writers"] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    confidence: Float[ndarray, "readers writers"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", _checked_mask(self.graph, self.mask))
        if self.scores is not None:
            object.__setattr__(self, "scores", _checked_scores(self.graph, self.scores))
        if self.confidence is not None:
            object.__setattr__(self, "confidence", _checked_confidence(self.graph, self.confidence))
        object.__setattr__(self, "provenance", _plain(self.provenance, "provenance"))
        object.__setattr__(self, "record", _plain(self.record, "record"))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        return (
            self.graph == other.graph
            and np.array_equal(self.mask, other.mask)
            and _same_scores(self.scores, other.scores)
            and _same_scores(self.confidence, other.confidence)
            and self.provenance == other.provenance
            and self.record == other.record
        )

    def __hash__(self) -> int:
        return hash((self.graph, self.mask.tobytes()))

    def __repr__(self) -> str:
        scored = "scored" if self.scores is not None else "no scores"
        return f"Circuit({self.n_edges:,} of {self.graph.n_edges:,} edges, {len(self.nodes)} of {len(self.graph.nodes)} nodes, {scored})"

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The kept edges, by reader, then by writer."""
        return self.graph.edges_of(self.mask)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The ends of the kept edges, in the graph's order."""
        ends = {self.graph.writers[w].node for w in np.flatnonzero(self.mask.any(axis=0))}
        for r in np.flatnonzero(self.mask.any(axis=1)):
            ends.update(self.nodes_of(self.graph.readers[r]))
        return tuple(name for name in self.graph.nodes if name in ends)

    def nodes_of(self, reader: Reader) -> tuple[str, ...]:
        """The nodes that an edge into this reader leads to. Of heads that share it, those that write a kept edge, or all if none does."""
        names = self.graph.nodes_of(reader)
        if len(names) < 2:
            return names
        said = {self.graph.writers[w].node for w in np.flatnonzero(self.mask.any(axis=0))}
        return tuple(name for name in names if name in said) or names

    def is_kept(self, edge: Edge | str) -> bool:
        """Whether an edge such as `a5.h1->a9.h6<q>` is in the circuit. Raises `UnknownNameError` when the graph has no such edge."""
        return bool(self.mask[self.graph.edge_id(edge)])

    def top(self, n: int) -> Circuit:
        """The `n` edges of the graph with the largest |score|; ties go to the lower id, so `top(n)` is always a subset of `top(n + 1)`."""
        scores = self._scores_for("top")
        n_scored = int(np.isfinite(scores[self.graph.visible]).sum())
        if whole_number("top: n", n, 0) > n_scored:
            raise CircuitGraphError(f"top({n}): the graph has {n_scored:,} scored edges; n must be from 0 to that")
        mask = self.graph.largest(np.abs(scores), n)
        return self._with_mask(mask, {"operation": "top", "n": int(n)})

    def threshold(self, t: float) -> Circuit:
        """The edges of the graph with |score| >= t; an edge without a score is not among them."""
        scores = self._scores_for("threshold")
        if not t >= 0:
            raise CircuitGraphError(f"threshold({t}): expected a number that is at least 0; it is compared with |score|")
        return self._with_mask((np.abs(scores) >= t) & self.graph.visible, {"operation": "threshold", "t": float(t)})

    def prune_dead(self) -> Circuit:
        """Only the edges on a kept path from the input to the logits."""
        return self._with_mask(self.graph.prune_dead(self.mask), {"operation": "prune_dead"})

    def __or__(self, other: Circuit) -> Circuit:
        """The edges in either; in set algebra, scores and provenance stay where both circuits agree on them."""
        return self._combined(other, "|", np.logical_or)

    def __and__(self, other: Circuit) -> Circuit:
        """The edges in both."""
        return self._combined(other, "&", np.logical_and)

    def __sub__(self, other: Circuit) -> Circuit:
        """The edges in this one and not in the other."""
        return self._combined(other, "-", np.greater)

    def __xor__(self, other: Circuit) -> Circuit:
        """The edges in one of the two."""
        return self._combined(other, "^", np.logical_xor)

    def to_networkx(self) -> nx.MultiDiGraph:
        """The kept edges between the usual nodes, with `edge` and, where there is one, `score`."""
        graph = self.graph.node_graph(self.mask)
        for _, target, key, data in list(graph.edges(keys=True, data=True)):
            reader, (r, w) = data["edge"].reader, self.graph.edge_id(data["edge"])
            if target not in self.nodes_of(reader):
                graph.remove_edge(data["edge"].writer.node, target, key=key)
            elif self.scores is not None and not math.isnan(self.scores[r, w]):
                data["score"] = float(self.scores[r, w])
        graph.remove_nodes_from(set(graph) - set(self.nodes))
        return graph

    def to_dot(self, *, title: str | None = None, detail: Detail = "auto", labels: Mapping[str, str] | None = None) -> str:
        """The picture as DOT text; see `render`."""
        from circuitgraph.drawing import to_dot

        return to_dot(self, title=title, detail=detail, labels=labels)

    def render(
        self,
        path: str | Path,
        *,
        title: str | None = None,
        detail: Detail = "auto",
        dpi: int = 200,
        labels: Mapping[str, str] | None = None,
    ) -> Path:
        """Draw the live edges into an SVG, HTML, PDF, PNG or DOT file, by its suffix. Raises `FileError`.

        `detail`: `edges` draws every edge, `nodes` merges the q, k and v edges between two nodes, `layers` also the heads of a layer;
        `auto` takes the first of these that stays legible, and the caption says which. `dpi` is that of a PNG. `labels`: what nodes are, by
        name (`m3.f12`), for whoever points at one in an SVG or a page.
        """
        from circuitgraph.drawing import render

        return render(self, path, title=title, detail=detail, dpi=dpi, labels=labels)

    def save(self, path: str | Path) -> Path:
        """Write the circuit as JSON; the scores of a large graph go into a safetensors file beside it. Raises `FileError`."""
        from circuitgraph.files import save

        return save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read a circuit that `save` wrote. Raises `FileError`."""
        from circuitgraph.files import load

        return load(path)

    def _scores_for(self, what: str) -> Float[ndarray, "readers writers"]:
        if self.scores is None:
            raise CircuitGraphError(f"{what}: this circuit has no scores; take one from an algorithm that scores edges, such as eap")
        return self.scores

    def _with_mask(self, mask: Bool[ndarray, "readers writers"], step: dict[str, Any]) -> Circuit:
        """Another choice from the same graph: says how it came about and drops what was measured on the old one."""
        if np.array_equal(mask, self.mask):
            return self
        provenance = _unmeasured(self.provenance)
        provenance["derived"] = [*provenance.get("derived", []), step]
        return dataclasses.replace(self, mask=mask, provenance=provenance)

    def _combined(self, other: Circuit, operation: str, combine: np.ufunc) -> Circuit:
        if not isinstance(other, Circuit):
            return NotImplemented
        if self.graph != other.graph:
            raise CircuitGraphError(
                f"circuit {operation} circuit: their graphs differ: {self.graph!r} and {other.graph!r}; "
                "only circuits of one model, traced with the same options, can be compared edge by edge"
            )
        left, right = _unmeasured(self.provenance), _unmeasured(other.provenance)
        shared = {key: value for key, value in left.items() if key in right and right[key] == value}
        alone = [{key: value for key, value in side.items() if key not in shared} for side in (left, right)]
        step = {"operation": operation, "left": alone[0], "right": alone[1]}
        provenance = {**shared, "derived": [*shared.get("derived", []), step]}
        scores = self.scores if _same_scores(self.scores, other.scores) else None
        confidence = self.confidence if _same_scores(self.confidence, other.confidence) else None
        return Circuit(self.graph, combine(self.mask, other.mask), scores, provenance, confidence=confidence)


def _checked_mask(graph: Graph, value: Any) -> Bool[ndarray, "readers writers"]:
    mask = np.array(value)
    if mask.shape != graph.shape:
        raise CircuitGraphError(f"circuit: the mask has shape {mask.shape}, expected [readers, writers] = {graph.shape}")
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        raise CircuitGraphError("circuit: the mask holds other numbers than 0 and 1; decide which edges are kept, for example mask > 0.5")
    kept: Bool[ndarray, "readers writers"] = mask.astype(bool) & graph.visible
    kept.setflags(write=False)
    return kept


def _checked_scores(graph: Graph, value: Any) -> Float[ndarray, "readers writers"]:
    scores = np.asarray(value)
    if scores.shape != graph.shape or scores.dtype.kind not in "fiub":
        raise CircuitGraphError(f"circuit: scores are {scores.dtype} {scores.shape}, expected numbers [readers, writers] = {graph.shape}")
    scores = np.where(graph.visible, scores, 0.0).astype(np.float64)
    if np.isinf(scores).any():
        r, w = np.argwhere(np.isinf(scores))[0]
        edge = Edge(graph.writers[w], graph.readers[r])
        raise CircuitGraphError(f"circuit: the score of {edge} is {scores[r, w]}; a score is finite, or NaN where the edge was not scored")
    scores.setflags(write=False)
    return scores


def _checked_confidence(graph: Graph, value: Any) -> Float[ndarray, "readers writers"]:
    confidence = _checked_scores(graph, value)
    if ((confidence < 0) | (confidence > 1)).any():
        raise CircuitGraphError(f"circuit: a confidence of {float(np.nanmax(np.abs(confidence)))}; expected shares from 0 to 1")
    return confidence


def _same_scores(a: Float[ndarray, "readers writers"] | None, b: Float[ndarray, "readers writers"] | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b, equal_nan=True))


def _unmeasured(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Without the numbers that belong to one mask, at the top or one level below."""
    kept = {key: value for key, value in provenance.items() if key not in MEASURED}
    return {key: {k: v for k, v in value.items() if k not in MEASURED} if isinstance(value, dict) else value for key, value in kept.items()}


def _plain(value: Any, where: str) -> Any:
    """The value in what JSON has: mappings, lists, text, numbers, booleans, None. Always a copy."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise CircuitGraphError(f"circuit: {where} has the key {bad[0]!r}; expected text, so that it can be saved as JSON")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise CircuitGraphError(f"circuit: {where} is a {type(value).__name__}; expected what JSON has: text, numbers, lists and mappings")
