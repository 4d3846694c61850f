"""A model whose circuit is known, and what every algorithm makes of it.

Each part of the stream is a room of its own: the input writes into the first, `a0.h0` reads that and writes into the second, `a1.h1` reads
that and writes into the third, the logits read the third. All other heads and all MLPs speak into a room that nobody reads, or are silent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from circuitgraph._circuit import Circuit
from circuitgraph._engine import Engine
from circuitgraph.algorithms import (
    ACDC,
    EAP,
    EAPIG,
    HISP,
    ActivationPatching,
    AlongPaths,
    AttributionPatching,
    EdgePruning,
    InformationFlow,
    PathPatching,
    RelP,
    ScreenedBy,
    Selected,
    SubnetworkProbing,
    UniformGradientSampling,
)
from circuitgraph.evaluation import Curve, Protocol, Scale, matched
from circuitgraph.selection import Greedy, IntegerProgram, SignConsistent
from circuitgraph.testing import ReferenceAttention, ReferenceLayer, ReferenceMLP, ReferenceModel, random_pairs

ROOM, VOCABULARY = 4, 9
PLANTED = ("input->a0.h0<v>", "a0.h0->a1.h1<v>", "a1.h1->logits")
LINEAR = {
    "eap": EAP(),
    "relp": RelP(),
    "eap-ig inputs": EAPIG(points=2),
    "eap-ig activations": EAPIG("activations", points=2),
    "activation patching": ActivationPatching(),
}


def from_room_to_room(source: int, target: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a head's values and of its output."""
    v, o = np.zeros((ROOM, 5 * ROOM)), np.zeros((5 * ROOM, ROOM))
    draw = np.random.default_rng(seed)
    v[:, source * ROOM : (source + 1) * ROOM] = draw.normal(size=(ROOM, ROOM))
    o[target * ROOM : (target + 1) * ROOM] = draw.normal(size=(ROOM, ROOM))
    return v, o


def layer(heads: list[tuple[int, int]], seed: int) -> ReferenceLayer:
    """Two heads from room to room, looking everywhere alike, and an MLP that speaks into the last room."""
    values = [from_room_to_room(*rooms, seed + i) for i, rooms in enumerate(heads)]
    nothing = np.zeros((2, ROOM, 5 * ROOM))
    attention = ReferenceAttention(nothing, nothing, np.stack([v for v, _ in values]), np.stack([o for _, o in values]))
    draw = np.random.default_rng(seed + 10)
    down = np.zeros((5 * ROOM, 6))
    down[4 * ROOM :] = draw.normal(size=(ROOM, 6))
    return ReferenceLayer(attention, ReferenceMLP(draw.normal(size=(6, 5 * ROOM)), down, "gelu"))


def ends(engine: Engine) -> np.ndarray:
    """`F(1)` and `F(0)`, per prompt."""
    values: np.ndarray = engine.evaluate(np.stack([np.ones(engine.graph.shape), np.zeros(engine.graph.shape)]))
    return values


def planted(metric: str = "logit_diff", prompts: int = 4) -> Engine:
    draw = np.random.default_rng(0)
    embedding, unembedding = np.zeros((VOCABULARY, 5 * ROOM)), np.zeros((VOCABULARY, 5 * ROOM))
    embedding[:, :ROOM] = draw.normal(size=(VOCABULARY, ROOM))
    unembedding[:, 2 * ROOM : 3 * ROOM] = draw.normal(size=(VOCABULARY, ROOM))
    model = ReferenceModel(embedding, (layer([(0, 1), (0, 4)], 1), layer([(4, 4), (1, 2)], 2)), unembedding)
    pairs = random_pairs(5, vocabulary=VOCABULARY, lengths=(3,) * 30)
    clean, source = ends(model.bind(pairs, "logit_diff"))
    return model.bind(pairs.select(np.flatnonzero(clean - source > 5)[:prompts]), metric)  # prompts that the model answers


def names(engine: Engine, mask: np.ndarray) -> set[str]:
    return {edge.name for edge in engine.graph.edges_of(mask)}


def found(engine: Engine, algorithm: Any) -> np.ndarray:
    scores = algorithm.run(engine).scores
    assert scores is not None
    return np.asarray(scores)


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize("group_first", [True, False])
def test_acdc_at_a_tiny_threshold_keeps_exactly_what_was_planted(metric: str, group_first: bool) -> None:
    engine = planted(metric)
    assert names(engine, ACDC(1e-9, group_first=group_first).run(engine).mask) == set(PLANTED)


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_exact_on_linear_parts_scores_the_planted_edges_and_no_others(name: str) -> None:
    """The whole effect goes along the one path, and every part of it is linear: each planted edge owes all of F(1) - F(0)."""
    engine = planted()
    scores, (clean, source) = found(engine, LINEAR[name]), ends(engine).mean(axis=1)
    for edge in engine.graph.edges:
        wanted = clean - source if edge.name in PLANTED else 0.0
        assert scores[engine.graph.edge_id(edge)] == pytest.approx(wanted, abs=1e-6), edge


def test_along_the_mask_the_planted_edges_share_the_effect_alike() -> None:
    """F is a product of three masks: the mean of its derivative in each is a third of it, exactly with two Gauss-Legendre points."""
    engine = planted()
    outcome = EAPIG("mask", points=2, quadrature="gauss-legendre").run(engine)
    scores, (clean, source) = np.asarray(outcome.scores), ends(engine).mean(axis=1)
    assert [scores[engine.graph.edge_id(name)] for name in PLANTED] == pytest.approx([(clean - source) / 3] * 3, abs=1e-6)
    assert np.abs(scores).sum() == pytest.approx(abs(clean - source), abs=1e-6)
    assert outcome.record["completeness_gap"] == pytest.approx(0, abs=1e-6)


