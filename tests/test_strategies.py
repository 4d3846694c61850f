"""Hypothesis strategies: what they draw is what it says, and it shrinks to the smallest that there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from circuitgraph import Circuit, Graph, PromptPairs, UnknownNameError
from circuitgraph.testing import ReferenceModel, planted_model, strategies

FAMILIES = ("gpt2", "llama", "neox", "gemma", "attention-only", "mlp-only", "linear")


def smallest(strategy: st.SearchStrategy[Any], condition: Any = lambda _: True) -> Any:
    quiet = settings(max_examples=200, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
    return find(strategy, condition, settings=quiet)


@given(st.data())
@settings(max_examples=30)
def test_masks_and_circuits_are_of_their_graph(data: st.DataObject) -> None:
    graph = data.draw(strategies.graphs())
    mask, circuit = data.draw(strategies.masks(graph)), data.draw(strategies.circuits(graph))
    assert isinstance(graph, Graph)
    assert isinstance(circuit, Circuit)
    assert not (mask & ~graph.visible).any()
    assert circuit.scores is not None
    assert np.isfinite(np.asarray(circuit.scores)).all()
    assert data.draw(strategies.circuits(graph, scored=False)).scores is None


@given(strategies.prompt_pairs(vocabulary=7))
@settings(max_examples=30)
def test_prompts_are_pairs(pairs: PromptPairs) -> None:
    assert pairs.largest_token < 7


@given(strategies.tasks())
@settings(max_examples=10)
def test_tasks_are_tasks(task: Any) -> None:
    assert task.prompt[0].answer == " {colour.2}"


@pytest.mark.parametrize("family", FAMILIES)
def test_models_run(family: Any) -> None:
    model = smallest(strategies.small_models(family))
    assert isinstance(model, ReferenceModel)
    assert np.isfinite(model.forward(np.array([[1, 2]]))).all()
    assert len(model.layers) == 1


def test_they_shrink_to_one_layer_one_head_and_two_tokens() -> None:
    graph = smallest(strategies.graphs(), lambda graph: graph.n_edges > 3)
    assert [writer.name for writer in graph.writers] == ["input", "a0.h0"]
    pairs = smallest(strategies.prompt_pairs())
    assert (len(pairs), len(pairs.clean[0])) == (1, 2)
    assert repr(smallest(strategies.planted_models())) == "planted_model(seed=0, n_layers=1, n_heads=1, n_kv_heads=1, mlp=None)"


def test_a_counterexample_is_a_line_to_run() -> None:
    found = smallest(strategies.planted_models(), lambda planted: planted.graph.n_edges > 30)
    again = eval(repr(found), {"planted_model": planted_model})
    assert again.circuit == found.circuit


def test_a_family_that_is_not_there() -> None:
    with pytest.raises(UnknownNameError, match="llama"):
        strategies.small_models("lama")  # type: ignore[arg-type]
