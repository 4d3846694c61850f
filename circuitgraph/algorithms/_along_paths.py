"""Path patching along given paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._engine import Engine, Outcome, last_outcome
from circuitgraph._errors import whole_number
from circuitgraph._graph import Graph
from circuitgraph.algorithms._activation_patching import Direction
from circuitgraph.algorithms._lanes import Lane, asked_of, check_runs, evaluate_lanes
from circuitgraph.algorithms._paths import Expression, Path

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray


@dataclass(frozen=True)
class AlongPaths:
    """What the behaviour owes to one path, or to each of many (Goldowsky-Dill et al. 2023, arXiv:2304.05969).

        score(path) = s * (F(1) - F(the sender's source value, told along this path only))

    The first node on the way hears the sender as it is in the source run and all others as they are in the clean run; the second hears what
    the first one then says, and all others as they are in the clean run; and so on. From the last receiver the run goes on freely.
    `direction` and `s` are those of `ActivationPatching`, whose score of an edge is that of the path of this edge alone.

    `path`: `input -> a0.h1<v> -> m2 -> a5.h3<k> -> logits`, or an expression that many fit, each of which is tried by itself: `*` is any
    node, `a*.h*<q>` any query, `a0-3.h1` one head of four layers, `m*` any MLP; a plain `a5.h3` on the way or at the end is each of that
    head's inputs in turn. More than `max_paths` are refused. `record["paths"]` has every path's score, the strongest first. The mask has
    the edges of all of them, and an edge's score is that of the strongest path through it.

    Cost: one forward pass per path, and one more. `max_lanes` of them are sent together where none goes through another's sender.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=2).bind(pairs, "logit_diff")
    >>> sorted(AlongPaths("a0.h* -> a1.h1<k> -> logits").run(engine).record["paths"])
    ['a0.h0 -> a1.h1<k> -> logits', 'a0.h1 -> a1.h1<k> -> logits']
    """

    path: str
    direction: Direction = "noising"
    max_paths: int = 4096
    max_lanes: int = 64

    def __post_init__(self) -> None:
        Expression(self.path)
        whole_number("along paths: max_paths", self.max_paths, 1)
        check_runs("along paths", self.direction, self.max_lanes)

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """An outcome after every batch of paths; edges of none that was tried have score 0."""
        graph = engine.graph
        paths = Expression(self.path).paths(graph, self.max_paths)
        asked, sign = asked_of(engine, self.direction)
        baseline = np.asarray(asked.evaluate(graph.visible[None].astype(np.float32)), dtype=np.float64)[0]
        effects: list[Float[ndarray, " prompts"]] = []
        for values in evaluate_lanes(asked, (_lane(graph, path) for path in paths), self.max_lanes):
            effects += [sign * (value - baseline) for value in values]
            if len(effects) < len(paths):
                yield Outcome(_edges(graph, paths), _strongest(graph, paths, effects).mean(axis=0), done=len(effects) / len(paths))
        prompt_scores = _strongest(graph, paths, effects)
        record = {"baseline": float(baseline.mean()), "paths": _by_strength(graph, paths, effects)}
        yield Outcome(_edges(graph, paths), prompt_scores.mean(axis=0), record, prompt_scores=prompt_scores.astype(np.float32))


def _lane(graph: Graph, path: Path) -> Lane:
    """Whoever is computed from a reader on the way is frozen for all but the next reader, siblings in a group of heads for all."""
    moved = np.isin(np.arange(len(graph.writers)), np.nonzero(graph.feeds[[r for r, _ in path.steps]])[1])
    mask = graph.visible.astype(np.float32)
    mask[:, moved] = 0
    for edge in path.edges[1:]:
        mask[edge] = 1
    mask[path.edges[0]] = 0
    return Lane(mask, path.sender, moved)


def _edges(graph: Graph, paths: Sequence[Path]) -> Bool[ndarray, "readers writers"]:
    mask = np.zeros(graph.shape, dtype=bool)
    for path in paths:
        mask[tuple(zip(*path.edges, strict=True))] = True
    return mask


def _strongest(
    graph: Graph, paths: Sequence[Path], effects: Sequence[Float[ndarray, " prompts"]]
) -> Float[ndarray, "prompts readers writers"]:
    """For each edge, the effect of the strongest path through it."""
    best = np.zeros((len(effects[0]), *graph.shape))
    for path, effect in sorted(zip(paths, effects, strict=False), key=lambda pair: abs(pair[1].mean())):  # the strongest comes last
        for r, w in path.edges:
            best[:, r, w] = effect
    return best


def _by_strength(graph: Graph, paths: Sequence[Path], effects: Sequence[Float[ndarray, " prompts"]]) -> dict[str, float]:
    scored = [(path.name(graph), float(effect.mean())) for path, effect in zip(paths, effects, strict=True)]
    return dict(sorted(scored, key=lambda pair: -abs(pair[1])))
