"""A run that is linear but for MLPs, beside the same in numpy: what each writer adds to a target, one by one; and beside each other."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, Literal

import families
import numpy as np
import pytest
import torch
from engines import every_backend, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from lifted import lifted
from test_jax_engine import compilations

import circuitgraph
from circuitgraph import CircuitGraphError, Rule, TaskError
from circuitgraph._dictionary import Dictionary, Neurons
from circuitgraph._engine import TracedModel
from circuitgraph._linear import FeatureTarget, LogitTarget
from circuitgraph._names import Component
from circuitgraph._pairs import PromptPairs
from circuitgraph._refinement import Refinement
from circuitgraph.testing import ReferenceModel, planted_model, random_cross_layer_transcoder, random_dictionary
from circuitgraph.testing._planted import traced as traced_as
from circuitgraph.testing._reference_rules import Memory

HELD = Rule(norms="frozen", patterns="frozen")
TOKENS = np.array([3, 5, 7, 2])
WANTED = (LogitTarget(4), LogitTarget(1), FeatureTarget(1, 2, 3), FeatureTarget(0, 1, 1), FeatureTarget(1, 5, 2))
READS = ("mlp_in", "mlp_normalized", "mlp_stream")


def transcoders(
    reads: str, *, width: int = 16, has_skip: bool = False, n_layers: int = 2, seed: int = 0, activation: str = "relu"
) -> list[Refinement]:
    made = [
        random_dictionary(seed + layer, width=width, reads=reads, has_skip=has_skip and layer == 0, activation=activation)  # type: ignore[arg-type]
        for layer in range(n_layers)
    ]
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


@every_backend
@pytest.mark.parametrize(("family", "reads"), [("gpt2", "mlp_in"), ("gpt2", "mlp_stream"), ("llama", "mlp_in"), ("llama", "mlp_stream")])
def test_attributions_are_what_each_writer_adds(backend: str, family: str, reads: str) -> None:
    refinements = transcoders(reads, has_skip=True)
    tolerance = 2e-5 if (backend, family) == ("torch", "llama") else 1e-9
    check(traced(backend, family), traced("reference", family).model, refinements, tolerance)  # type: ignore[attr-defined]


@every_backend
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_so_are_those_of_features_that_write_to_several_mlps(backend: str, family: str) -> None:
    layers = random_cross_layer_transcoder(2, 1, width=16, has_skip=True).values()
    refinements = [Refinement(Component("m", layer), dictionary, (0, 2, 5)) for layer, dictionary in enumerate(layers)]
    tolerance = 2e-5 if (backend, family) == ("torch", "llama") else 1e-9
    check(traced(backend, family), traced("reference", family).model, refinements, tolerance)  # type: ignore[attr-defined]


@every_backend
def test_in_parallel_blocks_and_without_norms(backend: str) -> None:
    planted = planted_model(4, n_layers=2, n_heads=2, parallel=True)
    d_model = planted.model.embedding.shape[1]
    check(planted.traced(backend), planted.model, transcoders("mlp_in", width=d_model), 1e-9)


@every_backend
def test_in_parallel_blocks_with_norms_and_groups(backend: str) -> None:
    check(parallel(backend), parallel("reference").model, transcoders("mlp_in", has_skip=True), 1e-9)  # type: ignore[attr-defined]


@cache
def parallel(backend: str) -> TracedModel:
    """Attention and MLP side by side, RMS norms, two heads to a key; no bias anywhere."""
    sizes: dict[str, Any] = {"vocabulary": 30, "d_model": 16, "n_heads": 4, "n_kv_heads": 2}
    return traced_as(ReferenceModel.random(4, parallel=True, gated=True, act="silu", biases=False, **sizes), backend)


def check(whole: Any, model: ReferenceModel, refinements: list[Refinement], tolerance: float) -> None:
    run = whole.refined(refinements).linear_run(TOKENS)
    got = run.attributions(WANTED)
    graph, held = whole.refined(refinements).graph, Held(model, refinements)
    nothing = [np.zeros_like(said) for said in held.mlps]
    base = held.targets(0 * held.embedding, nothing, WANTED)
    for position in range(len(TOKENS)):
        here = (np.arange(len(TOKENS)) == position)[None, :, None]
        by_input = held.targets(held.embedding * here, nothing, WANTED) - base
        np.testing.assert_allclose(got[:, 0, position], by_input, atol=tolerance * max(1, np.abs(got).max()))
        for layer, refinement in enumerate(refinements):
            parts = [w for w, writer in enumerate(graph.writers) if writer.component == refinement.component and writer.kind != "skip"]
            constant = refinement.dictionary.constant  # type: ignore[union-attr]
            alone = [(held.mlps[layer] - constant) * here if n == layer else zero for n, zero in enumerate(nothing)]
            by_mlp = held.targets(0 * held.embedding, alone, WANTED) - base
            np.testing.assert_allclose(got[:, parts, position].sum(1), by_mlp, atol=tolerance * max(1, np.abs(got).max()))
    assert not got[:, [w for w, writer in enumerate(graph.writers) if writer.kind == "head"]].any()
    assert np.abs(got).max() > 0.1


@every_backend
def test_without_constants_the_sum_is_the_target(backend: str) -> None:
    """A target heard by another way: the logits, and what the engine says that a transcoder reads."""
    plain = [
        replace(one, dictionary=replace(one.dictionary, decoder_bias=np.zeros(16)))  # type: ignore[arg-type]
        for one in transcoders("mlp_normalized")
    ]
    model = parallel(backend).refined(plain)
    run = model.linear_run(TOKENS)
    pairs = PromptPairs([TOKENS], [TOKENS + 1], [0])
    (logits,) = model.logits(pairs)
    expected = [logits[target.token] - logits.mean() if isinstance(target, LogitTarget) else 0.0 for target in WANTED]
    for t, target in enumerate(WANTED):
        if isinstance(target, FeatureTarget):
            seen = next(iter(model.seen_by(plain[target.layer], pairs)))
            expected[t] = seen[target.position] @ plain[target.layer].dictionary.encoder[:, target.feature]  # type: ignore[union-attr]
    np.testing.assert_allclose(run.attributions(WANTED).sum(axis=(1, 2)), expected, rtol=1e-9)
    np.testing.assert_allclose(run.logits, logits, rtol=1e-9)


@every_backend
def test_a_run_is_the_models_own(backend: str) -> None:
    """What it says of the run that it is linear in, beside the engine's word."""
    model = traced(backend, "gpt2").refined(transcoders("mlp_in", has_skip=True))
    run, pairs = model.linear_run(TOKENS), PromptPairs([TOKENS], [TOKENS + 1], [0])
    np.testing.assert_allclose(run.said, model.bind(pairs, "nll").activations()[0], atol=1e-12)
    layer = traced("reference", "gpt2").model.layers[0]  # type: ignore[attr-defined]
    stream = traced("reference", "gpt2").model.embed(TOKENS[None])  # type: ignore[attr-defined]
    seen = layer.mlp.norm(stream + layer.attention(stream))[0]
    (first, _) = model.refinements
    np.testing.assert_allclose(run.features(0), first.dictionary.encode(seen, [0, 2, 5]), atol=1e-12)  # type: ignore[union-attr]
    assert run.attributions([]).shape == (0, len(model.graph.writers), 4)


