"""The published circuits: their counts are those of ACDC's authors, their nodes exist, they run on models of their shape and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from circuitgraph import Circuit, evaluate
from circuitgraph._errors import CircuitGraphError, UnknownNameError
from circuitgraph._graph import Layer, transformer_graph
from circuitgraph._published import reference_circuit, reference_circuits
from circuitgraph.testing import ReferenceModel, random_pairs

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layers": 12, "n_heads": 12, "d_model": 4, "d_head": 2, "d_mlp": 4, "norm": "layer"},
    "attn-only-4l": {"n_layers": 4, "n_heads": 8, "d_mlp": 0, "norm": "layer"},
}
# Heads and edges; edges as ACDC's authors count them, with one from each input that is read to its head (Conmy et al. 2023, appendix).
COUNTS = {"ioi": (26, 963, 1041), "greater-than": (9, 235, 262), "docstring": (6, 24, 37)}
SMALL = ReferenceModel.random(0).traced()
every_circuit = pytest.mark.parametrize("name", COUNTS)

EDGES = {
    "ioi": {
        True: ("a8.h6->a9.h9<q>", "a9.h9->logits", "input->a0.h1<k>", "a4.h11->a5.h5<k>", "m3->a9.h9<k>", "a9.h9->m9", "input->a11.h10<v>"),
        False: ("a8.h6->a9.h9<k>", "a5.h5->logits", "a9.h9->a10.h0<q>", "input->a5.h5<q>", "a0.h0->m0", "input->a9.h9<q>"),
    },
    "greater-than": {
        True: ("a0.h1->m0", "m3->a5.h5<v>", "m8->a9.h1<q>", "a9.h1->m9", "a8.h11->m8", "m11->logits", "m5->m8"),
        False: ("a0.h3->m0", "m4->a9.h1<v>", "m7->m9", "m0->logits", "input->a5.h5<q>"),
    },
    "docstring": {
        True: ("a0.h5->a1.h4<v>", "a1.h4->a3.h6<q>", "a1.h2->a3.h0<k>", "a1.h4->a2.h0<v>", "input->a3.h0<v>"),
        False: ("a1.h4->a3.h6<v>", "input->logits", "input->a3.h0<q>"),
    },
}


@every_circuit
def test_counts_are_those_of_the_papers(name: str) -> None:
    circuit = reference_circuit(name)
    n_heads, n_edges, n_in_acdc = COUNTS[name]
    assert len({node for role in circuit.record["roles"].values() for node in role if node.startswith("a")}) == n_heads
    assert sum(node.startswith("a") for node in circuit.nodes) == n_heads
    inputs_read = sum(
        bool(row.any()) for row, reader in zip(circuit.mask, circuit.graph.readers, strict=True) if reader.kind in ("q", "k", "v")
    )
    assert (circuit.n_edges, circuit.n_edges + inputs_read) == (n_edges, n_in_acdc)
    assert circuit.prune_dead().n_edges == n_edges


@every_circuit
def test_roles_name_nodes_of_the_circuit(name: str) -> None:
    circuit = reference_circuit(name)
    named = {node for role in circuit.record["roles"].values() for node in role}
    assert named | {"input", "logits"} == set(circuit.nodes)
    assert {"about", "paper", "edges_by", "model"} <= set(circuit.provenance)
    for is_kept, edges in EDGES[name].items():
        assert [circuit.is_kept(edge) for edge in edges] == [is_kept] * len(edges)


@pytest.mark.filterwarnings("ignore::circuitgraph.CircuitGraphWarning")  # random weights do no task
@pytest.mark.parametrize("name", ["ioi", "docstring"])
def test_they_run_on_models_of_their_shape(name: str, tmp_path: Path) -> None:
    """`greater-than` has the shape of `ioi`."""
    circuit = reference_circuit(name)
    model = ReferenceModel.random(1, **SHAPES[circuit.provenance["model"]["name"]]).traced()
    assert reference_circuit(name, graph=model.graph) == circuit
    report = evaluate(model, random_pairs(1, lengths=(2,)), circuit, metric="kl")
    assert (report.edges_kept, report.edges_total) == (circuit.n_edges, model.graph.n_edges)
    assert 0 < report.metric_circuit != report.metric_corrupted
    assert Circuit.load(circuit.save(tmp_path / "circuit.json")) == circuit


@pytest.mark.filterwarnings("ignore::circuitgraph.CircuitGraphWarning")
def test_another_shape_is_refused_with_both() -> None:
    shapes = r"12 layers of 12 heads, 12 MLPs and 32,491 edges.* 2 layers of 2 heads, 2 MLPs and [\d]+ edges"
    with pytest.raises(CircuitGraphError, match=f"reference circuit ioi is of gpt2, which has {shapes}"):
        reference_circuit("ioi", graph=SMALL.graph)
    with pytest.raises(CircuitGraphError, match=r"4 layers of 8 heads, 0 MLPs .* has 4 layers of 8 heads, 4 MLPs"):
        reference_circuit("docstring", graph=transformer_graph([Layer(8, 8)] * 4))
    with pytest.raises(CircuitGraphError, match=r"the circuit is of Graph\(157 writers.*, but .* is Graph\(7 writers"):
        evaluate(SMALL, random_pairs(1), reference_circuit("ioi"), metric="kl")


def test_they_have_names() -> None:
    assert list(reference_circuits()) == sorted(COUNTS)
    assert "26 heads" in reference_circuits()["ioi"]
    with pytest.raises(UnknownNameError, match="unknown reference circuit 'greaterthan'; did you mean 'greater-than'"):
        reference_circuit("greaterthan")
