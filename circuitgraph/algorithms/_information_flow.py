"""Information flow routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._engine import Engine, Outcome
from circuitgraph._graph import Graph

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

POSITIONS_AT_ONCE = 32  # of one prompt; bounds the memory for a long one


@dataclass(frozen=True)
class InformationFlow:
    """How close what a writer says is to all that a reader hears (Ferrando & Voita 2024, arXiv:2403.00824). No gradient, no patching.

        x_r = sum over visible writers w of live_w
        proximity[r, w] = max(0, ||x_r||_1 - ||x_r - live_w||_1)
        importance[r, w] = proximity[r, w] / sum over visible writers v of proximity[r, v]

    at every position, then the mean over positions, of the logits' input only the last, which is the one that is read; the score is the
    mean over prompts. It needs neither metric nor source and is never negative: how much of a reader's input comes from where, not what
    supports the behaviour. The scores into one reader sum to 1 (to less where no writer is near), so a fair choice among readers goes from
    the logits back, as the paper does.

    The paper walks back from the last position through every attention edge, token by token. An edge here lies at one position, and the
    attention from position to position is inside a head; so readers are weighed at all positions alike. Biases of projections belong to no
    writer and are left out of `x_r`.

    Cost: one forward pass, and `writers * positions * d_model` additions for each set of readers that hear the same.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> InformationFlow().run(engine).scores.sum(axis=1).round(9).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def run(self, engine: Engine) -> Outcome:
        values, audiences = engine.activations(), _audiences(engine.graph)
        per_prompt = np.zeros((engine.n_prompts, *engine.graph.shape))
        for importance, prompt in zip(per_prompt, range(engine.n_prompts), strict=True):
            said = np.asarray(values[prompt])
            for audience in audiences:
                shares = _shares(said[audience.hears, -1:] if audience.is_last else said[audience.hears])
                importance[np.ix_(audience.readers, audience.hears)] = shares
        return Outcome(engine.graph.visible.copy(), per_prompt.mean(axis=0), prompt_scores=per_prompt.astype(np.float32))


@dataclass(frozen=True, eq=False)
class _Audience:
    """Readers that hear the same writers at the same positions: only the last one, or all."""

    readers: Int[ndarray, " some_readers"]
    hears: Int[ndarray, " some_writers"]
    is_last: bool


def _audiences(graph: Graph) -> list[_Audience]:
    is_last = np.array([reader.kind == "logits" for reader in graph.readers])
    kinds, kind_of = np.unique(np.column_stack([graph.visible, is_last]), axis=0, return_inverse=True)
    return [_Audience(np.flatnonzero(kind_of == number), np.flatnonzero(kind[:-1]), bool(kind[-1])) for number, kind in enumerate(kinds)]


def _shares(said: Float[ndarray, "some_writers position d_model"]) -> Float[ndarray, " some_writers"]:
    """How much of the sum is owed to each, averaged over positions."""
    shares = np.zeros(len(said))
    for start in range(0, said.shape[1], POSITIONS_AT_ONCE):
        part = said[:, start : start + POSITIONS_AT_ONCE].astype(np.float64)  # a small share is a difference of large norms
        whole = part.sum(axis=0)
        near = np.maximum(0, np.abs(whole).sum(axis=-1) - np.abs(whole - part).sum(axis=-1))
        total = near.sum(axis=0)
        shares += np.divide(near, total, out=np.zeros_like(near), where=total > 0).sum(axis=1)
    mean: Float[ndarray, " some_writers"] = shares / said.shape[1]
    return mean
