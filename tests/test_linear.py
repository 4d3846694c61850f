"""A run that is linear but for MLPs, beside the same in numpy: what each writer adds to a target, one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engines import traced

from circuitgraph import CircuitGraphError, Rule
from circuitgraph._dictionary import Dictionary
from circuitgraph._linear import FeatureTarget, LogitTarget
from circuitgraph._names import Component
from circuitgraph._refinement import Refinement
from circuitgraph.testing import ReferenceModel, planted_model, random_cross_layer_transcoder, random_dictionary
from circuitgraph.testing._reference_rules import Memory

HELD = Rule(norms="frozen", patterns="frozen")
TOKENS = np.array([3, 5, 7, 2])


def transcoders(reads: str, *, width: int = 16, has_skip: bool = False, n_layers: int = 2) -> list[Refinement]:
    made = [random_dictionary(layer, width=width, reads=reads, has_skip=has_skip and layer == 0) for layer in range(n_layers)]  # type: ignore[arg-type]
    return [Refinement(Component("m", layer), dictionary, (0, 2, 5)) for layer, dictionary in enumerate(made)]


class Held:
    """The model on a prompt, as a function of what the input and the MLPs say, with patterns and scales as they were."""

    def __init__(self, model: ReferenceModel, refinements: list[Refinement]) -> None:
        self.model, self.dictionaries = model, [one.dictionary for one in refinements]
        self.memory = Memory(HELD)
        self.embedding = model.embed(TOKENS[None])
        self.heard: list[np.ndarray] = []
        self.mlps = self._run(self.embedding, None, self.memory)[1]

    def targets(self, embedding: np.ndarray, mlps: list[np.ndarray], wanted: list[Any]) -> np.ndarray:
        memory = self.memory.again()
        heard, _, end = self._run(embedding, mlps, memory)
        return np.array([self._target(target, heard, end) for target in wanted])

    def _run(self, embedding: np.ndarray, mlps: list[np.ndarray] | None, memory: Memory) -> Any:
        stream, heard, said = embedding, [], []
        for number, layer in enumerate(self.model.layers):
            before = stream
            if layer.attention is not None:
                heads = [layer.attention.head(h, before, before, before, memory=memory) for h in range(layer.attention.n_heads)]
                bias = 0.0 if layer.attention.o_bias is None else layer.attention.o_bias
                stream = stream + sum(heads) + bias
            assert layer.mlp is not None
            x = before if layer.is_parallel else stream
            dictionary = self.dictionaries[number]
            assert isinstance(dictionary, Dictionary)
            heard.append(x if layer.mlp.norm is None or dictionary.reads == "mlp_stream" else layer.mlp.norm(x, memory))
            says = layer.mlp(x) if mlps is None else mlps[number]
            if dictionary.skip is not None:  # goes with the stream, not with the MLP
                skipped = heard[-1] @ dictionary.skip.T
                says = says - skipped if mlps is None else says
                stream = stream + skipped
            said.append(says)
            stream = stream + says
        final = self.model.final_norm
        end = stream if final is None else final(stream, memory)
        return heard, said, end

    def _target(self, target: Any, heard: list[np.ndarray], end: np.ndarray) -> float:
        if isinstance(target, LogitTarget):
            logits = end[0, -1] @ self.model.unembedding.T
            return float(logits[target.token] - logits.mean())
        dictionary = self.dictionaries[target.layer]
        assert isinstance(dictionary, Dictionary)
        return float(heard[target.layer][0, target.position] @ dictionary.encoder[:, target.feature])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("reads", ["mlp_in", "mlp_stream"])
def test_attributions_are_what_each_writer_adds(family: str, reads: str) -> None:
    refinements = transcoders(reads, has_skip=True)
    check(traced("torch", family), traced("reference", family).model, refinements, 2e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_so_are_those_of_features_that_write_to_several_mlps(family: str) -> None:
    layers = random_cross_layer_transcoder(2, 1, width=16, has_skip=True).values()
    refinements = [Refinement(Component("m", layer), dictionary, (0, 2, 5)) for layer, dictionary in enumerate(layers)]
    check(traced("torch", family), traced("reference", family).model, refinements, 2e-5)  # type: ignore[attr-defined]


def test_in_parallel_blocks_and_without_norms() -> None:
    planted = planted_model(4, n_layers=2, n_heads=2, parallel=True)
    d_model = planted.model.embedding.shape[1]
    check(planted.traced("torch"), planted.model, transcoders("mlp_in", width=d_model), 1e-9)


def check(whole: Any, model: ReferenceModel, refinements: list[Refinement], tolerance: float) -> None:
    run = whole.refined(refinements).linear_run(TOKENS)
    wanted = [LogitTarget(4), LogitTarget(1), FeatureTarget(1, 2, 3), FeatureTarget(0, 1, 1), FeatureTarget(1, 5, 2)]
    got = run.attributions(wanted)
    graph, held = whole.refined(refinements).graph, Held(model, refinements)
    nothing = [np.zeros_like(said) for said in held.mlps]
    base = held.targets(0 * held.embedding, nothing, wanted)
    for position in range(len(TOKENS)):
        here = (np.arange(len(TOKENS)) == position)[None, :, None]
        by_input = held.targets(held.embedding * here, nothing, wanted) - base
        np.testing.assert_allclose(got[:, 0, position], by_input, atol=tolerance * max(1, np.abs(got).max()))
        for layer, refinement in enumerate(refinements):
            parts = [w for w, writer in enumerate(graph.writers) if writer.component == refinement.component and writer.kind != "skip"]
            constant = refinement.dictionary.constant  # type: ignore[union-attr]
            alone = [(held.mlps[layer] - constant) * here if n == layer else zero for n, zero in enumerate(nothing)]
            by_mlp = held.targets(0 * held.embedding, alone, wanted) - base
            np.testing.assert_allclose(got[:, parts, position].sum(1), by_mlp, atol=tolerance * max(1, np.abs(got).max()))
    assert not got[:, [w for w, writer in enumerate(graph.writers) if writer.kind == "head"]].any()
    assert np.abs(got).max() > 0.1


def test_features_are_those_of_the_dictionary() -> None:
    refinements = transcoders("mlp_in")
    run = traced("torch", "gpt2").refined(refinements).linear_run(TOKENS)  # type: ignore[attr-defined]
    layer = traced("reference", "gpt2").model.layers[0]  # type: ignore[attr-defined]
    stream = traced("reference", "gpt2").model.embed(TOKENS[None])  # type: ignore[attr-defined]
    seen = layer.mlp.norm(stream + layer.attention(stream))[0]
    np.testing.assert_allclose(run.features(0), refinements[0].dictionary.encode(seen, [0, 2, 5]), atol=1e-6)  # type: ignore[union-attr]
    assert run.said.shape == (len(run._parts.sites.graph.writers), 4, 16)


def test_what_cannot_be_followed_is_refused() -> None:
    model = traced("torch", "gpt2")
    stream = Refinement(Component("r", 1), random_dictionary(width=16, reads="stream"), (0,))
    with pytest.raises(CircuitGraphError, match="r1 is in parts by random-0, which reads stream"):
        model.refined([stream]).linear_run(TOKENS)  # type: ignore[attr-defined]
    sae = Refinement(Component("m", 0), random_dictionary(width=16), (0,))
    with pytest.raises(CircuitGraphError, match="m0 is in parts by random-0, which reads mlp_out"):
        model.refined([sae]).linear_run(TOKENS)  # type: ignore[attr-defined]
    with pytest.raises(CircuitGraphError, match="m0 has no features that read the stream by themselves"):
        model.linear_run(TOKENS).features(0)  # type: ignore[attr-defined]
    normed = Refinement(Component("m", 0), replace(random_dictionary(width=16, reads="mlp_in"), input_norm="layer_norm"), (0,))
    with pytest.raises(CircuitGraphError, match="cannot hold the scale"):
        model.refined([normed]).linear_run(TOKENS).attributions([FeatureTarget(0, 0, 1)])  # type: ignore[attr-defined]
