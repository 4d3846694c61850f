"""The verbs: `trace` a model, `discover` a circuit, `check_trace`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph import _plugins
from circuitgraph._circuit import Circuit
from circuitgraph._engine import Algorithm, Check, Engine, Outcome, Source, SourceKind, TracedModel, checked_algorithm, outcomes
from circuitgraph._errors import CircuitGraphError
from circuitgraph._metrics import Metric
from circuitgraph._pairs import PromptPairs
from circuitgraph.evaluation._question import Question, digest, pose, source_digest, warn
from circuitgraph.evaluation._report import Report, answer, with_report
from circuitgraph.selection import default_size

if TYPE_CHECKING:
    from circuitgraph._task import Task

Progress = Callable[[float, str], None]


def trace(model: Any, *, backend: str = "torch", **options: Any) -> TracedModel:
    """Find the model's wiring and prove it.

    `model`: a Hugging Face id or a local folder, a live `nn.Module`, an nnsight `LanguageModel`, a GGUF file or a bundled `zoo:` name.
    Options of both backends: `architecture` (a hand-written one), `per_head_kv`, `dtype` (float32 unless files are in float64 or a live
    module in something else), `device`, `tokenizer`, `memory_budget` (what may be computed with beside the weights: bytes, "8GB" or
    "auto"); of jax: `devices`. Raises `TraceError` that names the joint which could not be found or the first module that differs.

    >>> trace("zoo:induction-2l").graph
    Graph(9 writers, 25 readers, 81 edges, 10 nodes)
    """
    return _plugins.traced(model, backend=backend, **options)


def discover(
    model: Any,
    task: Task | PromptPairs | str | Path,
    algorithm: Algorithm,
    *,
    prompts: int | None = None,
    seed: int = 0,
    backend: str = "torch",
    metric: Metric | str | None = None,
    source: Source | SourceKind = "corrupted",
    progress: Progress | None = None,
) -> Circuit:
    """Find the part of `model` that does `task`.

    `model`: what `trace` takes, or a traced model. `task`: a name, a file, a `Task` or `PromptPairs`. `prompts`: how many; by default 32,
    or all rows of a file, or all pairs. `metric`: the algorithm's own default, else the task's. `progress` is told a fraction and a text.
    Warns when the model fails the task. Raises `TraceError` when the trace is not the model on these prompts, `DegenerateError` when the
    question has no answer.

    >>> circuit = discover("zoo:induction-2l", "induction", ACDC(threshold=0.001), prompts=32)   # doctest: +SKIP
    """
    circuit, _ = find(
        model, task, algorithm, prompts=prompts, seed=seed, backend=backend, metric=metric, source=source, progress=progress or _silent
    )
    return circuit


def find(
    model: Any,
    task: Task | PromptPairs | str | Path,
    algorithm: Algorithm,
    *,
    prompts: int | None,
    seed: int,
    backend: str,
    metric: Metric | str | None,
    source: Source | SourceKind,
    progress: Progress,
    choose: Callable[[Circuit], Circuit] | None = None,
) -> tuple[Circuit, Report]:
    """`discover` with its report; `choose` picks from what the algorithm scored before the report is made."""
    started = time.perf_counter()
    checked_algorithm("algorithm", algorithm)
    progress(0.0, "tracing the model")
    if metric is None:
        metric = getattr(algorithm, "default_metric", None)
    question = pose(model, task, prompts=prompts, seed=seed, metric=metric, source=source, backend=backend)
    progress(0.0, "checking the trace")
    question.check()
    outcome = outcome_of(algorithm, question.engine, progress)
    progress(1.0, "evaluating the circuit")
    provenance = _provenance(question, algorithm)
    circuit = Circuit(outcome.graph or question.traced.graph, outcome.mask, outcome.scores, provenance, dict(outcome.record))
    if choose is not None:
        circuit = choose(circuit)
    if circuit.n_edges == 0:
        warn("no edge was kept: the threshold is above every score, or what was kept leads from the input to nowhere; ask for more edges")
    report = answer(question, circuit)
    circuit = with_report(circuit, report)
    seconds = round(time.perf_counter() - started, 3)
    return dataclasses.replace(circuit, provenance={**circuit.provenance, "seconds": seconds}), report


def strongest(circuit: Circuit, *, top: int | None = None, threshold: float | None = None) -> Circuit:
    """The edges of largest |score| that lie on a path from the input to the logits.

    `top` of them before dead ends are pruned, or those of at least `threshold`. With neither, what the algorithm decided on stays as it
    is: that is where it kept fewer than all edges; else it is 1% of them, at least 20.
    """
    if top is not None and threshold is not None:
        raise CircuitGraphError("top and threshold exclude each other; give one")
    if threshold is not None:
        return circuit.threshold(threshold).prune_dead()
    if top is None and circuit.n_edges < circuit.graph.n_edges:
        return circuit
    return circuit.top(default_size(circuit.graph.n_edges) if top is None else top).prune_dead()


def check_trace(model: Any, pairs: PromptPairs | None = None, *, backend: str = "torch") -> tuple[Check, ...]:
    """Every invariant of a trace, measured on `pairs` (default: a few random tokens), for anyone's CI.

    `F(1)` is the model, `F(0)` the source run, readers are the sum of their writers, padding changes nothing; the last check reports
    the readers that move nothing.

    >>> assert all(check.holds for check in check_trace("zoo:induction-2l"))   # doctest: +SKIP
    """
    return tuple(checks(_plugins.traced(model, backend=backend), pairs))


def checks(traced: TracedModel, pairs: PromptPairs | None = None) -> Iterator[Check]:
    """The checks of `check_trace` one by one, cheapest first."""
    return traced.checks(random_pairs(traced.architecture.vocabulary) if pairs is None else pairs)


def random_pairs(vocabulary: int, *, prompts: int = 2, length: int = 8, seed: int = 0) -> PromptPairs:
    """Prompts of random tokens, for questions where any prompt will do."""
    draw = np.random.default_rng(seed)
    clean, corrupted = draw.integers(vocabulary, size=(2, prompts, length))
    corrupted[:, 0] = (clean[:, 0] + 1) % vocabulary
    answers = draw.integers(vocabulary, size=(prompts, 1))
    return PromptPairs(clean=[*clean], corrupted=[*corrupted], answers=[*answers], wrong_answers=[*((answers + 1) % vocabulary)])


def outcome_of(algorithm: Algorithm, engine: Engine, tell: Progress | None = None) -> Outcome:
    """Run an algorithm, step by step where it has steps. Raises `CircuitGraphError` for an outcome that no circuit can be made of."""
    name, tell = type(algorithm).__name__, tell or _silent
    tell(0.0, name)
    for outcome in outcomes(algorithm, engine):
        tell(outcome.done, name)
    return _checked(outcome, engine, name)


def _checked(outcome: Outcome, engine: Engine, name: str) -> Outcome:
    graph = outcome.graph or engine.graph
    if np.shape(outcome.mask) != graph.shape:
        raise CircuitGraphError(f"{name}: the mask has shape {np.shape(outcome.mask)}; expected [readers, writers] = {graph.shape}")
    if outcome.scores is not None and graph.n_edges and np.isnan(np.asarray(outcome.scores)[graph.visible]).all():
        raise CircuitGraphError(f"{name}: every score is NaN, so there is nothing to choose from; check the model's weights and dtype")
    return outcome


def _provenance(question: Question, algorithm: Algorithm) -> dict[str, Any]:
    traced = question.traced
    model = dict(traced.provenance)
    versions, file = model.pop("versions", {}), question.task_file
    return {
        "model": {**model, "name": traced.name},
        "architecture": json.loads(traced.architecture.to_json()),
        "task": {"name": question.task_name, "digest": question.task_digest, **({"path": str(file)} if file else {})},
        "prompts_digest": digest(question.pairs),
        "prompts": len(question.pairs),
        "seed": question.seed,
        "source": question.source.kind,
        "source_data": None if question.fitted_to else source_digest(question),
        "source_fitted_to": question.fitted_to,
        "algorithm": described(algorithm),
        "versions": {"circuitgraph": _version(), "numpy": np.__version__, **versions},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def described(value: Any) -> Any:
    """A frozen dataclass as its class and hyper-parameters, algorithms inside algorithms too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    return repr(value)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("circuitgraph")
    except PackageNotFoundError:
        return "not installed"


def _silent(fraction: float, text: str) -> None:
    """The progress callback of those who want none."""
