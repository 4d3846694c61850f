"""Automatic circuit discovery."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np

from circuitgraph._engine import Engine, Outcome, last_outcome
from circuitgraph._errors import CircuitGraphError, whole_number
from circuitgraph._graph import Graph
from circuitgraph.algorithms._acdc_order import HeadOrder, Places, Trial, places, receivers, senders, shuffled, single_edges, whole_inputs

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray


@dataclass(frozen=True)
class ACDC:
    """Greedy removal of edges from the output backwards (Conmy et al. 2023, arXiv:2304.14997, algorithm 1 as its code runs it).

        for each reader, from the logits back; for each writer it sees, the latest first:
            remove the edge if  loss(without it) - loss(now) < threshold

    `loss` is the mean metric, negated where higher is better. The comparison is strict and signed: what improves the metric always goes.
    With the logit difference the metric can so run away from the model's; the paper's choice is KL divergence.

    `group_first`: before the edges of a layer's heads, each head's whole `v`, `k` and `q` input is tried at once, as the paper's code
    does (auto-circuit does not). `head_order`: of writers of one layer; "descending" is the default of the paper's command line,
    "ascending" that of its class. Readers' heads are always descending. `order_seed` shuffles the heads of writers and readers alike
    instead, to see how much of a circuit is owed to the order. A reader that feeds no needed writer loses its edges unasked.

    Cost: one run per edge that is tried, of what an engine must recompute for it. Up to `max_lanes` of them are sent together: a batch
    bets that its trials go as the last one did, and what follows a lost bet is tried again, so the decisions do not depend on `max_lanes`.

    Scores are `loss(without it) - loss(then)` of the edges tried one by one, positive where the edge supports the behaviour; else 0. The
    record has `decisions` (name, delta, margin = threshold - delta, whether it was removed; a whole input by its reader's name), the
    `metric` after each, the `order`, the number of `untested` edges, and the `smallest_margin`: near 0, rounding decides.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "kl")
    >>> [edge.name for edge in engine.graph.edges_of(ACDC(threshold=0.02).run(engine).mask)]
    ['input->a0.h1<v>', 'a0.h1->m0', 'a0.h1->logits', 'm0->logits']
    """

    default_metric: ClassVar[str] = "kl"

    threshold: float
    group_first: bool = True
    head_order: HeadOrder = "descending"
    max_lanes: int = 16
    order_seed: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.threshold, Real) and math.isfinite(self.threshold) and self.threshold >= 0):
            raise CircuitGraphError(f"acdc: threshold is {self.threshold!r}; expected a number of at least 0")
        if self.head_order not in get_args(HeadOrder):
            raise CircuitGraphError(f"acdc: head_order is {self.head_order!r}; expected 'descending' or 'ascending'")
        whole_number("acdc: max_lanes", self.max_lanes, 1)
        if self.order_seed is not None:
            whole_number("acdc: order_seed", self.order_seed, 0)

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """An outcome after every batch; the last one has the scores and the record."""
        graph = engine.graph
        search = _Search(engine, self.threshold, self.max_lanes)
        readers_at, writers_at = self._places(graph)
        order, visits = senders(graph, writers_at), [*receivers(graph, readers_at)]
        for readers in visits:
            search.drop_unneeded(readers)
            if self.group_first:
                yield from search.decide(whole_inputs(graph, search.mask, readers))
            yield from search.decide(single_edges(search.mask, readers, order))
        yield Outcome(search.kept, search.scores, search.record(visits, order))

    def _places(self, graph: Graph) -> tuple[Places, Places]:
        """Of the readers' heads and of the writers'."""
        if self.order_seed is None:
            return places("descending"), places(self.head_order)
        return (shuffled(graph, self.order_seed),) * 2


@dataclass
class _Search:
    """Where the walk stands: the mask, the loss under it, and what was decided on the way."""

    engine: Engine
    threshold: float
    max_lanes: int
    mask: Float[ndarray, "readers writers"] = field(init=False)
    scores: Float[ndarray, "readers writers"] = field(init=False)
    loss: float = field(init=False)
    decisions: list[tuple[Trial, float, bool]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    untested: int = 0
    n_decided: int = 0
    lanes_run: int = 0
    lanes: int = 1  # to send next
    bet: bool = True  # that the next trials are removals

    def __post_init__(self) -> None:
        self.mask = self.graph.visible.astype(np.float32)
        self.scores = np.zeros(self.graph.shape)
        self.loss = self._losses_of(self.mask[None])[0]
        self.start = self.loss

    @property
    def graph(self) -> Graph:
        return self.engine.graph

    @property
    def kept(self) -> Bool[ndarray, "readers writers"]:
        return self.mask > 0

    def drop_unneeded(self, readers: Sequence[int]) -> None:
        """Remove, without a run, the edges into readers that feed nothing needed."""
        needed, _ = self.graph.needed(self.mask > 0)
        for r in readers:
            if not needed[r]:
                dropped = int(self.mask[r].sum())
                self.untested, self.n_decided = self.untested + dropped, self.n_decided + dropped
                self.mask[r] = 0

    def decide(self, trials: Sequence[Trial]) -> Iterator[Outcome]:
        """Settle trials in order, several to a query."""
        settled = 0
        while settled < len(trials):
            batch = trials[settled : settled + self.lanes]
            losses = self._losses_of(_bets(self.mask, batch, all_go=self.bet))
            n_valid = 0
            for trial, loss in zip(batch, losses, strict=True):
                is_removed = self._settle(trial, loss)
                n_valid += 1
                if is_removed != self.bet:
                    break
            self._adapt(n_valid, won=is_removed == self.bet)
            settled += n_valid
            yield Outcome(self.kept, done=0.999 * self.n_decided / self.graph.n_edges)

    def _settle(self, trial: Trial, loss: float) -> bool:
        """ACDC's comparison; what is removed stays removed."""
        delta = loss - self.loss
        is_removed = delta < self.threshold
        if is_removed:
            self.loss = loss
            self.mask[trial.reader, trial.writers] = 0
        if not trial.is_whole_input:
            self.scores[trial.reader, trial.writers[0]] = delta
        self.n_decided += len(trial.writers) if is_removed or not trial.is_whole_input else 0
        self.decisions.append((trial, delta, is_removed))
        self.losses.append(self.loss)
        return is_removed

    def _adapt(self, n_valid: int, won: bool) -> None:
        """A won bet is doubled, a lost one cut towards what it yielded; one lost by its first trial turns round."""
        self.lanes = min(2 * self.lanes, self.max_lanes) if won else (self.lanes + n_valid) // 2
        if not won and n_valid == 1:
            self.bet = not self.bet

    def _losses_of(self, masks: Float[ndarray, "lanes readers writers"]) -> list[float]:
        """The metric to be minimised, averaged over prompts."""
        values = np.asarray(self.engine.evaluate(masks), dtype=np.float64).mean(axis=1)
        if not np.isfinite(values).all():
            raise CircuitGraphError(f"acdc: metric {self.engine.metric.name} is not finite after {len(self.decisions)} decisions")
        self.lanes_run += len(masks)
        return [self._sign * float(value) for value in values]

    @property
    def _sign(self) -> float:
        return -1.0 if self.engine.metric.higher_is_better else 1.0

    def record(self, visits: Sequence[Sequence[int]], order: Sequence[int]) -> dict[str, Any]:
        """What the search did, in plain values."""
        graph = self.graph
        margins = [self.threshold - delta for _, delta, _ in self.decisions]
        return {
            "decisions": [
                [trial.name(graph), delta, margin, is_removed]
                for (trial, delta, is_removed), margin in zip(self.decisions, margins, strict=True)
            ],
            "metric_at_start": self._sign * self.start,
            "metric": [self._sign * loss for loss in self.losses],
            "order": {
                "readers": [graph.readers[r].name for layer in visits for r in layer],
                "writers": [graph.writers[w].name for w in order],
            },
            "untested": self.untested,
            "smallest_margin": min(map(abs, margins), default=None),
            "lanes": self.lanes_run,
        }


def _bets(mask: Float[ndarray, "readers writers"], batch: Sequence[Trial], *, all_go: bool) -> Float[ndarray, "lanes readers writers"]:
    """One mask per trial, without what it removes; and, if all are expected to go, without what those before it remove."""
    masks = np.repeat(mask[None], len(batch), axis=0)
    for lane, trial in enumerate(batch):
        affected = masks[lane:] if all_go else masks[lane : lane + 1]
        affected[:, trial.reader, trial.writers] = 0
    return masks
