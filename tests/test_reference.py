"""The numpy reference model and engine against the plain forward pass and transformers. The laws: `test_engine_laws.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engines import ONLY_REFERENCE
from twins import small_model, twin

from circuitgraph._engine import Rule
from circuitgraph._names import Writer
from circuitgraph.testing import ReferenceModel, _reference_engine, random_pairs

LLAMA: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2, "rotary_base": 1e4, "n_positions": 0, "gated": True, "act": "silu", "biases": False}
MODELS: dict[str, dict[str, Any]] = {"gpt2": {"norm": "layer", "act": "gelu_tanh"}, "llama": LLAMA, **ONLY_REFERENCE}
MODEL = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
LINEAR: dict[str, Any] = {"n_heads": 0, "norm": None, "act": "identity", "n_layers": 3}


def logit_diff(logits: Any, pairs: Any) -> Any:
    return np.array([row[a[0]] - row[w[0]] for row, a, w in zip(logits, pairs.answers, pairs.wrong_answers, strict=True)])


def last_logits(model: ReferenceModel, prompts: Any) -> Any:
    return np.stack([model.forward(tokens[None])[0, -1] for tokens in prompts])


def forward_with(model: ReferenceModel, tokens: Any, writer: Writer, value: Any) -> Any:
    """The last logits of a plain forward pass in which one writer says something else."""
    stream = value if writer.kind == "input" else model.embed(tokens)
    for number, layer in enumerate(model.layers):
        before = stream
        if layer.attention:
            attention = layer.attention
            parts, rest = attention.parts([attention.head(h, before, before, before) for h in range(attention.n_heads)])
            if writer.kind == "head" and writer.layer == number:
                parts[writer.index] = value
            stream = stream + sum(parts) + rest
        if layer.mlp:
            said = layer.mlp(before if layer.is_parallel else stream)
            stream = stream + (value if writer == Writer("mlp", number) else said)
    return model.unembed(stream[:, -1])


@MODEL
def test_patching_a_node_is_replacing_what_it_says(options: dict[str, Any]) -> None:
    model, pairs = ReferenceModel.random(3, **options), random_pairs(3, lengths=(4, 4))
    engine = model.bind(pairs, "logit_diff")
    corrupted = engine.reversed().activations()
    for w, writer in enumerate(engine.graph.writers):
        mask = np.ones(engine.graph.shape)
        mask[:, w] = 0
        expected = [forward_with(model, ids[None], writer, corrupted[i][None, w])[0] for i, ids in enumerate(pairs.clean)]
        assert np.allclose(engine.evaluate(mask[None])[0], logit_diff(expected, pairs), atol=1e-12), writer


@MODEL
def test_masks_that_agree_in_their_first_layers_are_as_each_alone(options: dict[str, Any]) -> None:
    engine = ReferenceModel.random(5, **options).bind(random_pairs(5, lengths=(4, 3, 4)), "logit_diff")
    rng = np.random.default_rng(5)
    for row in (0, len(engine.graph.readers) // 2, -1):
        masks = np.repeat(rng.uniform(size=(1, *engine.graph.shape)), 4, axis=0)
        masks[1:, row:] = rng.uniform(size=masks[1:, row:].shape).round()
        assert np.allclose(engine.evaluate(masks), np.concatenate([engine.evaluate(mask[None]) for mask in masks]), rtol=1e-12, atol=1e-12)


def test_writers_add_up_to_the_stream() -> None:
    model, pairs = ReferenceModel.random(4, **LLAMA), random_pairs(4)
    values = model.bind(pairs, "logit_diff").activations()
    for i, tokens in enumerate(pairs.clean):
        assert np.allclose(model.unembed(values[i].sum(0)), model.forward(tokens[None])[0], atol=1e-12)


@pytest.mark.parametrize("row", range(-1, 3))
def test_metric_is_affine_in_one_edge_of_a_linear_model(row: int) -> None:
    engine = ReferenceModel.random(8, **LINEAR).bind(random_pairs(8), "logit_diff")
    masks = np.repeat(np.random.default_rng(1).random((1, *engine.graph.shape)), 3, axis=0)
    masks[:, row, 0] = 0.0, 0.3, 1.0
    zero, some, one = engine.evaluate(masks)
    assert np.allclose(some, 0.7 * zero + 0.3 * one, atol=1e-12)


def test_mixed_gradient_is_that_of_the_mixed_run() -> None:
    model, pairs = ReferenceModel.random(12, n_heads=0, n_layers=1, norm=None), random_pairs(12, lengths=(4,))
    engine, mlp = model.bind(pairs, "logit_diff"), model.layers[0].mlp
    assert mlp is not None
    clean, corrupted = model.embed(pairs.clean[0][None]), model.embed(pairs.corrupted[0][None])
    direction, at = clean - corrupted, corrupted + 0.3 * (clean - corrupted)
    push = (mlp(at + 1e-5 * direction) - mlp(at - 1e-5 * direction)) / 2e-5
    expected = logit_diff(push[:, -1] @ model.unembedding.T, pairs)
    assert np.allclose(engine.gradient(np.ones(engine.graph.shape), mix=0.3)[:, 0, 0], expected, atol=1e-8)


def test_equal_hashes_are_equal_weights() -> None:
    hashes = [ReferenceModel.random(seed, **options).weights_hash() for seed in (14, 15) for options in MODELS.values()]
    assert len(set(hashes)) == len(hashes)
    assert ReferenceModel.random(14).traced().provenance["weights_sha256"] == ReferenceModel.random(14).weights_hash()


def test_a_check_that_does_not_hold_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, pairs = ReferenceModel.random(14).traced(), random_pairs(14, lengths=(4, 5))
    forward, stream = ReferenceModel.forward, ReferenceModel.stream
    monkeypatch.setattr(ReferenceModel, "forward", lambda self, tokens: forward(self, tokens) + 1e-6)
    assert [check.holds for check in traced.checks(pairs)] == [False, False, True, True, True]
    monkeypatch.setattr(ReferenceModel, "forward", forward)
    monkeypatch.setattr(ReferenceModel, "stream", lambda self, tokens: stream(self, tokens) + 1e-6)
    assert [check.holds for check in traced.checks(pairs)] == [False, False, False, True, True]
    monkeypatch.setattr(ReferenceModel, "stream", stream)
    attention = traced.model.layers[1].attention
    assert attention is not None
    monkeypatch.setitem(attention.__dict__, "o", 0 * attention.o)
    *_, last = traced.checks(pairs)
    assert last.error == 6
    assert "a1.h0<q>, a1.h1<q>" in last.what


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_full_mask_is_transformers(family: str) -> None:
    torch = pytest.importorskip("torch")
    hf = small_model(family)
    model, pairs = twin(hf), random_pairs(17, lengths=(6, 6))
    with torch.no_grad():
        logits = hf(torch.tensor(np.stack(pairs.clean))).logits[:, -1].numpy()
    engine = model.bind(pairs, "logit_diff")
    assert np.allclose(model.traced().logits(pairs), logits, atol=1e-5)
    assert np.allclose(engine.evaluate(np.ones((1, *engine.graph.shape)))[0], logit_diff(logits, pairs), atol=1e-5)


@pytest.mark.parametrize("mix", [1.0, 0.4])
def test_tokens_and_positions_apart_share_what_the_input_has(mix: float) -> None:
    """By scores; and patching both is patching the input."""
    model, pairs = ReferenceModel.random(5, n_layers=1), random_pairs(5, lengths=(4, 4))
    whole, apart = (replace(model, splits_input=splits).bind(pairs, "logit_diff", "zero") for splits in (False, True))
    scores, parts = (engine.gradient(np.ones(engine.graph.shape), mix=mix) for engine in (whole, apart))
    assert np.allclose(parts[..., 0] + parts[..., 1], scores[..., 0], atol=1e-6)
    assert np.allclose(parts[..., 2:], scores[..., 1:], atol=1e-6)
    mask = np.random.default_rng(0).uniform(size=(1, *whole.graph.shape))
    assert np.allclose(apart.evaluate(np.concatenate([mask[..., :1], mask], axis=-1)), whole.evaluate(mask), atol=1e-12)


@pytest.mark.parametrize("patterns", ["exact", "recomputed"])
def test_room_for_few_nudges_changes_no_gradient(monkeypatch: pytest.MonkeyPatch, patterns: Any) -> None:
    model = ReferenceModel.random(3, n_kv_heads=1)
    engine = model.bind(random_pairs(3, lengths=(4, 4, 3), vocabulary=len(model.embedding)), "logit_diff")
    mask = np.ones(engine.graph.shape)
    together = engine.gradient(mask, rule=Rule(patterns=patterns))
    monkeypatch.setattr(_reference_engine, "_LANE_NUMBERS", 1)  # each reader by itself
    assert np.allclose(engine.gradient(mask, rule=Rule(patterns=patterns)), together, atol=1e-8 * np.abs(together).max())
    assert np.count_nonzero(together) > 0
