"""A gradient in PyTorch leaves out the positions before the first difference of its pairs, and that changes no score."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from engines import IN_PARTS
from engines import traced as in_parts
from families import tiny

import circuitgraph_torch
from circuitgraph import PromptPairs, trace
from circuitgraph._engine import EXACT, QK_FIX, RELP, Rule
from circuitgraph.testing import compiled_model
from circuitgraph.testing._module import module_of

LENGTH, SPANS = 7, ("begin", "S", "rest", "END")
TOLERANCES = {"gpt2": 1e-9, "gpt_neox": 1e-9, "gemma3": 1e-5, "llama": 1e-5, "qwen3_moe": 1e-5, **dict.fromkeys(IN_PARTS, 1e-9)}
TOLERANCES["llama in parts"] = 1e-5  # Hugging Face's RMSNorm computes in float32
FAMILIES = [*TOLERANCES]
RULES = {"exact": EXACT, "relp": RELP, "qk-fix": QK_FIX, "a layer dropped": Rule(dropped_layer=1)}


def pairs(first: int, n: int = 2) -> PromptPairs:
    """Of two prompts, with a first difference at this position in one and at the next in the other."""
    clean = np.random.default_rng(0).integers(3, 9, (n, LENGTH))
    corrupted = clean.copy()
    for row, prompt in enumerate(corrupted):
        differing = prompt[min(first + row, LENGTH - 1) :: 2]
        differing[:] = 3 + (differing - 2) % 6
    return PromptPairs(clean, corrupted, [[3], [4]][:n], [[5], [6]][:n], spans=[[0, 0, 1, 1, 2, 2, 3]] * n, span_names=SPANS)


@cache
def traced(family: str) -> Any:
    if family in IN_PARTS:
        return in_parts("torch", family)
    dtype = torch.float32 if family == "qwen3_moe" else torch.float64  # PyTorch has no experts in float64
    return circuitgraph_torch.trace(tiny(family, dtype=dtype))


def bound(family: str, first: int) -> Any:
    return traced(family).bind(pairs(first), "logit_diff")


def with_all_positions(engine: Any) -> Any:
    """The engine, made to leave nothing out."""
    for batch in engine.batches:
        batch._parts = replace(batch._parts, looks_back=False)
    return engine


def left_out(engine: Any) -> list[int]:
    """At how many positions, batch by batch."""
    engine.source_values()
    later = [source.later for source in engine._sources.values()]
    return [0 if one is None else one.n_before for one in later]


HAVE_NO_RULES = (*IN_PARTS, "qwen3_moe")


@pytest.mark.parametrize(
    ("family", "rule"), [(family, rule) for family in FAMILIES for rule in RULES if rule == "exact" or family not in HAVE_NO_RULES]
)
def test_no_score_changes(family: str, rule: str) -> None:
    engine, expected = bound(family, 3), with_all_positions(bound(family, 3))
    assert left_out(engine) == [3]
    masks = {"ones": np.ones(engine.graph.shape), "some": np.random.default_rng(1).uniform(size=engine.graph.shape)}
    for name, mask in masks.items():
        for mix in [1.0, (0.2, 0.7)]:
            if rule == "qk-fix" and name == "some":
                continue  # it is refused there
            assert_same(engine.gradient(mask, mix=mix, rule=RULES[rule]), expected.gradient(mask, mix=mix, rule=RULES[rule]), family)
    spanned = np.ones((*engine.graph.shape, len(SPANS)))
    got, whole = (one.gradient(spanned, rule=RULES[rule]) for one in (engine, expected))
    assert_same(got, whole, family)
    beginning = np.abs(got[..., 0]).max()  # both prompts of a pair say the same there
    assert beginning <= (TOLERANCES[family] * np.abs(got).max() if rule == "qk-fix" else 0)  # what is computed anew is equal to rounding


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("first", [0, 1, 5, 6])
def test_wherever_the_first_difference_is(family: str, first: int) -> None:
    engine, expected = bound(family, first), with_all_positions(bound(family, first))
    assert left_out(engine) == [first]
    everything = np.ones(engine.graph.shape)
    assert_same(engine.gradient(everything), expected.gradient(everything), family)
    mask = np.random.default_rng(2).uniform(size=(2, *engine.graph.shape))
    assert_same(engine.evaluate(mask), expected.evaluate(mask), family)


def test_sources_that_know_no_other_prompts_leave_nothing_out() -> None:
    assert left_out(traced("gpt2").bind(pairs(3), "logit_diff", "zero")) == [0]


def test_attention_that_looks_ahead_is_noticed() -> None:
    known = compiled_model("reverse")
    model = replace(known.model, splits_input=False)
    looking_ahead = trace(module_of(model), architecture=model.traced().architecture, dtype="float64")
    assert not looking_ahead._parts.looks_back  # type: ignore[attr-defined]
    assert all(traced(family)._parts.looks_back for family in FAMILIES)


def assert_same(got: np.ndarray, expected: np.ndarray, family: str) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCES[family] * np.abs(expected).max())
    assert np.abs(expected).max() > 0
