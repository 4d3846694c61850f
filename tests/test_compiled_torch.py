"""Compiled models in PyTorch, traced by a description: attention that looks both ways, layers of zeros, fewer logits than tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuitgraph import Architecture, TraceError, check_trace, trace
from circuitgraph._engine import TracedModel
from circuitgraph.algorithms import ACDC
from circuitgraph.testing import COMPILED, ReferenceAttention, ReferenceLayer, ReferenceModel, compiled_model


class Attention(nn.Module):
    def __init__(self, part: ReferenceAttention) -> None:
        super().__init__()
        self.shape = part.q.shape[:2]
        self.q, self.k, self.v = (linear(np.concatenate(heads)) for heads in (part.q, part.k, part.v))
        self.o = linear(np.concatenate(part.o, axis=1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, self.shape).transpose(1, 2) for project in (self.q, self.k, self.v))
        pattern = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(self.shape[1]), dim=-1)
        said: Tensor = self.o((pattern @ v).transpose(1, 2).flatten(2))
        return said


class Layer(nn.Module):
    def __init__(self, part: ReferenceLayer) -> None:
        super().__init__()
        assert part.attention is not None
        assert part.mlp is not None
        self.attention = Attention(part.attention)
        self.mlp = nn.Sequential(linear(part.mlp.up), nn.ReLU(), linear(part.mlp.down))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        after: Tensor = x + self.mlp(x)
        return after


class Compiled(nn.Module):
    def __init__(self, model: ReferenceModel) -> None:
        super().__init__()
        self.embedding, self.positions = (nn.Embedding.from_pretrained(torch.tensor(rows)) for rows in (model.embedding, model.positions))
        self.layers = nn.ModuleList(Layer(layer) for layer in model.layers)
        self.unembedding = linear(model.unembedding)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.unembedding(x)
        return logits


def linear(weight: Any) -> nn.Linear:
    out, inside = weight.shape
    module = nn.Linear(inside, out, bias=False, dtype=torch.float64)
    module.weight.data = torch.tensor(weight)
    return module


def reference(name: str) -> ReferenceModel:
    """With one writer for the embeddings, as the backends have it."""
    return replace(compiled_model(name).model, splits_input=False)


def described(model: ReferenceModel) -> Architecture:
    return model.traced().architecture


@cache
def traced(name: str) -> TracedModel:
    model = reference(name)
    return trace(Compiled(model).eval(), architecture=described(model), dtype="float64")


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
        trace(Compiled(model).eval(), architecture=replace(wiring, blocks=tuple(blocks)), dtype="float64")
