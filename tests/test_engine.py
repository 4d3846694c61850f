"""The PyTorch engine against nnsight on the untouched model, against itself, and against finite differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import oracle_logits, oracle_writers

import circuitgraph_torch
from circuitgraph._engine import Source
from circuitgraph._errors import CircuitGraphError, DegenerateError, TaskError
from circuitgraph._metrics import METRICS
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
        traced = circuitgraph_torch.trace(tiny(family))
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


def test_gradient_is_zero_where_there_is_no_edge() -> None:
    b = bound("gpt2")
    assert not b.engine.gradient(np.ones(b.engine.graph.shape))[:, ~b.engine.graph.visible].any()


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


def test_per_head_kv_with_equal_rows_is_the_grouped_run_and_splits_otherwise() -> None:
    b = bound("llama")
    split = circuitgraph_torch.trace(b.traced.module, per_head_kv=True)
    engine = split.bind(b.pairs, "logit_diff")
    rng = np.random.default_rng(7)
    grouped = rng.uniform(size=b.engine.graph.shape)
    rows = [b.engine.graph.reader_id(reader) for reader in engine.graph.readers]
    assert np.allclose(engine.evaluate(grouped[rows][None]), b.engine.evaluate(grouped[None]), atol=5e-5)
    one_head = np.ones(engine.graph.shape)
    one_head[engine.graph.reader_id("a1.h1<k>"), 0] = 0
    other_head = np.ones(engine.graph.shape)
    other_head[engine.graph.reader_id("a1.h0<k>"), 0] = 0
    values = engine.evaluate(np.stack([one_head, other_head, one_head * other_head]))
    assert len({round(float(v), 4) for v in values[:, 0]}) == 3


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_every_metric_is_what_the_original_logits_give(metric: str) -> None:
    b = bound("gpt2")
    engine = b.traced.bind(b.pairs, metric)
    mask = np.random.default_rng(8).uniform(size=engine.graph.shape)
    logits = engine_logits(engine, mask)[:, -1].double().numpy()
    clean = b.traced.logits(b.pairs).astype(np.float64)
    probs, clean_probs = (np.exp(x - x.max(-1, keepdims=True)) for x in (logits, clean))
    probs, clean_probs = probs / probs.sum(-1, keepdims=True), clean_probs / clean_probs.sum(-1, keepdims=True)
    rows = np.arange(len(b.pairs))
    a, w = (np.array([ids[0] for ids in sets]) for sets in (b.pairs.answers, b.pairs.wrong_answers))
    expected = {
        "logit_diff": logits[rows, a] - logits[rows, w],
        "prob_diff": probs[rows, a] - probs[rows, w],
        "nll": -np.log(probs[rows, a]),
        "kl": (clean_probs * np.log(clean_probs / probs)).sum(-1),
        "accuracy": (logits[rows, a] > logits[rows, w]).astype(float),
    }[metric]
    assert np.allclose(engine.evaluate(mask[None])[0], expected, atol=1e-4)


def test_buckets_and_their_cuts_give_each_prompt_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    b = bound("qwen2")
    short, long = make_pairs(90, seed=9, n=3, length=6), make_pairs(90, seed=10, n=4, length=10)
    order = [0, 3, 1, 4, 2, 5, 6]
    both = PromptPairs(
        clean=[*short.clean, *long.clean],
        corrupted=[*short.corrupted, *long.corrupted],
        answers=[*short.answers, *long.answers],
        wrong_answers=[*short.wrong_answers, *long.wrong_answers],
    ).select(order)
    mask = np.random.default_rng(11).uniform(size=b.engine.graph.shape)
    alone = [b.traced.bind(both.select([i]), "logit_diff").evaluate(mask[None])[0, 0] for i in range(len(both))]
    engine = b.traced.bind(both, "logit_diff")
    assert np.allclose(engine.evaluate(mask[None])[0], alone, atol=5e-5)
    gradient = engine.gradient(mask)
    monkeypatch.setattr("circuitgraph_torch._engine._BATCH_BYTES", 1)
    monkeypatch.setattr("circuitgraph_torch._engine._CACHE_BYTES", 1)
    cut = b.traced.bind(both, "logit_diff")
    assert np.allclose(cut.evaluate(mask[None])[0], alone, atol=5e-5)
    assert np.allclose(cut.gradient(mask), gradient, atol=1e-4)
    assert np.allclose(cut.activations()[1], engine.activations()[1], atol=1e-5)


def test_reversed_engine_runs_the_corrupted_prompts_and_patches_clean_values() -> None:
    b = bound("gpt2")
    swapped = PromptPairs(clean=b.pairs.corrupted, corrupted=b.pairs.clean, answers=b.pairs.answers, wrong_answers=b.pairs.wrong_answers)
    mask = np.random.default_rng(12).uniform(size=b.engine.graph.shape)
    assert np.allclose(b.engine.reversed().evaluate(mask[None]), b.traced.bind(swapped, "logit_diff").evaluate(mask[None]))
    kl = b.traced.bind(b.pairs, "kl").reversed().evaluate(np.stack([0 * mask, mask]))
    assert np.abs(kl[0]).max() < 1e-6 < kl[1].max()  # patched back to the clean run everywhere, it is the clean run


def test_explicit_source_values_replace_the_bound_ones() -> None:
    b = bound("llama")
    mask = np.random.default_rng(13).uniform(size=b.engine.graph.shape)
    zero = b.traced.bind(b.pairs, "logit_diff", "zero")
    values = b.engine.reversed().activations()
    assert np.allclose(zero.evaluate(mask[None], source=values), b.engine.evaluate(mask[None]), atol=5e-5)
    assert np.allclose(zero.gradient(mask, source=values), b.engine.gradient(mask), atol=1e-4)


def test_activations_under_a_mask_are_those_of_that_run() -> None:
    b = bound("llama")
    everything = np.ones(b.engine.graph.shape)
    none = b.engine.activations(0 * everything)
    assert np.allclose(none[0][1:], b.corrupted_values[1:, 0].numpy(), atol=1e-5)
    assert np.allclose(b.engine.activations(everything)[1], b.engine.activations()[1], atol=1e-5)


def test_mix_interpolates_the_input_and_keeps_the_differences() -> None:
    b = bound("gpt2")
    ones = np.ones(b.engine.graph.shape)
    logits_row = b.engine.gradient(ones, mix=0.5)
    # Only the input edge is interpolated: along it, the mean of the gradient is the change of F.
    only_input = np.zeros(b.engine.graph.shape)
    only_input[-1, 0] = 1
    values = b.engine.evaluate(np.stack([only_input, 0 * only_input]))
    nodes, weights = np.polynomial.legendre.leggauss(8)
    mean = sum(w / 2 * b.engine.gradient(only_input, mix=float((x + 1) / 2))[:, -1, 0] for x, w in zip(nodes, weights, strict=True))
    assert np.allclose(mean, values[0] - values[1], atol=1e-4)
    assert not np.allclose(logits_row, b.engine.gradient(ones), atol=1e-4)


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


def test_bad_questions_are_refused() -> None:
    b = bound("gpt2")
    ones = np.ones(b.engine.graph.shape)
    with pytest.raises(DegenerateError, match="zero gradient at the clean run.*acdc"):
        b.traced.bind(b.pairs, "kl").gradient(ones)
    with pytest.raises(DegenerateError, match="no gradient"):
        b.traced.bind(b.pairs, "accuracy").gradient(ones)
    assert np.isfinite(b.traced.bind(b.pairs, "kl").gradient(0.5 * ones)).all()
    with pytest.raises(CircuitGraphError, match=r"expected \[lanes, readers, writers\]"):
        b.engine.evaluate(ones)
    with pytest.raises(CircuitGraphError, match="NaN or infinity"):
        b.engine.evaluate(ones[None] * np.nan)
    with pytest.raises(TaskError, match="does not take prompts of 70 tokens"):
        b.traced.bind(make_pairs(90, length=70), "nll").evaluate(ones[None])
    with pytest.raises(TaskError, match="token id"):
        b.traced.bind(b.pairs, "nll", Source("mean", PromptPairs(clean=[[500]], corrupted=[[2]], answers=[3])))
    with pytest.raises(TaskError, match="token id 500 is not in the model's vocabulary"):
        b.traced.bind(PromptPairs(clean=[[500, 1]], corrupted=[[2, 1]], answers=[3]), "nll")
    with pytest.raises(TaskError, match="needs a wrong answer"):
        b.traced.bind(PromptPairs(clean=[[5, 1]], corrupted=[[2, 1]], answers=[3]), "logit_diff")
    with pytest.raises(TaskError, match="no reference prompt has 9 tokens"):
        b.traced.bind(b.pairs, "nll", Source("mean-per-position", make_pairs(90, length=7))).evaluate(ones[None] * 0)
