"""The ACDC paper's table of Tracr models, on its inputs and counted as its code counts: for `benchmarks.tracr`.

Conmy et al. 2023 (arXiv:2304.14997) ask how well ACDC, subnetwork probing and HISP find the edges and nodes of two lists. Their graph has
besides ours an edge from each `q`, `k` and `v` to its head. Their area under a curve is pessimistic: between two points that a method
reaches it counts the lower true positive rate, so a method that jumps from few edges to all of them gets nothing for the jump.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.tracr_probing import Probe
from circuitgraph._names import Writer
from circuitgraph.algorithms import ACDC
from circuitgraph.testing import CompiledModel
from circuitgraph.testing._outputs import Ablation, OutputEngine

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

    Tokens = Int[ndarray, "prompts position"]

SWEEP = np.geomspace(1e-9, 1e1, 41)  # thresholds: from the paper's least to where no edge is left
N_SAMPLES = 200
N_PROMPTS, N_TOKENS = 50, 4  # of `frac_prevs`
LISTS = {
    "reverse": "tok->a0.h0<v> tok->m0 a0.h0->m0 tok->m1 pos->m1 m0->m1 m1->m2 m2->a3.h0<q> pos->a3.h0<k> tok->a3.h0<v> a3.h0->logits",
    "frac_prevs": "tok->m0 tok->a1.h0<q> pos->a1.h0<q> tok->a1.h0<k> pos->a1.h0<k> m0->a1.h0<v> a1.h0->logits",
}
"""For zero ablation, from the paper's code, where `frac_prevs` is called proportion."""
METHODS = ("ACDC", "subnetwork probing", "HISP")
PUBLISHED: dict[tuple[str, Ablation], tuple[tuple[float, float], ...]] = {
    ("frac_prevs", "zero"): ((1.000, 1.000), (0.561, 0.875), (0.679, 0.909)),
    ("frac_prevs", "corrupted"): ((0.600, 0.727), (0.400, 0.716), (0.679, 0.909)),
    ("reverse", "zero"): ((1.000, 1.000), (0.692, 0.947), (0.656, 0.750)),
    ("reverse", "corrupted"): ((0.200, 0.312), (0.416, 0.533), (0.656, 0.750)),
}
"""Of edges and of nodes, by method: `experiments/results/auc_tables.tex` of ArthurConmy/Automatic-Circuit-Discovery at 6894cd8."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Found:
    """Edges and nodes of the paper's graph. An edge into an MLP or a head's input has our name, the one on to the head ends in `->`."""

    edges: frozenset[str]
    nodes: frozenset[str]

    @classmethod
    def by_edges(cls, names: Iterable[str]) -> Found:
        """Some of our edges, with the edges on to the heads that they feed, and the nodes on them."""
        edges, nodes = set(names), set[str]()
        for writer, reader in (name.split("->") for name in [*edges]):
            nodes |= {writer, reader}
            if "<" in reader:
                edges.add(f"{reader}->")
                nodes |= {f"{reader}->", reader.partition("<")[0]}
        return cls(frozenset(edges), frozenset(nodes))

    def without(self, masked: Iterable[str]) -> Found:
        """What is left where these inputs of heads and MLPs are masked. As in the paper's code, an MLP is masked where it writes."""
        gone = {node for name in masked for node in ((name, f"{name}->") if "<" in name else (name,))}
        heads = {node for node in self.nodes if {f"{node}<{role}>" for role in "qkv"} <= gone}
        edges = {edge for edge in self.edges if not _touches(edge, gone, heads)}
        return Found(frozenset(edges), self.nodes - gone - heads)


def _touches(edge: str, gone: set[str], heads: set[str]) -> bool:
    writer, _, reader = edge.partition("->")
    return writer in gone | heads or ("<" in reader and reader in gone)


def published(compiled: CompiledModel, ablation: Ablation, seed: int) -> dict[str, Any]:
    """Areas under the curves of edges and of nodes, by method, beside the published ones.

    `seed`: of the prompts where they are drawn, and of the training. Of subnetwork probing, `between`: the 5th and 95th percentile of both
    areas over the samples that decide what is off after the training; `without_masked_mlps`: the areas by what it masks, see `_keeps_mlps`;
    `masked`: what that is, for each of its penalties.
    """
    asked = engine(compiled, ablation, seed)
    everything, listed = Found.by_edges(edge.name for edge in compiled.graph.edges), Found.by_edges(LISTS[compiled.name].split())
    probe = Probe(asked)
    log_alpha = probe.train(seed)
    masked = probe.masked(log_alpha, seed)
    others = [areas(_keeps_mlps(everything, probe.masked(log_alpha, seed + i)), everything, listed) for i in range(N_SAMPLES)]
    found = (_acdc(asked), _keeps_mlps(everything, masked), _ties(compiled, everything))
    return {
        "program": compiled.name,
        "ablation": ablation,
        "areas": {method: areas(circuits, everything, listed) for method, circuits in zip(METHODS, found, strict=True)},
        "between": np.percentile(others, (5, 95), axis=0).tolist(),
        "without_masked_mlps": areas((everything.without(names) for names in masked), everything, listed),
        "masked": masked,
        "published": dict(zip(METHODS, PUBLISHED[compiled.name, ablation], strict=True)),
    }


