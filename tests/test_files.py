"""Files: what goes out comes back, and what is damaged is named."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_circuit import circuits

import circuitgraph.files._json as json_file
from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError, FileError
from circuitgraph._graph import Graph, Layer, transformer_graph
from circuitgraph.files import from_mib, load, save, save_mib, to_mib, write_bytes

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def circuit() -> Circuit:
    graph = transformer_graph([Layer(2, 2), Layer(2, 2)])
    random = np.random.default_rng(0)
    architecture = {"architecture": {"d_model": 8}}
    return Circuit(graph, random.random(graph.shape) < 0.5, random.normal(size=graph.shape), architecture)


@pytest.fixture
def sidecars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph is a large one."""
    monkeypatch.setattr(json_file, "INLINE_LIMIT", 0)


# Our own format


@given(circuit=circuits(), limit=st.sampled_from([0, 10_000]))
@few
def test_save_and_load_give_the_same_circuit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, circuit: Circuit, limit: int) -> None:
    monkeypatch.setattr(json_file, "INLINE_LIMIT", limit)
    path = circuit.save(tmp_path / "circuit.json")
    loaded = Circuit.load(path)
    assert loaded == circuit
    assert loaded.graph == circuit.graph
    if circuit.scores is not None:
        assert loaded.scores is not None
        assert loaded.scores.tobytes() == circuit.scores.tobytes()
    before = path.read_bytes()
    assert save(loaded, path).read_bytes() == before


def test_graphs_with_holes_come_back(tmp_path: Path) -> None:
    whole = transformer_graph([Layer(3, 3), Layer(3, 3)])
    visible = whole.visible & (np.random.default_rng(0).random(whole.shape) < 0.5)
    circuit = Circuit(Graph(whole.writers, whole.readers, visible, whole.feeds), visible)
    assert load(save(circuit, tmp_path / "c.json")) == circuit


def test_the_file_is_strict_ascii_json_that_reads_well(tmp_path: Path, circuit: Circuit) -> None:
    scores = np.where(circuit.mask, 0.1, np.nan)
    text = save(Circuit(circuit.graph, circuit.mask, scores, {"prompt": "naïve ☃"}), tmp_path / "c.json").read_text("ascii")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(text, parse_constant=refuse)
    assert list(data) == ["format", "schema", "graph", "edges", "scores", "provenance", "record"]
    assert data["schema"] == 1
    assert data["edges"] == [edge.name for edge in circuit.edges]
    assert data["graph"]["visible"][0] == [[0, 1]]
    assert data["provenance"] == {"prompt": "naïve ☃"}
    assert None in data["scores"]
    assert f' "{circuit.edges[0]}",\n' in text


def test_large_scores_lie_beside_it(tmp_path: Path, circuit: Circuit, sidecars: None) -> None:
    circuit.save(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.safetensors"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("a.json", "a.safetensors"):
        (tmp_path / name).rename(moved / name)
    assert load(moved / "a.json") == circuit
    circuit.save(moved / "a.json")  # our own scores may be replaced
    with pytest.raises(FileError, match=r"call the circuit b\.json"):
        circuit.save(tmp_path / "b.safetensors")


def test_a_model_is_not_overwritten_by_scores(tmp_path: Path, circuit: Circuit, sidecars: None) -> None:
    import safetensors.numpy

    for content in (b"weights", safetensors.numpy.save({"weight": np.zeros(2)})):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(FileError, match="which circuitgraph did not write; choose another name"):
            circuit.save(tmp_path / "model.json")
        assert (tmp_path / "model.safetensors").read_bytes() == content
        assert not (tmp_path / "model.json").exists()


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "there is no circuit file .*c.json; check the name"),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "truncated or not JSON"),
        (lambda path: path.write_bytes(b""), "truncated or not JSON"),
        (lambda path: path.write_bytes(b"\x93\xff\x00"), "is not text"),
        (lambda path: path.write_text("[1]"), "holds a list, not a circuit"),
        (lambda path: path.write_text("[" * 100_000), "truncated or not JSON"),
        (lambda path: path.write_text('{"a": 1}'), "is not a circuit file"),
        (lambda path: path.write_text('{"cfg": {}, "nodes": {}, "edges": {}}'), "from_mib"),
        (
            _edit(lambda data: data.update(schema=2, new=1)),
            "has schema 2, this version of circuitgraph knows schema 1; upgrade circuitgraph",
        ),
        (_edit(lambda data: data.update(schema=0)), "has schema 0"),
        (_edit(lambda data: data.update(extra=1)), "extra: Extra inputs are not permitted"),
        (_edit(lambda data: data.pop("edges")), "edges: Field required"),
        (_edit(lambda data: data["edges"].append("input->m7")), "unknown reader 'm7'"),
        (_edit(lambda data: data["edges"].append(data["edges"][0])), "listed twice"),
        (_edit(lambda data: data["scores"].pop()), "45 scores for 46 edges"),
        (_edit(lambda data: data["scores"].__setitem__(0, float("nan"))), "finite number"),
        (_edit(lambda data: data["graph"]["visible"].pop()), r"graph.visible has 14 rows for 15 readers"),
        (_edit(lambda data: data["graph"]["visible"][0].append([3, 99])), r"graph.visible\[0\] has the range \[3, 99\]"),
        (_edit(lambda data: data["graph"]["visible"][0].append([0, 7])), "computed from"),
        (_edit(lambda data: data["graph"]["feeds"][0].append([1])), "at least 2 items"),
        (_edit(lambda data: data.update(scores={"file": "../x.safetensors", "sha256": ""})), "String should match"),
    ],
)
def test_damaged_files(tmp_path: Path, circuit: Circuit, damage: Callable[[Path], Any], message: str) -> None:
    path = circuit.save(tmp_path / "c.json")
    damage(path)
    with pytest.raises(FileError, match=message) as raised:
        Circuit.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is not there; keep the two files together"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8] + b"12345678"), "its sha256 differs"),
    ],
)
def test_damaged_scores(tmp_path: Path, circuit: Circuit, sidecars: None, damage: Callable[[Path], Any], message: str) -> None:
    circuit.save(tmp_path / "c.json")
    damage(tmp_path / "c.safetensors")
    with pytest.raises(FileError, match=message):
        Circuit.load(tmp_path / "c.json")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, circuit: Circuit) -> None:
    path = circuit.save(tmp_path / "c.json")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FileError, match=r"cannot write .*c.json: No space left on device"):
        circuit.top(3).save(path)
    assert Circuit.load(path) == circuit
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.json"]


