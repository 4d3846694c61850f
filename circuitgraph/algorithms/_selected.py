"""An algorithm whose circuit is chosen from another one's scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._engine import Algorithm, Engine, Outcome, checked_algorithm, last_outcome, outcomes
from circuitgraph._errors import CircuitGraphError, DegenerateError, whole_number
from circuitgraph._graph import Graph
from circuitgraph.selection import Selector, TopN
from circuitgraph.selection._selector import check_size, edges_asked, n_scores

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

_NOISE = 1e-6  # of the metric's own size: below this F(1) and F(0) are one number
_FINEST = 0.01  # of a size: a smallest one is not looked for more closely


@dataclass(frozen=True)
class Selected:
    """Runs `algorithm`, then keeps what `selector` chooses from its scores, less what lies on no path from the input to the logits.

    `size`: how many edges to choose, before dead ones are dropped: a whole number, or a share of all edges as a fraction (`1` is one edge,
    `1.0` all of them). `faithfulness`: instead, the smallest size whose circuit C, without its dead edges, reaches a target:

        (F(C) - F(0)) / (F(1) - F(0)) >= faithfulness        F averaged over prompts

    Neither: all edges that the selector would take. Faithfulness may rise and fall with size, so what "smallest" means is this: of the
    sizes 1, 2, 4, ... the first that reaches the target, and from there bisection (in `max_lanes` places at once) between the last size
    that failed and the first that did not, until they are 1% apart. A smaller size that happens to do well between two that fail is missed.

    Cost: the algorithm's; with a target, one forward pass for each size tried, some 10 to 30, and 2.

    The record is the algorithm's and, under "selection", the `size` chosen from, the number of `edges` kept, what the selector has to say,
    and with a target the `faithfulness` reached and the sizes `tried`, as [size, edges kept, faithfulness]. Raises `CircuitGraphError`
    when no size reaches the target, `DegenerateError` when F(1) and F(0) are the same.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.algorithms import EAP
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> [edge.name for edge in engine.graph.edges_of(Selected(EAP(), faithfulness=0.9).run(engine).mask)]
    ['input->a0.h1<v>', 'a0.h1->m0', 'a0.h1->logits', 'm0->logits']
    """

    algorithm: Algorithm
    selector: Selector = field(default_factory=TopN)
    size: float | None = None
    faithfulness: float | None = None
    max_lanes: int = 4

    def __post_init__(self) -> None:
        checked_algorithm("selected: algorithm", self.algorithm)
        if isinstance(self.selector, type) or not isinstance(self.selector, Selector):
            raise CircuitGraphError(f"selected: selector is {self.selector!r}; expected an instance with a choose method, such as TopN()")
        if self.size is not None and self.faithfulness is not None:
            raise CircuitGraphError("selected: size and faithfulness exclude each other; give one")
        if self.size is not None:
            check_size("selected: size", self.size)
        target = self.faithfulness
        if target is not None and not (isinstance(target, Real) and math.isfinite(target) and target > 0):
            raise CircuitGraphError(f"selected: faithfulness is {target!r}; expected a number above 0, such as 0.9")
        whole_number("selected: max_lanes", self.max_lanes, 1)

    @property
    def default_metric(self) -> str | None:
        """That of the algorithm."""
        return getattr(self.algorithm, "default_metric", None)

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """The algorithm's outcomes, then one for every stack of sizes, then the choice."""
        share = 0.99 if self.faithfulness is None else 0.5
        for outcome in outcomes(self.algorithm, engine):
            yield replace(outcome, done=share * outcome.done)
        attempts = _Attempts(engine, self.selector, outcome)
        if self.faithfulness is None:
            yield attempts.outcome_of(attempts.at(self._size(attempts)))
        else:
            yield from self._search(attempts, self.faithfulness)

    def _size(self, attempts: _Attempts) -> int:
        if self.size is None:
            return attempts.largest
        return edges_asked("selected: size", self.size, attempts.graph.n_edges)

    def _search(self, attempts: _Attempts, target: float) -> Iterator[Outcome]:
        """Up the grid to the first size that reaches the target, then between it and the last one that failed."""
        failed, reached = 0, None
        sizes = _doubling(attempts.largest)
        width = len(sizes)
        while sizes:
            batch, sizes = sizes[: self.max_lanes], sizes[self.max_lanes :]
            for attempt in attempts.tested(batch):
                if attempt.faithfulness >= target:
                    reached = attempt
                    break
                failed = attempt.size
            if reached is not None:
                sizes = _between(failed, reached.size, self.max_lanes)
            done = 0.5 + 0.5 * len(attempts.tried) / (len(attempts.tried) + width)
            yield replace(attempts.before, done=done)
        if reached is None:
            best = max(attempts.tried, key=lambda attempt: attempt.faithfulness, default=None)
            reason = f"the best is {best.faithfulness:.3g}, at size {best.size:,}" if best else "there are no scored edges"
            raise CircuitGraphError(
                f"selected: no size reaches a faithfulness of {target}; {reason}; lower the target or take other scores"
            )
        yield attempts.outcome_of(reached)


