"""The same weights in every backend: the naive numpy engine, PyTorch and JAX give the same numbers and the same circuits.

JAX compiles for each metric, length, and number of lanes, and for sources that differ by position apart from those that do not: a test asks
all that it can of what was compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from engines import PAIRS, SHORT
from hypothesis import given, settings
from hypothesis import strategies as st
from lifted import lifted
from twins import small_model, twin

import circuitgraph_jax
import circuitgraph_torch
from circuitgraph._engine import Algorithm, Engine
from circuitgraph._pairs import PromptPairs
from circuitgraph.algorithms import ACDC, EAP, ActivationPatching

BACKENDS: dict[str, Any] = {"torch": circuitgraph_torch, "jax": circuitgraph_jax}
ONE_LENGTH = SHORT  # and the same shapes as those of the laws
LANES = 4
families = pytest.mark.parametrize("family", ["gpt2", "llama"])
backends = pytest.mark.parametrize("backend", BACKENDS)
metrics = ["logit_diff", "prob_diff", "nll", "kl"]
sources = ["corrupted", "zero", "mean", "mean-per-position"]
TOLERANCE = 1e-9  # relative, in float64
SLOPE = 1e-4  # of the reference's gradient, which is taken by differences


@pytest.fixture(scope="module", autouse=True)
def _in_float64() -> Iterator[None]:
    with lifted():
        yield


@cache
def traced(family: str, backend: str, per_head_kv: bool = False) -> Any:
    if backend == "reference":
        return twin(small_model(family))
    return BACKENDS[backend].trace(small_model(family), per_head_kv=per_head_kv)


@cache
def engine(
    family: str, backend: str, metric: str = "logit_diff", source: str = "corrupted", per_head_kv: bool = False, pairs: PromptPairs = PAIRS
) -> Engine:
    if backend == "reference":
        return traced(family, backend).bind(pairs, metric, source, per_head_kv=per_head_kv)  # type: ignore[no-any-return]
    return traced(family, backend, per_head_kv).bind(pairs, metric, source)  # type: ignore[no-any-return]


@cache
def expected_gradient(
    family: str, metric: str = "logit_diff", source: str = "corrupted", mix: float = 1.0, pairs: PromptPairs = PAIRS
) -> np.ndarray:
    reference = engine(family, "reference", metric, source, pairs=pairs)
    return reference.gradient(np.random.default_rng(5).uniform(size=reference.graph.shape), mix=mix)


@settings(max_examples=4)
@given(
    family=st.sampled_from(["gpt2", "llama"]),
    metric=st.sampled_from([*metrics, "accuracy"]),
    sources=st.sampled_from([("corrupted", "mean-per-position"), ("zero", "mean")]),
    per_head_kv=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_evaluate_agrees(family: str, metric: str, sources: tuple[str, str], per_head_kv: bool, seed: int) -> None:
    pairs = PAIRS if metric == "logit_diff" else ONE_LENGTH
    for source in sources:
        reference = engine(family, "reference", metric, source, per_head_kv, pairs)
        uniform = np.random.default_rng(seed).uniform(size=(2, *reference.graph.shape))
        for masks in (uniform, (uniform < 0.5).astype(float), (uniform < 0.9).astype(float)):
            expected = reference.evaluate(masks)
            for backend in BACKENDS:
                ours = engine(family, backend, metric, source, per_head_kv, pairs)
                assert reference.graph == ours.graph
                assert np.allclose(ours.evaluate(masks), expected, atol=TOLERANCE * max(1, np.abs(expected).max())), backend


@pytest.mark.parametrize(("family", "backend"), [("gpt2", "torch"), ("llama", "torch"), ("llama", "jax")])
@pytest.mark.parametrize("metric", metrics)
@pytest.mark.parametrize("source", sources)
def test_gradient_agrees(family: str, backend: str, metric: str, source: str) -> None:
    pairs = PAIRS if metric == "logit_diff" else ONE_LENGTH
    ours, expected = engine(family, backend, metric, source, pairs=pairs), expected_gradient(family, metric, source, pairs=pairs)
    mask = np.random.default_rng(5).uniform(size=ours.graph.shape)
    assert np.allclose(ours.gradient(mask), expected, atol=SLOPE * np.abs(expected).max())


@backends
def test_gradient_at_the_model_tells_heads_of_a_group_apart(backend: str) -> None:
    """At `m = 1` a group's keys and values are equal, but not what they are used for. (PyTorch once gave all to the first head.)"""
    reference, ours = engine("llama", "reference", per_head_kv=True), engine("llama", backend, per_head_kv=True)
    everything = np.ones(ours.graph.shape)
    expected = reference.gradient(everything)
    assert np.allclose(ours.gradient(everything), expected, atol=SLOPE * np.abs(expected).max())


@families
@backends
def test_mixed_gradient_and_activations_agree(family: str, backend: str) -> None:
    reference, ours = engine(family, "reference"), engine(family, backend)
    mask = np.random.default_rng(5).uniform(size=reference.graph.shape)
    expected = expected_gradient(family, mix=0.3)
    assert np.allclose(ours.gradient(mask, mix=0.3), expected, atol=SLOPE * np.abs(expected).max())
    for m in (None, mask):
        said, wanted = ours.activations(m), reference.activations(m)
        assert all(np.allclose(said[i], wanted[i], atol=TOLERANCE) for i in range(len(PAIRS)))


SCORES: list[tuple[Algorithm, str]] = [
    (EAP(), "logit_diff"),
    (ActivationPatching(max_lanes=LANES), "logit_diff"),
    (ActivationPatching(level="node", direction="denoising", max_lanes=LANES), "kl"),
    (ActivationPatching(direction="denoising", max_lanes=LANES), "nll"),
]


@families
@pytest.mark.parametrize(("algorithm", "metric"), SCORES, ids=str)
def test_scores_agree(family: str, algorithm: Algorithm, metric: str) -> None:
    expected = algorithm.run(engine(family, "reference", metric))
    assert expected.scores is not None
    for backend in BACKENDS:
        outcome = algorithm.run(engine(family, backend, metric))
        assert np.allclose(outcome.scores, expected.scores, atol=1e-4 * np.abs(expected.scores).max()), backend
        assert np.array_equal(outcome.mask, expected.mask), backend


@families
@pytest.mark.parametrize("threshold", [0.003, 0.03, 0.3])
@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize("group_first", [True, False])
def test_acdc_finds_the_same_circuit(family: str, threshold: float, metric: str, group_first: bool) -> None:
    algorithm = ACDC(threshold=threshold, group_first=group_first, max_lanes=LANES)
    expected = algorithm.run(engine(family, "reference", metric))
    assert expected.record["smallest_margin"] > 1e-6, "a decision too close for rounding not to settle: choose another threshold"
    for backend in BACKENDS:
        outcome = algorithm.run(engine(family, backend, metric))
        assert np.array_equal(outcome.mask, expected.mask), backend
        assert [d[0] for d in outcome.record["decisions"]] == [d[0] for d in expected.record["decisions"]], backend
