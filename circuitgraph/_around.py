"""An engine that passes what it is asked on to another: what stands between an algorithm and its engine inherits from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuitgraph._engine import EXACT, Engine, Rule, WriterValues
from circuitgraph._graph import Graph
from circuitgraph._metrics import Metric

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class Around:
    """All of the protocol but `reversed`, whose answer has to be such an engine too."""

    engine: Engine

    @property
    def graph(self) -> Graph:
        return self.engine.graph

    @property
    def metric(self) -> Metric:
        return self.engine.metric

    @property
    def n_prompts(self) -> int:
        return self.engine.n_prompts

    @property
    def spans(self) -> tuple[str, ...]:
        return self.engine.spans

    def activations(self, mask: Float[ndarray, "readers writers"] | None = None, *, source: WriterValues | None = None) -> WriterValues:
        return self.engine.activations(mask, source=source)

    def source_values(self) -> WriterValues:
        return self.engine.source_values()

    def evaluate(
        self, masks: Float[ndarray, "lanes readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "lanes prompts"]:
        return self.engine.evaluate(masks, source=source)

    def gradient(
        self,
        mask: Float[ndarray, "readers writers"],
        *,
        source: WriterValues | None = None,
        mix: float | Sequence[float] = 1.0,
        rule: Rule = EXACT,
    ) -> Float[ndarray, "prompts readers writers"]:
        return self.engine.gradient(mask, source=source, mix=mix, rule=rule)

    def source_gradient(
        self, mask: Float[ndarray, "readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "prompts writers d_model"]:
        return self.engine.source_gradient(mask, source=source)
