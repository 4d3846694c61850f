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
from circuitgraph.evaluation._faithfulness import Faithfulness, check_gap, faithfulness
from circuitgraph.evaluation._protocol import Protocol

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

LANES = 32  # masks that are sent together


@dataclass(frozen=True, eq=False)
class Scale:
    """An engine, the graph of the masks it is asked about, and the protocol of the answers.

    `graph` is the engine's, or that split by the spans of its prompts. Raises `DegenerateError` where `F(1)` and `F(0)` cannot be told
    apart, so nothing that is measured on a scale divides by zero, and `CircuitGraphError` for another graph.

    >>> from circuitgraph.testing import ReferenceModel, random_pairs
    >>> engine = ReferenceModel.random(seed=3, n_layers=1).bind(random_pairs(3), "kl")
    >>> scale = Scale(engine, engine.graph, Protocol("kl", prompts=3))
    >>> scale.faithfulness(engine.graph.visible).value
    1.0
    """

    engine: Engine
    graph: Graph
    protocol: Protocol

    def __post_init__(self) -> None:
        traced = self.engine.graph
        if self.graph != traced and not self._is_split:
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
        return self.metric(self.graph.visible)

    @cached_property
    def source(self) -> Float[ndarray, " prompts"]:
        """`F(0)` per prompt."""
        return self.metric(np.zeros(self.graph.shape, dtype=bool))

    @cached_property
    def gap(self) -> float:
        """Mean `F(1) - F(0)`, which is not 0."""
        return float((self.model - self.source).mean())

    def metric(self, mask: Bool[ndarray, "readers writers"]) -> Float[ndarray, " prompts"]:
        """`F` of one mask, per prompt."""
        return self.metrics(np.asarray(mask)[None])[0]

    def metrics(self, masks: Iterable[Bool[ndarray, "readers writers"]]) -> Float[ndarray, "lanes prompts"]:
        """`F` of many masks, per prompt, several to a query. Raises `TraceError` when one is not a number."""
        rest = iter(masks)
        parts = [np.zeros((0, self.engine.n_prompts))]
        while lanes := list(islice(rest, LANES)):
            parts.append(self._ask(np.stack(lanes)))
        values = np.concatenate(parts)
        if not np.isfinite(values).all():
            lane, prompt = np.argwhere(~np.isfinite(values))[0]
            raise TraceError(f"{self.engine.metric.name} of prompt {prompt} is {values[lane, prompt]} under a mask; expected a number")
        return values

    def _ask(self, masks: Bool[ndarray, "lanes readers writers"]) -> Float[ndarray, "lanes prompts"]:
        asked = masks.astype(np.float32)
        if self._is_split:  # the columns of a writer stand together, one for each span
            asked = asked.reshape(len(masks), *self.engine.graph.shape, len(self.graph.spans))
        return np.asarray(self.engine.evaluate(asked), dtype=np.float64)

    def faithfulness(self, mask: Bool[ndarray, "readers writers"]) -> Faithfulness:
        """Of one mask, with its interval."""
        return self.placed(self.metric(mask))

    def placed(self, metric: Float[ndarray, " prompts"]) -> Faithfulness:
        """Where a metric lies between source run and model."""
        return faithfulness(metric, self.model, self.source, seed=self.seed)
