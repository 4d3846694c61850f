"""A circuit against a reference circuit of the same graph: AUROC of its scores, precision and recall of its edges and nodes."""

from __future__ import annotations

import dataclasses
import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph
from circuitgraph._names import INPUTS
from circuitgraph.evaluation._curve import MIB_GRID
from circuitgraph.evaluation._protocol import Protocol
from circuitgraph.evaluation._scale import Scale

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray


@dataclass(frozen=True)
class Match:
    """Of edges or of nodes. `precision` is None where the circuit has none, `auroc` where it has no scores or the reference has all."""

    kept: int
    reference: int
    shared: int
    auroc: float | None

    @property
    def precision(self) -> float | None:
        return self.shared / self.kept if self.kept else None

    @property
    def recall(self) -> float:
        return self.shared / self.reference

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "precision": self.precision, "recall": self.recall}


@dataclass(frozen=True)
class ReferenceMatch:
    """How a circuit and its scores agree with a reference. `nodes` are heads and MLPs; a node's score is that of its strongest edge out.

    `mib_auroc`: the ten-point version, where it was asked for. `protocol`: of the circuit's evaluation, where there is one.
    """

    edges: Match
    nodes: Match | None
    mib_auroc: float | None
    protocol: Protocol | None = None

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Precision, recall and AUROC, of edges and of nodes."""
        rows = [(f"{what} against the reference", _said(match)) for what, match in (("edges", self.edges), ("nodes", self.nodes)) if match]
        if self.mib_auroc is not None:
            rows.append(("AUROC of edges, as MIB computes it", f"{self.mib_auroc:.3f}"))
        return tuple(rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "edges": self.edges.to_dict(),
            "nodes": self.nodes.to_dict() if self.nodes else None,
            "mib_auroc": self.mib_auroc,
            "protocol": self.protocol.to_dict() if self.protocol else None,
        }


@dataclass(frozen=True, eq=False)
class Agreement:
    """The measure: `matched(circuit, reference)`. Cost: no forward pass."""

    name: ClassVar[str] = "reference"

    reference: Circuit
    mib_compat: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.reference, Circuit):
            raise CircuitGraphError(f"reference: {self.reference!r}; expected a Circuit, such as Circuit.load reads from a file")

    def measure(self, scale: Scale, circuit: Circuit) -> ReferenceMatch:
        return dataclasses.replace(matched(circuit, self.reference, mib_compat=self.mib_compat), protocol=scale.protocol)


def matched(circuit: Circuit, reference: Circuit, *, mib_compat: bool = False) -> ReferenceMatch:
    """Precision and recall of the kept edges and nodes, and the AUROC of |score| as a guess of what the reference keeps.

    With `mib_compat`, also MIB's AUROC: at ten sizes, edges are taken greedily from the logits back, dead ends dropped, and the area is a
    trapezoid over the ten points divided by the last false-positive rate; it starts at the first point, not at (0, 0). MIB's comparison
    counts an edge of the reference that the circuit's graph lacks as found, and one that the reference leaves out as wrongly found; graphs
    are equal here, so that rule never bites. Raises `CircuitGraphError` for a reference of another graph, or one that keeps no edge.

    >>> from circuitgraph._graph import Layer, transformer_graph
    >>> graph = transformer_graph([Layer(n_heads=0, n_kv_heads=0)])
    >>> chain = Circuit(graph, np.array([[True, False], [False, True]]), np.array([[3.0, 0.0], [2.0, 1.0]]))
    >>> match = matched(chain.top(2), chain)
    >>> match.edges.precision, match.edges.recall, match.edges.auroc
    (0.5, 0.5, 0.5)
    """
    graph = circuit.graph
    if reference.graph != graph:
        raise CircuitGraphError(
            f"the reference is of another architecture: it is of {_of(reference)}, the circuit of {_of(circuit)}; "
            "take a reference for the circuit's model, traced with the same options (per_head_kv among them)"
        )
    if reference.n_edges == 0:
        raise CircuitGraphError("the reference keeps no edge, so there is nothing to find")
    scores = None if circuit.scores is None else np.where(np.isnan(circuit.scores), -np.inf, np.abs(circuit.scores))
    kept, wanted, visible = circuit.mask, reference.mask, graph.visible
    edges = _match(kept[visible], wanted[visible], None if scores is None else scores[visible])
    mib = mib_auroc(graph, circuit.scores, wanted) if mib_compat and circuit.scores is not None else None
    return ReferenceMatch(edges, _nodes(circuit, reference, scores), mib)


def auroc(scores: Float[ndarray, " items"], is_wanted: Bool[ndarray, " items"]) -> float | None:
    """The chance that a wanted item has a larger score than an unwanted one, ties counted half (Mann & Whitney 1947); None if either lacks.

    >>> auroc(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False]))
    0.875
    """
    from scipy.stats import rankdata

    n_wanted, n_other = int(is_wanted.sum()), int((~is_wanted).sum())
    if not n_wanted or not n_other:
        return None
    above = rankdata(scores)[is_wanted].sum() - n_wanted * (n_wanted + 1) / 2
    return float(above / (n_wanted * n_other))


def mib_auroc(graph: Graph, scores: Float[ndarray, "readers writers"], wanted: Bool[ndarray, "readers writers"]) -> float | None:
    """MIB's ten-point version; None where no unwanted edge is ever taken, so that it would divide by zero."""
    wanted = wanted & graph.visible
    n_wanted, n_other = int(wanted.sum()), graph.n_edges - int(wanted.sum())
    taken = [graph.prune_dead(_from_the_logits(graph, scores, math.ceil(fraction * graph.n_edges))) for fraction in MIB_GRID]
    found = np.array([(mask & wanted).sum() for mask in taken]) / n_wanted
    false = np.array([(mask & ~wanted).sum() for mask in taken]) / max(n_other, 1)
    return float(np.trapezoid(found, false / false[-1])) if false[-1] > 0 else None


