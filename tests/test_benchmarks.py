"""The benchmarks run, on tiny sizes, and their figures are where the documentation takes them from. No time is asserted here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from engines import SHORT, traced

from benchmarks import __main__ as everything
from benchmarks import algorithms, backends, backends_case, clock, eap, eap_case, machine, node_estimates, startup, tables, trace_proof
from circuitgraph import EAP, ActivationPatching, AttributionPatching


def test_trace_proof_passes_and_has_its_noise_floors() -> None:
    (llama,) = trace_proof.proved("llama")
    assert (llama.verdict, llama.edges) == ("PASS", 190)
    assert llama.attention_noise is not None
    assert 0 < llama.attention_noise < 1e-5
    assert llama.rounding_noise is not None
    assert 0 < llama.rounding_noise < 1e-5
    (gptj,) = trace_proof.proved("gptj")
    assert gptj.attention_noise is None  # it has no sdpa attention
    (bloom,) = trace_proof.proved("bloom")
    assert bloom.verdict == "refused"
    shown = trace_proof.table([llama, gptj, bloom])
    assert [row[-1] for row in shown.rows] == ["PASS", "PASS", "refused"]
    assert trace_proof.Proved("broken", error=float("nan")).verdict == "FAIL"


@pytest.mark.parametrize("frozen", [False, True])
def test_eap_is_timed_and_weighed(frozen: bool) -> None:
    found = {
        "model": "tiny",
        "frozen": frozen,
        **eap_case.times("tiny", frozen=frozen, rounds=2),
        **eap_case.memory("tiny", frozen=frozen),
    }
    assert (found["edges"], found["prompts"], found["requires_grad"]) == (46, [8, 16], not frozen)
    assert 0 < found["peak_before_eap"] <= found["peak"]
    (row,) = eap.table([found], threads=1, rounds=2).rows
    assert len(row) == len(eap.table([found], threads=1, rounds=2).columns)
    assert row[2] == ("frozen" if frozen else "as they come")


@pytest.mark.parametrize(("ratio", "peak", "verdict"), [(3.5, 2e9, "PASS"), (3.6, 1e9, "FAIL"), (3.0, 2.1e9, "FAIL")])
def test_the_bars_of_eap_are_both_held(ratio: float, peak: float, verdict: str) -> None:
    spread = {"median": ratio, "least": 1.0, "most": 9.0}
    case = dict.fromkeys(("base", "call", "wall_ratio", "cpu_ratio"), spread) | {"peak": peak, "edges": 1, "prompts": [1, 2]}
    (row,) = eap.table([{"model": "tiny", "frozen": True, **case}], threads=1, rounds=2).rows
    assert row[-1] == verdict


def test_start_is_timed_and_imports_nothing_heavy() -> None:
    imports = startup.import_times(1)
    assert imports["heavy"] == []
    assert imports["wall"][0] > 0
    command = startup.demo_command(Path("/somewhere"))
    assert command[:4] == ["-m", "circuitgraph.cli", "discover", "induction"]
    assert "/somewhere" in command
    assert not [word for word in command if "$" in word]
    demo = {"discovery": [1.0], "process": [2.0]}
    assert "FAIL" not in [row[-1] for row in startup.table({**imports, "wall": [0.1], "cpu": [0.1]}, demo).rows]


def test_ratios_are_those_of_one_round() -> None:
    found = clock.compared(lambda: sum(range(40_000)), lambda: sum(range(10_000)), rounds=3)
    assert found.wall_ratio.least <= found.wall_ratio.median <= found.wall_ratio.most
    assert clock.Spread.of([3, 1, 2]) == clock.Spread(2, 1, 3)


def test_peak_memory_is_the_process_s_own() -> None:
    before = machine.peak_memory()
    held = bytearray(b"x" * 50_000_000)
    assert machine.peak_memory() >= max(before, len(held))


def test_a_report_goes_through_json_and_into_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tables.Table("Made up [1]", ("a | b", "c"), [("1", "[red]2")], ["A note."])
    tables.publish(table, [{"a": 1}], command="python -m nothing", watch=machine.Watch(), file=tmp_path / "report.json")
    assert "[red]2" in capsys.readouterr().out
    report = tables.Report.from_json((tmp_path / "report.json").read_text())
    assert "| a \\| b | c |\n| --- | --- |\n| 1 | [red]2 |\n\nA note.\n" in everything.results([report])
    page = everything.with_tables(f"before {everything.START} old {everything.END} after", [report])
    assert "old" not in page
    assert everything.tables([report]) in page
    assert page.startswith("before ")
    assert page.endswith(" after")
    with pytest.raises(ValueError, match="has no"):
        everything.with_tables("no marks", [report])
    elsewhere = dataclasses.replace(report, machine={**report.machine, "CPU": "another"})
    with pytest.raises(ValueError, match="different machines"):
        everything.write_pages([report, elsewhere])


def test_the_documentation_shows_the_results() -> None:
    """Both files are written by `make bench`; neither is edited by hand between the marks."""
    shown = everything.PAGE.read_text().partition(everything.START)[2].partition(everything.END)[0].strip()
    assert shown
    assert shown in everything.RESULTS.read_text()


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_backends_are_compared(backend: str) -> None:
    traced, pairs = backends_case._traced(backend, "tiny")
    plain = backends_case.plain_forward(backend, traced, pairs, threads=1)
    found = {"model": "tiny", "backend": backend, **backends_case.measured(traced, pairs, plain, rounds=2, threshold=0.01)}
    assert (found["edges"], found["prompts"]) == (46, [8, 16])
    shown = backends.table([found], rounds=2)
    assert [row[0] for row in shown.rows] == ["EAP", "64 random lanes", "exact sweep, 46 edges", "ACDC, kl at 0.01"]
    assert {len(row) for row in shown.rows} == {len(shown.columns)}
    assert [row[-1] != "" for row in shown.rows] == [backend == "jax", False, False, False]


def test_the_page_of_algorithms_is_written_from_its_cells() -> None:
    page = algorithms.PAGE.read_text()
    assert algorithms.with_tables(page, {name: algorithms.table(name) for name in algorithms.PARTS}) == page
    zoo = algorithms.table("zoo")
    assert len(zoo.results) == len(algorithms.PARTS["zoo"].rows)  # none is missing
    assert all(result.refused is None for result in zoo.results)
    with pytest.raises(ValueError, match="zoo"):
        algorithms.with_tables("no marks", {"zoo": zoo})


def test_estimates_of_nodes_are_held_against_patching() -> None:
    engine = traced("reference", "gpt2 of three layers").bind(SHORT, "logit_diff")
    nodes = [writer.name for writer in engine.graph.writers]
    eap, attributed = (node_estimates.node_scores(algorithm, engine) for algorithm in (EAP(), AttributionPatching()))
    assert np.allclose(eap, attributed)
    patched = ActivationPatching(level="node").run(engine).record["nodes"]
    rows = node_estimates.compared(engine)
    assert [row[0] for row in rows] == [*node_estimates.ESTIMATES]
    assert all(len(row) + 2 == len(node_estimates.COLUMNS) for row in rows)
    assert rows[0][-2:] == (f"{eap[nodes.index('m0')]:.3f}", f"{patched['m0']:.3f}")
    heads = [number for number, name in enumerate(nodes) if name.startswith("a")]
    assert rows[0][3] == f"{np.corrcoef(eap[heads], [patched[nodes[head]] for head in heads])[0, 1]:.3f}"


def test_the_page_has_all_estimates_of_nodes() -> None:
    page = node_estimates.PAGE.read_text()
    table = page[page.index(node_estimates.START) : page.index(node_estimates.END)]
    assert all(f"| {task} |" in table for task in node_estimates.TASKS)
    assert all(f"| {name} |" in table for name in node_estimates.ESTIMATES)
