"""Hypothesis strategies: graphs, masks, circuits, tasks, prompts and models, which shrink to one layer, one head and two tokens.

Models and prompts are made of a few numbers by functions that everybody can call, so a counterexample is a line to paste, such as
`planted_model(seed=0, n_layers=1, n_heads=1)`. Needs hypothesis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from circuitgraph._circuit import Circuit
from circuitgraph._errors import unknown_name
from circuitgraph._graph import Graph, Layer, transformer_graph
from circuitgraph._pairs import PromptPairs
from circuitgraph.testing._planted import PlantedModel, planted_model
from circuitgraph.testing._random_pairs import random_pairs
from circuitgraph.testing._reference_model import ReferenceModel

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray

    from circuitgraph._task import Task

Family = Literal["gpt2", "llama", "neox", "gemma", "attention-only", "mlp-only", "linear"]

_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layer"},
    "llama": {"rotary_base": 1e4, "n_positions": 0, "gated": True, "act": "silu", "biases": False},
    "neox": {"norm": "layer", "parallel": True},
    "gemma": {
        "rotary_base": 1e4,
        "n_positions": 0,
        "gated": True,
        "act": "gelu_tanh",
        "biases": False,
        "post_norm": True,
        "logit_softcap": 3.0,
    },
    "attention-only": {"d_mlp": 0},
    "mlp-only": {"n_heads": 0},
    "linear": {"norm": None, "act": "identity", "n_heads": 0},
}


def graphs(*, max_layers: int = 3, max_heads: int = 4) -> st.SearchStrategy[Graph]:
    """Graphs of transformers: with and without attention, MLPs and parallel blocks, heads that share keys."""

    @st.composite
    def draw(draw: st.DrawFn) -> Graph:
        n_layers = draw(st.integers(1, max_layers))
        layers = []
        for _ in range(n_layers):
            n_heads = draw(st.integers(1, max_heads))
            n_kv = draw(st.sampled_from([n for n in range(1, n_heads + 1) if n_heads % n == 0][::-1]))
            layers.append(Layer(n_heads, n_kv, has_mlp=draw(st.booleans()), is_parallel=draw(st.booleans())))
        return transformer_graph(layers, per_head_kv=draw(st.booleans()))

    return draw()


def masks(graph: Graph) -> st.SearchStrategy[Bool[ndarray, "readers writers"]]:
    """Edges of a graph, `[readers, writers]`; shrinks to none."""
    return arrays.arrays(bool, graph.shape).map(lambda kept: kept & graph.visible)


def circuits(graph: Graph, *, scored: bool = True) -> st.SearchStrategy[Circuit]:
    """Circuits of a graph, with finite scores if `scored`."""
    if not scored:
        return masks(graph).map(lambda mask: Circuit(graph, mask))
    numbers = st.floats(-10, 10, allow_nan=False, width=32)
    scores = arrays.arrays(np.float64, graph.shape, elements=numbers).map(lambda values: np.where(graph.visible, values, 0.0))
    return st.builds(lambda mask, values: Circuit(graph, mask, values), masks(graph), scores)


def prompt_pairs(*, vocabulary: int = 13, max_prompts: int = 4, max_length: int = 6, min_length: int = 2) -> st.SearchStrategy[PromptPairs]:
    """Prompt pairs of one or several lengths; shrinks to one prompt of two tokens."""
    lengths = st.lists(st.integers(min_length, max_length), min_size=1, max_size=max_prompts).map(tuple)
    return st.builds(random_pairs, st.integers(0, 99), lengths=lengths, vocabulary=st.just(vocabulary))


def tasks() -> st.SearchStrategy[Task]:
    """Task definitions with one template and two slots."""
    from circuitgraph._task import Task

    words = st.lists(
        st.sampled_from(["red", "blue", "green", "black", "white", "brown", "gold", "gray"]), min_size=3, max_size=6, unique=True
    )

    def task(words: list[str], start: str) -> Task:
        return Task.model_validate(
            {
                "schema": 1,
                "name": "colours",
                "metric": "logit_diff",
                "words": {"colour": words},
                "prompt": [
                    {
                        "name": "only",
                        "clean": f"{start} {{colour.1}} and {{colour.2}}, so {{colour.1}} and",
                        "corrupted": f"{start} {{colour.3}} and {{colour.2}}, so {{colour.3}} and",
                        "answer": " {colour.2}",
                        "wrong": " {colour.1}",
                    }
                ],
            }
        )

    return st.builds(task, words, st.sampled_from(["It is", "We saw"]))


def planted_models(*, max_layers: int = 3, max_heads: int = 4, **fixed: Any) -> st.SearchStrategy[PlantedModel]:
    """Planted models of any kind; `fixed` settings of `planted_model` stay as they are. Options that a small model has no room for are not
    drawn."""

    @st.composite
    def draw(draw: st.DrawFn) -> PlantedModel:
        n_heads = fixed.get("n_heads") or draw(st.integers(1, max_heads))
        drawn: dict[str, Any] = {
            "seed": draw(st.integers(0, 99)),
            "n_layers": draw(st.integers(1, max_layers)),
            "n_heads": n_heads,
            "n_kv_heads": draw(st.sampled_from([n for n in (4, 2, 1) if n_heads % n == 0])),
            "norm": draw(st.sampled_from([None, "rms", "layer"])),
            "mlp": draw(st.sampled_from([None, "gelu", "relu", "gated", "linear"])),
            "parallel": draw(st.booleans()),
            "looks_up": draw(st.sampled_from([True, False])),
        }
        return planted_model(**{**drawn, **fixed})

    return draw()


def small_models(family: Family = "gpt2", *, max_layers: int = 2, max_heads: int = 2) -> st.SearchStrategy[ReferenceModel]:
    """Random numpy models of a family, in which nothing is nearly linear (but of "linear", all is). Raises `UnknownNameError`."""
    if family not in _FAMILIES:
        raise unknown_name("family", family, _FAMILIES)
    settings = _FAMILIES[family]
    heads = st.just(settings["n_heads"]) if "n_heads" in settings else st.integers(1, max_heads)
    rest = {name: value for name, value in settings.items() if name != "n_heads"}
    drawn = {"seed": st.integers(0, 99), "n_layers": st.integers(1, max_layers), "n_heads": heads}
    return st.builds(ReferenceModel.random, **drawn, **{name: st.just(value) for name, value in rest.items()})
