"""`Circuit`: choosing edges, the algebra of sets, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError, UnknownNameError
from circuitgraph._graph import Graph, Layer, transformer_graph
from circuitgraph._names import Reader, Writer


@st.composite
def graphs(draw: st.DrawFn, *, uniform: bool = False) -> Graph:
    """Small decoders: grouped heads, layers without MLP, parallel ones. `uniform`: what a MIB file can describe."""

    def layer() -> dict[str, Any]:
        groups, size = draw(st.integers(1, 2)), draw(st.integers(1, 3))
        is_parallel, has_mlp = draw(st.booleans()), draw(st.booleans())
        return {"n_heads": groups * size, "n_kv_heads": groups, "is_parallel": is_parallel, "has_mlp": has_mlp}

    layers = [layer()] * draw(st.integers(1, 3)) if uniform else [layer() for _ in range(draw(st.integers(1, 3)))]
    return transformer_graph([Layer(**made) for made in layers], per_head_kv=draw(st.booleans()))


def _scores(draw: st.DrawFn, graph: Graph) -> np.ndarray | None:
    if draw(st.integers(0, 4)) == 0:
        return None
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = random.normal(size=graph.shape) if draw(st.booleans()) else random.integers(-2, 3, graph.shape).astype(float)
    return np.where(random.random(graph.shape) < 0.1, np.nan, scores) if draw(st.booleans()) else scores


@st.composite
def circuits(draw: st.DrawFn, graph: Graph | None = None, *, uniform: bool = False) -> Circuit:
    graph = draw(graphs(uniform=uniform)) if graph is None else graph
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = random.random(graph.shape) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    provenance = {"task": {"name": "ioi"}, "seed": draw(st.integers(-3, 3)), "text": draw(st.text(max_size=5))}
    record = {"margins": [0.1, draw(st.floats(allow_nan=False, allow_infinity=False))]}
    confidence = random.integers(0, 11, graph.shape) / 10 if draw(st.booleans()) else None
    return Circuit(graph, mask, _scores(draw, graph), provenance, record, confidence)


def _example(**kwargs: Any) -> Circuit:
    graph = transformer_graph([Layer(4, 2), Layer(4, 2)])
    scores = np.random.default_rng(0).normal(size=graph.shape)
    return Circuit(graph, graph.visible, **{"scores": scores, **kwargs})


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_set_algebra(data: st.DataObject) -> None:
    graph = data.draw(graphs())
    a, b, c = (data.draw(circuits(graph)) for _ in range(3))

    def same(x: Circuit, y: Circuit) -> bool:
        return bool((x.mask == y.mask).all())

    assert same(a | b, b | a)
    assert same(a & b, b & a)
    assert same(a ^ b, b ^ a)
    assert same(a | (b | c), (a | b) | c)
    assert same(a & (b | c), (a & b) | (a & c))
    assert same(a ^ b, (a | b) - (a & b))
    assert same(a - b, a & (a ^ b))
    assert same((a - b) | (a & b), a)
    assert (a - a).n_edges == 0
    assert same(a | a, a)
    assert same(a & a, a)


@given(circuits())
@settings(max_examples=25, deadline=None)
def test_top_has_the_size_asked_for_and_nests(circuit: Circuit) -> None:
    if circuit.scores is None:
        with pytest.raises(CircuitGraphError, match="no scores"):
            circuit.top(1)
        return
    size = np.abs(circuit.scores)[circuit.graph.visible]
    n_scored = int((~np.isnan(size)).sum())
    before = circuit.top(0)
    for n in sorted({*range(0, n_scored, 7), n_scored}):
        chosen = circuit.top(n)
        assert chosen.n_edges == n
        assert (before.mask <= chosen.mask).all()
        before = chosen
    assert not np.isnan(circuit.scores[before.mask]).any()
    with pytest.raises(CircuitGraphError, match=f"{n_scored:,} scored edges"):
        circuit.top(n_scored + 1)


@given(circuits(), st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_threshold_is_a_top(circuit: Circuit, t: float) -> None:
    if circuit.scores is not None:
        chosen = circuit.threshold(t)
        assert (chosen.mask == circuit.top(chosen.n_edges).mask).all()
        assert (np.abs(circuit.scores[chosen.mask]) >= t).all()


@given(circuits())
@settings(max_examples=40, deadline=None)
def test_prune_dead_keeps_exactly_the_edges_on_a_path(circuit: Circuit) -> None:
    import networkx as nx

    live = circuit.prune_dead()
    assert (live.mask <= circuit.mask).all()
    assert live.prune_dead() == live
    paths = circuit.graph.to_networkx()
    paths.remove_edges_from((edge.writer, edge.reader) for edge in circuit.graph.edges_of(~circuit.mask))
    start, end = Writer("input"), Reader("logits")
    alive = (nx.descendants(paths, start) | {start}) & (nx.ancestors(paths, end) | {end})
    assert set(live.edges) == {edge for edge in circuit.edges if edge.writer in alive and edge.reader in alive}


@given(circuits())
@settings(max_examples=25, deadline=None)
def test_networkx_has_the_circuits_nodes_and_edges(circuit: Circuit) -> None:
    network = circuit.to_networkx()
    assert set(network) == set(circuit.nodes)
    assert {data["edge"] for *_, data in network.edges(data=True)} == set(circuit.edges)
    for *_, data in network.edges(data=True):
        score = np.nan if circuit.scores is None else circuit.scores[circuit.graph.edge_id(data["edge"])]
        assert np.array_equal(data.get("score", np.nan), score, equal_nan=True)


def test_heads_that_share_a_reader_are_nodes_only_if_they_write() -> None:
    graph = transformer_graph([Layer(4, 2)])
    mask = np.zeros(graph.shape, dtype=bool)
    for edge in ("input->a0.g0<k>", "a0.h1->logits"):
        mask[graph.edge_id(edge)] = True
    circuit = Circuit(graph, mask)
    assert circuit.nodes == ("input", "a0.h1", "logits")
    assert Circuit(graph, mask & (np.arange(graph.shape[1]) == 0)).nodes == ("input", "a0.h0", "a0.h1")


def test_is_kept_takes_any_spelling_and_refuses_what_is_no_edge() -> None:
    circuit = _example()
    assert circuit.is_kept("a0.h1->a1.h2<q>")
    assert circuit.is_kept("0.1 -> A1.2.q")
    assert circuit.is_kept("m0->a1.h3<k>")
    with pytest.raises(UnknownNameError, match="no edge"):
        circuit.is_kept("m1->a1.h0<q>")


def test_arrays_are_copies_and_read_only() -> None:
    graph = transformer_graph([Layer(2, 2)])
    mask, scores = np.ones(graph.shape, dtype=bool), np.ones(graph.shape, dtype=np.float32)
    circuit = Circuit(graph, mask, scores)
    mask[:] = False
    assert circuit.n_edges == graph.n_edges
    assert circuit.scores is not None
    assert circuit.scores.dtype == np.float64
    assert (circuit.scores[~graph.visible] == 0).all()
    for array in (circuit.mask, circuit.scores):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 0


def test_equality_hash_copy_and_text() -> None:
    circuit = _example(provenance={"seed": 1})
    assert circuit == copy.deepcopy(circuit) == pickle.loads(pickle.dumps(circuit))
    assert hash(circuit) == hash(copy.copy(circuit))
    assert circuit != _example(provenance={"seed": 2})
    assert circuit != _example(scores=None)
    assert circuit != "circuit"
    assert repr(circuit) == "Circuit(82 of 82 edges, 12 of 12 nodes, scored)" == str(circuit)


def test_a_changed_circuit_does_not_inherit_what_was_measured_on_the_old_one() -> None:
    measured = {"faithfulness": 0.9, "task": "ioi", "report": {"faithfulness": 0.9, "metric_clean": 3.0}, "metric_circuit": 2.9}
    circuit = _example(provenance=measured)
    assert circuit.top(circuit.n_edges) is circuit
    chosen = circuit.top(3).threshold(0.5)
    steps = [{"operation": "top", "n": 3}, {"operation": "threshold", "t": 0.5}]
    assert chosen.provenance == {"task": "ioi", "report": {"metric_clean": 3.0}, "derived": steps}
    other = _example(provenance={"task": "ioi", "seed": 5})
    step = {"operation": "-", "left": {"report": {"metric_clean": 3.0}}, "right": {"seed": 5}}
    assert (circuit - other).provenance == {"task": "ioi", "derived": [step]}
    assert (circuit - other).scores is not None
    assert (circuit - _example(scores=None)).scores is None


def test_provenance_becomes_plain_json() -> None:
    circuit = _example(provenance={"a": (1, np.float32(0.5), np.arange(2)), "b": {"x": float("nan"), "y": -np.inf}, "c": np.bool_(True)})
    assert circuit.provenance == {"a": [1, 0.5, [0, 1]], "b": {"x": None, "y": None}, "c": True}
    with pytest.raises(CircuitGraphError, match=r"provenance\['a'\]\[0\] is a set"):
        _example(provenance={"a": [{1}]})
    with pytest.raises(CircuitGraphError, match="record has the key 1"):
        _example(record={1: 2})


@pytest.mark.parametrize(
    ("mask", "scores", "message"),
    [
        (np.ones((3, 3)), None, r"mask has shape \(3, 3\), expected \[readers, writers\] = \(8, 4\)"),
        (np.full((8, 4), 0.5), None, "decide which edges are kept"),
        (np.ones((8, 4)), np.ones(3), "scores are float64"),
        (np.ones((8, 4)), np.full((8, 4), "x"), "expected numbers"),
        (np.ones((8, 4)), np.full((8, 4), -np.inf), "the score of input->a0.h0<q> is -inf"),
    ],
)
def test_bad_arrays(mask: Any, scores: Any, message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        Circuit(transformer_graph([Layer(2, 2)]), mask, scores)


def test_bad_questions() -> None:
    circuit = _example()
    other = Circuit(transformer_graph([Layer(2, 2)]), np.ones((8, 4)))
    with pytest.raises(CircuitGraphError, match=r"their graphs differ: Graph\(11 writers.*Graph\(4 writers"):
        circuit | other
    with pytest.raises(TypeError):
        circuit & 3  # type: ignore[operator]
    for bad in (-1.0, float("nan")):
        with pytest.raises(CircuitGraphError, match="at least 0"):
            circuit.threshold(bad)
    for wrong in (-1, 1.5, True):
        with pytest.raises(CircuitGraphError, match=f"top: n: {wrong}; expected a whole number of at least 0"):
            circuit.top(wrong)  # type: ignore[arg-type]


def test_importing_it_is_quick() -> None:
    heavy = "{'networkx', 'pydantic', 'graphviz', 'pygraphviz', 'torch', 'safetensors'}"
    code = (
        "import sys, types; package = types.ModuleType('circuitgraph'); package.__path__ = [sys.argv[1]]; "
        f"sys.modules['circuitgraph'] = package; import circuitgraph._circuit; print({heavy} & set(sys.modules))"
    )
    import circuitgraph._circuit

    folder = circuitgraph._circuit.__file__.rsplit("/", 1)[0]
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