def test_writing_where_one_cannot(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"there is no folder .*nowhere; create it"):
        write_bytes(tmp_path / "nowhere" / "c.json", b"")
    with pytest.raises(FileError, match="it is a folder"):
        write_bytes(tmp_path, b"")
    mode = write_bytes(tmp_path / "c.json", b"").stat().st_mode
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)  # not that of a temporary file


# EAP-IG and MIB

EAP_IG = (  # as EAP-IG writes the graph of one layer with one head, up to the scores
    '{"cfg": {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": false, "d_model": 4}, '
    '"nodes": {"input": {"in_graph": true}, "a0.h0": {"in_graph": true}, "m0": {"in_graph": false}, "logits": {"in_graph": true}}, '
    '"edges": {"input->a0.h0<q>": {"score": 0.5, "in_graph": true}, "input->a0.h0<k>": {"score": -1e-09, "in_graph": false}, '
    '"input->a0.h0<v>": {"score": 0.0, "in_graph": false}, "input->m0": {"score": 3.0517578125e-05, "in_graph": true}, '
    '"a0.h0->m0": {"score": -0.0, "in_graph": false}, "input->logits": {"score": 1.0, "in_graph": false}, '
    '"a0.h0->logits": {"score": 2.5, "in_graph": true}, "m0->logits": {"score": 0.1, "in_graph": false}}}'
)


def _with_node_scores(data: dict[str, Any]) -> dict[str, Any]:
    nodes = {name: {**node, "score": 0.25} for name, node in data["nodes"].items()}
    return {**data, "nodes": {**nodes, "m0": {"in_graph": True, "score": -2.0}}}


def test_a_file_of_eap_ig_comes_out_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(EAP_IG)
    circuit = from_mib(tmp_path / "in.json")
    assert [edge.name for edge in circuit.edges] == ["input->a0.h0<q>", "input->m0", "a0.h0->logits"]
    assert save_mib(load(save(circuit, tmp_path / "ours.json")), tmp_path / "out.json").read_text() == EAP_IG


def test_what_a_file_says_of_its_nodes_is_kept_until_the_circuit_changes() -> None:
    data = _with_node_scores(json.loads(EAP_IG))
    circuit = from_mib(data)
    assert to_mib(circuit) == data
    assert to_mib(circuit.top(8))["nodes"]["m0"] == {"in_graph": True}
    assert to_mib(circuit.top(1))["nodes"]["m0"] == {"in_graph": False}