tokens = st.lists(st.integers(0, 29), min_size=1, max_size=6)


@st.composite
def targets(draw: st.DrawFn, layers: list[int], length: int) -> list[FeatureTarget | LogitTarget]:
    of_features = st.builds(FeatureTarget, st.sampled_from(layers), st.integers(0, 5), st.integers(0, length - 1))
    found: list[FeatureTarget | LogitTarget] = draw(st.lists(st.builds(LogitTarget, st.integers(0, 29)) | of_features, max_size=5))
    return found


@given(st.data())
@settings(max_examples=25)
def test_torch_agrees_with_the_reference(data: st.DataObject) -> None:
    """With any MLPs in parts, by any transcoders."""
    family = data.draw(st.sampled_from(["gpt2", "parallel"]))
    activation = data.draw(st.sampled_from(["relu", "jumprelu", "topk", "gated"]))
    made = transcoders(
        data.draw(st.sampled_from(READS)), has_skip=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99)), activation=activation
    )
    chosen = data.draw(st.sampled_from([made, made[:1], made[1:]]))
    prompt = data.draw(tokens)
    wanted = data.draw(targets([one.component.layer for one in chosen], len(prompt)))
    whole = parallel if family == "parallel" else traced
    agree([whole(backend).refined(chosen) for backend in ("reference", "torch")], prompt, wanted)


@given(st.integers(0, 99), st.lists(st.integers(0, 29), min_size=4, max_size=4), targets([0, 1], 4))
@settings(max_examples=10)
def test_jax_agrees_with_the_reference(seed: int, prompt: list[int], wanted: list[FeatureTarget | LogitTarget]) -> None:
    """With dictionaries of the shapes that it has compiled for."""
    made = transcoders("mlp_in", has_skip=True, seed=seed)
    agree([traced(backend).refined(made) for backend in ("reference", "jax")], prompt, wanted)


def agree(models: list[TracedModel], prompt: list[int], wanted: list[FeatureTarget | LogitTarget]) -> None:
    expected, got = (model.linear_run(prompt) for model in models)
    found = expected.attributions(wanted)
    np.testing.assert_allclose(got.attributions(wanted), found, atol=1e-10 * max(1, np.abs(found).max(initial=0)))
    np.testing.assert_allclose(got.said, expected.said, atol=1e-10)
    for refinement in models[0].refinements:
        layer = refinement.component.layer
        np.testing.assert_allclose(got.features(layer), expected.features(layer), atol=1e-10)


