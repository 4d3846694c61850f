"""The PyTorch engine on every family: against nnsight on the untouched model, and finite differences. The laws: `test_engine_laws.py`."""

from __future__ import annotations

from dataclasses import dataclass

import families
import numpy as np
import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import oracle_logits, oracle_writers

import circuitgraph_torch
from circuitgraph._engine import Source
from circuitgraph._pairs import PromptPairs
from circuitgraph_torch._engine import TorchEngine

N_PROMPTS, LENGTH = 3, 9
TRACEABLE = [name for name in FAMILIES if name != "bloom"]
# Top-k routing jumps: finite differences across a jump say nothing about the gradient.
SMOOTH = [name for name in TRACEABLE if name not in ("mixtral", "qwen3_moe")]


@dataclass(frozen=True)
class Bound:
    """A tiny model, traced and bound, with what the oracle needs."""

    traced: circuitgraph_torch.TorchModel
    pairs: PromptPairs
    engine: TorchEngine
    corrupted_values: torch.Tensor

    @property
    def clean(self) -> torch.Tensor:
        return torch.from_numpy(np.stack(self.pairs.clean))


def make_pairs(vocabulary: int, seed: int = 0, n: int = N_PROMPTS, length: int = LENGTH) -> PromptPairs:
    rng = np.random.default_rng(seed)
    clean = rng.integers(3, vocabulary, (n, length))
    corrupted = clean.copy()
    corrupted[:, [2, 5]] = 3 + (clean[:, [2, 5]] - 3 + rng.integers(1, vocabulary - 3, (n, 2))) % (vocabulary - 3)
    answers = rng.integers(3, vocabulary, n)
    return PromptPairs(clean=clean, corrupted=corrupted, answers=answers, wrong_answers=3 + (answers - 2) % (vocabulary - 3))


_BOUND: dict[str, Bound] = {}


def bound(family: str) -> Bound:
    if family not in _BOUND:
        traced = families.traced(family)
        pairs = make_pairs(traced.architecture.vocabulary)
        engine = traced.bind(pairs, "logit_diff")
        values = engine.reversed().activations()
        corrupted = torch.from_numpy(np.stack([values[i] for i in range(len(pairs))], axis=1))
        _BOUND[family] = Bound(traced, pairs, engine, corrupted)
    return _BOUND[family]


def engine_logits(engine: TorchEngine, mask: np.ndarray) -> torch.Tensor:
    ((_, logits),) = engine.logits(mask)
    return logits


