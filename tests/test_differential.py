"""The same weights in every backend: the naive numpy engine and PyTorch give the same numbers and the same circuits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import small_model, twin

import circuitgraph_torch
from circuitgraph._engine import Algorithm, Engine
from circuitgraph.algorithms import ACDC, EAP, ActivationPatching
from circuitgraph.testing import random_pairs

PAIRS = random_pairs(3, lengths=(6, 4, 6))
families = pytest.mark.parametrize("family", ["gpt2", "llama"])
metrics = ["logit_diff", "prob_diff", "nll", "kl"]
sources = ["corrupted", "zero", "mean", "mean-per-position"]


@cache
def engines(family: str, metric: str = "logit_diff", source: str = "corrupted", per_head_kv: bool = False) -> tuple[Engine, Any]:
    """The reference engine and PyTorch's."""
    model = small_model(family)
    reference = twin(model).bind(PAIRS, metric, source, per_head_kv=per_head_kv)  # type: ignore[arg-type]
    return reference, circuitgraph_torch.trace(model, per_head_kv=per_head_kv).bind(PAIRS, metric, source)  # type: ignore[arg-type]


# Hugging Face's RMSNorm computes in float32 even in a float64 model; LayerNorm does not.
def tolerance(family: str) -> float:
    return 1e-9 if family == "gpt2" else 2e-5


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(["gpt2", "llama"]),
    metric=st.sampled_from(metrics),
    source=st.sampled_from(sources),
    per_head_kv=st.booleans(),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(["float", "binary", "sparse"]),
)
def test_evaluate_agrees(family: str, metric: str, source: str, per_head_kv: bool, seed: int, kind: str) -> None:
    reference, torch_engine = engines(family, metric, source, per_head_kv)
    assert reference.graph == torch_engine.graph
    masks = np.random.default_rng(seed).uniform(size=(2, *reference.graph.shape))
    if kind != "float":
        masks = (masks < (0.5 if kind == "binary" else 0.9)).astype(float)
    expected = reference.evaluate(masks)
    assert np.allclose(torch_engine.evaluate(masks), expected, atol=tolerance(family) * max(1, np.abs(expected).max()))


@families
@pytest.mark.parametrize("metric", metrics)
@pytest.mark.parametrize("source", sources)
def test_gradient_agrees(family: str, metric: str, source: str) -> None:
    reference, torch_engine = engines(family, metric, source)
    mask = np.random.default_rng(5).uniform(size=reference.graph.shape)
    expected = reference.gradient(mask)
    assert np.allclose(torch_engine.gradient(mask), expected, atol=1e-4 * np.abs(expected).max())


@families
def test_mixed_gradient_and_activations_agree(family: str) -> None:
    reference, torch_engine = engines(family)
    mask = np.random.default_rng(6).uniform(size=reference.graph.shape)
    expected = reference.gradient(mask, mix=0.3)
    assert np.allclose(torch_engine.gradient(mask, mix=0.3), expected, atol=1e-4 * np.abs(expected).max())
    for m in (None, mask):
        ours, theirs = torch_engine.activations(m), reference.activations(m)
        assert all(np.allclose(ours[i], theirs[i], atol=1e-4) for i in range(len(PAIRS)))


@families
@pytest.mark.parametrize(
    ("algorithm", "metric"),
    [
        (EAP(), "logit_diff"),
        (ActivationPatching(), "logit_diff"),
        (ActivationPatching(level="node", direction="denoising"), "kl"),
        (ActivationPatching(direction="denoising"), "nll"),
    ],
    ids=str,
)
def test_scores_agree(family: str, algorithm: Algorithm, metric: str) -> None:
    outcomes = [algorithm.run(engine) for engine in engines(family, metric)]
    expected = outcomes[0].scores
    assert expected is not None
    assert np.allclose(outcomes[1].scores, expected, atol=1e-4 * np.abs(expected).max())


@families
@pytest.mark.parametrize("threshold", [0.003, 0.03, 0.3])
@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize("group_first", [True, False])
def test_acdc_finds_the_same_circuit(family: str, threshold: float, metric: str, group_first: bool) -> None:
    reference, torch_engine = engines(family, metric)
    algorithm = ACDC(threshold=threshold, group_first=group_first)
    ours, theirs = algorithm.run(torch_engine), algorithm.run(reference)
    assert theirs.record["smallest_margin"] > 1e-5, "a decision too close for float32 to settle: choose another threshold"
    assert np.array_equal(ours.mask, theirs.mask)
    assert [d[0] for d in ours.record["decisions"]] == [d[0] for d in theirs.record["decisions"]]
