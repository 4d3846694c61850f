"""Attribution graphs: the numbers that are made of their weights, pruning, files, pictures, and the way there from a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import BACKENDS, every_backend, traced
from hypothesis import given
from hypothesis import strategies as st

from circuitgraph import CircuitGraphError, FileError, UnknownNameError
from circuitgraph._names import Component
from circuitgraph._refinement import Refinement
from circuitgraph.features import (
    AttributionGraph,
    AttributionNode,
    attribution_graph,
    from_neuronpedia,
    render_attribution,
    save_neuronpedia,
    to_neuronpedia,
)
from circuitgraph.testing import random_dictionary

TOKENS = (3, 5, 7, 2)


def made(seed: int = 0, *, errors: bool = True) -> AttributionGraph:
    """Two layers of two features and an error, at one position or the other, under two logits; random weights, some of them 0."""
    rng = np.random.default_rng(seed)
    features = [AttributionNode("feature", layer, index, index % 2, 1.5) for layer in range(2) for index in range(2)]
    left = [AttributionNode("error", layer, -1, position) for layer in range(2) for position in range(2)] if errors else []
    words = [AttributionNode("embedding", -1, 7 + position, position) for position in range(2)]
    ends = [AttributionNode("logit", -1, token, 1, probability=p, label=f"'{token}'") for token, p in ((4, 0.6), (9, 0.3))]
    nodes = (*features, *left, *words, *ends)
    weights = np.zeros((len(nodes), len(nodes)))
    for t, target in enumerate(nodes):
        for s, source in enumerate(nodes):
            depth = {"embedding": -1, "logit": 9}
            is_earlier = depth.get(source.kind, source.layer) < depth.get(target.kind, target.layer)
            if target.kind in ("feature", "logit") and is_earlier and source.kind != "logit":
                weights[t, s] = rng.normal() * (rng.random() < 0.8)
    return AttributionGraph(nodes, weights, ("'a'", "'b'"), {"prompt": "ab", "model": {"name": "made"}})


def by_paths(graph: AttributionGraph) -> np.ndarray:
    """Influence by walking every way down from every logit."""
    sizes = np.abs(graph.weights)
    total = np.zeros(len(graph.nodes))

    def walk(node: int, worth: float) -> None:
        for source in np.flatnonzero(sizes[node]):
            share = worth * sizes[node, source] / sizes[node].sum()
            total[source] += share
            walk(int(source), share)

    for i, node in enumerate(graph.nodes):
        if node.kind == "logit":
            assert node.probability is not None
            walk(i, node.probability)
    return total


@given(st.integers(0, 99))
def test_influence_is_the_sum_over_paths(seed: int) -> None:
    graph = made(seed)
    np.testing.assert_allclose(graph.influence, by_paths(graph), atol=1e-12)
    assert 0 <= graph.replacement_score <= 1
    assert 0 <= graph.completeness_score <= 1
    ends = [i for i, node in enumerate(graph.nodes) if node.kind in ("error", "embedding")]
    assert graph.influence[ends].sum() <= 0.9 + 1e-12  # all of it begins somewhere: less where a node hears nothing


def test_without_errors_features_explain_all() -> None:
    graph = made(1, errors=False)
    assert (graph.replacement_score, graph.completeness_score) == (1.0, pytest.approx(1.0))


@given(st.integers(0, 99), st.floats(0.1, 1), st.floats(0.1, 1))
def test_pruning_keeps_the_influential(seed: int, nodes: float, edges: float) -> None:
    graph = made(seed)
    pruned = graph.prune(nodes, edges)
    names = {node.name for node in pruned.nodes}
    assert {node.name for node in graph.nodes if node.kind in ("embedding", "logit")} <= names
    for i, node in enumerate(pruned.nodes):
        if node.kind in ("feature", "error"):
            assert pruned.weights[:, i].any()
        if node.kind == "feature":
            assert pruned.weights[i].any()
    kept = [i for i, node in enumerate(graph.nodes) if node.name in names]
    same = graph.weights[np.ix_(kept, kept)]
    assert ((pruned.weights == same) | (pruned.weights == 0)).all()
    assert len(graph.prune(1, 1).nodes) >= len(pruned.nodes)


def test_pruning_by_hand() -> None:
    """One feature carries nine tenths, another one a tenth: with 0.8 of the influence only the first stays."""
    nodes = (
        AttributionNode("feature", 0, 1, 0, 1.0),
        AttributionNode("feature", 0, 2, 0, 1.0),
        AttributionNode("embedding", -1, 5, 0),
        AttributionNode("logit", -1, 4, 0, probability=1.0),
    )
    weights = np.array([[0, 0, 2.0, 0], [0, 0, -1.0, 0], [0] * 4, [0.9, -0.1, 0, 0]])
    graph = AttributionGraph(nodes, weights, ("'a'",))
    np.testing.assert_allclose(graph.influence, [0.9, 0.1, 1.0, 0])
    assert [node.name for node in graph.prune(0.8, 1).nodes] == ["m0.f1@0", "input@0", "logit.4"]
    assert [node.name for node in graph.prune(0.99, 1).nodes] == ["m0.f1@0", "m0.f2@0", "input@0", "logit.4"]
    with pytest.raises(CircuitGraphError, match="prune: nodes is 1.5"):
        graph.prune(1.5)


IN_PARTS = tuple(Refinement(Component("m", layer), random_dictionary(layer, width=16, reads="mlp_in"), (*range(6),)) for layer in range(2))


@every_backend
def test_from_a_model(backend: str) -> None:
    """The weights into a node and the constants are what it is: with another floor only other nodes are shown."""
    model = traced(backend, "gpt2").refined(IN_PARTS)
    graph = attribution_graph(model, TOKENS, logits=3)
    run = model.linear_run(TOKENS)
    active = {(layer, position, feature) for layer in range(2) for position, feature in np.argwhere(run.features(layer) > 0)}
    found = {(node.layer, node.position, node.index) for node in graph.nodes if node.kind == "feature"}
    assert found == active
    probabilities = np.exp(run.logits - run.logits.max())
    probabilities /= probabilities.sum()
    ends = [node for node in graph.nodes if node.kind == "logit"]
    assert [node.index for node in ends] == np.argsort(-probabilities)[: len(ends)].tolist()
    assert sum(node.probability or 0 for node in ends) >= 0.95 or len(ends) == 3
    assert graph.tokens == tuple(map(str, TOKENS))
    assert not graph.weights[[node.kind in ("error", "embedding") for node in graph.nodes]].any()
    few = attribution_graph(model, TOKENS, logits=3, floor=1.0)
    assert len(few.nodes) < len(graph.nodes)
    assert 0 < graph.replacement_score < 1
    assert repr(graph).startswith(f"AttributionGraph({len(found)} features, 8 errors, 4 embeddings, {len(ends)} logit")


def test_all_backends_have_the_same_graph() -> None:
    """With all MLPs in parts or the first one, with heads in groups or alone. (PyTorch's RMS norm is in float32.)"""
    for family, refinements, tolerance in (("gpt2", IN_PARTS, 1e-10), ("llama", IN_PARTS[:1], 1e-5)):
        expected, *others = (attribution_graph(traced(each, family).refined(refinements), TOKENS, logits=3) for each in BACKENDS)
        assert {node.kind for node in expected.nodes} == {"feature", "error", "embedding", "logit"}
        for graph in others:
            assert [node.name for node in graph.nodes] == [node.name for node in expected.nodes]
            for what in ("activation", "probability"):
                got, wanted = ([getattr(node, what) or 0.0 for node in one.nodes] for one in (graph, expected))
                np.testing.assert_allclose(got, wanted, atol=tolerance)
            np.testing.assert_allclose(graph.weights, expected.weights, atol=tolerance * np.abs(expected.weights).max())


def test_two_writers_of_the_input_are_one_embedding() -> None:
    whole = traced("reference", "gpt2").model  # type: ignore[attr-defined]
    one, two = (replace(whole, splits_input=split).traced().refined(IN_PARTS) for split in (False, True))
    expected = attribution_graph(one, TOKENS).weights
    np.testing.assert_allclose(attribution_graph(two, TOKENS).weights, expected, atol=1e-12)


@every_backend
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (TOKENS, "no MLP is in parts by a transcoder; refine the model first"),
        ("a text", "has no tokenizer; give the prompt as token ids"),
        ((), "the prompt has no token"),
    ],
)
def test_what_has_no_graph_is_refused(backend: str, prompt: Any, message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        attribution_graph(traced(backend, "gpt2"), prompt)


# ---------------------------------------------------------------------------------------------------------------------------------- files


def test_the_file_has_what_the_viewers_ask_for(tmp_path: Path) -> None:
    """By the schema that Neuronpedia publishes: what is required, and of which type."""
    graph = made(2).group({"both": ["m0.f0@0", "m1.f0@0"]})
    content = json.loads(save_neuronpedia(graph, tmp_path / "my-graph.json", scan="gemma-2-2b").read_text())
    assert {"metadata", "qParams", "nodes", "links"} <= set(content)
    metadata = content["metadata"]
    assert (metadata["slug"], metadata["scan"], metadata["prompt"], metadata["prompt_tokens"]) == (
        "my-graph",
        "gemma-2-2b",
        "ab",
        ["a", "b"],
    )
    required = {"node_id": str, "feature": int, "layer": (str, int), "ctx_idx": int, "feature_type": str, "jsNodeId": str, "clerp": str}
    for node in content["nodes"]:
        assert all(isinstance(node[key], kind) for key, kind in required.items()), node
    assert {node["feature_type"] for node in content["nodes"]} == {
        "cross layer transcoder",
        "mlp reconstruction error",
        "embedding",
        "logit",
    }
    ids = [node["node_id"] for node in content["nodes"]]
    assert len(set(ids)) == len(ids) == len({node["jsNodeId"] + str(node["ctx_idx"]) for node in content["nodes"]})
    assert {"0_0_0", "1_1_1", "E_7_0", "3_4_1", "0_-1_1"} <= set(ids)
    for link in content["links"]:
        assert {link["source"], link["target"]} <= set(ids)
        assert isinstance(link["weight"], float)
    assert content["qParams"]["supernodes"] == [["both", "0_0_0", "1_0_0"]]
    assert content["qParams"]["pinnedIds"] == ["0_0_0", "1_0_0"]


@given(st.integers(0, 99))
def test_what_is_written_is_read_back(seed: int) -> None:
    graph = made(seed).group({"one": ["m0.f1@1"]}).label({"m0.f1": "plural"})
    read = from_neuronpedia(to_neuronpedia(graph, slug="x"))
    assert [node.name for node in read.nodes] == [node.name for node in graph.nodes]
    np.testing.assert_array_equal(read.weights, graph.weights)
    assert read.supernodes == graph.supernodes
    assert [node.label for node in read.nodes if node.name.startswith("m0.f1")] == ["plural"]
    np.testing.assert_allclose(read.influence, graph.influence)


def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    content = to_neuronpedia(made(), slug="x")
    for change, message in (
        ({"nodes": [{"node_id": "1_2_3"}]}, r"nodes\.0\.feature"),
        ({"links": [{"source": "0_0_0", "target": "9_9_9", "weight": 1.0}]}, "a link from 0_0_0 to 9_9_9, of which one is no node"),
        ({"metadata": {}}, "metadata.slug"),
    ):
        with pytest.raises(FileError, match=message):
            from_neuronpedia({**content, **change})
    strange = [{**content["nodes"][0], "feature_type": "lorsa"}]
    with pytest.raises(FileError, match="node '0_0_0' of type 'lorsa'"):
        from_neuronpedia({**content, "nodes": strange})
    with pytest.raises(FileError, match="there is no attribution graph"):
        from_neuronpedia(tmp_path / "none.json")


# ------------------------------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_has_its_nodes_and_groups(tmp_path: Path) -> None:
    graph = made(3).label({"m0.f1": "plural nouns"}).group({"say four": ["m1.f0@0", "m1.f1@1"]})
    picture = render_attribution(graph, tmp_path / "graph.svg").read_text()
    for text in ("plural nouns", "say four", "60.0%", "adds to", "replacement score"):
        assert text in picture
    assert "m1.f0\n" not in picture
    assert render_attribution(graph, tmp_path / "graph.png").stat().st_size > 1000


def test_a_group_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"supernode 'x': there is no node 'm0.f9@0'"):
        made().group({"x": ["m0.f9@0"]})
    with pytest.raises(CircuitGraphError, match="for 12 nodes"):
        replace(made(), weights=np.zeros((2, 2)))
