"""`evaluate` and its `Report`: the numbers that say whether to believe a circuit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._engine import Source, SourceKind
from circuitgraph._errors import CircuitGraphError
from circuitgraph._metrics import Metric
from circuitgraph._pairs import PromptPairs
from circuitgraph.evaluation._bootstrap import Estimate, Interval
from circuitgraph.evaluation._columns import aligned
from circuitgraph.evaluation._curve import FaithfulnessCurve
from circuitgraph.evaluation._knockout import node_version
from circuitgraph.evaluation._measures import Finding, Measure, measures_named
from circuitgraph.evaluation._protocol import Protocol
from circuitgraph.evaluation._question import Question, pose_again, warn_of_changes
from circuitgraph.evaluation._scale import scale_of

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray
    from rich.table import Table

    from circuitgraph._task import Task


RANDOM_CIRCUITS = 5


@dataclass(frozen=True)
class Report:
    """What a circuit keeps of a model's behaviour on a task.

    `metric_clean` is `F(1)`, the model; `metric_corrupted` `F(0)`, the source run; `metric_circuit` with only the circuit's edges live;
    `metric_nodes` with every edge between its nodes live; `metric_complement` with all edges but the circuit's. Between source run (0) and
    model (1), `faithfulness` places the first of these three, `node_faithfulness` the second, `complement` the third (Marks et al. 2024
    call it completeness): near 0, nothing that does the job was left out. Each may leave that range. Intervals are 95% bootstrap
    intervals over prompts, `None` for one prompt. `task_accuracy` is the untouched model's. `random_faithfulness` is the mean of
    `RANDOM_CIRCUITS` circuits of as many edges at random, `random_faithfulness_most` the best of them: what a size alone is worth.

    `protocol` is that of every number here, but for the granularity of what is said of nodes. `findings`: what deeper measures found, by
    the name of the measure.
    """

    model: str
    task: str
    metric: str
    source: str
    prompts: int
    seed: int
    task_accuracy: float
    edges_total: int
    edges_kept: int
    nodes_total: int
    nodes_kept: int
    edges_between_nodes: int
    metric_clean: float
    metric_corrupted: float
    metric_circuit: float
    metric_nodes: float
    metric_complement: float
    faithfulness: float
    faithfulness_interval: Interval | None
    node_faithfulness: float
    node_faithfulness_interval: Interval | None
    complement: float
    complement_interval: Interval | None
    random_faithfulness: float
    random_faithfulness_most: float
    protocol: Protocol
    findings: Mapping[str, Finding] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "findings"}
        findings = {name: finding.to_dict() for name, finding in self.findings.items()}
        return {**values, "protocol": self.protocol.to_dict(), "findings": findings}

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Name and value of every line of the report, as text."""
        return (
            ("model", self.model),
            ("task", f"{self.task}, {self.prompts} prompts, seed {self.seed}, accuracy {self.task_accuracy:.0%}"),
            ("edges kept", f"{self.edges_kept} of {self.edges_total} ({self.edges_kept / max(self.edges_total, 1):.2%})"),
            ("nodes kept", f"{self.nodes_kept} of {self.nodes_total}, {self.edges_between_nodes} edges between them"),
            (f"{self.metric}, model", f"{self.metric_clean + 0.0:.4g}"),  # -0.0 becomes 0.0
            (f"{self.metric}, {self.source}", f"{self.metric_corrupted + 0.0:.4g}"),
            (f"{self.metric}, circuit", f"{self.metric_circuit + 0.0:.4g}"),
            (f"{self.metric}, all but the circuit", f"{self.metric_complement + 0.0:.4g}"),
            ("faithfulness (1 is the model)", str(Estimate(self.faithfulness, self.faithfulness_interval))),
            ("faithfulness of its nodes", str(Estimate(self.node_faithfulness, self.node_faithfulness_interval))),
            ("complement (0: nothing left out)", str(Estimate(self.complement, self.complement_interval))),
            (
                "random circuits of its size",
                f"{self.random_faithfulness + 0.0:.3f} (the best of them: {self.random_faithfulness_most + 0.0:.3f})",
            ),
            *(row for finding in self.findings.values() for row in finding.rows()),
        )

    def __str__(self) -> str:
        return aligned(self.rows())

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in self.rows():
            table.add_row(name, value)
        return table

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, whole or not at all. Raises `FileError`."""
        from circuitgraph.files import write_bytes

        return write_bytes(path, f"{self.to_json()}\n".encode())

    def plot(self, path: str | Path) -> Path:
        """Draw the faithfulness curve into an SVG, PDF or PNG file, by its suffix. Raises `FileError`, `CircuitGraphError` without one."""
        from circuitgraph.drawing import plot_curve

        curve = self.findings.get("curve")
        if not isinstance(curve, FaithfulnessCurve):
            raise CircuitGraphError("plot: this report has no faithfulness curve; ask evaluate() for it with measures=('curve',)")
        return plot_curve(curve, path, title=f"{self.task} · {self.model}")


def evaluate(
    model: Any,
    task: Task | PromptPairs | str | Path,
    circuit: Circuit,
    *,
    prompts: int | None = None,
    seed: int = 0,
    metric: Metric | str | None = None,
    source: Source | SourceKind | None = None,
    backend: str = "torch",
    measures: Sequence[str | Measure] = (),
    progress: Callable[[float, str], None] | None = None,
) -> Report:
    """Run the circuit, its nodes, its complement, the model and the source run, and compare; then take deeper measures.

    `measures`: names ("completeness", "minimality", "curve", "tests") or instances with other settings, such as `Curve(mib_compat=True)` or
    `Agreement(reference)`. Their cost in forward passes stands in their docs. `progress` is told a fraction and a text before each.

    `metric` and `source` are those the circuit was found with, unless given. Constants of the source "optimal" are those of discovery,
    too: fitted once more to the prompts that it drew, whatever `prompts` and `seed` are now. Use another `seed` than discovery did for
    prompts that the circuit was not fitted to. Refuses and warns of what `discover` does, and `CircuitGraphError` is raised when the
    circuit is of another graph; a task or weights that have changed since it was found are warned of.

    >>> report = evaluate("zoo:induction-2l", "induction", circuit, seed=1)   # doctest: +SKIP
    >>> print(report)                                                         # doctest: +SKIP
    """
    if not isinstance(circuit, Circuit):
        raise CircuitGraphError(f"circuit: {circuit!r}; expected a Circuit, such as Circuit.load reads from a file")
    chosen = measures_named(measures)
    question = pose_again(circuit, model, task, prompts=prompts, seed=seed, metric=metric, source=source, backend=backend)
    warn_of_changes(circuit.provenance, question)
    question.check()
    tell = progress or (lambda fraction, text: None)
    tell(0.0, "evaluating the circuit")
    report, scale = answer(question, circuit), scale_of(question, circuit.graph)
    findings: dict[str, Finding] = {}
    for i, measure in enumerate(chosen):
        tell((i + 1) / (len(chosen) + 1), measure.name)
        findings[measure.name] = measure.measure(scale, circuit)
    return dataclasses.replace(report, findings=findings)


def answer(question: Question, circuit: Circuit) -> Report:
    """The report on a circuit as an answer to a question."""
    scale = scale_of(question, circuit.graph)
    graph, kept = circuit.graph, circuit.mask
    nodes = node_version(circuit)
    by_edges, by_nodes, outside, *others = scale.metrics(
        np.stack([kept, nodes, graph.visible & ~kept, *random_circuits(circuit, question.seed)])
    )
    faithful, between, complement = scale.placed(by_edges), scale.placed(by_nodes), scale.placed(outside)
    chance = [scale.placed(other).value for other in others]
    return Report(
        model=question.traced.name,
        task=question.task_name,
        metric=question.metric.name,
        source=question.source.kind,
        prompts=len(question.pairs),
        seed=question.seed,
        task_accuracy=question.task_accuracy,
        edges_total=graph.n_edges,
        edges_kept=circuit.n_edges,
        nodes_total=len(graph.nodes),
        nodes_kept=len(circuit.nodes),
        edges_between_nodes=int(nodes.sum()),
        metric_clean=float(scale.model.mean()),
        metric_corrupted=float(scale.source.mean()),
        metric_circuit=float(by_edges.mean()),
        metric_nodes=float(by_nodes.mean()),
        metric_complement=float(outside.mean()),
        faithfulness=faithful.value,
        faithfulness_interval=faithful.interval,
        node_faithfulness=between.value,
        node_faithfulness_interval=between.interval,
        complement=complement.value,
        complement_interval=complement.interval,
        random_faithfulness=float(np.mean(chance)),
        random_faithfulness_most=max(chance),
        protocol=scale.protocol,
    )


def random_circuits(circuit: Circuit, seed: int) -> list[Bool[ndarray, "readers writers"]]:
    """Circuits of as many edges, drawn at random."""
    edges, masks = np.flatnonzero(circuit.graph.visible), []
    for number in range(RANDOM_CIRCUITS):
        mask = np.zeros(circuit.graph.shape, dtype=bool)
        mask.flat[np.random.default_rng([seed, number]).choice(edges, circuit.n_edges, replace=False)] = True
        masks.append(mask)
    return masks


def with_report(circuit: Circuit, report: Report) -> Circuit:
    """The circuit with the report's numbers in its provenance; choosing other edges drops those that belong to these."""
    names = ("metric", "metric_clean", "metric_corrupted", "metric_circuit", "faithfulness", "node_faithfulness", "complement")
    numbers = {name: getattr(report, name) for name in (*names, "task_accuracy", "edges_kept")}
    return dataclasses.replace(circuit, provenance={**circuit.provenance, **numbers, "protocol": report.protocol.to_dict()})
