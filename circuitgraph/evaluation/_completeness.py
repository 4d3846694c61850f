"""Completeness as Wang et al. 2023 define it (arXiv:2211.00593): without a set of its nodes, does the circuit do what the model does?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._errors import unknown_name, whole_number
from circuitgraph.evaluation._bootstrap import Estimate
from circuitgraph.evaluation._knockout import NodeSet, mask_of, named, parts_of, plain, roles_of, sampled_sets, some, without
from circuitgraph.evaluation._protocol import Granularity, Protocol
from circuitgraph.evaluation._scale import Scale


@dataclass(frozen=True)
class KnockOut:
    """One set `K`, and how it was found: `sampled`, `greedy` or the name of a role.

    `circuit` and `model` are the mean `F(C \\ K)` and `F(M \\ K)`. In units of `F(M) - F(0)`, `score` is the size of their difference and
    `per_prompt` the difference itself.
    """

    how: str
    nodes: tuple[str, ...]
    circuit: float
    model: float
    score: Estimate
    per_prompt: tuple[float, ...]


@dataclass(frozen=True)
class Incompleteness:
    """The sets that were tried: all sampled ones, each role, and the one where the greedy search ended."""

    sets: tuple[KnockOut, ...]
    protocol: Protocol

    @property
    def worst(self) -> KnockOut:
        return max(self.sets, key=lambda tried: tried.score.value)

    def rows(self) -> tuple[tuple[str, str], ...]:
        """The worst set of all, and each way of choosing one."""
        ways = dict.fromkeys(tried.how for tried in self.sets)
        worst = {way: max((t for t in self.sets if t.how == way), key=lambda tried: tried.score.value) for way in ways}
        overall = f"{self.worst.score} without {named(self.worst.nodes)}"
        return (
            (f"incompleteness, worst of {len(self.sets)} sets (0 is complete)", overall),
            *((f"incompleteness, {way}", f"{tried.score} without {named(tried.nodes)}") for way, tried in worst.items()),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "worst": dataclasses.asdict(self.worst),
            "sets": [dataclasses.asdict(s) for s in self.sets],
            "protocol": self.protocol.to_dict(),
        }


@dataclass(frozen=True)
class Completeness:
    """The measure: `|F(C \\ K) - F(M \\ K)|` for sets `K` of the circuit's heads and MLPs, in units of `F(M) - F(0)`.

    `X \\ K` is `X` with the nodes of `K` knocked out, patched wherever they are read; `F` is averaged over prompts first. A circuit that
    left out a backup of `K` shows it here and not in its faithfulness. Sets are `sampled` ones (each node in with probability 1/2;
    every set where there are no more than `sampled`), each of the `roles` (by default the heads and the MLPs), and that of a greedy
    search: at each of `greedy_steps`, of `width` nodes at random, the one that raises the difference most is added; the best set on the
    way counts. The search looks at the prompts it is judged on, so its interval is too narrow.

    `granularity`: of the circuit. Wang et al. knock nodes out of circuits of nodes. Cost: two forward passes per set, and
    `2 * width * greedy_steps` of the search.

    >>> from circuitgraph.testing import ReferenceModel, random_pairs
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(random_pairs(3, lengths=[3]), "logit_diff")
    >>> scale = Scale(engine, engine.graph, Protocol("logit_diff", prompts=1))
    >>> Completeness().measure(scale, Circuit(engine.graph, engine.graph.visible)).worst.score.value
    0.0
    """

    name: ClassVar[str] = "completeness"

    sampled: int = 16
    greedy_steps: int = 10
    width: int = 8
    roles: Mapping[str, Sequence[str]] | None = None
    granularity: Granularity = "edge"

    def __post_init__(self) -> None:
        whole_number("completeness: sampled", self.sampled, 1)
        whole_number("completeness: greedy_steps", self.greedy_steps, 0)
        whole_number("completeness: width", self.width, 1)
        if self.granularity not in get_args(Granularity):
            raise unknown_name("granularity", self.granularity, get_args(Granularity))

    def measure(self, scale: Scale, circuit: Circuit) -> Incompleteness:
        parts, draw = parts_of(circuit, "completeness"), np.random.default_rng(scale.seed)
        asked = _Asked(scale, circuit, self.granularity)
        found = asked.all("sampled", sampled_sets(parts, self.sampled, draw))
        for role, nodes in roles_of(circuit, self.roles).items():
            found += asked.all(role, [nodes])
        if 2 ** len(parts) > self.sampled:
            found += self._greedy(asked, parts, draw)
        return Incompleteness(tuple(found), dataclasses.replace(scale.protocol, granularity=self.granularity))

    def _greedy(self, asked: _Asked, parts: Sequence[str], draw: np.random.Generator) -> list[KnockOut]:
        here: NodeSet = frozenset()
        on_the_way: list[KnockOut] = []
        for _ in range(min(self.greedy_steps, len(parts))):
            tried = asked.all("greedy", [here | {node} for node in some(set(parts) - here, self.width, draw)])
            best = max(tried, key=lambda knock_out: knock_out.score.value)
            here = frozenset(best.nodes)
            on_the_way.append(best)
        return [max(on_the_way, key=lambda knock_out: knock_out.score.value)] if on_the_way else []


@dataclass(frozen=True, eq=False)
class _Asked:
    scale: Scale
    circuit: Circuit
    granularity: Granularity

    def all(self, how: str, sets: Sequence[NodeSet]) -> list[KnockOut]:
        graph, circuit = self.scale.graph, mask_of(self.circuit, self.granularity)
        metrics = self.scale.metrics(without(graph, mask, nodes) for mask in (circuit, graph.visible) for nodes in sets)
        inside, whole = metrics.reshape(2, len(sets), -1)
        return [self._knock_out(how, *found) for found in zip(sets, inside, whole, strict=True)]

    def _knock_out(self, how: str, nodes: NodeSet, circuit: Any, model: Any) -> KnockOut:
        difference = circuit - model
        score, per_prompt = self.scale.size(difference), tuple(plain(difference / self.scale.gap))
        return KnockOut(
            how, tuple(n for n in self.scale.graph.nodes if n in nodes), float(circuit.mean()), float(model.mean()), score, per_prompt
        )
