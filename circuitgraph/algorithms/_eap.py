"""Edge attribution patching."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuitgraph._engine import Engine, Outcome


@dataclass(frozen=True)
class EAP:
    """The first-order estimate of what patching each edge does, for all edges at once (Nanda 2023; Syed et al. 2023).

        score[r, w] = s * mean over prompts of dF/dm[r, w] at m = 1 = s * mean of <dF/dx_r, live_w - source_w>

    with `s` 1 for a metric where higher is better and -1 where lower is. So a positive score supports the behaviour, and the scores
    estimate those of `ActivationPatching(level="edge", direction="noising")`.

    Cost: one forward pass of the source, one forward and one backward of the clean prompts. Raises `DegenerateError` for a metric
    whose gradient vanishes at the clean run (KL divergence) or that has none (accuracy).

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> EAP().run(engine).scores.shape == engine.graph.shape
    True
    """

    def run(self, engine: Engine) -> Outcome:
        visible = engine.graph.visible
        gradient = np.asarray(engine.gradient(visible.astype(np.float32)), dtype=np.float64).mean(axis=0)
        sign = 1.0 if engine.metric.higher_is_better else -1.0
        return Outcome(mask=visible.copy(), scores=np.where(visible, sign * gradient, 0.0))