def test_older_files_and_unscored_edges() -> None:
    data = json.loads(EAP_IG)
    old = {
        "cfg": {name: data["cfg"][name] for name in ("n_layers", "n_heads", "parallel_attn_mlp")},
        "nodes": {name: node["in_graph"] for name, node in data["nodes"].items()},
        "edges": {name: {**edge, "score": None} for name, edge in data["edges"].items()},
    }
    assert from_mib(old).scores is None
    with pytest.raises(CircuitGraphError, match="pass d_model="):
        to_mib(from_mib(old))
    zero = {name: {**edge, "score": 0.0} for name, edge in data["edges"].items()}
    assert to_mib(from_mib(old), d_model=4) == {**data, "edges": zero}
    data["edges"]["input->m0"]["score"] = float("nan")
    circuit = from_mib(json.loads(json.dumps(data)))  # NaN as Python writes it
    assert circuit.scores is not None
    assert np.isnan(circuit.scores[circuit.graph.edge_id("input->m0")])
    assert to_mib(circuit)["edges"]["input->m0"]["score"] == 0.0
    json.dumps(to_mib(circuit), allow_nan=False)


@given(circuit=circuits(uniform=True))
@few
def test_mib_round_trip(circuit: Circuit) -> None:
    data = to_mib(circuit, d_model=16)
    assert len(data["edges"]) == from_mib(data).graph.n_edges
    assert to_mib(from_mib(data)) == data
    back = from_mib(data, circuit.graph)
    assert (back.mask == circuit.mask).all()
    expected = np.zeros(circuit.graph.shape) if circuit.scores is None else np.nan_to_num(circuit.scores)
    assert back.scores is not None
    assert np.allclose(back.scores, expected, rtol=1e-15, atol=0)
    assert to_mib(back, d_model=16) == data


def test_shared_readers_are_written_per_head_and_read_as_their_union() -> None:
    graph = transformer_graph([Layer(4, 2)])
    mask, scores = np.zeros(graph.shape, dtype=bool), np.zeros(graph.shape)
    place = graph.edge_id("input->a0.g1<k>")
    mask[place], scores[place] = True, 3.0
    data = to_mib(Circuit(graph, mask, scores), d_model=8)
    assert [name for name, edge in data["edges"].items() if edge["in_graph"]] == ["input->a0.h2<k>", "input->a0.h3<k>"]
    assert data["edges"]["input->a0.h2<k>"]["score"] == 1.5
    data["edges"]["input->a0.h2<k>"].update(in_graph=False, score=-1.0)
    back = from_mib(data, graph)
    assert back.is_kept("input->a0.g1<k>")
    assert back.scores is not None
    assert back.scores[place] == 0.5


def test_the_order_of_a_parallel_model() -> None:
    graph = transformer_graph([Layer(1, 1, is_parallel=True)] * 2)
    names = list(to_mib(Circuit(graph, graph.visible), d_model=4)["edges"])
    assert names[:4] == ["input->a0.h0<q>", "input->a0.h0<k>", "input->a0.h0<v>", "input->m0"]
    assert names[4:9] == ["input->a1.h0<q>", "input->a1.h0<k>", "input->a1.h0<v>", "input->m1", "a0.h0->a1.h0<q>"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("edges"), "edges: Field required"),
        (lambda data: data["cfg"].pop("n_heads"), "cfg.n_heads: Field required"),
        (lambda data: data["cfg"].update(n_layers=2), "8 of the 23 edges of its model; .* is missing"),
        (lambda data: data["edges"].update({"m0->a0.h0<q>": {"score": 0, "in_graph": True}}), "there is no edge m0->a0.h0<q>"),
        (lambda data: data["edges"]["input->m0"].update(score=float("inf")), "score of input->m0 is inf"),
        (lambda data: data["nodes"]["input"].update(neurons=[True, False]), "only some neurons of input"),
    ],
)
def test_bad_mib_files(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    data = json.loads(EAP_IG)
    change(data)
    (tmp_path / "mib.json").write_text(json.dumps(data))
    with pytest.raises(FileError, match=message):
        from_mib(tmp_path / "mib.json")


def test_mib_and_another_graph() -> None:
    data = json.loads(EAP_IG)
    with pytest.raises(FileError, match="1 layers of 1 heads, sequential does not fit"):
        from_mib(data, transformer_graph([Layer(2, 2)]))
    with pytest.raises(FileError, match="1 layers of 1 heads, sequential does not fit"):
        from_mib(data, transformer_graph([Layer(1, 1, is_parallel=True)]))
    with pytest.raises(FileError, match="uses the edge input->m0, which the graph does not have"):
        from_mib(data, transformer_graph([Layer(1, 1, has_mlp=False)]))
    for layers, message in (
        ([Layer(1, 1), Layer(2, 2)], "same number of heads"),
        ([Layer(1, 1), Layer(1, 1, is_parallel=True)], "one parallel_attn_mlp"),
    ):
        graph = transformer_graph(layers)
        with pytest.raises(CircuitGraphError, match=message):
            to_mib(Circuit(graph, graph.visible), d_model=4)
