"""The benchmarks of discovery and of a peer run, on tiny sizes, and count what they say they count. No time is asserted here."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import __main__ as everything
from benchmarks import clock, discovery, discovery_case, floors, peer, processes, products, subjects, twin
from circuitgraph import ACDC, ActivationPatching


@pytest.fixture(scope="module")
def case() -> discovery_case.Case:
    return discovery_case.Case(*discovery_case.subject("tiny", prompts=2), chunks=3)


def test_a_long_job_is_timed_without_its_pauses() -> None:
    paused = []
    found = clock.paced(iter("abc"), lambda: paused.append(1), every=0.0)
    assert found.last == "c"
    assert len(paused) == 3 * 4  # after every piece, and at the end
    assert found.ratio > 0
    assert found.seconds.wall > 0
    assert clock.paced([], lambda: None).last is None


def test_a_process_answers_in_json_or_says_why_not() -> None:
    assert processes.in_a_process(["-c", "print('noise'); print('{\"a\": 1}')"], threads=1) == {"a": 1}
    with pytest.raises(RuntimeError, match="no such luck"):
        processes.in_a_process(["-c", "raise SystemExit('no such luck')"], threads=1)


@pytest.mark.parametrize("model", ["tiny", "tiny-llama", "zoo:tiny-english"])
def test_the_untouched_model_is_the_model_in_the_same_memory(model: str) -> None:
    traced, pairs = discovery_case.subject(model, prompts=2)
    module: Any = traced.module  # type: ignore[attr-defined]
    untouched: Any = twin.sharing_twin(module)
    ids = torch.from_numpy(np.stack(pairs.clean))
    with torch.no_grad():
        assert torch.equal(untouched(ids).logits, module(ids).logits)
    places = {parameter.data_ptr() for parameter in module.parameters()}
    assert {parameter.data_ptr() for parameter in untouched.parameters()} == places
    assert untouched is not module


def test_the_large_model_is_bfloat16_from_the_start() -> None:
    traced, _ = discovery_case.subject("tiny-llama", prompts=2)
    module: Any = traced.module  # type: ignore[attr-defined]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert module.lm_head.weight is module.model.embed_tokens.weight
    head_sizes = discovery_case.LLAMA_1B["d_model"] / discovery_case.LLAMA_1B["n_heads"]
    assert head_sizes == 64


@pytest.mark.parametrize("method", discovery_case.METHODS)
def test_every_method_is_measured_and_shown(case: discovery_case.Case, method: str) -> None:
    found = discovery_case.measured(method, case)
    assert (found["edges"], found["prompts"]) == (46, [2, 16])
    assert found["seconds"] > 0
    assert found["per_edge"] == pytest.approx(found["forwards"] / 46)
    assert found["peak"] > 0
    assert ("kept" in found) == (method == "acdc")
    assert discovery.is_extrapolated(found) == (method == "naive")  # three calls of up to 64 edges are all of a tiny model's
    row = next(number for number, row in enumerate(discovery.ROWS["zoo:induction-2l"]) if row.method == method)
    shown = discovery.table([{"model": "zoo:induction-2l", "row": row, **json.loads(json.dumps(found))}])
    assert len(shown.rows[0]) == len(shown.columns)


def test_the_sampled_sweep_asks_what_the_algorithm_asks(case: discovery_case.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery_case, "ActivationPatching", lambda: ActivationPatching(max_lanes=10))
    asked: list[Any] = []
    engine = case.bind()

    def evaluate(masks: Any) -> Any:
        asked.append(masks)
        return np.zeros((len(masks), 2))

    monkeypatch.setattr(engine, "evaluate", evaluate)
    monkeypatch.setattr(discovery_case.Case, "bind", lambda self: engine)
    ActivationPatching(max_lanes=10).run(engine)
    whole, asked[:] = [*asked], []
    five = dataclasses.replace(case, chunks=5)
    list(discovery_case.sampled_sweep(five))
    assert [masks.tolist() for masks in asked] == [masks.tolist() for masks in whole]
    assert sum(map(len, discovery_case.sampled_chunks(five))) == case.n_edges
    asked[:] = []
    list(discovery_case.sampled_sweep(case))
    assert [masks.tolist() for masks in asked[1:]] == [whole[number].tolist() for number in (1, 3, 5)]
    assert [len(edges) for edges in discovery_case.sampled_chunks(case)] == [10, 10, 6]


def test_bars_and_aims_are_judged_apart() -> None:
    bars = (discovery.Bar("per_edge", 0.05, 0.02), discovery.Bar("peak", 12))
    row = discovery.Row("acdc", 8, bars=bars, share_kept=(0.003, 0.03))
    good = {"per_edge": 0.03, "peak": 11e9, "edges": 1000, "kept": 10}
    assert discovery.verdicts(row, good) == ("PASS: 0.05 forwards an edge, 12 GB", "FAIL: 0.02 forwards an edge")
    assert discovery.verdicts(row, {**good, "peak": 13e9})[0].startswith("FAIL")
    assert "0.3% to 3.0%" in discovery.verdicts(row, {**good, "kept": 100})[0]
    assert discovery.verdicts(discovery.Row("eap", 8), good) == ("", "")


def test_every_row_can_be_asked_for() -> None:
    assert set(discovery.ROWS) <= set(discovery_case.MODELS)
    assert {row.method for rows in discovery.ROWS.values() for row in rows} == set(discovery_case.METHODS)
    scripts = {name for name in everything.SCRIPTS if name.startswith("discovery")}
    assert {model for name in scripts for model in everything.SCRIPTS[name][2:]} == set(discovery.ROWS) - {"tiny"}


def test_the_pages_have_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "startup.json").write_text((everything.NUMBERS / "startup.json").read_text())
    (report,) = everything.known_reports(tmp_path, [*everything.SCRIPTS])
    assert report.table.title == "Start"
    assert "discovery-zoo" in capsys.readouterr().out


PEER_NAMES = {
    "input->logits": "Resid Start->Resid End",
    "input->a0.h1<q>": "Resid Start->A0.1.Q",
    "a0.h1->a1.h0<k>": "A0.1->A1.0.K",
    "m0->a1.h1<v>": "MLP 0->A1.1.V",
    "a1.h0->m1": "A1.0->MLP 1",
    "m1->logits": "MLP 1->Resid End",
}


def test_edges_have_the_peer_s_names_and_our_order(tmp_path: Path) -> None:
    graph, pairs, model = peer.exported(tmp_path, discovery_case.TINY)
    assert {name: peer.peer_name(graph, *graph.edge_id(name)) for name in PEER_NAMES} == PEER_NAMES
    outcome = ACDC(threshold=0.0, group_first=False).run(model.bind(pairs, "kl"))
    order = peer.acdc_order(graph, outcome.record["order"])
    assert sorted(order) == sorted(peer.peer_name(graph, r, w) for r, w in np.argwhere(graph.visible))
    names = {peer.peer_name(graph, *graph.edge_id(edge)): edge.name for edge in graph.edges}
    tried = [name for name, *_ in outcome.record["decisions"]]
    assert [names[name] for name in order if names[name] in tried] == tried
    written = np.load(tmp_path / "pairs.npz")
    assert written["clean"].shape == (peer.PROMPTS, discovery_case.LENGTH)
    assert written["answers"].shape == (peer.PROMPTS,)
    assert (tmp_path / "model.safetensors").exists()


def test_scores_are_compared_with_the_largest() -> None:
    assert peer.difference({"a": -4.0, "b": 1.0}, {"a": -4.0, "b": 1.5}) == pytest.approx(0.125)
    with pytest.raises(ValueError, match="other edges"):
        peer.difference({"a": 1.0}, {"b": 1.0})


def test_the_peer_s_table_says_who_agrees() -> None:
    spread = {"median": 2.0, "least": 1.0, "most": 3.0}
    eap = {"base": spread, "peak": 1e9}
    theirs = {**eap, "call": spread, "wall_ratio": spread}
    found = {
        "edges": 46,
        "circuitgraph": {**eap, "seconds": 1.0, "spread": {**spread, "median": 0.5}},
        "auto-circuit": {"as they come": {**theirs, "difference": 1e-6}, "frozen": {**theirs, "difference": 0.1}},
        "acdc": {"seconds_per_edge": 2.0, "per_edge": 3.0, "base": 0.5, "measured_edges": 4, "peak": 1e9},
    }
    same = {"edges": 46, "kept": 3, "only_ours": [], "only_theirs": ["A->B"], "smallest_margin": 1e-5}
    shown = peer.table(found, same, dict.fromkeys(peer._NEEDS, "1.2"))
    assert {len(row) for row in shown.rows} == {len(shown.columns)}
    assert [row[-1] for row in shown.rows] == ["", "PASS: 1.0e-06", "FAIL: 1.0e-01", ""]
    assert shown.rows[1][-2] == "2.0 x in seconds, 4.0 x in forwards"
    assert "1 edges are in one only, such as A->B" in shown.notes[1]
    assert "both keep the same" in peer.table(found, {**same, "only_theirs": []}, {}).notes[1]


def test_an_environment_without_the_peer_is_refused() -> None:
    with pytest.raises(SystemExit, match="expected an environment with auto-circuit"):
        peer.peer_versions(sys.executable)


def test_the_peer_s_script_needs_nothing_of_ours() -> None:
    """It runs where circuitgraph is not installed; what it takes from the benchmarks needs the standard library only."""
    own = imported("peer_case")
    assert {name for name in own if name.startswith(("circuitgraph", "benchmarks"))} == {"benchmarks.clock", "benchmarks.machine"}
    for module in ("clock", "machine"):
        assert {name.partition(".")[0] for name in imported(module)} <= sys.stdlib_module_names


def imported(module: str) -> set[str]:
    tree = ast.parse((subjects.ROOT / "benchmarks" / f"{module}.py").read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_a_profile_counts_what_an_operation_computes_and_moves(case: discovery_case.Case) -> None:
    a, b = torch.ones(4, 8), torch.ones(8, 2)
    profile = floors.profiled(lambda: (a @ b).relu(), case, floors.Speeds(product=1e3, copy=1e3))
    product, relu = profile.costs["other products"], profile.costs["aten.relu"]
    assert (product.operations, product.moved) == (2 * 4 * 8 * 2, 4 * (32 + 16 + 8))
    assert (relu.operations, relu.moved) == (0, 4 * (8 + 8))
    assert product.floor == pytest.approx(0.224)  # its bytes take longer than its 128 operations
    assert profile.floor == pytest.approx(0.224 + 0.064)
    forward = discovery_case.plain_forward(case)
    counted = floors.profiled(forward, case, floors.Speeds(1e9, 1e9)).costs
    assert sum(cost.operations for cost in counted.values()) == products.operations(forward)
    assert {"products with the model's weights", "products with the unembedding", "attention"} <= {*counted}


@pytest.mark.parametrize("name", ["eap", "acdc-kl"])
def test_floors_of_methods_are_shown(name: str) -> None:
    at = floors.speeds(size=16, rounds=1)
    found = floors.measured(name, "tiny", at)
    table = floors.table({name: found}, at, "tiny")
    assert next(row[-1] for row in table.rows if row[1] == "together") == "1.00"
    assert all(len(row) == len(table.columns) for row in table.rows)
    shown = dict(found[1].shown())
    assert sum(cost.seconds for cost in shown.values()) == pytest.approx(sum(cost.seconds for cost in found[1].costs.values()))
