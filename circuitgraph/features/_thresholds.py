"""`thresholded`: a TopK dictionary as a JumpReLU one, for packages that have no TopK transcoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._dictionary import Dictionary
from circuitgraph._errors import CircuitGraphError
from circuitgraph._names import Component
from circuitgraph._pairs import PromptPairs
from circuitgraph._refinement import Refinement
from circuitgraph.evaluation._question import pose

if TYPE_CHECKING:
    from circuitgraph._task import Task


def thresholded(
    model: Any,
    dictionary: Dictionary,
    task: Task | PromptPairs | str | Path,
    *,
    component: str | None = None,
    prompts: int | None = None,
    seed: int = 0,
    backend: str = "torch",
) -> Dictionary:
    """A JumpReLU dictionary near a TopK one: a feature is active above the mean, over all positions of the prompts, of the least activation
    that is among the `k` largest there (as BatchTopK is used after training; Bussmann et al. 2024).

    It is another dictionary, with about `k` active features a position instead of `k`; SAELens reads it, a transcoder too
    (`save_dictionary`). `component`: by default the one it was trained on. Raises `CircuitGraphError` for one that is not TopK, or of
    which no feature is active on these prompts.
    """
    if dictionary.activation != "topk":
        raise CircuitGraphError(f"thresholded: {dictionary.name} is {dictionary.activation}; expected a topk dictionary")
    if component is None and dictionary.layer is None:
        raise CircuitGraphError(f"thresholded: {dictionary.name} does not say of which layer it is; give component")
    place = Component.parse(component or f"{dictionary.component}{dictionary.layer}")
    question = pose(model, task, prompts=prompts, seed=seed, backend=backend)
    asked = Refinement(place, dictionary, (0,))
    question.traced.graph.refine(place, asked.parts)  # raises for a component that is not there
    least = [np.where(f > 0, f, np.inf).min(axis=1) for f in map(dictionary.encode, question.traced.seen_by(asked, question.pairs))]
    of_active = np.concatenate(least)
    of_active = of_active[np.isfinite(of_active)]
    if len(of_active) == 0:
        raise CircuitGraphError(f"thresholded: no feature of {dictionary.name} is active on these prompts")
    threshold = np.full(dictionary.n_features, of_active.mean())
    return replace(dictionary, activation="jumprelu", k=None, threshold=threshold, name=f"{dictionary.name}, thresholded")
