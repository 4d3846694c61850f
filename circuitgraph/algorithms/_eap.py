"""Edge attribution patching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._engine import Engine, Outcome

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


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
        return attributed(engine, engine.gradient(engine.graph.visible.astype(np.float32)))


def attributed(engine: Engine, gradient: Float[ndarray, "prompts readers writers"], record: Mapping[str, Any] | None = None) -> Outcome:
    """Every edge, scored by how much it supports the behaviour; `gradient` is that of the metric, per prompt."""
    visible = engine.graph.visible
    per_prompt = np.where(visible, towards_better(engine) * np.asarray(gradient), 0.0)
    scores = per_prompt.mean(axis=0, dtype=np.float64)
    return Outcome(visible.copy(), scores, record or {}, prompt_scores=per_prompt.astype(np.float32))


def towards_better(engine: Engine) -> float:
    """1 where a higher metric is better, -1 where a lower one is."""
    return 1.0 if engine.metric.higher_is_better else -1.0
