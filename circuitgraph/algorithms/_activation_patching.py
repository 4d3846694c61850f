"""Activation patching, edge by edge or node by node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from circuitgraph._engine import Engine, Outcome, last_outcome
from circuitgraph._errors import CircuitGraphError, whole_number
from circuitgraph._graph import Graph

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

Level = Literal["edge", "node"]
Direction = Literal["noising", "denoising"]


@dataclass(frozen=True)
class ActivationPatching:
    """What patching one edge, or all edges out of one writer, does to the metric (Vig et al. 2020; Heimersheim & Nanda 2024).

        noising:    score = s * (F(1) - F(1 without it))       what the behaviour loses when it alone is patched
        denoising:  score = s * (F'(1 without it) - F'(1))     what a corrupted run gains when it alone is restored

    `F'` is the engine with clean and corrupted prompts exchanged; `s` is 1 for a metric where higher is better and -1 where lower is. So
    a positive score always supports the behaviour. Every visible edge is kept in the outcome's mask.

    At node level a writer's score stands on each of its outgoing edges, and `record["nodes"]` has it by the writer's name.

    Cost: one forward pass per edge or writer, and one more. `max_lanes` of them are sent together.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> list(ActivationPatching(level="node").run(engine).record["nodes"])
    ['input', 'a0.h0', 'a0.h1', 'm0']
    """

    level: Level = "edge"
    direction: Direction = "noising"
    max_lanes: int = 64

    def __post_init__(self) -> None:
        for name, value, known in (("level", self.level, get_args(Level)), ("direction", self.direction, get_args(Direction))):
            if value not in known:
                raise CircuitGraphError(f"activation patching: {name} is {value!r}; expected {' or '.join(map(repr, known))}")
        whole_number("activation patching: max_lanes", self.max_lanes, 1)

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """An outcome after every chunk of lanes; edges not yet tried have score 0."""
        graph = engine.graph
        patches = _patches(graph, self.level)
        scores = np.zeros(graph.shape)
        asked = engine if self.direction == "noising" else engine.reversed()
        before = _means(asked, graph.visible[None])[0]
        sign = -1.0 if (self.direction == "noising") == engine.metric.higher_is_better else 1.0
        for start in range(0, len(patches), self.max_lanes):
            chunk = patches[start : start + self.max_lanes]
            after = _means(asked, _without(graph, chunk))
            for (readers, writer), effect in zip(chunk, sign * (after - before), strict=True):
                scores[readers, writer] = effect
            done = (start + len(chunk)) / len(patches)
            yield Outcome(graph.visible.copy(), scores.copy(), self._record(graph, scores, before) if done == 1.0 else {}, done)

    def _record(self, graph: Graph, scores: Float[ndarray, "readers writers"], before: float) -> dict[str, Any]:
        record: dict[str, Any] = {"baseline": float(before)}
        if self.level == "node":
            node_scores = np.where(graph.visible, scores, -np.inf).max(axis=0)  # the same on every edge of a writer
            record["nodes"] = {w.name: float(score) for w, score in zip(graph.writers, node_scores, strict=True)}
        return record


Patch = tuple["Bool[ndarray, ' readers']", int]  # the readers whose edge from a writer is patched


def _patches(graph: Graph, level: Level) -> list[Patch]:
    if level == "node":
        return [(graph.visible[:, w], w) for w in range(len(graph.writers))]
    row = np.arange(len(graph.readers))
    return [(row == r, int(w)) for r, w in np.argwhere(graph.visible)]


def _without(graph: Graph, patches: list[Patch]) -> Float[ndarray, "lanes readers writers"]:
    """One mask per patch, with its edges at 0."""
    masks = np.repeat(graph.visible.astype(np.float32)[None], len(patches), axis=0)
    for mask, (readers, writer) in zip(masks, patches, strict=True):
        mask[readers, writer] = 0
    return masks


def _means(engine: Engine, masks: Float[ndarray, "lanes readers writers"]) -> Float[ndarray, " lanes"]:
    """`F`, averaged over prompts."""
    means: Float[ndarray, " lanes"] = np.asarray(engine.evaluate(masks.astype(np.float32)), dtype=np.float64).mean(axis=1)
    return means
