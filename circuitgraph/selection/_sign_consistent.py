"""Edges whose sign does not depend on which prompts were drawn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._engine import Outcome
from circuitgraph._errors import CircuitGraphError, whole_number
from circuitgraph._graph import Graph
from circuitgraph.selection._selector import Choice, Selector, checked_scores, n_scores
from circuitgraph.selection._top import TopN

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

_AT_ONCE = 64  # resamples whose means are held in memory


@dataclass(frozen=True)
class SignConsistent:
    """Chooses among edges whose mean score keeps its sign when prompts are drawn again (after Nikankin et al. 2025, arXiv:2510.25786).

        consistent:  sign(mean over a resample of the prompts) = sign(mean over the prompts)  in at least `share` of the resamples
        then:        `then.choose`, with the scores of all other edges gone

    Resamples are drawn with replacement, from all prompts alike (templates are not kept apart). The scores of each prompt are needed:
    `Outcome.prompt_scores`, which algorithms give whose scores are means over prompts, such as eap. There may be fewer consistent edges
    than `size`; the record says how many there are. Whether edges can be dead is up to `then`; one that a path needs may be inconsistent.
    """

    share: float = 0.95
    resamples: int = 1000
    seed: int = 0
    then: Selector = field(default_factory=TopN)

    def __post_init__(self) -> None:
        if not (isinstance(self.share, Real) and not isinstance(self.share, bool) and 0.5 <= self.share <= 1):
            raise CircuitGraphError(f"sign-consistent: share is {self.share!r}; expected a number from 0.5 to 1")
        whole_number("sign-consistent: resamples", self.resamples, 1)
        whole_number("sign-consistent: seed", self.seed, 0)
        if isinstance(self.then, type) or not isinstance(self.then, Selector):
            raise CircuitGraphError(f"sign-consistent: then is {self.then!r}; expected a selector, such as TopN()")

    def choose(self, graph: Graph, outcome: Outcome, size: int) -> Choice:
        scores = checked_scores(graph, outcome, size)
        samples = self._samples(graph, outcome)
        is_consistent = np.zeros(graph.shape, dtype=bool)
        is_consistent[graph.visible] = self._agreement(samples) >= self.share
        scores = np.where(is_consistent, scores, np.nan)
        n_left = n_scores(scores)
        choice = self.then.choose(graph, replace(outcome, scores=scores), min(size, n_left))
        return Choice(choice.mask, {**choice.record, "consistent": n_left})

    def _samples(self, graph: Graph, outcome: Outcome) -> Float[ndarray, "prompts edges"]:
        if outcome.prompt_scores is None:
            raise CircuitGraphError(
                "sign-consistent: the algorithm gave no scores of single prompts (Outcome.prompt_scores) to resample; "
                "take one whose scores are means over prompts, such as eap"
            )
        samples = np.asarray(outcome.prompt_scores)
        if samples.shape[1:] != graph.shape or len(samples) < 2:
            raise CircuitGraphError(
                f"sign-consistent: prompt_scores of shape {samples.shape}; expected at least 2 prompts, "
                f"and [prompts, readers, writers] with {graph.shape} readers and writers"
            )
        return samples[:, graph.visible].astype(np.float64)

    def _agreement(self, samples: Float[ndarray, "prompts edges"]) -> Float[ndarray, " edges"]:
        """The share of resamples in which an edge's mean has the sign it has over all prompts; 0 for a mean of 0."""
        n, sign = len(samples), np.sign(samples.mean(axis=0))
        counts = np.random.default_rng(self.seed).multinomial(n, np.full(n, 1 / n), size=self.resamples)
        agreed = np.zeros(samples.shape[1])
        for start in range(0, self.resamples, _AT_ONCE):
            agreed += (np.sign(counts[start : start + _AT_ONCE] @ samples) == sign).sum(axis=0)
        return np.where(sign == 0, 0.0, agreed / self.resamples)
