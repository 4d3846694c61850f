"""The numpy reference engine against the plain forward pass, against transformers, and against what the protocol promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from twins import small_model, twin

from circuitgraph._engine import Source
from circuitgraph._errors import CircuitGraphError, DegenerateError, TaskError, UnknownNameError
from circuitgraph._metrics import log_softmax
from circuitgraph._names import Writer
from circuitgraph.testing import (
    ReferenceModel,
    ReferenceValues,
    random_pairs,
)

LLAMA: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2, "rotary_base": 1e4, "n_positions": 0, "gated": True, "act": "silu", "biases": False}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layer", "act": "gelu_tanh"},
    "llama": LLAMA,
    "gemma": LLAMA | {"post_norm": True, "logit_softcap": 3.0},
    "post-norm with biases": {"norm": "layer", "post_norm": True},
    "neox": {"parallel": True, "norm": "layer"},
    "granite": LLAMA | {"scale": 0.3},
    "attention only": {"d_mlp": 0},
    "mlp only": {"n_heads": 0, "act": "relu"},
    "without norms": {"norm": None, "act": "identity"},
}
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
@pytest.mark.parametrize("metric", ["logit_diff", "nll", "kl", "prob_diff", "accuracy"])
def test_full_mask_is_the_model(options: dict[str, Any], metric: str) -> None:
    model, pairs = ReferenceModel.random(1, **options), random_pairs(1)
    value = model.bind(pairs, metric).evaluate(np.ones((1, *model.graph().shape)))[0]
    logits = last_logits(model, pairs.clean)
    answers = np.array([a[0] for a in pairs.answers])
    if metric == "logit_diff":
        assert np.allclose(value, logit_diff(logits, pairs), atol=1e-12)
    if metric == "nll":
        assert np.allclose(value, -log_softmax(logits)[range(3), answers], atol=1e-12)
    if metric == "kl":
        assert np.allclose(value, 0, atol=1e-12)


@MODEL
@pytest.mark.parametrize("per_head_kv", [False, True])
def test_empty_mask_is_the_corrupted_run(options: dict[str, Any], per_head_kv: bool) -> None:
    model, pairs = ReferenceModel.random(2, **options), random_pairs(2)
    engine = model.bind(pairs, "logit_diff", per_head_kv=per_head_kv)
    value = engine.evaluate(np.zeros((1, *engine.graph.shape)))[0]
    assert np.allclose(value, logit_diff(last_logits(model, pairs.corrupted), pairs), atol=1e-12)


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


def test_an_empty_mask_hears_only_the_source_but_the_input_says_what_it_says() -> None:
    engine = ReferenceModel.random(4).bind(random_pairs(4), "logit_diff")
    nothing, clean, corrupted = engine.activations(np.zeros(engine.graph.shape)), engine.activations(), engine.reversed().activations()
    for i in range(3):
        assert np.allclose(nothing[i][0], clean[i][0])
        assert np.allclose(nothing[i][1:], corrupted[i][1:])


def test_writers_add_up_to_the_stream() -> None:
    model, pairs = ReferenceModel.random(4, **LLAMA), random_pairs(4)
    values = model.bind(pairs, "logit_diff").activations()
    for i, tokens in enumerate(pairs.clean):
        assert np.allclose(model.unembed(values[i].sum(0)), model.forward(tokens[None])[0], atol=1e-12)


@MODEL
def test_explicit_source_values_are_the_source(options: dict[str, Any]) -> None:
    model, pairs = ReferenceModel.random(5, **options), random_pairs(5)
    engine = model.bind(pairs, "logit_diff")
    other = model.bind(pairs, "logit_diff", "zero")
    masks = np.random.default_rng(0).random((2, *engine.graph.shape))
    source_run = engine.reversed().activations()
    assert np.allclose(other.evaluate(masks, source=source_run), engine.evaluate(masks), atol=1e-12)


def test_sources_by_hand() -> None:
    model, pairs, data = ReferenceModel.random(6), random_pairs(6, lengths=(4, 6, 4)), random_pairs(7, lengths=(4, 6, 6, 4))
    swapped = replace(data, clean=data.corrupted, corrupted=data.clean)
    for source, prompts in ((None, pairs), (data, swapped)):
        said = model.bind(prompts, "kl").reversed().activations().prompts
        everywhere = np.mean([vector for values in said for vector in values.swapaxes(0, 1)], axis=0)[:, None]
        mean = model.bind(pairs, "kl", Source("mean", source))._own_source
        by_position = model.bind(pairs, "kl", Source("mean-per-position", source))._own_source
        for i, length in enumerate((4, 6, 4)):
            assert np.allclose(mean[i], everywhere)
            assert np.allclose(by_position[i], np.mean([values for values in said if values.shape[1] == length], axis=0))
    assert not model.bind(pairs, "kl", "zero")._own_source[1].any()


@pytest.mark.parametrize("row", range(-1, 3))
def test_metric_is_affine_in_one_edge_of_a_linear_model(row: int) -> None:
    engine = ReferenceModel.random(8, **LINEAR).bind(random_pairs(8), "logit_diff")
    masks = np.repeat(np.random.default_rng(1).random((1, *engine.graph.shape)), 3, axis=0)
    masks[:, row, 0] = 0.0, 0.3, 1.0
    zero, some, one = engine.evaluate(masks)
    assert np.allclose(some, 0.7 * zero + 0.3 * one, atol=1e-12)


@MODEL
def test_lengths_do_not_mix(options: dict[str, Any]) -> None:
    model, pairs = ReferenceModel.random(9, **options), random_pairs(9, lengths=(4, 6, 4, 5))
    mask = np.random.default_rng(2).random((1, *model.graph().shape))
    together = model.bind(pairs, "nll").evaluate(mask)[0]
    alone = [model.bind(pairs.select([i]), "nll").evaluate(mask)[0, 0] for i in range(4)]
    assert np.allclose(together, alone, atol=1e-12)


def test_grouped_readers_are_equal_rows_of_their_heads() -> None:
    model, pairs = ReferenceModel.random(10, **LLAMA), random_pairs(10)
    grouped, split = model.bind(pairs, "nll"), model.bind(pairs, "nll", per_head_kv=True)
    masks = np.random.default_rng(3).random((3, *grouped.graph.shape))
    rows = [grouped.graph.reader_id(reader) for reader in split.graph.readers]
    assert len(grouped.graph.readers) < len(split.graph.readers)
    assert np.allclose(grouped.evaluate(masks), split.evaluate(masks[:, rows]), atol=1e-12)


@MODEL
@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
def test_gradient_is_the_derivative_by_the_mask(options: dict[str, Any], metric: str) -> None:
    model = ReferenceModel.random(11, **({"n_layers": 1} | options))
    engine = model.bind(random_pairs(11, lengths=(3, 4)), metric)
    mask = np.random.default_rng(4).random(engine.graph.shape)
    gradient = engine.gradient(mask)
    for r, w in np.argwhere(engine.graph.visible)[::3]:
        masks = np.repeat(mask[None], 2, axis=0)
        masks[:, r, w] += 1e-5, -1e-5
        up, down = engine.evaluate(masks)
        assert np.allclose(gradient[:, r, w], (up - down) / 2e-5, atol=1e-8)
    assert not gradient[:, ~engine.graph.visible].any()


def test_mixed_gradient_is_that_of_the_mixed_run() -> None:
    model, pairs = ReferenceModel.random(12, n_heads=0, n_layers=1, norm=None), random_pairs(12, lengths=(4,))
    engine, mlp = model.bind(pairs, "logit_diff"), model.layers[0].mlp
    assert mlp is not None
    clean, corrupted = model.embed(pairs.clean[0][None]), model.embed(pairs.corrupted[0][None])
    direction, at = clean - corrupted, corrupted + 0.3 * (clean - corrupted)
    push = (mlp(at + 1e-5 * direction) - mlp(at - 1e-5 * direction)) / 2e-5
    expected = logit_diff(push[:, -1] @ model.unembedding.T, pairs)
    assert np.allclose(engine.gradient(np.ones(engine.graph.shape), mix=0.3)[:, 0, 0], expected, atol=1e-8)


def test_reversed_exchanges_prompts_but_not_the_question() -> None:
    model, pairs = ReferenceModel.random(13), random_pairs(13)
    for metric in ("kl", "logit_diff"):
        engine = model.bind(pairs, metric)
        ends = np.stack([np.zeros(engine.graph.shape), np.ones(engine.graph.shape)])
        assert np.allclose(engine.reversed().evaluate(ends), engine.evaluate(ends)[::-1], atol=1e-12)
        assert np.allclose(engine.reversed().reversed().evaluate(ends), engine.evaluate(ends), atol=1e-12)


@MODEL
def test_trace_proves_itself(options: dict[str, Any]) -> None:
    traced = ReferenceModel.random(14, **options).traced()
    checks = list(traced.checks(random_pairs(14, lengths=(4, 5))))
    assert [check.name for check in checks] == ["F(1)", "F(0)"]
    assert all(check.holds for check in checks), checks
    assert traced.architecture.graph() == traced.graph
    weights = traced.provenance["weights_sha256"]
    assert weights == ReferenceModel.random(14, **options).weights_hash() != ReferenceModel.random(15).weights_hash()


def test_refusals() -> None:
    model, pairs = ReferenceModel.random(16), random_pairs(16)
    engine = model.bind(pairs, "kl")
    with pytest.raises(DegenerateError, match="acdc"):
        engine.gradient(np.ones(engine.graph.shape))
    with pytest.raises(DegenerateError, match="no gradient"):
        model.bind(pairs, "accuracy").gradient(np.ones(engine.graph.shape))
    with pytest.raises(DegenerateError, match="zero"):
        model.bind(pairs, "kl", "zero").reversed()
    with pytest.raises(CircuitGraphError, match="shape"):
        engine.evaluate(np.ones(engine.graph.shape)[None, 1:])
    with pytest.raises(CircuitGraphError, match="expected 3"):
        engine.evaluate(np.ones((1, *engine.graph.shape)), source=ReferenceValues(()))
    with pytest.raises(TaskError, match="vocabulary"):
        model.bind(random_pairs(0, vocabulary=99), "kl")
    with pytest.raises(TaskError, match="wrong answer"):
        model.bind(replace(pairs, wrong_answers=()), "logit_diff")
    with pytest.raises(TaskError, match="5 tokens"):
        model.bind(pairs, "kl", Source("mean-per-position", random_pairs(0, lengths=(4,)))).evaluate(np.ones((1, *engine.graph.shape)))
    with pytest.raises(UnknownNameError):
        model.bind(pairs, "kl", "corupted")  # type: ignore[arg-type]


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
