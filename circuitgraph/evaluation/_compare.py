"""Circuits of one graph beside each other: which edges they share, and how good they are at the same size."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._engine import Algorithm, Source, SourceKind
from circuitgraph._errors import CircuitGraphError
from circuitgraph._metrics import Metric
from circuitgraph._pairs import PromptPairs
from circuitgraph.algorithms import Magnitude, Random
from circuitgraph.evaluation._columns import aligned
from circuitgraph.evaluation._faithfulness import Faithfulness
from circuitgraph.evaluation._overlap import jaccard, jaccard_by_chance
from circuitgraph.evaluation._protocol import Protocol
from circuitgraph.evaluation._question import pose_again, warn_of_changes
from circuitgraph.evaluation._scale import scale_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray
    from rich.table import Table

    from circuitgraph._task import Task


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two circuits or more, by name. `same_size`: the edges that each was cut to, and what they are worth then, if that was asked.

    Jaccard indices are of edges, `by_chance` those of random circuits of the same sizes. `baselines`: what as many edges are worth that
    random and magnitude scores choose. `protocol`: how faithfulness came about.
    """

    circuits: Mapping[str, Circuit]
    same_size: int | None = None
    faithfulness: Mapping[str, Faithfulness] = dataclasses.field(default_factory=dict)
    baselines: Mapping[str, Faithfulness] = dataclasses.field(default_factory=dict)
    protocol: Protocol | None = None

    @property
    def owners(self) -> Int[ndarray, "readers writers"]:
        """How many of the circuits have each edge."""
        count: Int[ndarray, "readers writers"] = np.sum([circuit.mask for circuit in self.circuits.values()], axis=0)
        return count

    @property
    def jaccard(self) -> Float[ndarray, "circuits circuits"]:
        masks = [circuit.mask for circuit in self.circuits.values()]
        return np.array([[jaccard(a, b) for b in masks] for a in masks])

    @property
    def jaccard_of_nodes(self) -> Float[ndarray, "circuits circuits"]:
        names = [frozenset(circuit.nodes) for circuit in self.circuits.values()]
        return np.array([[len(a & b) / max(len(a | b), 1) if a | b else 1.0 for b in names] for a in names])

    @property
    def by_chance(self) -> Float[ndarray, "circuits circuits"]:
        sizes = [circuit.n_edges for circuit in self.circuits.values()]
        n = next(iter(self.circuits.values())).graph.n_edges
        return np.array([[1.0 if i == j else jaccard_by_chance(a, b, n) for j, b in enumerate(sizes)] for i, a in enumerate(sizes)])

    def only(self, name: str) -> Circuit:
        """The edges that this circuit alone has."""
        others = np.sum([circuit.mask for other, circuit in self.circuits.items() if other != name], axis=0) > 0
        circuit = self.circuits[name]
        return Circuit(circuit.graph, circuit.mask & ~others, circuit.scores)

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """A line per circuit, with a heading: size, edges that nobody else has, Jaccard with each, faithfulness at the same size."""
        heading = ["circuit", "edges", "its alone", *(f"Jaccard with {name}" for name in self.circuits)]
        if self.same_size is not None:
            heading.append(f"faithfulness of its {self.same_size} strongest")
        lines = []
        for i, (name, circuit) in enumerate(self.circuits.items()):
            indices = ["" if i == j else f"{self.jaccard[i, j]:.3f} ({self.by_chance[i, j]:.3f})" for j in range(len(self.circuits))]
            line = [name, f"{circuit.n_edges}", f"{self.only(name).n_edges}", *indices]
            if self.same_size is not None:
                line.append(f"{found.value:.3f}" if (found := self.faithfulness.get(name)) else "no scores to cut by")
            lines.append(tuple(line))
        empty = [""] * (1 + len(self.circuits))
        lines += [(name, f"{self.same_size}", *empty, f"{found.value:.3f}") for name, found in self.baselines.items()]
        return (tuple(heading), *lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        names, owners = [*self.circuits], self.owners
        graph = next(iter(self.circuits.values())).graph
        return {
            "circuits": {name: {"edges": circuit.n_edges, "alone": self.only(name).n_edges} for name, circuit in self.circuits.items()},
            "edges_in_all": int((owners == len(names)).sum()),
            "edges_in_any": int((owners > 0).sum()),
            "edges_total": graph.n_edges,
            "names": names,
            "jaccard": self.jaccard.tolist(),
            "jaccard_by_chance": self.by_chance.tolist(),
            "jaccard_of_nodes": self.jaccard_of_nodes.tolist(),
            "same_size": self.same_size,
            "faithfulness": {name: dataclasses.asdict(found) for name, found in self.faithfulness.items()},
            "baselines": {name: dataclasses.asdict(found) for name, found in self.baselines.items()},
            "protocol": self.protocol.to_dict() if self.protocol else None,
        }

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def render(self, path: str | Path, *, title: str | None = None) -> Path:
        """One picture of all circuits, in which a line's colour says who has the edge. Raises `FileError`."""
        from circuitgraph.drawing import render_joint

        return render_joint(self.circuits, path, title=title)

    def __str__(self) -> str:
        return f"{aligned(self.rows())}\nin brackets: what random circuits of these sizes would have"

    def __rich__(self) -> Table:
        from rich.table import Table

        heading, *lines = self.rows()
        table = Table(*heading, box=None, pad_edge=False, caption="in brackets: what random circuits of these sizes would have")
        for line in lines:
            table.add_row(*line)
        return table


def compare(
    circuits: Mapping[str, Circuit],
    model: Any = None,
    task: Task | PromptPairs | str | Path | None = None,
    *,
    prompts: int | None = None,
    seed: int = 0,
    metric: Metric | str | None = None,
    source: Source | SourceKind | None = None,
    backend: str = "torch",
) -> Comparison:
    """What circuits of one graph have in common. `circuits`: each under the name that it is to have.

    With a `model` and a `task` also the faithfulness of each when it is cut to the size of the smallest, by the |score| of its own edges (a
    larger circuit without scores cannot be cut), and of as many edges by random and by magnitude scores; all else as in `evaluate`, the
    metric and the source by default those of the first circuit. Raises `CircuitGraphError` for fewer than two circuits, or circuits of
    different graphs.

    >>> from circuitgraph._graph import Layer, transformer_graph
    >>> graph = transformer_graph([Layer(n_heads=1, n_kv_heads=1)])
    >>> whole = Circuit(graph, graph.visible)
    >>> print(compare({"whole": whole, "none": whole - whole}).jaccard[0])
    [1. 0.]
    """
    first = _checked(circuits)
    if (model is None) != (task is None):
        raise CircuitGraphError("compare: faithfulness at one size needs a model and a task; give both, or neither")
    if model is None or task is None:
        return Comparison(dict(circuits))
    question = pose_again(first, model, task, prompts=prompts, seed=seed, metric=metric, source=source, backend=backend)
    warn_of_changes(first.provenance, question)
    question.check()
    size = min(circuit.n_edges for circuit in circuits.values())
    scale = scale_of(question, first.graph)
    cut = {name: part for name, circuit in circuits.items() if (part := _cut(circuit, size)) is not None}
    found = {name: scale.faithfulness(circuit.mask) for name, circuit in cut.items()}
    scored: dict[str, Algorithm] = {} if scale.graph.spans else {"random": Random(question.seed), "magnitude": Magnitude()}
    baselines = {
        name: scale.faithfulness(Circuit(scale.graph, scale.graph.visible, method.run(question.engine).scores).top(size).mask)
        for name, method in scored.items()
    }
    return Comparison(dict(circuits), size, found, baselines, scale.protocol)


def _checked(circuits: Mapping[str, Circuit]) -> Circuit:
    """The first of circuits that can be compared."""
    if not isinstance(circuits, Mapping) or not all(isinstance(circuit, Circuit) for circuit in circuits.values()):
        raise CircuitGraphError("compare: expected circuits by name, such as compare({'acdc': one, 'eap': other})")
    if len(circuits) < 2:
        raise CircuitGraphError(f"compare: {len(circuits)} circuit; expected two or more")
    (first_name, first), *others = circuits.items()
    for name, circuit in others:
        if circuit.graph != first.graph:
            raise CircuitGraphError(
                f"compare: {first_name} is of {first.graph!r} and {name} of {circuit.graph!r}; "
                "only circuits of one model, traced with the same options, have edges in common"
            )
    return first


def _cut(circuit: Circuit, size: int) -> Circuit | None:
    """The `size` edges of the circuit with the largest |score|."""
    if circuit.n_edges == size:
        return circuit
    if circuit.scores is None or not np.isfinite(circuit.scores[circuit.mask]).all():
        return None
    kept = Circuit(circuit.graph, circuit.mask, np.where(circuit.mask, circuit.scores, np.nan))
    return kept.top(size)