def test_optimised_masks_find_what_was_planted() -> None:
    engine = planted("kl", prompts=1)
    assert names(engine, EdgePruning(target=3, n_steps=20).run(engine).mask) == set(PLANTED)
    scores = found(engine, UniformGradientSampling(n_steps=12))
    best = np.argsort(-scores[engine.graph.visible])[:3]
    assert {engine.graph.edges[i].name for i in best} == set(PLANTED)


def test_paths_selectors_and_screens_find_what_was_planted() -> None:
    engine = planted()
    paths = AlongPaths("input -> * -> * -> logits").run(engine).record["paths"]
    strongest = max(paths, key=lambda path: abs(paths[path]))
    assert strongest == "input -> a0.h0<v> -> a1.h1<v> -> logits"
    assert sorted(map(abs, paths.values()))[-2] < 1e-9
    for selector in (Greedy(), IntegerProgram(), SignConsistent()):
        assert names(engine, Selected(EAP(), selector, size=3).run(engine).mask) == set(PLANTED), selector
    assert names(engine, Selected(EAP(), faithfulness=0.99).run(engine).mask) == set(PLANTED)
    assert names(engine, ScreenedBy(EAP(), keep=0.2, then=ActivationPatching()).run(engine).mask) >= set(PLANTED)


NODES = {
    "activation patching": ActivationPatching(level="node"),
    "attribution patching": AttributionPatching(),
    "attribution patching, qk fix": AttributionPatching(corrections=("qk-fix",)),
}


@pytest.mark.parametrize("name", NODES)
def test_on_linear_parts_each_planted_node_owes_the_whole_effect_and_no_other_any(name: str) -> None:
    engine = planted()
    nodes, (clean, source) = NODES[name].run(engine).record["nodes"], ends(engine).mean(axis=1)
    wanted = {writer.name: 0.0 for writer in engine.graph.writers} | dict.fromkeys(("input", "a0.h0", "a1.h1"), clean - source)
    assert nodes == pytest.approx(wanted, abs=1e-6)


def test_hisp_and_probing_find_the_planted_nodes() -> None:
    importance = HISP().run(planted()).record["nodes"]  # of each layer, with a norm of 1
    assert importance == pytest.approx({name: float(name in ("input", "a0.h0", "a1.h1")) for name in importance}, abs=1e-6)
    nodes = SubnetworkProbing(n_steps=30).run(planted("kl", prompts=1)).record["nodes"]
    kept = {name for name, share in nodes.items() if share > 0.5}
    assert kept == {"input", "a0.h0", "a1.h1"}


@pytest.mark.parametrize("edge", PLANTED)
def test_path_patching_finds_the_one_sender_that_a_planted_receiver_listens_to(edge: str) -> None:
    engine = planted()
    sender, receiver = edge.split("->")
    senders, (clean, source) = PathPatching(receivers=receiver).run(engine).record["senders"], ends(engine).mean(axis=1)
    assert senders == pytest.approx({name: clean - source if name == sender else 0.0 for name in senders}, abs=1e-6)
    assert sender in senders


def test_information_flow_sees_who_speaks_and_not_what_matters() -> None:
    """`a0.h1` speaks as loudly as `a0.h0`; only the metric tells them apart."""
    engine = planted()
    scores = found(engine, InformationFlow())
    assert scores[engine.graph.edge_id("a0.h1->a1.h1<v>")] > 0


@pytest.mark.parametrize("algorithm", [EAP(), ActivationPatching()])
def test_a_perfect_ranking_has_a_perfect_curve_and_auroc(algorithm: Any) -> None:
    """From the third edge on the circuit is the model; below that nothing gets through: CMD is the first trapezoid's, AUROC is 1."""
    engine = planted()
    graph = engine.graph
    circuit = Circuit(graph, graph.visible, found(engine, algorithm))
    sizes = tuple(n / graph.n_edges for n in (2, 3, graph.n_edges))
    curve = Curve(grid=(*(size + 1e-9 for size in sizes[:2]), 1)).measure(Scale(engine, graph, Protocol("logit_diff", prompts=4)), circuit)
    assert [point.faithfulness.value for point in curve.absolute] == pytest.approx([0, 0, 1, 1], abs=1e-6)
    assert curve.cmd.value == pytest.approx((2 + 0.5) / graph.n_edges, abs=1e-6)
    truth = np.zeros(graph.shape, dtype=bool)
    for name in PLANTED:
        truth[graph.edge_id(name)] = True
    match = matched(circuit, Circuit(graph, truth))
    assert (match.edges.auroc, match.edges.recall) == (1.0, 1.0)


def test_grad_drop_leaves_a_chain_what_has_a_way_around_the_dropped_layer() -> None:
    """In a chain through both layers only the last head has one. To Kramar et al. that is the price of not cancelling."""
    engine = planted()
    nodes, (clean, source) = AttributionPatching(corrections=("grad-drop",)).run(engine).record["nodes"], ends(engine).mean(axis=1)
    assert nodes == pytest.approx({name: clean - source if name == "a1.h1" else 0.0 for name in nodes}, abs=1e-6)
