"""`evaluate` and its `Report`: the numbers that say whether to believe a circuit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._engine import Source, SourceKind
from circuitgraph._errors import CircuitGraphError
from circuitgraph._metrics import Metric
from circuitgraph._pairs import PromptPairs
from circuitgraph.evaluation._bootstrap import CONFIDENCE, Interval
from circuitgraph.evaluation._faithfulness import faithfulness
from circuitgraph.evaluation._question import NO_TASK, Question, pose, warn

if TYPE_CHECKING:
    from rich.table import Table

    from circuitgraph._task import Task


@dataclass(frozen=True)
class Report:
    """What a circuit keeps of a model's behaviour on a task.

    `metric_clean` is `F(1)`, the model; `metric_corrupted` `F(0)`, the source run; `metric_circuit` with only the circuit's edges live;
    `metric_complement` with all others. `faithfulness` places the circuit between source run (0) and model (1); it may leave that range.
    `completeness` does the same for the complement (Marks et al. 2024): near 0, nothing that does the job was left out. Intervals are 95%
    bootstrap intervals over prompts, `None` for one prompt. `task_accuracy` is the untouched model's.
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
    metric_clean: float
    metric_corrupted: float
    metric_circuit: float
    metric_complement: float
    faithfulness: float
    faithfulness_interval: Interval | None
    completeness: float
    completeness_interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Name and value of every line of the report, as text."""
        return (
            ("model", self.model),
            ("task", f"{self.task}, {self.prompts} prompts, seed {self.seed}, accuracy {self.task_accuracy:.0%}"),
            ("edges kept", f"{self.edges_kept} of {self.edges_total} ({self.edges_kept / max(self.edges_total, 1):.2%})"),
            (f"{self.metric}, model", f"{self.metric_clean + 0.0:.4g}"),  # -0.0 becomes 0.0
            (f"{self.metric}, {self.source}", f"{self.metric_corrupted + 0.0:.4g}"),
            (f"{self.metric}, circuit", f"{self.metric_circuit + 0.0:.4g}"),
            (f"{self.metric}, all but the circuit", f"{self.metric_complement + 0.0:.4g}"),
            ("faithfulness (1 is the model)", f"{with_interval(self.faithfulness, self.faithfulness_interval)}"),
            ("completeness (0 is complete)", f"{with_interval(self.completeness, self.completeness_interval)}"),
        )

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in self.rows():
            table.add_row(name, value)
        return table


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
) -> Report:
    """Run the circuit, its complement, the model and the source run, and compare.

    `metric` and `source` are those the circuit was found with, unless given. Use another `seed` than discovery did for prompts that the
    circuit was not fitted to. Refuses and warns of what `discover` does, and `CircuitGraphError` is raised when the circuit is of another
    graph; a task or weights that have changed since it was found are warned of.

    >>> report = evaluate("zoo:induction-2l", "induction", circuit, seed=1)   # doctest: +SKIP
    >>> print(report)                                                         # doctest: +SKIP
    """
    if not isinstance(circuit, Circuit):
        raise CircuitGraphError(f"circuit: {circuit!r}; expected a Circuit, such as Circuit.load reads from a file")
    found: Mapping[str, Any] = circuit.provenance
    if source is None and found.get("source_data"):
        raise CircuitGraphError("the circuit was found with a mean over its own data set; pass that source to evaluate()")
    question = pose(
        model,
        task,
        prompts=prompts,
        seed=seed,
        metric=metric if metric is not None else found.get("metric"),
        source=source if source is not None else found.get("source", "corrupted"),
        backend=backend,
    )
    _warn_of_changes(found, question)
    question.check()
    return answer(question, circuit)


def answer(question: Question, circuit: Circuit) -> Report:
    """The report on a circuit as an answer to a question."""
    graph = question.traced.graph
    if circuit.graph != graph:
        raise CircuitGraphError(
            f"the circuit is of {circuit.graph!r}, but {question.traced.name} is {graph!r}; trace it as it was traced then"
        )
    kept = np.asarray(circuit.mask, dtype=bool) & graph.visible
    inside, outside = question.evaluate(kept), question.evaluate(~kept & graph.visible)
    clean, source = question.clean, question.corrupted
    faithful = faithfulness(inside, clean, source, seed=question.seed)
    complete = faithfulness(outside, clean, source, seed=question.seed)
    return Report(
        model=question.traced.name,
        task=question.task_name,
        metric=question.metric.name,
        source=question.source.kind,
        prompts=len(question.pairs),
        seed=question.seed,
        task_accuracy=question.task_accuracy,
        edges_total=graph.n_edges,
        edges_kept=int(kept.sum()),
        metric_clean=float(clean.mean()),
        metric_corrupted=float(source.mean()),
        metric_circuit=float(inside.mean()),
        metric_complement=float(outside.mean()),
        faithfulness=faithful.value,
        faithfulness_interval=faithful.interval,
        completeness=complete.value,
        completeness_interval=complete.interval,
    )


def with_report(circuit: Circuit, report: Report) -> Circuit:
    """The circuit with the report's numbers in its provenance; choosing other edges drops those that belong to these."""
    names = ("metric", "metric_clean", "metric_corrupted", "metric_circuit", "faithfulness", "completeness", "task_accuracy", "edges_kept")
    return dataclasses.replace(circuit, provenance={**circuit.provenance, **{name: getattr(report, name) for name in names}})


def _warn_of_changes(found: Mapping[str, Any], question: Question) -> None:
    """Under the same name, the task or the weights may be others than those the circuit was found with."""
    task, model = (part if isinstance(part := found.get(name), Mapping) else {} for name in ("task", "model"))
    now = question.traced.provenance
    if task.get("name") == question.task_name != NO_TASK and task.get("digest") != question.task_digest:
        warn(f"task {question.task_name} has changed since the circuit was found with it")
    is_comparable = model.get("name") == question.traced.name and model.get("backend") == now.get("backend")  # each hashes in its own way
    if is_comparable and model.get("weights_sha256") != now.get("weights_sha256"):
        warn(f"the weights of {question.traced.name} are others than those the circuit was found with")