def _from_the_logits(graph: Graph, scores: Float[ndarray, "readers writers"], n: int) -> Bool[ndarray, "readers writers"]:
    """The strongest edge into what is taken already, `n` times, beginning with the logits (Hanna et al. 2024)."""
    strength = np.where(np.isnan(scores), -np.inf, np.abs(scores))
    mask = np.zeros(graph.shape, dtype=bool)
    is_open = np.array([reader.kind == "logits" for reader in graph.readers])
    heap = [(-strength[r, w], r, w) for r in np.flatnonzero(is_open) for w in np.flatnonzero(graph.visible[r])]
    heapq.heapify(heap)
    while heap and n > 0:
        _, r, w = heapq.heappop(heap)
        mask[r, w], n = True, n - 1
        for reader in np.flatnonzero(graph.feeds[:, w] & ~is_open):
            is_open[reader] = True
            for writer in np.flatnonzero(graph.visible[reader]):
                heapq.heappush(heap, (-strength[reader, writer], reader, writer))
    return mask


def _match(kept: Bool[ndarray, " items"], wanted: Bool[ndarray, " items"], scores: Float[ndarray, " items"] | None) -> Match:
    return Match(int(kept.sum()), int(wanted.sum()), int((kept & wanted).sum()), None if scores is None else auroc(scores, wanted))


def _nodes(circuit: Circuit, reference: Circuit, strength: Float[ndarray, "readers writers"] | None) -> Match | None:
    """Of heads and MLPs; None where the reference has none."""
    graph = circuit.graph
    names = [node for node in graph.nodes if node not in (*INPUTS, "logits")]
    kept, wanted = (np.isin(names, one.nodes) for one in (circuit, reference))
    if not wanted.any():
        return None
    scores = None
    if strength is not None:
        strongest = np.where(graph.visible, strength, -np.inf).max(axis=0)
        of = [writer.node for writer in graph.writers]
        scores = np.array([max(s for s, node in zip(strongest, of, strict=True) if node == name) for name in names])
    return _match(kept, wanted, scores)


def _of(circuit: Circuit) -> str:
    model = circuit.provenance.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    return f"{name}, {circuit.graph!r}" if name else repr(circuit.graph)


def _said(match: Match) -> str:
    precision = "none kept" if match.precision is None else f"{match.precision:.3f}"
    area = "" if match.auroc is None else f", AUROC {match.auroc:.3f}"
    return f"precision {precision}, recall {match.recall:.3f} ({match.shared} of {match.reference}){area}"
