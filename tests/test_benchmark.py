"""`benchmark`: every algorithm measured alike, and nothing twice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from engines import traced

from circuitgraph._benchmark import Benchmark, benchmark, known_results
from circuitgraph._circuit import Circuit
from circuitgraph._engine import Engine, Outcome
from circuitgraph._errors import CircuitGraphError, FileError
from circuitgraph._task import Prompt, Task
from circuitgraph.algorithms import EAP

TASK = Task(
    name="tokens",
    words={"token": "*"},
    metric="kl",
    prompt=[Prompt(clean="{token.a}{token.b}{token.c}", corrupted="{token.d}{token.e}{token.f}", answer="{token.g}", wrong="{token.h}")],
)


@dataclass(frozen=True)
class Counted:
    """Scores that know the right answer; counts how often it is asked."""

    share: float = 0.5
    asked: ClassVar[list[str]] = []

    def run(self, engine: Engine) -> Outcome:
        self.asked.append(engine.metric.name)
        graph = engine.graph
        scores = np.where(graph.visible, np.arange(graph.visible.size).reshape(graph.shape) + 1.0, 0)
        return Outcome(scores > self.share * scores.max(), scores)


def table(folder: Path, algorithms: Any, **options: Any) -> Benchmark:
    Counted.asked.clear()
    return benchmark([traced("reference")], [TASK], algorithms, folder=folder, prompts=2, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results")
    table(path, {"mine": Counted(), "eap": EAP()})
    return path


def test_every_cell_is_there_with_the_baselines(folder: Path) -> None:
    found = table(folder, {"mine": Counted(), "eap": EAP()})
    assert [r.algorithm for r in found.results] == ["random", "magnitude", "mine", "eap"]
    random, _, mine, eap = found.results
    assert mine.refused is None
    assert mine.faithfulness["1"] == pytest.approx(1.0)  # all edges are the model
    assert mine.kept is not None
    assert mine.kept_faithfulness is not None
    assert random.kept is None  # it keeps every edge and chooses none
    assert eap.refused is not None  # KL has no gradient at the clean run
    assert "zero gradient" in eap.refused
    assert mine.seconds is not None
    assert mine.forwards is not None
    assert mine.protocol["metric"] == "kl"
    assert mine.protocol["seed"] == 1  # other prompts than those of discovery
    text = (folder / "table.md").read_text()
    assert text == found.to_markdown()
    assert "No answer:" in text
    assert len(json.loads((folder / "table.json").read_text())["results"]) == 4


def test_what_is_known_is_not_asked_again(folder: Path) -> None:
    again = table(folder, {"mine": Counted(), "eap": EAP()})
    assert not Counted.asked
    assert again.to_markdown() == table(folder, {"mine": Counted(), "eap": EAP()}).to_markdown()
    assert {r.algorithm for r in known_results(folder).results} == {"random", "magnitude", "mine", "eap"}
    table(folder, {"mine": Counted(0.4)})
    assert Counted.asked == ["kl"]
    table(folder, {"mine": Counted(0.4)}, seed=5)
    assert Counted.asked == ["kl"]


def test_a_reference_gives_auroc(tmp_path: Path) -> None:
    graph = traced("reference").graph
    scores = np.where(graph.visible, np.arange(graph.visible.size).reshape(graph.shape) + 1.0, 0)
    best = Circuit(graph, graph.visible, scores).top(5)
    found = table(tmp_path, {"mine": Counted()}, references={"tokens": best})
    assert found.results[-1].auroc == 1.0
    assert 0 < (found.results[0].auroc or 0) < 1
    other = traced("reference", "llama").graph
    assert table(tmp_path / "other", {}, references={"tokens": Circuit(other, other.visible)}).results[0].auroc is None


def test_broken_files_and_empty_questions_are_refused(folder: Path, tmp_path: Path) -> None:
    cell = next(folder.glob("*--mine.json"))
    (tmp_path / cell.name).write_text('{"model": 3}')
    with pytest.raises(FileError, match="not a result"):
        table(tmp_path, {"mine": Counted()})
    with pytest.raises(CircuitGraphError, match="no model or no task"):
        benchmark([], [TASK], {}, folder=tmp_path)
