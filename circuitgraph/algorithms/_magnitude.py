"""Scores by how much a writer says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._engine import Engine, Outcome

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


@dataclass(frozen=True)
class Magnitude:
    """How far what a writer says is from what would be patched in: the baseline without a question.

        score[r, w] = mean over prompts and positions of || live_w - source_w ||_2

    It is what patching would change in the stream, whoever reads it and whatever the metric: the same on every edge of a writer, never
    negative. What a gradient method finds beyond it is owed to the gradient.

    Cost: one forward pass of the clean prompts and one of the source.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> bool((Magnitude().run(engine).scores[engine.graph.visible] > 0).all())
    True
    """

    def run(self, engine: Engine) -> Outcome:
        visible = engine.graph.visible
        live, source = engine.activations(), engine.source_values()
        sizes = np.stack([_size(live[i] - source[i]) for i in range(engine.n_prompts)])
        per_prompt = np.where(visible, sizes[:, None, :], 0.0)
        return Outcome(visible.copy(), per_prompt.mean(axis=0), prompt_scores=per_prompt.astype(np.float32))


def _size(values: Float[ndarray, "writers position d_model"]) -> Float[ndarray, " writers"]:
    sizes: Float[ndarray, " writers"] = np.linalg.norm(values.astype(np.float64), axis=-1).mean(axis=-1)
    return sizes
