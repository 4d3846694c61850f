"""`Graph.refine`: a component replaced by its parts, as rows and columns; circuits on whole components and on parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitgraph import Circuit, CircuitGraphError, Graph, UnknownNameError, Writer
from circuitgraph._graph import Layer, Parts, transformer_graph
from circuitgraph._names import Component, Reader
from circuitgraph.features import divided, merged
from circuitgraph.testing import strategies

PARTS = st.builds(
    Parts,
    st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True).map(tuple),
    kind=st.sampled_from(["feature", "neuron"]),
    has_skip=st.booleans(),
)


def layers(n: int = 2, *, parallel: bool = False) -> Graph:
    return transformer_graph([Layer(n_heads=2, n_kv_heads=1, is_parallel=parallel)] * n)


@st.composite
def refined_graphs(draw: st.DrawFn, kinds: str = "amr") -> tuple[Graph, Graph]:
    """A graph, and the same with some of its components in parts."""
    graph = refined = draw(strategies.graphs(max_layers=2, max_heads=2))
    there = {f"{'a' if w.kind == 'head' else 'm'}{w.layer}" for w in graph.writers if w.kind in ("head", "mlp")}
    n_layers = 1 + max(w.layer for w in graph.writers)
    there |= {f"r{layer}" for layer in range(n_layers + 1)}
    able = sorted(name for name in there if name[0] in kinds)
    for name in sorted(draw(st.sets(st.sampled_from(able), max_size=3))) if able else []:
        parts = draw(PARTS)
        has_readers = name[0] == "m" and parts.kind == "feature" and draw(st.booleans())
        refined = refined.refine(name, Parts(parts.numbers, parts.kind, parts.has_skip, has_readers=has_readers))
    return graph, refined


@given(refined_graphs())
def test_parts_are_ordinary_writers_and_readers(both: tuple[Graph, Graph]) -> None:
    """The constructor has checked names and order. Writers are sorted, and each reader sees writers that stand together."""
    _, refined = both
    assert list(refined.writers) == sorted(refined.writers)
    assert list(refined.readers) == sorted(refined.readers)
    for row in refined.visible:
        seen = np.flatnonzero(row)
        assert len(seen) == seen[-1] + 1 - seen[0]
    assert refined.needed(refined.visible)[0].all()
    assert refined.reached(refined.visible)[1].all()


@given(refined_graphs("m"), st.data())
def test_refining_and_merging_back_is_the_identity(both: tuple[Graph, Graph], data: st.DataObject) -> None:
    graph, refined = both
    circuit = Circuit(graph, data.draw(strategies.masks(graph)))
    assert merged(divided(circuit, refined), graph) == circuit


@given(refined_graphs("am"), st.integers(0, 9))
def test_merging_keeps_the_sum_of_scores(both: tuple[Graph, Graph], seed: int) -> None:
    graph, refined = both
    scores = np.where(refined.visible, np.random.default_rng(seed).normal(size=refined.shape), 0.0)
    whole = merged(Circuit(refined, refined.visible, scores), graph)
    assert whole.scores is not None
    assert np.isclose(whole.scores.sum(), scores.sum())


@given(both=refined_graphs())
def test_a_circuit_on_parts_is_saved_and_read(both: tuple[Graph, Graph], tmp_path_factory: pytest.TempPathFactory) -> None:
    _, refined = both
    circuit = Circuit(refined, refined.visible)
    assert Circuit.load(circuit.save(tmp_path_factory.mktemp("circuit") / "circuit.json")) == circuit


def test_an_mlp_by_features_that_its_reader_feeds() -> None:
    graph = layers().refine("m0", Parts((3, 8)))
    assert [writer.name for writer in graph.writers][3:6] == ["m0.f3", "m0.f8", "m0.err"]
    assert graph.feeds[graph.reader_id("m0"), 3:6].all()
    assert graph.edge_id("m0.f3->a1.g0<k>")
    with pytest.raises(UnknownNameError, match="does not come after"):
        graph.edge_id("m0.f3->m0")


def test_a_transcoder_s_features_have_readers_of_their_own() -> None:
    graph = layers().refine("m1", Parts((3, 8), has_skip=True, has_readers=True))
    assert [edge.name for edge in graph.edges if edge.reader == Reader("feature", 1, 8)][:2] == ["input->m1.f8", "a0.h0->m1.f8"]
    own = graph.feeds[graph.reader_id("m1.f8")]
    assert [writer.name for writer, fed in zip(graph.writers, own, strict=True) if fed] == ["m1.f8"]
    rest = graph.feeds[graph.reader_id("m1")]
    assert [writer.name for writer, fed in zip(graph.writers, rest, strict=True) if fed] == ["m1.skip", "m1.err"]


def test_heads_by_features_that_all_their_readers_feed() -> None:
    graph = layers().refine("a0", Parts((5,)))
    assert [writer.name for writer in graph.writers] == ["input", "a0.f5", "a0.err", "m0", "a1.h0", "a1.h1", "m1"]
    assert graph.feeds[graph.reader_id("a0.h1<q>"), 1:3].all()
    assert graph.nodes_of(Reader("k", 0, 0, is_grouped=True)) == ("a0.f5", "a0.err")
    circuit = merged(Circuit(graph, graph.visible & (np.arange(7) == 1)), layers())
    assert {edge.writer.name for edge in circuit.edges} == {"a0.h0", "a0.h1"}  # which head of it says the feature, nobody knows


def test_a_refined_stream_hides_what_was_before() -> None:
    graph = layers().refine("r1", Parts((5,)))
    seen = {reader.name: {edge.writer.name for edge in graph.edges if edge.reader == reader} for reader in graph.readers}
    assert seen["r1"] == {"input", "a0.h0", "a0.h1", "m0"}
    assert seen["a1.h0<q>"] == {"r1.f5", "r1.err"}
    assert seen["logits"] == {"r1.f5", "r1.err", "a1.h0", "a1.h1", "m1"}
    both = graph.refine("r0", Parts((1,)))
    assert {edge.writer.name for edge in both.edges if edge.reader.name == "r1"} == {"r0.f1", "r0.err", "a0.h0", "a0.h1", "m0"}
    assert both == layers().refine("r0", Parts((1,))).refine("r1", Parts((5,)))


@pytest.mark.parametrize(
    ("component", "parts", "message"),
    [
        ("m7", Parts((1,)), "'m7'"),
        ("r3", Parts((1,)), "'r3'"),
        ("x1", Parts((1,)), "an MLP 'm3', an attention 'a3'"),
        ("m0", Parts((1, 1)), "each once"),
        ("m0", Parts((), has_error=False), "expected features"),
        ("a0", Parts((1,), has_readers=True), "a transcoder's"),
    ],
)
def test_what_cannot_be_refined_is_refused(component: str, parts: Parts, message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        layers().refine(component, parts)


def test_twice_and_by_span_are_refused() -> None:
    with pytest.raises(CircuitGraphError, match="refined already"):
        layers().refine("m0", Parts((1,))).refine("m0", Parts((2,)))
    with pytest.raises(CircuitGraphError, match="split by spans"):
        layers().by_span(["S", "END"]).refine("m0", Parts((1,)))
    assert layers().refine("m0", Parts((1,))).by_span(["S", "END"]).spans == ("S", "END")


@pytest.mark.parametrize(
    "name", ["m3.f12", "m3.n7", "m3.err", "m3.skip", "a3.f1", "r5.f2", "r5.err", "m3.f12@S2", "m3.f12.m5", "m3.f12.m5@S2"]
)
def test_names_of_parts_read_back(name: str) -> None:
    writer = Writer.parse(name)
    assert writer.name == name
    assert Writer.parse(name.upper().split("@")[0]) == Writer.parse(name.split("@")[0])
    assert writer.component == Component.parse("m5" if name.startswith("m3.f12.m5") else name.partition(".")[0])


@pytest.mark.parametrize("name", ["m5.f1.m3", "m5.f1.m5", "a3.f1.m5", "m3.n1.m5"])
def test_a_feature_writes_to_later_mlps_alone(name: str) -> None:
    with pytest.raises(UnknownNameError, match="is not the name of a writer"):
        Writer.parse(name)


@pytest.mark.parametrize("name", ["r5", "m3.f12"])
def test_names_of_readers_of_parts_read_back(name: str) -> None:
    assert Reader.parse(name).name == name


def test_merging_is_refused_for_parts_of_the_stream(tmp_path: Path) -> None:
    graph = layers()
    refined = graph.refine("r1", Parts((1,)))
    with pytest.raises(CircuitGraphError, match="parts of the stream"):
        merged(Circuit(refined, refined.visible), graph)
    other = layers(1).refine("m0", Parts((1,)))
    with pytest.raises(UnknownNameError):
        merged(Circuit(graph.refine("m1", Parts((1,))), graph.refine("m1", Parts((1,))).visible), other)
