"""A replay may be as far from the model as the model's own rounding is, where that is, and nowhere else."""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import tiny
from torch import Tensor

import circuitgraph
import circuitgraph_torch
from circuitgraph import EAP, CircuitGraphError, TraceError, load_task
from circuitgraph.testing import random_pairs
from circuitgraph_torch._calls import original_logits
from circuitgraph_torch._rounding import errors, judged, moved_by_rounding


def not_asked() -> Tensor:
    raise AssertionError("the tolerance is enough")


def test_errors_are_by_position_and_over_the_largest_value_of_all() -> None:
    expected = torch.tensor([[[1.0, -4.0], [2.0, 0.0]]], dtype=torch.bfloat16)
    found = errors(expected + torch.tensor([[[0.0, 0.5], [-1.0, 0.25]]]), expected)
    assert found.dtype == torch.float32
    assert found.tolist() == [[0.125, 0.25]]


def test_the_tolerance_is_enough_where_no_position_exceeds_it() -> None:
    assert judged(torch.tensor([[0.25, 0.5]]), 0.5, not_asked) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([0.25, 1.5], (1.5, 2.0)),  # four roundings
        ([0.75, 0.0], (0.75, 0.5)),  # one position's rounding excuses no other
        ([0.625, 2.25], (0.625, 0.5)),  # the worst is not the largest
    ],
)
def test_rounding_excuses_the_positions_that_it_moves(found: list[float], expected: tuple[float, float]) -> None:
    assert judged(torch.tensor([found]), 0.5, lambda: torch.tensor([[0.0, 0.5]])) == expected


def test_nothing_excuses_a_nan() -> None:
    error, allowed = judged(torch.tensor([[0.0, float("nan"), 9.0]]), 0.5, lambda: torch.full((1, 3), 1.0))
    assert np.isnan(error)
    assert not error <= allowed


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 1e-8, 1e-5), (torch.bfloat16, 1e-3, 0.2)])
def test_a_rounding_moves_as_much_as_the_dtype_says(dtype: torch.dtype, least: float, most: float) -> None:
    parts = circuitgraph_torch.trace(tiny("llama", dtype=dtype))._parts
    ids = torch.arange(10).view(2, 5)
    before = original_logits(parts.model, ids)
    moved = moved_by_rounding(parts, lambda: original_logits(parts.model, ids))
    assert moved.shape == (2, 5)
    assert least < float(moved.min()) <= float(moved.max()) < most
    assert torch.equal(original_logits(parts.model, ids), before)  # no hook is left behind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_description_is_refused_in_half_precision_too(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    found = circuitgraph_torch.find_architecture(model)
    with pytest.raises(TraceError, match="final norm"):
        circuitgraph_torch.trace(model, architecture=dataclasses.replace(found, logit_scale=1.5))
    shifted = dataclasses.replace(found.blocks[1], parallel=True)
    with pytest.raises(TraceError, match="differs from the model"):
        circuitgraph_torch.trace(model, architecture=dataclasses.replace(found, blocks=(found.blocks[0], shifted, *found.blocks[2:])))


def test_a_proof_says_what_was_allowed() -> None:
    proof = families.traced("llama").proof
    assert proof.tolerance == 1e-5
    assert "tolerance 1e-05" in str(proof)


@pytest.mark.smollm2
def test_smollm2_is_proved_in_bfloat16() -> None:
    """As most checkpoints are. The first positions of its prompts are moved by their own rounding more than the tolerance."""
    rough = circuitgraph_torch.trace("smollm2-135m", dtype="bfloat16")
    pairs = load_task("ioi").pairs(rough.tokenizer, 4, seed=0)
    checks = [*islice(rough.checks(pairs), 4)]  # the last one runs every reader by itself
    assert all(check.holds for check in checks), "\n".join(map(str, checks))


@pytest.mark.smollm2
@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.9), ("float16", 0.999)])
def test_scores_of_smollm2_in_half_precision_are_those_in_float32(dtype: str, least: float) -> None:
    """Its stream holds numbers of 20,000."""
    rough, exact = (circuitgraph_torch.trace("smollm2-135m", dtype=wanted) for wanted in (dtype, None))
    pairs = load_task("ioi").pairs(rough.tokenizer, 4, seed=0)
    found, expected = (EAP().run(traced.bind(pairs, "logit_diff")).scores for traced in (rough, exact))
    assert found is not None
    assert expected is not None
    visible = rough.graph.visible
    assert np.corrcoef(found[visible], expected[visible])[0, 1] > least


MASSIVE = 400.0  # its square is no number in float16


def with_massive_activations(family: str, dtype: torch.dtype) -> Any:
    """A tiny model, some of whose numbers in the stream are as large as they are at the first tokens of trained ones (Sun et al. 2024)."""
    model = tiny(family, dtype=dtype)
    model.get_input_embeddings().weight.data[:, :2] = MASSIVE
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_massive_activations_are_not_too_large_for_float16(family: str) -> None:
    """Models square them in float32; so must every formula of ours."""
    pairs = random_pairs(4, vocabulary=families.VOCABULARY)
    models = [circuitgraph_torch.trace(with_massive_activations(family, dtype)) for dtype in (torch.float16, torch.float32)]
    attention = [number for number, reader in enumerate(models[0].graph.readers) if reader.kind in "qkv"]
    found, expected = (model.bind(pairs, "logit_diff").gradient(np.ones(model.graph.shape))[:, attention] for model in models)
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


def test_a_gradient_that_float16_cannot_hold_is_refused() -> None:
    model = tiny("llama", dtype=torch.float16)
    model.lm_head.weight.data *= 500
    model.model.embed_tokens.weight.data *= 1e-4  # a small stream, of which the norm makes a large one, and so a large gradient
    engine = circuitgraph_torch.trace(model).bind(random_pairs(4, vocabulary=families.VOCABULARY), "logit_diff")
    for ask in (engine.gradient, engine.source_gradient):
        with pytest.raises(CircuitGraphError, match="gradient: it is not a finite number for prompt 0 in float16; trace the model with"):
            ask(np.ones(engine.graph.shape))


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("kind", ["mean", "mean-per-position"])
def test_a_mean_over_many_prompts_is_summed_wide(backend: str, kind: Any) -> None:
    """In float16 two hundred numbers of 400 are more than it holds, and bfloat16 would stop counting at 256."""
    one = random_pairs(3, lengths=(4,), vocabulary=families.VOCABULARY)
    for dtype in (torch.float16, torch.bfloat16):
        model = circuitgraph.trace(with_massive_activations("gpt2", dtype), backend=backend)
        many, alone = (model.bind(pairs, "nll", kind).source_values()[0] for pairs in (one.select([0] * 300), one))
        np.testing.assert_allclose(np.asarray(many, float), np.asarray(alone, float), rtol=0.01, atol=1e-3)
