"""`benchmark`: every algorithm measured alike, and nothing twice."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from engines import SHORT, traced

from circuitgraph import _remembered
from circuitgraph._benchmark import Benchmark, benchmark, known_results
from circuitgraph._circuit import Circuit
from circuitgraph._engine import Engine, Outcome
from circuitgraph._errors import CircuitGraphError, FileError
from circuitgraph._remembered import Answers, RememberedEngine
from circuitgraph._task import Prompt, Task
from circuitgraph.algorithms import ACDC, EAP, ActivationPatching

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


# ------------------------------------------------------------------------------------------------------- searches that are interrupted


class Interrupted(RememberedEngine):
    """Asked once too often."""

    left: ClassVar[float] = 0

    def evaluate(self, masks: Any, *, source: Any = None) -> Any:
        if Interrupted.left == 0:
            raise KeyboardInterrupt
        Interrupted.left -= 1
        return super().evaluate(masks, source=source)


@pytest.mark.parametrize(
    "algorithm",
    [ActivationPatching(max_lanes=4), ActivationPatching(direction="denoising", max_lanes=4), ACDC(threshold=0.01, max_lanes=1)],
)
def test_an_interrupted_cell_goes_on_where_it_was(algorithm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = table(tmp_path / "whole", {"it": algorithm}).results[2:]
    monkeypatch.setattr(_remembered, "WRITTEN_EVERY", 0.0)
    monkeypatch.setattr("circuitgraph._benchmark.RememberedEngine", Interrupted)
    for Interrupted.left in (3, 5, 4):  # the second goes on, the third has less than the second had
        with pytest.raises(KeyboardInterrupt):
            table(tmp_path, {"it": algorithm})
    (file,) = tmp_path.glob("*--it.safetensors")
    before = file.read_bytes()
    Interrupted.left, asked = float("inf"), []
    keep = Answers.keep
    monkeypatch.setattr(Answers, "keep", lambda self, question, answer: (asked.append(question), keep(self, question, answer)))
    (found,) = table(tmp_path, {"it": algorithm}).results[2:]
    assert (found.faithfulness, found.cmd, found.kept) == (expected.faithfulness, expected.cmd, expected.kept)
    assert not file.exists()
    file.write_bytes(before)
    known, _ = _remembered._read(file, found.key)
    assert len(known) >= 4
    assert asked
    assert not known.keys() & set(asked)


def test_answers_are_those_of_one_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_remembered, "WRITTEN_EVERY", 0.0)
    engine, file = traced("reference").bind(SHORT, "logit_diff"), tmp_path / "cell.safetensors"
    remembered = RememberedEngine(engine, Answers(file, "key"))
    masks = np.random.default_rng(0).uniform(size=(2, *engine.graph.shape))
    given = engine.source_values()
    for asked, one in [(remembered, engine), (remembered.reversed(), engine.reversed()), (remembered.reversed().reversed(), engine)]:
        for _ in range(2):
            assert np.array_equal(asked.evaluate(masks), one.evaluate(masks))
            assert np.array_equal(asked.evaluate(masks[:1]), one.evaluate(masks[:1]))
            assert np.array_equal(asked.evaluate(masks, source=given), one.evaluate(masks, source=given))
    asked = remembered.evaluate(masks)
    asked[:] = 0
    assert remembered.evaluate(masks).any()
    again = Answers(file, "key")
    assert again._before.seconds == again._before.forwards > 0
    again.start(plain=0.5)  # the machine is faster now
    engine.evaluate(masks)
    seconds, forwards = np.subtract(astuple(again.spent), astuple(again._before))
    assert seconds > 0
    assert forwards == pytest.approx(2 * seconds)
    monkeypatch.setattr(type(engine), "evaluate", lambda *_: pytest.fail("it was asked again"))
    assert np.array_equal(RememberedEngine(engine, again).evaluate(masks), remembered.evaluate(masks))
    assert not Answers(file, "another key")._known
    again.forget()
    assert not Answers(file, "key")._known
    file.write_bytes(b"no tensors")
    with pytest.raises(FileError, match=r"cell\.safetensors is not what an interrupted search leaves .*; remove it"):
        Answers(file, "key")
