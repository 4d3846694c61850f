"""Edge attribution patching with integrated gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from circuitgraph._engine import Engine, Outcome, last_outcome
from circuitgraph._errors import CircuitGraphError, whole_number
from circuitgraph._graph import Graph
from circuitgraph.algorithms._eap import attributed, towards_better
from circuitgraph.algorithms._quadrature import Quadrature, by_weight, knots

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

Path = Literal["inputs", "activations", "mask"]


@dataclass(frozen=True)
class EAPIG:
    """EAP with the mean of the gradient along a path from the source to the clean run (Hanna et al. 2024, arXiv:2403.17806).

        score[r, w] = s * mean over prompts of  integral over a from 0 to 1 of  dF/dm[r, w] in the run at a

    with `s` 1 for a metric where higher is better and -1 where lower is, so a positive score supports the behaviour. The gradient at one
    end misses what is saturated there; along a path it does not. The run at `a`, by `path`:

    - "inputs": the input embedding is source + a * (clean - source), all else follows; `live_w - source_w` stays that of the clean run.
    - "activations": what the writers of one depth (the heads of a layer, an MLP, the input) say is source + a * (clean - source), all else
      is the model's own, depth by depth, and it scores the edges out of these writers. So the edges out of one depth add up to what
      patching all of it does to `F`. (Hanna et al.'s code adds the gradient of every edge at each of these points, and divides by their
      number.)
    - "mask": every edge stands at `m = a` (Sundararajan et al. 2017, on `m`). All scores add up to `s * (F(1) - F(0))`; the record has
      `metric_at_ones`, `metric_at_zeros` and by how much the sum misses, `completeness_gap`.

    `quadrature`: where the `points` lie. "midpoint", the default, leaves both ends alone and has equal weights, so its points run together.
    "gauss-legendre" is exact for polynomials; a transformer may turn too sharply for a few points of it. "trapezoid" has both ends. "left"
    (k / points from k = 0) are the points of Hanna et al.'s code for inputs, "right" (from k = 1) those for activations;
    their clean-corrupted average of the gradients at the two ends is `EAPIG(points=2, quadrature="trapezoid")`.

    KL divergence works, because the points leave the clean run; a point at its end adds nothing.

    Cost, where EAP has one gradient (a forward and a backward pass): "inputs" and "mask" have `points`, the former sent together as far as
    weights are equal; "activations" has `points` for each depth, which is 2 * layers + 1. The mask's record costs two more forward passes.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> abs(EAPIG("mask", points=16, quadrature="gauss-legendre").run(engine).record["completeness_gap"]) < 1e-6
    True
    """

    path: Path = "inputs"
    points: int = 5
    quadrature: Quadrature = "midpoint"

    def __post_init__(self) -> None:
        for name, value, known in (("path", self.path, get_args(Path)), ("quadrature", self.quadrature, get_args(Quadrature))):
            if value not in known:
                raise CircuitGraphError(f"eap-ig: {name} is {value!r}; expected {' or '.join(map(repr, known))}")
        whole_number("eap-ig: points", self.points, 2 if self.quadrature == "trapezoid" else 1)

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """An outcome after every query; the last one has the scores."""
        visible = engine.graph.visible
        queries = _worth_asking(engine, _PATHS[self.path](engine.graph, self.quadrature, self.points))
        total = np.zeros((engine.n_prompts, *engine.graph.shape))
        for number, query in enumerate(queries):
            if number > 0:
                yield Outcome(visible.copy(), done=number / len(queries))
            total[:, :, query.writers] += query.weight * query.gradient(engine)
        yield attributed(engine, total, _completeness(engine, total) if self.path == "mask" else {})


@dataclass(frozen=True, eq=False)
class _Query:
    """A gradient to ask for: these writers' columns of it count, by `weight`, and their edges stand at `m = at`, all others at 1."""

    writers: Bool[ndarray, " writers"]
    weight: float
    at: float = 1.0
    mixes: tuple[float, ...] = (1.0,)

    @property
    def is_clean(self) -> bool:
        return self.at == 1 and all(mix == 1 for mix in self.mixes)

    def gradient(self, engine: Engine) -> Float[ndarray, "prompts readers chosen"]:
        mask = engine.graph.visible.astype(np.float64)
        mask[:, self.writers] *= self.at
        return np.asarray(engine.gradient(mask, mix=self.mixes))[:, :, self.writers]


def _along_inputs(graph: Graph, rule: Quadrature, n: int) -> list[_Query]:
    return [_Query(_all(graph), weight, mixes=points) for weight, points in by_weight(rule, n)]


def _along_activations(graph: Graph, rule: Quadrature, n: int) -> list[_Query]:
    depth = np.array([writer.depth for writer in graph.writers])
    queries = []
    for point, weight in zip(*knots(rule, n), strict=True):
        together = [_all(graph)] if point == 1 else [depth == d for d in np.unique(depth)]  # at 1 every depth asks for the same
        queries += [_Query(writers, float(weight), at=float(point)) for writers in together]
    return queries


def _along_mask(graph: Graph, rule: Quadrature, n: int) -> list[_Query]:
    return [_Query(_all(graph), float(weight), at=float(point)) for point, weight in zip(*knots(rule, n), strict=True)]


def _all(graph: Graph) -> Bool[ndarray, " writers"]:
    return np.ones(len(graph.writers), dtype=bool)


def _worth_asking(engine: Engine, queries: Sequence[_Query]) -> Sequence[_Query]:
    """Without those whose answer is zero by construction; an engine refuses these. All of them if there are no others: let it say why."""
    elsewhere = [query for query in queries if not query.is_clean]
    return elsewhere if engine.metric.flat_at_clean and elsewhere else queries


def _completeness(engine: Engine, total: Float[ndarray, "prompts readers writers"]) -> dict[str, Any]:
    """How far the sum of all scores is from what the model owes to all edges."""
    visible = engine.graph.visible.astype(np.float32)
    ones, zeros = np.asarray(engine.evaluate(np.stack([visible, 0 * visible])), dtype=np.float64).mean(axis=1).tolist()
    gap = towards_better(engine) * (float(total[:, engine.graph.visible].sum(axis=1).mean()) - (ones - zeros))
    return {"metric_at_ones": ones, "metric_at_zeros": zeros, "completeness_gap": gap}


_PATHS: dict[Path, Callable[[Graph, Quadrature, int], list[_Query]]] = {
    "inputs": _along_inputs,
    "activations": _along_activations,
    "mask": _along_mask,
}
