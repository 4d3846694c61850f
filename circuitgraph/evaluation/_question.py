"""`Question`: a traced model, prompts with answers, a metric and a source. What a circuit is an answer to."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph import _plugins
from circuitgraph._circuit import Circuit
from circuitgraph._engine import Engine, Source, SourceKind, TracedModel
from circuitgraph._errors import CircuitGraphError, TaskError, TraceError, whole_number
from circuitgraph._metrics import Accuracy, Metric, Target, check_answers, metric_named
from circuitgraph._pairs import PromptPairs, check_vocabulary
from circuitgraph._task_files import file_of
from circuitgraph.algorithms import OptimalAblation
from circuitgraph.evaluation._faithfulness import are_apart, check_gap

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    from circuitgraph._task import Task

NO_TASK = "token ids"  # the name of prompts that came without a task
_CHECKED_PROMPTS = 8  # the cheap checks of a trace run on the first few prompts


class CircuitGraphWarning(UserWarning):
    """The numbers are right, but the question may not be the one you meant."""


@dataclass(frozen=True, eq=False)
class Question:
    """What a circuit is asked about. `task_digest` identifies the task, or the token ids when there is no task; `task_file` is its file;
    `fitted_to` the prompts that the source's constants were fitted to, unless somebody gave them."""

    traced: TracedModel
    pairs: PromptPairs
    metric: Metric
    source: Source
    task_name: str
    task_digest: str
    task_file: Path | None
    seed: int
    fitted_to: str | None = None

    @cached_property
    def engine(self) -> Engine:
        return self.traced.bind(self.pairs, self.metric, self.source)

    @cached_property
    def clean(self) -> Float[ndarray, " prompts"]:
        """`F(1)` per prompt: the model itself."""
        return self.evaluate(np.ones(self.traced.graph.shape, dtype=np.float32))

    @cached_property
    def corrupted(self) -> Float[ndarray, " prompts"]:
        """`F(0)` per prompt: the source run."""
        return self.evaluate(np.zeros(self.traced.graph.shape, dtype=np.float32))

    def evaluate(self, mask: Float[ndarray, "readers writers"]) -> Float[ndarray, " prompts"]:
        """`F` of one mask, per prompt. Raises `TraceError` when it is not a number."""
        values: Float[ndarray, " prompts"] = np.asarray(self.engine.evaluate(np.asarray(mask, dtype=np.float32)[None]), dtype=np.float64)[0]
        if not np.isfinite(values).all():
            prompt = int(np.argmax(~np.isfinite(values)))
            raise TraceError(f"{self.traced.name}: {self.metric.name} of prompt {prompt} is {values[prompt]}; expected a number")
        return values

    @cached_property
    def task_accuracy(self) -> float:
        """The share of prompts that the untouched model answers rightly. Raises `TraceError` when its logits have a NaN."""
        return float(np.mean(list(self._hits())))

    def _hits(self) -> Iterator[float]:
        for bucket in self.pairs.buckets():
            logits = self.traced.logits(self.pairs.select(bucket.index))
            if np.isnan(logits).any():
                prompt = int(bucket.index[np.argmax(np.isnan(logits).any(axis=1))])
                raise TraceError(f"{self.traced.name}: the model's own logits for prompt {prompt} are NaN; check its weights and dtype")
            target = Target(bucket.answers.ids, bucket.answers.weights, bucket.wrong_answers.ids, bucket.wrong_answers.weights)
            yield from np.asarray(Accuracy()(np.asarray(logits), target)).tolist()

    def check(self) -> None:
        """Refuse what would give wrong or empty numbers, and warn of what may mislead. Raises `TraceError`, `DegenerateError`."""
        accuracy = self.task_accuracy
        few = self.pairs.select(range(min(len(self.pairs), _CHECKED_PROMPTS)))
        for check in islice(self.traced.checks(few), 2):
            if not check.holds:
                raise TraceError(f"{self.traced.name}: the trace differs from the model: {check}")
        check_gap(self.clean, self.corrupted, self.metric.name, seed=self.seed)
        self._warn_of_equal_answers()
        if accuracy < 0.5:
            warn(f"{self.traced.name} fails the task {self.task_name}: accuracy {accuracy:.0%}; a circuit for it explains little")
        elif self.metric.needs_wrong_answers and self.clean.mean() <= 0:
            warn(
                f"{self.traced.name} prefers the wrong answers in {self.task_name}: "
                f"mean {self.metric.name} {self.clean.mean():.3g}; a circuit for it explains little"
            )
        if len(self.pairs) == 1:
            warn("one prompt only: no interval can be had, and a circuit of one prompt may not hold for another")

    def _warn_of_equal_answers(self) -> None:
        """A metric that is 0 at the clean run and never negative tells any two runs apart; the answers may not."""
        if self.metric.flat_at_clean:
            asked = replace(self, metric=_metric_of(self.pairs))
            if not are_apart(asked.clean, asked.corrupted, seed=self.seed):
                warn(
                    f"{asked.metric.name} cannot tell the model ({asked.clean.mean():.4g}) from the source run "
                    f"({asked.corrupted.mean():.4g}), so what {self.metric.name} measures is not the answers to {self.task_name}"
                )


