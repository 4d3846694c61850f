"""Does discovery find the same circuit again? With other prompts, another seed, another order of questions.

A circuit depends on all three: bootstrap Jaccard indices of published IOI circuits lie between .34 and .67, and ACDC with another order of
heads shares a third of its edges. What returns every time is worth believing; what does not is one of many circuits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._engine import Algorithm, Source, SourceKind
from circuitgraph._errors import CircuitGraphError, unknown_name, whole_number
from circuitgraph._graph import Graph
from circuitgraph._metrics import Metric
from circuitgraph._pairs import PromptPairs
from circuitgraph.evaluation._columns import aligned
from circuitgraph.evaluation._overlap import mean_jaccard, mean_jaccard_by_chance
from circuitgraph.evaluation._question import Question, pose
from circuitgraph.evaluation._scale import scale_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray
    from rich.table import Table

    from circuitgraph._task import Task

Varied = Literal["prompts", "seed", "order"]


@dataclass(frozen=True, eq=False)
class Stability:
    """What repeated discovery found. `circuits` are the masks of the runs, `varied` what differed between them.

    `jaccard` is the mean over all pairs of runs, of edges and of nodes; `by_chance` is that of random circuits of the same sizes.
    """

    graph: Graph
    varied: tuple[Varied, ...]
    circuits: tuple[Bool[ndarray, "readers writers"], ...]
    question: dict[str, Any]

    @property
    def frequency(self) -> Float[ndarray, "readers writers"]:
        """How often each edge returned, from 0 to 1."""
        share: Float[ndarray, "readers writers"] = np.mean(self.circuits, axis=0)
        return share

    @property
    def jaccard(self) -> float:
        return mean_jaccard(self.circuits)

    @property
    def jaccard_of_nodes(self) -> float:
        return mean_jaccard([np.asarray(mask.any(axis=0)) for mask in self.circuits])

    @property
    def by_chance(self) -> float:
        return mean_jaccard_by_chance([int(mask.sum()) for mask in self.circuits], self.graph.n_edges)

    def circuit(self, at_least: float = 0.5) -> Circuit:
        """The edges that returned in at least this share of the runs, with `confidence` the share."""
        if not 0 < at_least <= 1:
            raise CircuitGraphError(f"stability: at_least is {at_least!r}; expected a share above 0, at most 1")
        provenance = {**self.question, "derived": [{"operation": "returned", "at_least": float(at_least), "runs": len(self.circuits)}]}
        return Circuit(self.graph, self.frequency >= at_least, self.frequency, provenance, confidence=self.frequency)

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Name and value of every line, as text."""
        sizes = [int(mask.sum()) for mask in self.circuits]
        always, ever = (self.frequency == 1).sum(), (self.frequency > 0).sum()
        return (
            ("runs", f"{len(self.circuits)}, other {', '.join(self.varied)} each"),
            ("edges kept", f"{min(sizes)} to {max(sizes)} of {self.graph.n_edges}"),
            ("edges in every run, in any", f"{always}, {ever}"),
            ("Jaccard of edges (by chance)", f"{self.jaccard:.3f} ({self.by_chance:.3f})"),
            ("Jaccard of nodes", f"{self.jaccard_of_nodes:.3f}"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: the edges that ever returned, with how often."""
        places = np.argwhere(self.frequency > 0)
        found = {f"{self.graph.writers[w]}->{self.graph.readers[r]}": float(self.frequency[r, w]) for r, w in places}
        sizes = [int(mask.sum()) for mask in self.circuits]
        numbers = {"jaccard": self.jaccard, "jaccard_by_chance": self.by_chance, "jaccard_of_nodes": self.jaccard_of_nodes}
        return {**self.question, "varied": [*self.varied], "runs": len(self.circuits), "sizes": sizes, **numbers, "frequency": found}

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        return aligned(self.rows())

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(show_header=False, box=None, pad_edge=False)
        for row in self.rows():
            table.add_row(*row)
        return table


def stability(
    model: Any,
    task: Task | PromptPairs | str | Path,
    algorithm: Algorithm,
    *,
    vary: Varied | Sequence[Varied] = "prompts",
    runs: int = 10,
    prompts: int | None = None,
    seed: int = 0,
    backend: str = "torch",
    metric: Metric | str | None = None,
    source: Source | SourceKind = "corrupted",
    progress: Callable[[float, str], None] | None = None,
) -> Stability:
    """Repeat discovery and see what returns.

    `prompts`: each run draws as many of the task's prompts with replacement. `seed`: each run has another seed, for algorithms that have
    one. `order`: another order of the heads, for algorithms with an `order_seed` (ACDC). Several of them vary together. An algorithm that
    keeps every edge is refused: `Selected(EAP(), size=200)` chooses. Costs `runs` discoveries.

    >>> stability("zoo:induction-2l", "induction", ACDC(0.01), vary=("prompts", "order"), runs=20).circuit(0.9)   # doctest: +SKIP
    """
    varied: tuple[Varied, ...] = (vary,) if isinstance(vary, str) else tuple(vary)
    for name in varied:
        if name not in get_args(Varied):
            raise unknown_name("thing to vary", name, get_args(Varied))
    whole_number("stability: runs", runs, 2)
    variants = [_variant(algorithm, varied, run) for run in range(runs)]
    metric = metric if metric is not None else getattr(algorithm, "default_metric", None)
    question = pose(model, task, prompts=prompts, seed=seed, metric=metric, source=source, backend=backend)
    question.check()
    masks = []
    for run, (variant, pairs) in enumerate(zip(variants, _prompts(question, "prompts" in varied, runs), strict=True)):
        if progress is not None:
            progress(run / runs, f"run {run + 1} of {runs}")
        engine = question.traced.bind(pairs, question.metric, question.source)
        masks.append(_kept(variant, engine))
    asked = {
        "model": question.traced.name,
        "task": question.task_name,
        "algorithm": type(algorithm).__name__,
        "prompts": len(question.pairs),
    }
    protocol = scale_of(question, question.traced.graph).protocol.to_dict()
    where = {"metric": question.metric.name, "source": question.source.kind, "seed": seed, "protocol": protocol}
    return Stability(question.traced.graph, varied, tuple(masks), {**asked, **where})


def _prompts(question: Question, resampled: bool, runs: int) -> Iterator[PromptPairs]:
    n = len(question.pairs)
    for run in range(runs):
        draw = np.random.default_rng([question.seed, run])
        yield question.pairs.select(draw.integers(n, size=n)) if resampled else question.pairs


def _kept(algorithm: Algorithm, engine: Any) -> Bool[ndarray, "readers writers"]:
    mask: Bool[ndarray, "readers writers"] = np.asarray(algorithm.run(engine).mask, dtype=bool)
    if mask.shape != engine.graph.shape:
        raise CircuitGraphError(
            "stability: the circuit is split by spans, which differ between prompts; repeat discovery over whole prompts"
        )
    if mask[engine.graph.visible].all():
        raise CircuitGraphError(
            f"stability: {type(algorithm).__name__} keeps every edge, so every run is the same; choose some, such as "
            f"Selected({type(algorithm).__name__}(), size=100)"
        )
    return np.asarray(mask & engine.graph.visible)


def _variant(algorithm: Algorithm, varied: Sequence[Varied], run: int) -> Algorithm:
    for name, field in (("seed", "seed"), ("order", "order_seed")):
        if name in varied:
            changed = _with(algorithm, field, run)
            if changed is algorithm:
                raise CircuitGraphError(f"stability: {type(algorithm).__name__} has no {field}, so its {name} cannot vary")
            algorithm = changed
    return algorithm


def _with(value: Any, name: str, new: int) -> Any:
    """A frozen dataclass with a field of that name changed, in it or in algorithms inside it; itself where there is none."""
    if isinstance(value, tuple):
        items = tuple(_with(item, name, new) for item in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes = {
        field.name: new if field.name == name else _with(getattr(value, field.name), name, new)
        for field in dataclasses.fields(value)
        if field.init
    }
    changes = {key: item for key, item in changes.items() if item is not getattr(value, key)}
    return dataclasses.replace(value, **changes) if changes or hasattr(value, name) else value
