"""One run from end to end for each thing people come for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import every_backend, with_reference
from typer.testing import CliRunner

import circuitgraph
from circuitgraph.cli import app


@pytest.fixture(autouse=True)
def _every_backend_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with_reference(monkeypatch)


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def patched_by_hand(traced: Any, pairs: circuitgraph.PromptPairs, layer: int, head: int) -> float:
    """Mean logit difference of the plain model when one head's output is that of the corrupted prompt: hooks only, no engine."""
    model, values = traced.module, []
    o = model.model.layers[layer].self_attn.o_proj
    width = o.in_features // model.config.num_attention_heads
    mine = slice(head * width, (head + 1) * width)
    for i in range(len(pairs)):
        clean, corrupted = (torch.tensor(ids)[None] for ids in (pairs.clean[i], pairs.corrupted[i]))
        seen: list[torch.Tensor] = []
        handle = o.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
        with torch.no_grad():
            model(corrupted)
        handle.remove()

        def patch(_: Any, args: Any, seen: list[torch.Tensor] = seen) -> Any:
            z = args[0].clone()
            z[..., mine] = seen[0][..., mine]
            return (z,)

        handle = o.register_forward_pre_hook(patch)
        with torch.no_grad():
            last = model(clean).logits[0, -1]
        handle.remove()
        right, wrong = (last[sets[i].tolist()].mean() for sets in (pairs.answers, pairs.wrong_answers))
        values.append(float(right - wrong))
    return float(np.mean(values))


@pytest.mark.parametrize(
    ("model", "task", "backend"),
    [
        ("zoo:induction-2l", "induction", "reference"),  # its ACDC takes minutes on the larger model
        ("zoo:induction-2l", "induction", "torch"),
        ("zoo:induction-2l", "induction", "jax"),
        ("zoo:tiny-english", "ioi", "torch"),
    ],
)
def test_the_demos_circuit_is_what_single_head_patching_says(model: str, task: str, backend: str) -> None:
    traced, original = circuitgraph.trace(model, backend=backend), circuitgraph.trace(model)
    pairs = circuitgraph.load_task(task).pairs(traced.tokenizer, 24, seed=3)
    outcome = circuitgraph.ActivationPatching(level="node").run(traced.bind(pairs, "logit_diff"))
    scores = outcome.record["nodes"]
    heads = [w for w in traced.graph.writers if w.kind == "head"]
    for head in heads:
        by_hand = outcome.record["baseline"] - patched_by_hand(original, pairs, head.layer, head.index)
        assert scores[head.name] == pytest.approx(by_hand, abs=1e-3)
    # The head that matters most by itself is in the circuit that ACDC finds.
    circuit = circuitgraph.discover(traced, pairs, circuitgraph.ACDC(threshold=0.01))
    strongest = max(heads, key=lambda head: scores[head.name])
    assert strongest.name in circuit.prune_dead().nodes


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_previous_token_head_feeds_the_keys_of_an_induction_head(backend: str) -> None:
    circuit = circuitgraph.discover("zoo:induction-2l", "induction", circuitgraph.ACDC(threshold=0.001), prompts=16, backend=backend)
    keys = [edge for edge in circuit.edges if edge.reader.kind == "k" and edge.writer.kind == "head"]
    assert keys, "no head feeds another head's keys"
    strongest = max(keys, key=lambda edge: circuit.scores[circuit.graph.edge_id(edge)])  # type: ignore[index]
    assert strongest.writer.layer == 0
    assert strongest.reader.layer == 1
    assert circuit.provenance["faithfulness"] > 0.95
    assert circuit.n_edges < 0.25 * circuit.graph.n_edges


@every_backend
def test_a_newcomer_asks_about_their_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text(
        "clean,corrupted,answer,wrong_answer\n"
        "The key near the cabinets,The keys near the cabinets, is, are\n"
        "The dog behind the trees,The dogs behind the trees, is, are\n"
    )
    model = circuitgraph.trace("zoo:tiny-english")
    rows = circuitgraph.load_task("mine.csv")
    assert "answer" in rows.describe(model.tokenizer)
    asked = ("mine.csv", "--model", "zoo:tiny-english", "--algorithm", "eap", "--top", "60", "--backend", backend)
    found = run("discover", *asked, "-o", "found")
    assert found["prompts"] == 2
    assert {Path(file).name for file in found["files"]} >= {"circuit.json", "circuit.svg", "report.json"}
    circuit = circuitgraph.Circuit.load("found/circuit.json")
    assert 0 < circuit.n_edges <= 60


@every_backend
@pytest.mark.parametrize("task", ["ioi", "greater-than", "subject-verb-agreement"])
def test_tiny_english_does_its_tasks(task: str, backend: str) -> None:
    traced = circuitgraph.trace("zoo:tiny-english", backend=backend)
    pairs = circuitgraph.load_task(task).pairs(traced.tokenizer, 64, seed=5)
    assert traced.bind(pairs, "accuracy").evaluate(np.ones((1, *traced.graph.shape))).mean() >= 0.98


@pytest.mark.smollm2
def test_a_real_language_model_and_a_real_task(tmp_path: Path) -> None:
    folder = tmp_path / "ioi"
    found = run("discover", "ioi", "-m", "smollm2-135m", "-a", "eap", "--top", "2000", "-n", "4", "-o", str(folder))
    assert found["edges_total"] == 70651
    assert found["task_accuracy"] >= 0.75
    assert found["metric_clean"] > 2 > 0 > found["metric_corrupted"]
    assert found["metric_corrupted"] < found["metric_circuit"] < found["metric_clean"]
    assert (folder / "circuit.svg").stat().st_size > 1000