@dataclass(frozen=True, eq=False)
class _Attempt:
    """What is chosen at one size."""

    size: int
    mask: Bool[ndarray, "readers writers"]
    record: dict[str, Any]
    faithfulness: float = math.nan


@dataclass(eq=False)
class _Attempts:
    """Circuits of several sizes from one outcome, and how faithful they are."""

    engine: Engine
    selector: Selector
    before: Outcome
    tried: list[_Attempt] = field(default_factory=list)
    ends: tuple[float, float] | None = None

    @property
    def graph(self) -> Graph:
        return self.engine.graph if self.before.graph is None else self.before.graph

    @property
    def largest(self) -> int:
        """The number of scored edges."""
        return 0 if self.before.scores is None else n_scores(np.where(self.graph.visible, self.before.scores, np.nan))

    def at(self, size: int) -> _Attempt:
        choice = self.selector.choose(self.graph, self.before, size)
        return _Attempt(size, self.graph.prune_dead(choice.mask), dict(choice.record))

    def tested(self, sizes: Sequence[int]) -> list[_Attempt]:
        """What is chosen at these sizes, with its faithfulness."""
        if self.ends is None:
            self.ends = self._ends()
        clean, source = self.ends
        chosen = [self.at(size) for size in sizes]
        values = self._means(np.stack([attempt.mask for attempt in chosen]))
        tested = [replace(a, faithfulness=float(v - source) / (clean - source)) for a, v in zip(chosen, values, strict=True)]
        self.tried += tested
        return tested

    def outcome_of(self, attempt: _Attempt) -> Outcome:
        selection: dict[str, Any] = {**attempt.record, "size": attempt.size, "edges": int(attempt.mask.sum())}
        if self.tried:
            selection["faithfulness"] = attempt.faithfulness
            selection["tried"] = [[a.size, int(a.mask.sum()), a.faithfulness] for a in sorted(self.tried, key=lambda a: a.size)]
        return replace(self.before, mask=attempt.mask, record={**self.before.record, "selection": selection}, done=1.0)

    def _ends(self) -> tuple[float, float]:
        """`F(1)` and `F(0)`."""
        clean, source = map(float, self._means(np.stack([self.graph.visible, np.zeros_like(self.graph.visible)])))
        if abs(clean - source) <= _NOISE * max(1.0, abs(clean), abs(source)):
            raise DegenerateError(
                f"selected: {self.engine.metric.name} of the model {clean:.4g} and of the source run {source:.4g} cannot be told apart, "
                "so every circuit would look perfect; give a size instead, or use another corruption, source or metric"
            )
        return clean, source

    def _means(self, masks: Bool[ndarray, "lanes readers writers"]) -> Float[ndarray, " lanes"]:
        """`F`, averaged over prompts. A mask of a graph by span is given its last axis back."""
        asked = masks.astype(np.float32)
        if self.before.graph is not None:
            asked = asked.reshape(len(masks), *self.engine.graph.shape, -1)
        means: Float[ndarray, " lanes"] = np.asarray(self.engine.evaluate(asked), dtype=np.float64).mean(axis=1)
        if not np.isfinite(means).all():
            raise CircuitGraphError(f"selected: metric {self.engine.metric.name} is not finite under a circuit that was tried")
        return means


def _doubling(largest: int) -> list[int]:
    """1, 2, 4, ..., and the largest."""
    return [*(2**i for i in range(largest.bit_length()) if 2**i < largest), largest] if largest else []


def _between(failed: int, reached: int, n: int) -> list[int]:
    """Up to `n` sizes evenly between two, none when these are as near as one wants them."""
    if reached - failed <= max(1, _FINEST * reached):
        return []
    return sorted({int(size) for size in np.linspace(failed, reached, n + 2).round()[1:-1]} - {failed, reached})
