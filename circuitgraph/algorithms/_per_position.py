"""Position-aware discovery: any algorithm, asked about every edge at every part of the prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from circuitgraph._around import Around
from circuitgraph._engine import (
    EXACT,
    Algorithm,
    Engine,
    Outcome,
    Rule,
    SteppedAlgorithm,
    WriterValues,
    checked_algorithm,
    checked_mask,
    last_outcome,
)
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


@dataclass(frozen=True)
class PerPosition:
    """Another algorithm on the graph whose writers are split by span (Haklay et al. 2025, arXiv:2502.04577).

        x_r[p] = const_r + sum over visible writers w of  m[r, w, span of p] * live_w[p] + (1 - m[r, w, span of p]) * source_w[p]

    An edge `a5.h1@S2->a9.h6<q>` is the edge at the positions of `S2`: a circuit of such edges says where in the prompt a head is heard,
    which one of whole edges averages over, and what helps at one position and hurts at another no longer cancels. Gradient scores (EAP) of
    an edge's spans add up to its score without spans; what patching does (activation patching, ACDC) does not.

    Tasks with slots name the spans of their prompts (`Task.describe` shows them); `PromptPairs` take `spans` and `span_names`. The circuit
    is of the split graph, and is evaluated on prompts with the same spans.

    Cost: for gradient methods that of `algorithm`. For one that tries edges or nodes one by one (activation patching, ACDC) that of
    `algorithm` times the number of spans. Raises `CircuitGraphError` for prompts without spans, and for an algorithm that looks into what
    writers say (information flow, magnitude, path patching through other parts), which an engine does not tell by span.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.algorithms import EAP
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs([[5, 6, 7]], [[5, 9, 7]], answers=[6], wrong_answers=[9], spans=[[0, 0, 1]], span_names=["BEGIN", "END"])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> by_span = PerPosition(EAP()).run(engine).scores.reshape(*engine.graph.shape, 2)
    >>> bool(abs(by_span.sum(-1) - EAP().run(engine).scores).max() < 1e-9)
    True
    """

    algorithm: Algorithm

    def __post_init__(self) -> None:
        if isinstance(checked_algorithm("per position: algorithm", self.algorithm), PerPosition):
            raise CircuitGraphError(f"per position: algorithm: {self.algorithm!r}; expected one that is not per position already")

    @property
    def default_metric(self) -> str | None:
        """That of the algorithm inside."""
        metric: str | None = getattr(self.algorithm, "default_metric", None)
        return metric

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """The outcomes of the algorithm inside, on the split graph; of one without steps its only one."""
        split = BySpan(engine)
        inside = self.algorithm
        for outcome in inside.steps(split) if isinstance(inside, SteppedAlgorithm) else [inside.run(split)]:
            yield replace(outcome, graph=split.graph)


@dataclass(frozen=True, eq=False)
class BySpan(Around):
    """An engine over the graph split by the spans of its prompts. Raises `CircuitGraphError` where they have none."""

    def __post_init__(self) -> None:
        if not self.engine.spans:
            raise CircuitGraphError(
                "per position: the prompts have no spans; take a task whose prompts have slots, "
                "or give PromptPairs their spans and span_names"
            )

    @cached_property
    def graph(self) -> Graph:
        return self.engine.graph.by_span(self.engine.spans)

    @property
    def spans(self) -> tuple[str, ...]:
        """None: they are in the graph."""
        return ()

    def activations(self, mask: Float[ndarray, "readers writers"] | None = None, *, source: WriterValues | None = None) -> WriterValues:
        """To be given back as a source, not to be looked into."""
        asked = None if mask is None else self._by_span(mask, 0)
        return _Whole(self.engine.activations(asked, source=_inside(source)))

    def source_values(self) -> WriterValues:
        return _Whole(self.engine.source_values())

    def evaluate(
        self, masks: Float[ndarray, "lanes readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "lanes prompts"]:
        return self.engine.evaluate(self._by_span(masks, 1), source=_inside(source))

    def gradient(
        self,
        mask: Float[ndarray, "readers writers"],
        *,
        source: WriterValues | None = None,
        mix: float | Sequence[float] = 1.0,
        rule: Rule = EXACT,
    ) -> Float[ndarray, "prompts readers writers"]:
        gradient = self.engine.gradient(self._by_span(mask, 0), source=_inside(source), mix=mix, rule=rule)
        return gradient.reshape(len(gradient), *self.graph.shape)

    def source_gradient(
        self, mask: Float[ndarray, "readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "prompts writers d_model"]:
        raise CircuitGraphError("per position: the source of a writer is not known by span; take an algorithm that does not fit sources")

    def reversed(self) -> BySpan:
        return BySpan(self.engine.reversed())

    def _by_span(self, masks: Float[ndarray, "*lanes readers writers"], n_axes: int) -> Float[ndarray, "*lanes readers whole spans"]:
        """The columns of a writer, which stand together, as a last axis."""
        checked = checked_mask(masks, (1,) * n_axes + self.graph.shape)
        return checked.reshape(*checked.shape[:n_axes], *self.engine.graph.shape, len(self.engine.spans))


@dataclass(frozen=True, eq=False)
class _Whole:
    """What writers say at all positions."""

    values: WriterValues

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, prompt: int) -> Float[ndarray, "writers position d_model"]:
        raise CircuitGraphError(
            "per position: what a writer says is not known by span; take an algorithm of masks and gradients only (eap, acdc)"
        )


def _inside(source: WriterValues | None) -> WriterValues | None:
    return source.values if isinstance(source, _Whole) else source
