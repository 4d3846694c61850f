"""The commands that look at more than one circuit: compare, confidence, stability, benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from circuitgraph import Circuit
from circuitgraph.cli import app

ZOO = ("induction", "--model", "zoo:induction-2l", "-n", "6")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def circuits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two circuits of one model, as discover writes them."""
    folder = tmp_path_factory.mktemp("circuits")
    for algorithm in ("eap-ig", "magnitude"):
        run("discover", *ZOO, "-a", algorithm, "--top", 12 if algorithm == "eap-ig" else 20, "-o", folder / algorithm)
    return folder / "eap-ig", folder / "magnitude"


def test_compare_says_what_circuits_share(circuits: tuple[Path, Path], tmp_path: Path) -> None:
    assert "Jaccard with magnitude" in " ".join(run("compare", *circuits).split())
    picture = tmp_path / "both.dot"
    found: dict[str, Any] = json.loads(run("compare", *circuits, "--same-size", "-n", 6, "--json", "-o", picture))
    assert found["names"] == ["eap-ig", "magnitude"]
    assert found["same_size"] == min(Circuit.load(path / "circuit.json").n_edges for path in circuits)
    assert {"random", "magnitude"} == set(found["baselines"])
    assert found["protocol"]["seed"] == 1
    assert "eap-ig only" in picture.read_text()


def test_confidence_lists_scores_with_their_intervals() -> None:
    found = json.loads(run("confidence", *ZOO, "-a", "eap", "--json"))
    assert len(found) == 81
    best = max(found.values(), key=lambda edge: abs(edge["score"]))
    assert best["interval"][0] <= best["score"] <= best["interval"][1]
    assert "sign kept" in run("confidence", *ZOO, "-a", "eap-ig", "--set", "points=2", "--limit", 3)


def test_stability_writes_what_returns(tmp_path: Path) -> None:
    out = tmp_path / "stable"
    found = json.loads(run("stability", *ZOO, "-a", "eap-ig", "--top", 10, "--runs", 3, "-o", out, "--json"))
    assert (found["runs"], found["varied"]) == (3, ["prompts"])
    circuit = Circuit.load(out / "circuit.json")
    assert circuit.confidence is not None
    assert {name for name, share in found["frequency"].items() if share >= 0.5} == {edge.name for edge in circuit.edges}
    assert "exists" in refused("stability", *ZOO, "-a", "eap", "-o", out)
    assert "order_seed" in refused("stability", *ZOO, "-a", "eap", "--vary", "order")


def test_what_an_algorithm_decides_is_what_is_repeated() -> None:
    found = json.loads(run("stability", *ZOO, "-a", "edge-pruning", "--set", "n_steps=2", "--set", "target=40", "--runs", 2, "--json"))
    assert min(found["sizes"]) > 20  # not the default size
    kept = json.loads(run("stability", *ZOO, "-a", "magnitude", "--runs", 2, "--json"))
    assert max(kept["sizes"]) <= 20


def test_benchmark_goes_on_where_it_was(tmp_path: Path) -> None:
    asked = ("benchmark", "-m", "zoo:induction-2l", "-t", "induction", "-n", 6, "-o", tmp_path, "-a", "eap-ig:points=2", "--json")
    first = json.loads(run(*asked, "-a", "eap"))
    assert [row["algorithm"] for row in first["results"]] == ["random", "magnitude", "eap-ig:points=2", "eap"]
    again = json.loads(run(*asked, "-a", "relp"))
    assert again["results"][:3] == first["results"][:3]  # the seconds, too
    assert "points" in refused(*asked[:-2], "eap-ig:pionts=2")
    assert "TASK=FILE" in refused(*asked, "--reference", "ioi")


def test_by_position_gives_edges_at_slots(tmp_path: Path) -> None:
    run("discover", "ioi", "-m", "zoo:tiny-english", "-n", 6, "-a", "eap", "--top", 30, "--by-position", "-o", tmp_path / "spans")
    assert any("@" in edge.name for edge in Circuit.load(tmp_path / "spans" / "circuit.json").edges)
