"""`Scale`: where the metric of any mask lies between the source run (0) and the model (1). What every measure asks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._engine import Engine
from circuitgraph._errors import CircuitGraphError, TraceError
from circuitgraph._graph import Graph
from circuitgraph.evaluation._bootstrap import Estimate, interval_of, resampled_means
from circuitgraph.evaluation._faithfulness import check_gap, faithfulness
from circuitgraph.evaluation._protocol import Protocol
from circuitgraph.evaluation._question import Question, digest, source_digest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

LANES = 32  # masks that are sent together


@dataclass(frozen=True, eq=False)
class Scale:
    """An engine, the graph of the masks it is asked about, and the protocol of the answers.

    `graph` is the engine's, or that split by the spans of its prompts. `ends`: `F(1)` and `F(0)` where they have been asked already.
    Raises `DegenerateError` where these two cannot be told apart, so nothing that is measured on a scale divides by zero, and
    `CircuitGraphError` for another graph.

    >>> from circuitgraph.testing import ReferenceModel, random_pairs
    >>> engine = ReferenceModel.random(seed=3, n_layers=1).bind(random_pairs(3), "kl")
    >>> scale = Scale(engine, engine.graph, Protocol("kl", prompts=3))
    >>> scale.faithfulness(engine.graph.visible).value
    1.0
    """

    engine: Engine
    graph: Graph
    protocol: Protocol
    ends: tuple[Float[ndarray, " prompts"], Float[ndarray, " prompts"]] | None = None

    def __post_init__(self) -> None:
        traced = self.engine.graph
        if self.graph != traced and not self._is_split:
            if self.graph.spans and self.graph.spans != tuple(self.engine.spans):
                ours, theirs = ", ".join(self.graph.spans), ", ".join(self.engine.spans) or "none"
                raise CircuitGraphError(
                    f"the circuit is split by the spans {ours}; the prompts have {theirs}; ask prompts of the same task"
                )
            raise CircuitGraphError(f"the circuit is of {self.graph!r}, but the model is {traced!r}; trace it as it was traced then")
        check_gap(self.model, self.source, self.engine.metric.name, seed=self.seed)

    @cached_property
    def _is_split(self) -> bool:
        spans, traced = tuple(self.engine.spans) if self.graph.spans else (), self.engine.graph
        return bool(spans) and self.graph.spans == spans and self.graph == traced.by_span(spans)

    @property
    def seed(self) -> int:
        return self.protocol.seed

    @cached_property
    def model(self) -> Float[ndarray, " prompts"]:
        """`F(1)` per prompt."""
        return self.ends[0] if self.ends else self.metric(self.graph.visible)

    @cached_property
    def source(self) -> Float[ndarray, " prompts"]:
        """`F(0)` per prompt."""
        return self.ends[1] if self.ends else self.metric(np.zeros(self.graph.shape, dtype=bool))

    @cached_property
    def gap(self) -> float:
        """Mean `F(1) - F(0)`, which is not 0."""
        return float((self.model - self.source).mean())

    def metric(self, mask: Bool[ndarray, "readers writers"]) -> Float[ndarray, " prompts"]:
        """`F` of one mask, per prompt."""
        values: Float[ndarray, " prompts"] = self.metrics([mask])[0]
        return values

    def metrics(self, masks: Iterable[Bool[ndarray, "readers writers"]]) -> Float[ndarray, "lanes prompts"]:
        """`F` of many masks, per prompt, several to a query. Raises `TraceError` when one is not a number."""
        rest = iter(masks)
        parts = [np.zeros((0, self.engine.n_prompts))]
        while lanes := list(islice(rest, LANES)):
            parts.append(self._ask(np.stack(lanes)))
        values: Float[ndarray, "lanes prompts"] = np.concatenate(parts)
        if not np.isfinite(values).all():
            lane, prompt = np.argwhere(~np.isfinite(values))[0]
            raise TraceError(f"{self.engine.metric.name} of prompt {prompt} is {values[lane, prompt]} under a mask; expected a number")
        return values

    def _ask(self, masks: Bool[ndarray, "lanes readers writers"]) -> Float[ndarray, "lanes prompts"]:
        asked = masks.astype(np.float32)
        if self._is_split:  # the columns of a writer stand together, one for each span
            asked = asked.reshape(len(masks), *self.engine.graph.shape, len(self.graph.spans))
        values: Float[ndarray, "lanes prompts"] = np.asarray(self.engine.evaluate(asked), dtype=np.float64)
        return values

    def faithfulness(self, mask: Bool[ndarray, "readers writers"]) -> Estimate:
        """Of one mask, with its interval."""
        return self.placed(self.metric(mask))

    def placed(self, metric: Float[ndarray, " prompts"]) -> Estimate:
        """Where a metric lies between source run and model."""
        return faithfulness(metric, self.model, self.source, seed=self.seed)

    def size(self, difference: Float[ndarray, " prompts"]) -> Estimate:
        """|mean difference| between two metrics, in units of the gap between source run and model."""
        samples = np.stack([difference, self.model - self.source])
        interval = None
        if samples.shape[1] > 1:
            means = resampled_means(samples, seed=self.seed)
            with np.errstate(divide="ignore", invalid="ignore"):
                interval = interval_of(np.abs(means[:, 0] / means[:, 1]))
        return Estimate(abs(float(difference.mean()) / self.gap), interval)


def scale_of(question: Question, graph: Graph) -> Scale:
    """The scale of a question, for circuits of this graph. Raises what `Scale` does."""
    protocol = Protocol(
        metric=question.metric.name,
        prompts=len(question.pairs),
        prompts_digest=digest(question.pairs),
        seed=question.seed,
        ablation=question.source.kind,
        ablation_data=source_digest(question),
        positions="spans" if graph.spans else "all",
    )
    return Scale(question.engine, graph, protocol, (question.clean, question.corrupted))
