"""Head importance scores for pruning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuitgraph._engine import Engine, Outcome
from circuitgraph._errors import CircuitGraphError


@dataclass(frozen=True)
class HISP:
    """How much the metric of a prompt moves with a mask on a whole head or MLP (Michel et al. 2019, arXiv:1905.10650).

        importance[w] = mean over prompts of |sum over readers of dF/dm[r, w]| at m = 1
                      = mean over prompts of |sum over positions of <dF/d(what w says), live_w - source_w>|

    Without the source (`zero`) these are Michel et al.'s head importance scores, equation 3, where the sign of each prompt is lost before
    the mean. This is the version of Conmy et al. (2023, arXiv:2304.14997, their final experiments): absolute value per prompt, after the
    sum over positions; MLPs as well; corrupted values in place of zero if that is the source. They mask a head's `q`, `k` and `v` apart;
    here a head is one writer.

    `normalised`: each layer's importances are divided by their l2 norm, as both papers do; so layers cannot be told apart by size, and
    the input, alone in its layer, has importance 1.

    Cost: that of EAP. Raises `DegenerateError` for a metric whose gradient vanishes at the clean run (KL divergence) or that has none.

    A writer's importance stands on each of its outgoing edges, never below 0, and `record["nodes"]` has it by the writer's name.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> list(HISP().run(engine).record["nodes"])
    ['input', 'a0.h0', 'a0.h1', 'm0']
    """

    normalised: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.normalised, bool):
            raise CircuitGraphError(f"hisp: normalised is {self.normalised!r}; expected True or False")

    def run(self, engine: Engine) -> Outcome:
        graph = engine.graph
        gradient = np.asarray(engine.gradient(graph.visible.astype(np.float32)), dtype=np.float64)
        per_prompt = np.abs(np.where(graph.visible, gradient, 0.0).sum(axis=1))
        importance = per_prompt.mean(axis=0)
        layers = np.array([-1 if writer.kind == "input" else writer.layer for writer in graph.writers])
        norms = np.ones(len(layers))
        if self.normalised:
            for layer in np.unique(layers):
                norms[layers == layer] = np.linalg.norm(importance[layers == layer])
        norms[norms == 0] = 1.0
        importance, per_prompt = importance / norms, per_prompt / norms
        nodes = {writer.name: float(score) for writer, score in zip(graph.writers, importance, strict=True)}
        return Outcome(
            mask=graph.visible.copy(),
            scores=graph.visible * importance,
            record={"nodes": nodes},
            prompt_scores=(graph.visible * per_prompt[:, None]).astype(np.float32),
        )