def test_jax_compiles_once_for_all_targets_of_a_length() -> None:
    model = traced("jax", "gpt2").refined(transcoders("mlp_in", has_skip=True))
    model.linear_run(TOKENS).attributions(WANTED)
    with compilations() as seen:
        run = model.linear_run(TOKENS + 1)
        run.attributions(WANTED[2:])
        run.attributions([LogitTarget(token) for token in range(30)] + [FeatureTarget(0, 3, 0)] * 10)
    assert not seen


def test_post_norms_and_soft_caps_in_both_backends() -> None:
    reads: list[tuple[int, Literal["mlp_in", "mlp_normalized"]]] = [(0, "mlp_in"), (2, "mlp_normalized")]
    made = [Refinement(Component("m", n), random_dictionary(n, width=64, reads=each, has_skip=n == 0), (0, 2, 5)) for n, each in reads]
    wanted = (LogitTarget(4), FeatureTarget(2, 2, 3), FeatureTarget(0, 1, 1))
    with lifted():
        model = families.tiny("gemma2", dtype=torch.float64)
        by_torch, by_jax = (circuitgraph.trace(model, backend=each).refined(made).linear_run(TOKENS) for each in ("torch", "jax"))
        expected = by_torch.attributions(wanted)
        np.testing.assert_allclose(by_jax.attributions(wanted), expected, atol=1e-10 * np.abs(expected).max())


def test_a_soft_cap_is_gone_through_to_first_order() -> None:
    """By central differences: of what the last MLP leaves over, at the last position, which nothing but the unembedding hears."""
    model = ReferenceModel.random(3, vocabulary=30, d_model=16, norm=None, logit_softcap=2.0)
    made = transcoders("mlp_in", n_layers=2)[1:]
    run = model.traced().refined(made).linear_run(TOKENS)
    last, end, step = run.said[-1, -1], model.stream(TOKENS[None])[0, -1], 1e-5
    slopes = (model.unembed(end + step * last) - model.unembed(end - step * last)) / (2 * step)
    got = run.attributions([LogitTarget(token) for token in range(30)])[:, -1, -1]
    np.testing.assert_allclose(got, slopes - slopes.mean(), atol=1e-8)
    assert np.abs(got - (last @ model.unembedding.T - (last @ model.unembedding.T).mean())).max() > 0.1


def refused(component: str, dictionary: Dictionary | Neurons, message: str) -> Any:
    return pytest.param([Refinement(Component.parse(component), dictionary, (0,))], message, id=message[:2] + dictionary.reads)


@every_backend
@pytest.mark.parametrize(
    ("refinements", "message"),
    [
        refused("r1", random_dictionary(width=16, reads="stream"), "r1 is in parts by random-0, which reads stream"),
        refused("a0", random_dictionary(width=16, reads="attn_out"), "a0 is in parts by random-0, which reads attn_out"),
        refused("m0", random_dictionary(width=16), "m0 is in parts by random-0, which reads mlp_out"),
        refused("m0", Neurons(), "m0 is in parts by neurons, which reads neurons"),
        refused("m0", random_dictionary(width=16, reads="mlp_in", input_norm="layer_norm"), "random-0: a linear run cannot hold the scale"),
    ],
)
def test_what_cannot_be_followed_is_refused(backend: str, refinements: list[Refinement], message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        traced(backend, "gpt2").refined(refinements).linear_run(TOKENS)


@every_backend
def test_what_is_not_there_is_refused(backend: str) -> None:
    model = traced(backend, "gpt2")
    run = model.refined(transcoders("mlp_in")[:1]).linear_run(TOKENS)
    for layer in (1, 7):
        message = f"m{layer} has no features that read the stream by themselves; refine it with a transcoder"
        with pytest.raises(CircuitGraphError, match=message):
            run.features(layer)
        with pytest.raises(CircuitGraphError, match=message):
            run.attributions([FeatureTarget(layer, 0, 0)])
    for target, message in (
        (FeatureTarget(0, 6, 0), "random-0 has no feature 6; it has 6, from 0"),
        (FeatureTarget(0, 0, 4), "position=4.: the prompt has 4 positions, from 0"),
        (FeatureTarget(0, 0, -1), "position=-1.: the prompt has 4 positions, from 0"),
        (LogitTarget(30), "LogitTarget.token=30.: the model has 30 tokens, from 0"),
    ):
        with pytest.raises(CircuitGraphError, match=message):
            run.attributions([LogitTarget(0), target])
    for prompt, message in (([30], "token id 30 is not in the model's vocabulary of 30"), ([], "no token"), ([1] * 17, "of 17 tokens")):
        with pytest.raises(TaskError, match=message):
            model.linear_run(prompt).said  # noqa: B018