def pose(
    model: Any,
    task: Task | PromptPairs | str | Path,
    *,
    prompts: int | None = None,
    seed: int = 0,
    metric: Metric | str | None = None,
    source: Source | SourceKind = "corrupted",
    backend: str = "torch",
    found: Mapping[str, Any] | None = None,
) -> Question:
    """Trace the model, draw the prompts, settle the metric (default: the task's) and the source. What users give is checked here.

    Constants that the source "optimal" does not have are fitted (`OptimalAblation`), to the question's prompts; for a circuit that was
    `found` (its provenance) with the same task, to the prompts of its discovery, drawn again. They are part of how the circuit was found:
    fitted again to prompts that are to test it, they would have seen the test.
    """
    from circuitgraph._task import load_task  # with pydantic, so not before it is needed

    seed = whole_number("seed", seed, 0)
    if prompts is not None:
        prompts = whole_number("prompts", prompts, 1)
    named = metric_named(metric) if metric is not None else None
    chosen = source if isinstance(source, Source) else Source(source)
    loaded = task if isinstance(task, PromptPairs) else load_task(task)
    traced = _plugins.traced(model, backend=backend)
    draw = partial(_drawn, loaded, traced)
    pairs = draw(prompts, seed)
    if isinstance(loaded, PromptPairs):
        name, identity = NO_TASK, digest(pairs)
        named = named or _metric_of(pairs)
    else:
        name, identity = loaded.name, loaded.digest
        named = named or metric_named(loaded.metric)
    check_answers(named, pairs.wrong_answers)
    check_vocabulary(pairs, traced.architecture.vocabulary)
    file, fitted_to = file_of(task), None
    if chosen.kind == "optimal" and chosen.constants is None:
        is_same = found is not None and found.get("task", {}).get("digest") == identity
        data = draw(found.get("prompts"), found.get("seed", 0)) if found is not None and is_same else pairs
        chosen, fitted_to = OptimalAblation().fit(traced.bind(data, "kl")), digest(data)
    return Question(traced, pairs, named, chosen, name, identity, file.resolve() if file else None, seed, fitted_to)


def pose_again(
    circuit: Circuit,
    model: Any,
    task: Task | PromptPairs | str | Path,
    *,
    prompts: int | None = None,
    seed: int = 0,
    metric: Metric | str | None = None,
    source: Source | SourceKind | None = None,
    backend: str = "torch",
) -> Question:
    """`pose`, by the metric and the source that the circuit was found with unless they are given."""
    found: Mapping[str, Any] = circuit.provenance
    if source is None and found.get("source_data"):
        what = "constants of its own" if found.get("source") == "optimal" else "a mean over its own data set"
        raise CircuitGraphError(f"the circuit was found with {what}; pass that source")
    return pose(
        model,
        task,
        prompts=prompts,
        seed=seed,
        metric=metric if metric is not None else found.get("metric"),
        source=source if source is not None else found.get("source", "corrupted"),
        backend=backend,
        found=found if source is None else None,
    )


def warn_of_changes(found: Mapping[str, Any], question: Question) -> None:
    """Under the same name, the task or the weights may be others than those the circuit was found with."""
    task, model = (part if isinstance(part := found.get(name), Mapping) else {} for name in ("task", "model"))
    now = question.traced.provenance
    if task.get("name") == question.task_name != NO_TASK and task.get("digest") != question.task_digest:
        warn(f"task {question.task_name} has changed since the circuit was found with it")
    is_comparable = model.get("name") == question.traced.name and model.get("backend") == now.get("backend")  # each hashes in its own way
    if is_comparable and model.get("weights_sha256") != now.get("weights_sha256"):
        warn(f"the weights of {question.traced.name} are others than those the circuit was found with")


def _drawn(task: Task | PromptPairs, traced: TracedModel, prompts: int | None, seed: int) -> PromptPairs:
    if isinstance(task, PromptPairs):
        return _first(task, prompts)
    return task.pairs(traced.tokenizer, prompts, seed, vocabulary=traced.architecture.vocabulary)


def _metric_of(pairs: PromptPairs) -> Metric:
    """The metric for answers that came without one."""
    return metric_named("logit_diff" if all(len(wrong) for wrong in pairs.wrong_answers) else "nll")


def _first(pairs: PromptPairs, prompts: int | None) -> PromptPairs:
    if prompts is None or prompts == len(pairs):
        return pairs
    if prompts > len(pairs):
        raise TaskError(f"prompts: {prompts} asked for, but there are {len(pairs)} pairs")
    return pairs.select(range(prompts))


def digest(pairs: PromptPairs) -> str:
    """A hash of the token ids: equal for equal prompts."""
    sha = hashlib.sha256()
    for part in (pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong_answers):
        for ids in part:
            sha.update(f"{ids.tolist()};".encode())
    return sha.hexdigest()


def source_digest(question: Question) -> str | None:
    """A hash of what the source's values come from: its data, the prompts that its constants were fitted to, or the constants."""
    source = question.source
    if source.data is not None:
        return digest(source.data)
    if question.fitted_to is not None or source.constants is None:
        return question.fitted_to
    return hashlib.sha256(source.constants.tobytes()).hexdigest()


def warn(message: str) -> None:
    """The one place that warnings come from; the command line shows them in red."""
    warnings.warn(message, CircuitGraphWarning, stacklevel=4)
