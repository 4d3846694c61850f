"""Hypothesis tests of a circuit (Shi et al. 2024, arXiv:2410.13032): equivalence, independence, minimality."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError, DegenerateError, unknown_name, whole_number
from circuitgraph._graph import Graph
from circuitgraph._names import Edge
from circuitgraph.evaluation._hsic import hsic_test
from circuitgraph.evaluation._multiplicity import Correction, adjusted
from circuitgraph.evaluation._protocol import Protocol
from circuitgraph.evaluation._scale import Scale
from circuitgraph.evaluation._sign_test import prompts_for_correlation, prompts_for_sign_test, sign_test

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

    Mask = Bool[ndarray, "readers writers"]

_TESTS = 3
_WINS, _CORRELATION = 0.9, 0.8  # what must be seen with the power asked for
_LARGEST_TOLERANCE = 0.3  # beyond it, it takes hundreds of prompts to see that winner
_WALKS = 1000  # tries to find a path that is not in the circuit


@dataclass(frozen=True)
class NullHypothesis:
    """One of the three. Each says something good of the circuit, so to reject it is bad news, and not to reject it is no proof.

    `statistic`: the share of prompts on which the circuit scores better; the criterion; the smallest p-value of an edge.
    """

    name: str
    null: str
    statistic: float
    p: float
    adjusted_p: float
    is_rejected: bool


@dataclass(frozen=True)
class Verdict:
    """The three tests, corrected together. `redundant`: edges that matter no more than random ones, with p corrected over all tested."""

    tests: tuple[NullHypothesis, ...]
    redundant: tuple[tuple[str, float], ...]
    edges_tested: int
    alpha: float
    correction: Correction
    protocol: Protocol

    def rows(self) -> tuple[tuple[str, str], ...]:
        """One line for each test."""
        redundant = f", {len(self.redundant)} of {self.edges_tested} edges"
        return tuple(
            (
                f"{test.name}, p {test.p:.3g} ({self.correction} {test.adjusted_p:.3g})",
                f"{'rejected' if test.is_rejected else 'not rejected'}: {test.null}" + (redundant if test.name == "minimality" else ""),
            )
            for test in self.tests
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class HypothesisTests:
    """The measure: three null hypotheses, each what an ideal circuit makes true.

    equivalence: on a prompt, circuit and model are equally likely to score better, up to `epsilon`. A sign test: the share of prompts on
    which the circuit does (ties half), against the binomial at `1/2 + epsilon`.

    independence: the score of the circuit's complement says nothing about the model's. A permutation test of the Hilbert-Schmidt criterion.

    minimality: removing any edge `e` changes the score more than removing a random edge does, `quantile` of the time. The change is
    `mean |F(C) - F(C - e)|`; the random edges are those of `random_edges` random paths from input to logits outside the circuit, each
    added to it before one of its edges is removed. A binomial test for each edge, of at most `max_edges` edges at random.

    p-values are corrected over the edges and then over the three tests, by `correction`. Shi et al.'s code compares the mean difference of
    scores where the paper has the share of prompts, takes one kernel width for both variables, and corrects nothing; here it is the paper's
    test, with a width for each. Refuses prompts too few to see, with `power`, a winner on 90% of them or a correlation of 0.8.

    Cost: `2 + 2 * random_edges + edges` forward passes.
    """

    name: ClassVar[str] = "tests"

    epsilon: float = 0.1
    quantile: float = 0.9
    alpha: float = 0.05
    power: float = 0.8
    correction: Correction = "holm"
    permutations: int = 1000
    random_edges: int = 100
    max_edges: int = 200

    def __post_init__(self) -> None:
        for name, low, high in (("epsilon", 0.0, _LARGEST_TOLERANCE), ("quantile", 0.0, 1.0), ("alpha", 0.0, 1.0), ("power", 0.0, 1.0)):
            value = getattr(self, name)
            if not low < value < high and not (name == "epsilon" and value == 0):
                raise CircuitGraphError(f"tests: {name} is {value!r}; expected a number between {low:g} and {high:g}")
        for name in ("permutations", "random_edges", "max_edges"):
            whole_number(f"tests: {name}", getattr(self, name), 1)
        if self.correction not in get_args(Correction):
            raise unknown_name("correction", self.correction, get_args(Correction))

    def measure(self, scale: Scale, circuit: Circuit) -> Verdict:
        self._check(scale, circuit)
        graph, draw = scale.graph, np.random.default_rng(scale.seed)
        inside, outside = scale.metrics([circuit.mask, graph.visible & ~circuit.mask])
        wins = float(np.sum(np.sign(inside - scale.model) * (1 if scale.engine.metric.higher_is_better else -1) + 1) / 2)
        n = len(inside)
        criterion, independent = hsic_test(outside, scale.model, permutations=self.permutations, seed=scale.seed)
        edges, p_edges = self._minimality(scale, circuit, draw)
        least = int(np.argmin(p_edges))
        found = (
            ("equivalence", "circuit and model are equally good", wins / n, sign_test(wins, n, self.epsilon)),
            ("independence", "the rest knows nothing of the model's score", criterion, independent),
            (
                "minimality",
                "every edge matters more than a random one",
                float(p_edges[least]),
                float(adjusted(p_edges, self.correction)[least]),
            ),
        )
        corrected = adjusted(np.array([p for *_, p in found]), self.correction)
        tests = tuple(NullHypothesis(*test, float(a), bool(a <= self.alpha)) for test, a in zip(found, corrected, strict=True))
        p_adjusted = adjusted(p_edges, self.correction)
        redundant = tuple(
            (edges[i].name, float(p_adjusted[i])) for i in np.argsort(p_adjusted, kind="stable") if p_adjusted[i] <= self.alpha
        )
        return Verdict(tests, redundant, len(edges), self.alpha, self.correction, scale.protocol)

    def _check(self, scale: Scale, circuit: Circuit) -> None:
        """Raises `CircuitGraphError` for a question that the tests cannot answer."""
        metric = scale.engine.metric
        if metric.flat_at_clean:
            raise DegenerateError(
                f"tests: {metric.name} of the model itself is the same for every prompt; use logit_diff, prob_diff or nll"
            )
        kept, least = circuit.n_edges, self.alpha / _TESTS
        if not 0 < kept < scale.graph.n_edges:
            raise CircuitGraphError(f"tests: the circuit keeps {kept} of {scale.graph.n_edges} edges; expected some of them, not all")
        needed = {
            "equivalence": prompts_for_sign_test(self.epsilon, wins=_WINS, alpha=least, power=self.power),
            "independence": prompts_for_correlation(_CORRELATION, alpha=least, power=self.power),
        }
        n = len(scale.model)
        if n < max(needed.values()):
            needs = " and ".join(f"{name} {count}" for name, count in needed.items())
            raise CircuitGraphError(
                f"tests: {n} prompts are too few: to see, with power {self.power:g}, a side that wins on {_WINS:.0%} of the prompts, or a "
                f"correlation of {_CORRELATION:g}, {needs} are needed; use prompts={max(needed.values())} or more"
            )
        tested = min(kept, self.max_edges)
        for what, have, smallest in (
            ("random_edges", self.random_edges, math.ceil(math.log(least / tested) / math.log(1 - self.quantile))),
            ("permutations", self.permutations, math.ceil(1 / least) - 1),
        ):
            if have < smallest:
                raise CircuitGraphError(f"tests: {what} is {have}, so no p-value could be small enough to reject; it takes {smallest}")

    def _minimality(self, scale: Scale, circuit: Circuit, draw: np.random.Generator) -> tuple[tuple[Edge, ...], Float[ndarray, " edges"]]:
        """The edges tested, and the p-value of each."""
        from scipy.stats import binom

        places = np.argwhere(circuit.mask)
        if len(places) > self.max_edges:
            places = places[np.sort(draw.choice(len(places), self.max_edges, replace=False))]
        inflated = [_inflated(scale.graph, circuit.mask, draw) for _ in range(self.random_edges)]
        random = np.abs(scale.metrics(m for m, _ in inflated) - scale.metrics(_less(m, edge) for m, edge in inflated)).mean(axis=1)
        own = np.abs(scale.metric(circuit.mask) - scale.metrics(_less(circuit.mask, edge) for edge in places)).mean(axis=1)
        beaten = (own[:, None] > random[None]).sum(axis=1)
        edges = tuple(Edge(scale.graph.writers[w], scale.graph.readers[r]) for r, w in places)
        return edges, np.asarray(binom.cdf(beaten, self.random_edges, self.quantile), dtype=np.float64)


def _less(mask: Mask, edge: Any) -> Mask:
    """Without one edge."""
    fewer = mask.copy()
    fewer[tuple(edge)] = False
    return fewer


def _inflated(graph: Graph, mask: Mask, draw: np.random.Generator) -> tuple[Mask, tuple[int, int]]:
    """The circuit with a random path from input to logits, and an edge of the path that was not in it."""
    for _ in range(_WALKS):
        path = _path(graph, mask, draw)
        if fresh := [edge for edge in path if not mask[edge]]:
            more = mask.copy()
            for edge in path:
                more[edge] = True
            return more, fresh[draw.integers(len(fresh))]
    raise CircuitGraphError("tests: there is no path from input to logits outside the circuit to compare its edges with")


def _path(graph: Graph, mask: Mask, draw: np.random.Generator) -> list[tuple[int, int]]:
    """A random walk from the logits back to the input, over edges that are not in the circuit where there are any."""
    r, path = len(graph.readers) - 1, []
    while True:
        outside = np.flatnonzero(graph.visible[r] & ~mask[r])
        w = int(draw.choice(outside if len(outside) else np.flatnonzero(graph.visible[r])))
        path.append((r, w))
        if graph.writers[w].kind == "input":
            return path
        r = int(draw.choice(np.flatnonzero(graph.feeds[:, w])))