def engine(compiled: CompiledModel, ablation: Ablation, seed: int) -> OutputEngine:
    """Asks about the paper's inputs, on structural edges: no other changes anything."""
    clean, corrupted = {"reverse": _orders, "frac_prevs": _misread_letters}[compiled.name](compiled, np.random.default_rng(seed))
    return OutputEngine(compiled.model, compiled.structural_graph, clean, corrupted, ablation)


def _orders(compiled: CompiledModel, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    """The inputs of `reverse`, clean and corrupted: the alphabet in every order, each corrupted by another one, by chance."""
    clean = np.stack([compiled.tokens(order) for order in itertools.permutations(compiled.alphabet)])
    others = rng.permutation(len(clean))
    while (others == np.arange(len(clean))).any():
        others = rng.permutation(len(clean))
    return clean, clean[others]


def _misread_letters(compiled: CompiledModel, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    """The inputs of `frac_prevs`, clean and corrupted: 50 of all four letters long, in another order.

    The paper's code numbers w, x, y and z from 0. In the model's vocabulary 0 to 3 are BOS, the padding, w and x. So BOS may stand
    anywhere, which the keys hear, and need not stand in front.
    """
    every = np.array([*itertools.product(range(len(compiled.alphabet)), repeat=N_TOKENS)])
    clean = every[rng.permutation(len(every))[:N_PROMPTS]]
    return clean, clean[rng.permutation(N_PROMPTS)]


def areas(circuits: Iterable[Found], everything: Found, listed: Found) -> tuple[float, float]:
    """Under the curves of edges and of nodes, through all circuits that a method gives."""
    found = [*circuits]
    edges, nodes = (
        pessimistic_area(_rates(getattr(one, kind), getattr(everything, kind), getattr(listed, kind)) for one in found)
        for kind in ("edges", "nodes")
    )
    return edges, nodes


def pessimistic_area(points: Iterable[Point]) -> float:
    """Under the lower steps through points of false and true positive rate, and (0, 0) and (1, 1).

    >>> pessimistic_area([(0.0, 0.2)])
    0.2
    >>> pessimistic_area([(0.0, 0.2), (0.5, 1.0)])
    0.6
    """
    false, true = np.array(sorted({(0.0, 0.0), (1.0, 1.0), *points})).T
    return float(np.diff(false) @ np.maximum.accumulate(true)[:-1])


def _rates(found: frozenset[str], everything: frozenset[str], listed: frozenset[str]) -> Point:
    return len(found - listed) / len(everything - listed), len(found & listed) / len(listed)


def _acdc(asked: OutputEngine) -> Iterator[Found]:
    """One circuit a threshold."""
    for threshold in SWEEP:
        yield Found.by_edges(edge.name for edge in asked.graph.edges_of(ACDC(threshold).run(asked).mask))


def _keeps_mlps(everything: Found, masked: Iterable[Iterable[str]]) -> Iterator[Found]:
    """What subnetwork probing leaves, as it was counted for the table: an MLP that is masked stays, with all its edges.

    So say the counts in `experiments/results/plots_data`, from which the published areas follow: 19 and 23 edges in `frac_prevs` (at
    2d538e3), 37, 44 and 51 in `reverse` (at 26ef898). No set of masks with an MLP among them leaves as many, listed and others. The likely
    cause is a name: an MLP's mask was listed as `hook_resid_mid`, where the graph that is counted has `hook_mlp_in`. At 15503ac the same
    runs are counted otherwise.
    """
    for names in masked:
        yield everything.without(name for name in names if "<" in name)


def _ties(compiled: CompiledModel, everything: Found) -> Iterator[Found]:
    """HISP as it was run for the paper. It scores a node by the slope of the outputs' distance from the model's own, at the model itself:
    0 for every node. So the nodes were masked in the order in which they were listed, first layer first."""
    masked: list[str] = []
    for name in (name for writer in compiled.graph.writers if writer.kind != "input" for name in _inputs(writer)):
        masked.append(name)
        yield everything.without(masked)


def _inputs(writer: Writer) -> list[str]:
    """What is masked of it."""
    return [f"{writer.name}<{role}>" for role in "qkv"] if writer.kind == "head" else [writer.name]
