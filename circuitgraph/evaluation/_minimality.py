"""Minimality as Wang et al. 2023 define it (arXiv:2211.00593): is there, for every node, a setting in which the circuit needs it?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._errors import unknown_name, whole_number
from circuitgraph.evaluation._bootstrap import Estimate
from circuitgraph.evaluation._knockout import NodeSet, mask_of, named, parts_of, plain, sampled_sets, some, without
from circuitgraph.evaluation._protocol import Granularity, Protocol
from circuitgraph.evaluation._scale import Scale

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

_LISTED = 3  # nodes in a printed report


@dataclass(frozen=True)
class Need:
    """How much the circuit needs a node at the most: `score` once the nodes of `beside` are gone; `per_prompt` with its sign."""

    node: str
    beside: tuple[str, ...]
    score: Estimate
    per_prompt: tuple[float, ...]


@dataclass(frozen=True)
class Needs:
    """Every node with the setting in which it is needed most, the least needed first."""

    nodes: tuple[Need, ...]
    protocol: Protocol

    def rows(self) -> tuple[tuple[str, str], ...]:
        """The nodes that are needed least."""
        return tuple((f"minimality, {need.node}", f"{need.score} without {named(need.beside)}") for need in self.nodes[:_LISTED])

    def to_dict(self) -> dict[str, Any]:
        return {"nodes": [dataclasses.asdict(need) for need in self.nodes], "protocol": self.protocol.to_dict()}


@dataclass(frozen=True)
class Minimality:
    """The measure: for each node `v` the largest `|F(C \\ (K + v)) - F(C \\ K)|` over sets `K` of the others, in units of `F(M) - F(0)`.

    Wang et al. divide by `F(M)`; that is 0 for KL divergence, and the same where the source run has no preference. A node that a backup
    replaces is needed only once the backup is gone, hence the sets: the empty one and `sampled` ones (each node in with probability
    1/2; every set where there are no more than `sampled`), then, from the best of these, a greedy search: at each of `greedy_steps`, of
    `width` nodes at random the one that raises the difference most joins `K`, until none does. A node with a low score is one that
    the circuit could do without, or one whose setting was not found: more sets can only raise a score.

    Cost: `(sampled + 1) * (nodes + 1)` forward passes, and at most `2 * width * greedy_steps * nodes` of the search.

    >>> from circuitgraph.testing import ReferenceModel, random_pairs
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(random_pairs(3, lengths=[3]), "logit_diff")
    >>> scale = Scale(engine, engine.graph, Protocol("logit_diff", prompts=1))
    >>> needs = Minimality().measure(scale, Circuit(engine.graph, engine.graph.visible))
    >>> sorted(need.node for need in needs.nodes)
    ['a0.h0', 'a0.h1', 'm0']
    """

    name: ClassVar[str] = "minimality"

    sampled: int = 8
    greedy_steps: int = 3
    width: int = 5
    granularity: Granularity = "edge"

    def __post_init__(self) -> None:
        whole_number("minimality: sampled", self.sampled, 0)
        whole_number("minimality: greedy_steps", self.greedy_steps, 0)
        whole_number("minimality: width", self.width, 1)
        if self.granularity not in get_args(Granularity):
            raise unknown_name("granularity", self.granularity, get_args(Granularity))

    def measure(self, scale: Scale, circuit: Circuit) -> Needs:
        parts, draw = parts_of(circuit, "minimality"), np.random.default_rng(scale.seed)
        search = _Search(scale, circuit, self.granularity)
        sets = dict.fromkeys([frozenset[str](), *sampled_sets(parts, self.sampled, draw)])
        search.try_toggling([*sets], parts)
        if 2 ** len(parts) > self.sampled:
            for _ in range(self.greedy_steps):
                search.try_growing({v: some(set(parts) - search.best[v][0] - {v}, self.width, draw) for v in parts})
        needs = sorted((search.need(v) for v in parts), key=lambda need: need.score.value)
        return Needs(tuple(needs), dataclasses.replace(scale.protocol, granularity=self.granularity))


class _Search:
    """The best set for each node so far, with what taking the node out does there, per prompt."""

    def __init__(self, scale: Scale, circuit: Circuit, granularity: Granularity) -> None:
        self.scale, self.mask = scale, mask_of(circuit, granularity)
        self.best: dict[str, tuple[NodeSet, Float[ndarray, " prompts"]]] = {}
        self.settled: set[str] = set()

    def try_toggling(self, sets: Sequence[NodeSet], parts: Sequence[str]) -> None:
        """Each set with each node put in or taken out: one run serves as `K` for the nodes outside it and as `K + v` for those inside."""
        metrics = self._metrics([nodes ^ toggled for nodes in sets for toggled in (frozenset[str](), *(frozenset({v}) for v in parts))])
        for nodes, (base, *toggled) in zip(sets, metrics.reshape(len(sets), len(parts) + 1, -1), strict=True):
            for v, other in zip(parts, toggled, strict=True):
                self._offer(v, nodes - {v}, base - other if v in nodes else other - base)

    def try_growing(self, candidates: dict[str, list[str]]) -> None:
        """For each node, its best set with one more; a node for which none is better is settled."""
        trials = [(v, self.best[v][0] | {u}) for v, others in candidates.items() if v not in self.settled for u in others]
        metrics = self._metrics([with_v for v, beside in trials for with_v in (beside, beside | {v})])
        metrics = metrics.reshape(len(trials), 2, self.scale.engine.n_prompts)
        grown = {v for (v, beside), (base, other) in zip(trials, metrics, strict=True) if self._offer(v, beside, other - base)}
        self.settled |= set(candidates) - grown

    def need(self, v: str) -> Need:
        beside, difference = self.best[v]
        per_prompt = tuple(plain(difference / self.scale.gap))
        return Need(v, tuple(n for n in self.scale.graph.nodes if n in beside), self.scale.size(difference), per_prompt)

    def _metrics(self, sets: Sequence[NodeSet]) -> Float[ndarray, "sets prompts"]:
        return self.scale.metrics(without(self.scale.graph, self.mask, nodes) for nodes in sets)

    def _offer(self, v: str, beside: NodeSet, difference: Float[ndarray, " prompts"]) -> bool:
        """Whether this set is better than the best so far."""
        is_better = v not in self.best or abs(difference.mean()) > abs(self.best[v][1].mean())
        if is_better:
            self.best[v] = (beside, difference)
        return bool(is_better)
