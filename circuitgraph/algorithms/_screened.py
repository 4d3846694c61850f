"""A slow algorithm on the edges that a fast one finds worth asking about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._around import Around
from circuitgraph._engine import EXACT, Algorithm, Engine, Outcome, Rule, WriterValues, checked_algorithm, last_outcome, outcomes
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph
from circuitgraph.algorithms._ensemble import shared_metric
from circuitgraph.selection import TopN
from circuitgraph.selection._selector import check_size, edges_asked

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray


@dataclass(frozen=True)
class ScreenedBy:
    """The edges with the largest |score| of `screen` stay; `then` runs on a graph that has no others.

    `keep`: how many stay, as a share of all edges, or as a whole number. The others carry the source's value throughout, so `then` starts
    from `F(screened)` and not from the model, and has nothing to say about them: they are in no mask, and their score is NaN. Where the
    screen scores positions apart, an edge is judged by its strongest one.

    Both run with one metric: the default of both if they agree, else the task's. Denoising is refused: with clean and corrupted exchanged,
    what was screened out would be clean.

    Cost: that of `screen`, that of `then` on the edges that stay, and one forward pass. The record is that of `then` and, under "screen",
    how many edges stayed, the `metric` F(screened) averaged over prompts, and the screen's record.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.algorithms import ACDC, ActivationPatching
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "kl")
    >>> found = ScreenedBy(ActivationPatching(), keep=6, then=ACDC(threshold=0.02)).run(engine)
    >>> [edge.name for edge in engine.graph.edges_of(found.mask)]
    ['input->a0.h1<v>', 'a0.h1->m0', 'a0.h1->logits', 'm0->logits']
    """

    screen: Algorithm
    keep: float = 0.1
    _: KW_ONLY
    then: Algorithm

    def __post_init__(self) -> None:
        checked_algorithm("screened: screen", self.screen)
        checked_algorithm("screened: then", self.then)
        check_size("screened: keep", self.keep)

    @property
    def default_metric(self) -> str | None:
        """That of both, where they agree."""
        return shared_metric((self.screen, self.then))

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """The screen's outcomes, with every edge, then those of `then`."""
        graph = engine.graph
        for screened in outcomes(self.screen, engine):
            yield Outcome(graph.visible.copy(), done=0.5 * screened.done)
        kept = self._kept(graph, screened)
        record = {
            "edges": int(kept.sum()),
            "metric": float(np.mean(engine.evaluate(kept[None].astype(np.float32)))),
            "record": dict(screened.record),
        }
        asked: Engine = engine
        if not np.array_equal(kept, graph.visible):
            asked = _Restricted(engine, kept)
        for outcome in outcomes(self.then, asked):
            found = _in_full(outcome, graph, kept)
            yield replace(found, record={**found.record, "screen": record}, done=0.5 + 0.5 * outcome.done)

    def _kept(self, graph: Graph, screened: Outcome) -> Bool[ndarray, "readers writers"]:
        if screened.scores is None:
            raise CircuitGraphError(
                f"screened: {type(self.screen).__name__} gave no scores to screen by; expected an algorithm that scores edges, such as eap"
            )
        sizes = np.abs(np.asarray(screened.scores, dtype=np.float64)).reshape(*graph.shape, -1).max(axis=-1)
        asked = edges_asked("screened: keep", self.keep, graph.n_edges)
        return TopN().choose(graph, Outcome(graph.visible, sizes), asked).mask


@dataclass(frozen=True, eq=False)
class _Restricted(Around):
    """An engine whose graph has only some of the edges; the others are never live."""

    kept: Bool[ndarray, "readers writers"]

    @cached_property
    def graph(self) -> Graph:
        return replace(self.engine.graph, visible=self.kept)

    def activations(self, mask: Float[ndarray, "readers writers"] | None = None, *, source: WriterValues | None = None) -> WriterValues:
        return self.engine.activations(self.kept.astype(np.float32) if mask is None else self._within(mask), source=source)

    def evaluate(
        self, masks: Float[ndarray, "lanes readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "lanes prompts"]:
        return self.engine.evaluate(self._within(masks, lanes=1), source=source)

    def gradient(
        self,
        mask: Float[ndarray, "readers writers"],
        *,
        source: WriterValues | None = None,
        mix: float | Sequence[float] = 1.0,
        rule: Rule = EXACT,
    ) -> Float[ndarray, "prompts readers writers"]:
        return self._within(self.engine.gradient(self._within(mask), source=source, mix=mix, rule=rule), lanes=1)

    def source_gradient(
        self, mask: Float[ndarray, "readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "prompts writers d_model"]:
        return self.engine.source_gradient(self._within(mask), source=source)

    def reversed(self) -> Engine:
        raise CircuitGraphError("a screened graph cannot be asked in reverse: what was screened out would be clean; use noising")

    def _within(self, values: Float[ndarray, ...], *, lanes: int = 0) -> Float[ndarray, ...]:
        """The values at kept edges, 0 elsewhere; with or without a last axis of spans."""
        values = np.asarray(values)
        within: Float[ndarray, ...] = values * (self.kept if values.ndim == 2 + lanes else self.kept[..., None])
        return within


def _in_full(outcome: Outcome, graph: Graph, kept: Bool[ndarray, "readers writers"]) -> Outcome:
    """An outcome on the kept edges as one on the whole graph: what nobody asked about has no score."""
    split = None if outcome.graph is None else graph.by_span(outcome.graph.spans)
    is_open = (graph if split is None else split).visible
    was_asked = kept if outcome.graph is None else outcome.graph.visible

    def spread(scores: Any, dtype: type) -> Any:
        return None if scores is None else np.where(is_open & ~was_asked, np.nan, scores).astype(dtype)

    return replace(
        outcome,
        mask=np.asarray(outcome.mask, dtype=bool) & was_asked,
        scores=spread(outcome.scores, np.float64),
        prompt_scores=spread(outcome.prompt_scores, np.float32),
        graph=split,
    )
