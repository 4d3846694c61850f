"""Compiled models in PyTorch, traced by a description: attention that looks both ways, layers of zeros, fewer logits than tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from circuitgraph import Architecture, TraceError, check_trace, trace
from circuitgraph._engine import TracedModel
from circuitgraph.algorithms import ACDC
from circuitgraph.testing import COMPILED, ReferenceModel, compiled_model
from circuitgraph.testing._module import module_of


def reference(name: str) -> ReferenceModel:
    """With one writer for the embeddings, as the backends have it."""
    return replace(compiled_model(name).model, splits_input=False)


def described(model: ReferenceModel) -> Architecture:
    return model.traced().architecture


@cache
def traced(name: str) -> TracedModel:
    model = reference(name)
    return trace(module_of(model), architecture=described(model), dtype="float64")


@pytest.mark.parametrize("source", ["zero", "corrupted"])
@pytest.mark.parametrize("name", COMPILED)
def test_masked_runs_are_those_of_the_reference(name: str, source: Any) -> None:
    model, pairs = reference(name), compiled_model(name).pairs(3).select(range(0, 27, 3))
    engines = [one.bind(pairs, "kl", source) for one in (traced(name), model)]
    graph = engines[0].graph
    assert graph == model.graph()
    draw = np.random.default_rng(0)
    masks = np.concatenate([draw.uniform(size=(2, *graph.shape)), np.ones((6, *graph.shape))])
    for mask, (r, w) in zip(masks[2:], draw.permutation(np.argwhere(graph.visible)), strict=False):
        mask[r, w] = 0
    got, wanted = (engine.evaluate(masks) for engine in engines)
    assert np.allclose(got, wanted, atol=1e-9)


def test_acdc_finds_the_circuit_of_reverse_with_one_input() -> None:
    for source, size in (("zero", 10), ("corrupted", 2)):
        engine = traced("reverse").bind(compiled_model("reverse").pairs(3), "kl", source)
        assert ACDC(1e-6).run(engine).mask.sum() == size


def test_of_the_checks_of_a_trace_only_that_of_padding_fails() -> None:
    """Attention that looks both ways sees what is behind the prompt."""
    pairs = compiled_model("reverse").pairs(3).select(range(4))
    for one in (traced("reverse"), reference("reverse").traced()):
        assert [check.name for check in check_trace(one, pairs) if not check.holds] == ["padding changes nothing"]


@pytest.mark.parametrize("swapped", [("q", "k"), ("k", "v"), ("q", "v")])
def test_a_description_with_projections_swapped_is_refused(swapped: tuple[str, str]) -> None:
    """Nobody sees keys and values apart by where they move an attention that looks both ways."""
    model = reference("sort")
    wiring = described(model)
    attention = wiring.blocks[1].attention
    one, other = swapped
    wrong = replace(attention, **{one: getattr(attention, other), other: getattr(attention, one)})  # type: ignore[type-var]
    blocks = [*wiring.blocks]
    blocks[1] = replace(blocks[1], attention=wrong)
    with pytest.raises(TraceError, match=r"layers\.1\.attention"):
        trace(module_of(model), architecture=replace(wiring, blocks=tuple(blocks)), dtype="float64")
