"""Several algorithms' scores as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from circuitgraph._engine import Algorithm, Engine, Outcome, checked_algorithm, last_outcome, outcomes
from circuitgraph._errors import CircuitGraphError, DegenerateError
from circuitgraph._graph import Graph

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

Combination = Literal["mean", "min", "max"]
_COMBINE: dict[str, Callable[..., Any]] = {"mean": np.mean, "min": np.min, "max": np.max}


@dataclass(frozen=True)
class Ensemble:
    """The scores of several algorithms, brought to one scale and combined (parallel ensembling: Mondorf et al. 2025, arXiv:2510.06811).

        score[r, w] = by over members of   score_i[r, w] / max |score_i|

    Each member's scores so lie from -1 to 1 with their signs kept: `min` is what every member grants an edge, `max` what at least one
    does. (The paper's code combines scores as they are, or divided by the sum over the edges into a node; members here may be in different
    units.) An edge that a member did not score has no score. Every visible edge is kept: choose with `Selected(Ensemble(...), ...)`.

    Cost: that of all members. With `mean` there are scores per prompt where all members have them. The record has each member's name,
    its `scale` max |score_i| and its own record. Raises `DegenerateError` when a member scores every edge 0.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.algorithms import EAP, ActivationPatching
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> scores = Ensemble((EAP(), ActivationPatching()), by="min").run(engine).scores
    >>> engine.graph.edges_of(scores == scores.max())[0].name
    'a0.h0->m0'
    """

    algorithms: tuple[Algorithm, ...]
    by: Combination = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "algorithms", tuple(self.algorithms))
        if not self.algorithms:
            raise CircuitGraphError("ensemble: there is no algorithm in it")
        for i, algorithm in enumerate(self.algorithms):
            checked_algorithm(f"ensemble: algorithms[{i}]", algorithm)
        if self.by not in get_args(Combination):
            raise CircuitGraphError(f"ensemble: by is {self.by!r}; expected 'mean', 'min' or 'max'")

    @property
    def default_metric(self) -> str | None:
        """That of the members, where they agree."""
        return shared_metric(self.algorithms)

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """Every member's outcomes; only the last one has the scores."""
        found = []
        for i, algorithm in enumerate(self.algorithms):
            for outcome in outcomes(algorithm, engine):
                yield Outcome(engine.graph.visible.copy(), done=0.999 * (i + outcome.done) / len(self.algorithms))
            found.append(outcome)
        yield self._combined(engine.graph, found)

    def _combined(self, graph: Graph, found: Sequence[Outcome]) -> Outcome:
        names = [type(algorithm).__name__ for algorithm in self.algorithms]
        split = found[0].graph
        if any(outcome.graph != split for outcome in found):
            raise CircuitGraphError(
                f"ensemble: {', '.join(names)} score different edges, of whole prompts and by position; expected the same"
            )
        scales = [_scale(outcome, name) for outcome, name in zip(found, names, strict=True)]
        scaled = [np.asarray(outcome.scores, dtype=np.float64) / scale for outcome, scale in zip(found, scales, strict=True)]
        members = [
            {"algorithm": name, "scale": scale, "record": dict(o.record)} for name, scale, o in zip(names, scales, found, strict=True)
        ]
        mask = (graph if split is None else split).visible.copy()
        scores = _COMBINE[self.by](scaled, axis=0)
        prompt_scores = self._prompt_scores(found, scales)
        return Outcome(mask, scores, {"members": members}, prompt_scores=prompt_scores, graph=split)

    def _prompt_scores(self, found: Sequence[Outcome], scales: Sequence[float]) -> Float[ndarray, "prompts readers writers"] | None:
        """Those of the mean, the one combination whose mean over prompts is the combination of the means."""
        if self.by != "mean" or any(outcome.prompt_scores is None for outcome in found):
            return None
        scaled = (np.asarray(outcome.prompt_scores) / np.float32(scale) for outcome, scale in zip(found, scales, strict=True))
        return np.asarray(sum(scaled) / len(found), dtype=np.float32)


def _scale(outcome: Outcome, name: str) -> float:
    if outcome.scores is None:
        raise CircuitGraphError(f"ensemble: {name} gave no scores to combine; expected an algorithm that scores edges, such as eap")
    scale = float(np.nanmax(np.abs(outcome.scores), initial=0.0))
    if scale == 0.0:
        raise DegenerateError(f"ensemble: {name} scores every edge 0, so its scores have no scale; leave it out or use another metric")
    return scale


def shared_metric(algorithms: Sequence[Algorithm]) -> str | None:
    """The default metric that all of them have, else none: then it is the task's."""
    metrics = {getattr(algorithm, "default_metric", None) for algorithm in algorithms}
    return metrics.pop() if len(metrics) == 1 else None
