"""The trained model: it does its task by the steps that it was trained into, and algorithms find the edges between them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from circuitgraph import UnknownNameError, discover
from circuitgraph._engine import Engine, TracedModel
from circuitgraph._tensors import read_tensors
from circuitgraph.algorithms import ACDC, EAP, EAPIG
from circuitgraph.evaluation import matched
from circuitgraph.testing import trained_model
from circuitgraph.testing._trained import CEILING, FLOOR, UNNAMED_CEILING

TRAINED = trained_model()
PROMPTS = 16
FRESH = 20261128  # a seed that neither the training nor its measures used


@cache
def engine(backend: str = "torch", prompts: int = PROMPTS) -> Engine:
    return traced(backend).bind(TRAINED.pairs(prompts, FRESH), "logit_diff")


@cache
def traced(backend: str = "torch") -> TracedModel:
    return TRAINED.traced(backend)


@cache
def effects() -> dict[str, float]:
    found = TRAINED.effects(PROMPTS, FRESH)
    return {edge.name: float(found[TRAINED.graph.edge_id(edge)]) for edge in TRAINED.graph.edges}


def by_hand(prompt: list[int], other: list[int], step: str | None) -> int:
    """The answer to a prompt with one step taken from another, written out."""
    if step in ("value", "answer"):
        prompt = other
    tags = (other if step == "tag" else prompt)[:-1:2]
    value = prompt[1::2][tags.index(prompt[-1])] - 6
    return 6 + (5 * value + 3) % 18


@pytest.mark.parametrize("step", [None, "tag", "value", "answer"])
def test_the_high_level_model_under_interchange(step: str | None) -> None:
    task = TRAINED.task
    base, other = task.prompts(200, FRESH), task.prompts(200, FRESH + 1)
    wanted = [by_hand(*pair, step) for pair in zip(base.tolist(), other.tolist(), strict=True)]
    assert task.answers(base, {step: other} if step else None).tolist() == wanted


def test_it_does_its_task_on_fresh_prompts() -> None:
    tokens = TRAINED.task.prompts(1000, FRESH)
    assert (TRAINED.model.forward(tokens)[:, -1].argmax(axis=-1) == TRAINED.task.answers(tokens)).mean() > 0.998


def test_corrupted_prompts_differ_everywhere() -> None:
    pairs = TRAINED.pairs(PROMPTS, FRESH)
    assert (np.stack(pairs.clean) != np.stack(pairs.corrupted)).all()
    assert (np.stack(pairs.clean)[:, 1:-1:2] >= TRAINED.task.tags).all()
    with pytest.raises(UnknownNameError, match="unknown step of tagged values 'tags'; did you mean 'tag'"):
        TRAINED.task.answers(np.stack(pairs.clean), {"tags": np.stack(pairs.corrupted)})


def test_weights_are_dense_and_small() -> None:
    weights = read_tensors(Path(TRAINED.folder))
    assert all((values != 0).all() for values in weights.values())
    assert sum(file.stat().st_size for file in TRAINED.folder.iterdir()) < 3e6


def test_unmapped_components_speak_and_nobody_hears() -> None:
    """Each alone, and all of them at once, say what they say on the corrupted prompt; the logit difference stays."""
    graph, unmapped = TRAINED.graph, [w for w in TRAINED.graph.writers if w.node not in {"input", *TRAINED.mapped.values()}]
    masks = np.ones((len(unmapped) + 3, *graph.shape), dtype=np.float32)
    masks[-1] = 0
    for lane, writer in enumerate(unmapped):
        masks[lane, :, graph.writer_id(writer)] = masks[-2, :, graph.writer_id(writer)] = 0
    *without, whole, nothing = np.asarray(engine().evaluate(masks[[*range(len(unmapped)), -2, -3, -1]])).mean(axis=1)
    assert np.abs(np.array(without[:-1]) - whole).max() < CEILING * (whole - nothing)
    assert abs(without[-1] - whole) < 2 * CEILING * (whole - nothing)
    said = TRAINED.measured["root mean square of what each says"]
    assert min(said[writer.node] for writer in unmapped) > 0.1 * min(said[node] for node in TRAINED.mapped.values())


def test_named_edges_matter_and_no_others() -> None:
    found = effects()
    assert min(found[name] for name in TRAINED.named) > FLOOR
    assert max(abs(found[name]) for name in TRAINED.unnamed) < UNNAMED_CEILING
    assert max(abs(value) for name, value in found.items() if name not in TRAINED.named | TRAINED.unnamed) < CEILING


def test_what_the_named_edges_do_without_the_others() -> None:
    """Whole components were interchanged, so nothing forbade the edges between mapped ones that no step names; they do a little."""
    graph = TRAINED.graph

    def mask(names: frozenset[str]) -> np.ndarray:
        return np.array([[f"{w}->{r}" in names for w in graph.writers] for r in graph.readers])

    named, unnamed = mask(TRAINED.named), mask(TRAINED.unnamed)
    masks = np.stack([graph.visible, np.zeros(graph.shape), named, graph.visible & ~named, named | unnamed]).astype(np.float32)
    whole, nothing, alone, complement, among = np.asarray(engine().evaluate(masks)).mean(axis=1)
    shares = [(value - nothing) / (whole - nothing) for value in (alone, complement, among)]
    assert shares == pytest.approx([0.95, 0.0, 1.0], abs=0.04)


def test_the_measures_on_record_hold() -> None:
    recorded = TRAINED.measured["edges"]
    assert set(recorded["named"]) == TRAINED.named
    assert set(recorded["unnamed"]) == TRAINED.unnamed
    assert min(TRAINED.measured["interchange"].values()) > 0.99
    assert min(TRAINED.measured["strict"].values()) > 0.99


@pytest.mark.parametrize("algorithm", [EAPIG(), EAPIG("activations")], ids=["inputs", "activations"])
def test_eap_ig_ranks_named_edges_first(algorithm: EAPIG) -> None:
    circuit = discover(traced(), TRAINED.pairs(PROMPTS, FRESH), algorithm, metric="logit_diff")
    agreement = matched(circuit, TRAINED.circuit).edges
    assert agreement.auroc is not None
    assert agreement.auroc > 0.99


def test_acdc_finds_the_named_edges() -> None:
    """At lower thresholds a path through an unmapped head comes on top, which helps only where most edges are corrupted."""
    circuit = discover(traced(), TRAINED.pairs(PROMPTS, FRESH), ACDC(0.3), metric="kl")
    assert {edge.name for edge in circuit.edges} == TRAINED.named


def test_backends_agree() -> None:
    """PyTorch and JAX trace the same folder with no description; the reference has the same weights in numpy."""
    engines = {backend: engine(backend, prompts=2) for backend in ("torch", "jax", "reference")}
    assert engines["torch"].graph == engines["jax"].graph == engines["reference"].graph == TRAINED.graph
    scores = {backend: np.asarray(EAP().run(asked).scores) for backend, asked in engines.items()}
    assert np.allclose(scores["torch"], scores["jax"], atol=1e-4)
    assert np.allclose(scores["torch"], scores["reference"], atol=1e-4)


def test_the_module_is_the_same_model() -> None:
    import torch

    tokens = TRAINED.task.prompts(4, FRESH)
    logits = TRAINED.module(torch.from_numpy(tokens)).logits.detach().numpy()
    assert np.allclose(logits, TRAINED.model.forward(tokens), atol=1e-3)
