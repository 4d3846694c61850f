"""Random scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuitgraph._engine import Engine, Outcome
from circuitgraph._errors import whole_number


@dataclass(frozen=True)
class Random:
    """A uniform random score between 0 and 1 for every edge: the baseline that any method has to beat.

    The same for the same graph and seed, whatever the model, the prompts and the metric. Cost: nothing.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> bool((Random(seed=1).run(engine).scores == Random(seed=1).run(engine).scores).all())
    True
    """

    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("random: seed", self.seed, 0)

    def run(self, engine: Engine) -> Outcome:
        visible = engine.graph.visible
        return Outcome(visible.copy(), np.where(visible, np.random.default_rng(self.seed).random(visible.shape), 0.0))