def relative(got: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    got, expected = np.asarray(got), np.asarray(expected)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def log_diff(logits: torch.Tensor, pairs: PromptPairs) -> np.ndarray:
    rows = range(len(pairs))
    last = logits[:, -1].numpy()
    return np.array([last[i, pairs.answers[i][0]] - last[i, pairs.wrong_answers[i][0]] for i in rows])


@pytest.mark.parametrize("family", TRACEABLE)
def test_full_mask_is_the_model_and_empty_mask_the_source_run(family: str) -> None:
    b = bound(family)
    ones, zeros = np.ones(b.engine.graph.shape), np.zeros(b.engine.graph.shape)
    with torch.no_grad():
        clean = b.traced.module(b.clean, use_cache=False).logits
        corrupted = b.traced.module(torch.from_numpy(np.stack(b.pairs.corrupted)), use_cache=False).logits
    assert relative(engine_logits(b.engine, ones), clean) < 1e-5
    assert relative(engine_logits(b.engine, zeros), corrupted) < 1e-5
    assert np.allclose(b.engine.evaluate(np.stack([ones, zeros])), [log_diff(clean, b.pairs), log_diff(corrupted, b.pairs)], atol=1e-4)


@pytest.mark.parametrize("family", TRACEABLE)
def test_writers_are_those_of_the_original(family: str) -> None:
    b = bound(family)
    corrupted = torch.from_numpy(np.stack(b.pairs.corrupted))
    assert relative(b.corrupted_values, oracle_writers(b.traced.module, b.traced.architecture, corrupted)) < 1e-5


@pytest.mark.parametrize("family", TRACEABLE)
@pytest.mark.parametrize("kind", ["any float", "half the edges", "outside 0 to 1"])
def test_masked_forward_agrees_with_nnsight_on_the_untouched_model(family: str, kind: str) -> None:
    b = bound(family)
    rng = np.random.default_rng(1)
    low, high = (-1, 2) if kind == "outside 0 to 1" else (0, 1)
    mask = rng.uniform(low, high, b.engine.graph.shape)
    mask = (mask < 0.5).astype(float) if kind == "half the edges" else mask
    expected = oracle_logits(b.traced.module, b.traced.architecture, b.clean, mask, b.corrupted_values)
    assert relative(engine_logits(b.engine, mask), expected) < 1e-5
    assert np.allclose(b.engine.evaluate(mask[None])[0], log_diff(expected, b.pairs), atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", TRACEABLE)
def test_single_edges_agree_with_nnsight(family: str) -> None:
    b = bound(family)
    rng = np.random.default_rng(2)
    edges = rng.permutation(np.argwhere(b.engine.graph.visible))[:8]
    masks = np.ones((len(edges), *b.engine.graph.shape))
    masks[np.arange(len(edges)), edges[:, 0], edges[:, 1]] = 0
    got = b.engine.evaluate(masks)
    for mask, values in zip(masks, got, strict=True):
        expected = oracle_logits(b.traced.module, b.traced.architecture, b.clean, mask, b.corrupted_values)
        assert np.allclose(values, log_diff(expected, b.pairs), atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", TRACEABLE)
def test_lanes_that_start_late_agree_with_whole_runs(family: str) -> None:
    b = bound(family)
    rng = np.random.default_rng(3)
    shape = b.engine.graph.shape
    masks = np.ones((7, *shape))
    for mask in masks[1:]:
        rows = rng.integers(0, shape[0], 2)
        mask[rows] = rng.integers(0, 2, (2, shape[1]))
    whole = [log_diff(engine_logits(b.engine, mask), b.pairs) for mask in masks]
    assert np.allclose(b.engine.evaluate(masks), whole, atol=5e-5)
    assert np.allclose([b.engine.evaluate(mask[None])[0] for mask in masks], whole, atol=5e-5)


@pytest.mark.parametrize("family", SMOOTH)
@pytest.mark.parametrize("where", ["at the model", "inside"])
def test_gradient_agrees_with_finite_differences(family: str, where: str) -> None:
    b = bound(family)
    rng = np.random.default_rng(4)
    mask = np.ones(b.engine.graph.shape) if where == "at the model" else rng.uniform(0.2, 0.9, b.engine.graph.shape)
    gradient = b.engine.gradient(mask)
    edges = rng.permutation(np.argwhere(b.engine.graph.visible))[:10]
    step = 0.02  # most norms compute in float32 whatever the input: a smaller step drowns in rounding
    masks = np.repeat(mask[None], 2 * len(edges), axis=0)
    for i, (r, w) in enumerate(edges):
        masks[2 * i, r, w] += step
        masks[2 * i + 1, r, w] -= step
    values = b.engine.evaluate(masks)
    slopes = (values[0::2] - values[1::2]) / (2 * step)
    found = gradient[:, edges[:, 0], edges[:, 1]].T
    assert np.allclose(slopes, found, rtol=3e-2, atol=3e-3 * np.abs(gradient).max())


def test_every_edge_of_a_model_agrees_with_nnsight() -> None:
    b = bound("gpt2")
    edges = np.argwhere(b.engine.graph.visible)
    masks = np.ones((len(edges), *b.engine.graph.shape))
    masks[np.arange(len(edges)), edges[:, 0], edges[:, 1]] = 0
    expected = [
        log_diff(oracle_logits(b.traced.module, b.traced.architecture, b.clean, mask, b.corrupted_values), b.pairs) for mask in masks
    ]
    assert np.allclose(b.engine.evaluate(masks), expected, atol=2e-5 * float(np.abs(expected).max()))


def test_a_model_in_training_mode_is_measured_without_dropout_and_left_in_training_mode() -> None:
    model = tiny("gpt2").train()
    traced = circuitgraph_torch.trace(model)
    engine = traced.bind(make_pairs(90), "logit_diff")
    mask = np.random.default_rng(14).uniform(size=engine.graph.shape)
    assert np.array_equal(engine.evaluate(mask[None]), engine.evaluate(mask[None]))
    assert np.array_equal(engine.gradient(mask), engine.gradient(mask))
    assert np.array_equal(traced.logits(make_pairs(90)), traced.logits(make_pairs(90)))
    expected = circuitgraph_torch.trace(tiny("gpt2")).bind(make_pairs(90), "logit_diff").evaluate(mask[None])
    assert np.allclose(engine.evaluate(mask[None]), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("source", ["zero", "mean", "mean-per-position"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_sources_agree_with_the_oracle(family: str, source: str) -> None:
    b = bound(family)
    mask = np.random.default_rng(5).uniform(size=b.engine.graph.shape)
    values = {
        "zero": torch.zeros_like(b.corrupted_values),
        "mean": b.corrupted_values.mean((1, 2), keepdim=True),
        "mean-per-position": b.corrupted_values.mean(1, keepdim=True),
    }[source]
    expected = oracle_logits(b.traced.module, b.traced.architecture, b.clean, mask, values.expand_as(b.corrupted_values))
    engine = b.traced.bind(b.pairs, "logit_diff", source)  # type: ignore[arg-type]
    assert np.allclose(engine.evaluate(mask[None])[0], log_diff(expected, b.pairs), atol=1e-4)


def test_mean_over_a_data_set_of_several_lengths() -> None:
    b = bound("llama")
    data = [make_pairs(90, seed=7, n=2, length=6), make_pairs(90, seed=8, n=3, length=LENGTH)]
    both = PromptPairs(clean=[*data[0].clean, *data[1].clean], corrupted=[*data[0].corrupted, *data[1].corrupted], answers=[1] * 5)
    tokens = [oracle_writers(b.traced.module, b.traced.architecture, torch.from_numpy(np.stack(d.clean))).flatten(1, 2) for d in data]
    mean = torch.cat(tokens, dim=1).mean(1)[:, None, None].expand_as(b.corrupted_values)
    mask = np.random.default_rng(6).uniform(size=b.engine.graph.shape)
    expected = oracle_logits(b.traced.module, b.traced.architecture, b.clean, mask, mean)
    engine = b.traced.bind(b.pairs, "logit_diff", Source("mean", both))
    assert np.allclose(engine.evaluate(mask[None])[0], log_diff(expected, b.pairs), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16), density=st.floats(0, 1), family=st.sampled_from(["gpt2", "llama", "gpt_neox", "olmo2", "attention_only"])
)
def test_any_circuit_agrees_with_the_oracle(seed: int, density: float, family: str) -> None:
    b = bound(family)
    mask = (np.random.default_rng(seed).uniform(size=b.engine.graph.shape) < density).astype(float)
    expected = oracle_logits(b.traced.module, b.traced.architecture, b.clean, mask, b.corrupted_values)
    assert np.allclose(b.engine.evaluate(mask[None])[0], log_diff(expected, b.pairs), atol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("gpt2")
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    engine = circuitgraph_torch.trace(model).bind(make_pairs(90), "logit_diff")
    engine.gradient(np.ones(engine.graph.shape))
    engine.evaluate(np.zeros((2, *engine.graph.shape)))
    assert all(torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
