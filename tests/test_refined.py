"""Components in parts: what holds of any dictionary, in the numpy reference and in the backends beside it. (All laws of engines hold too,
in test_engine_laws.)"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from engines import IN_PARTS, PAIRS, SHORT, traced
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitgraph import EAP, EAPIG, ActivationPatching, CircuitGraphError, Rule, UnknownNameError
from circuitgraph._dictionary import Dictionary, Neurons
from circuitgraph._engine import QK_FIX
from circuitgraph._names import Component
from circuitgraph._refinement import Refinement
from circuitgraph.testing import ReferenceModel, planted_model, random_dictionary, random_pairs
from circuitgraph_jax._devices import precisely

every_refined_model = pytest.mark.parametrize("family", IN_PARTS)
BACKENDS = ("reference", "torch", "jax")
COMPARED = ("torch", "jax")


def part(component: str, dictionary: Dictionary | Neurons, features: Any) -> Refinement:
    return Refinement(Component.parse(component), dictionary, tuple(features))


def close(got: Any, wanted: Any, tolerance: float) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1.0, float(np.abs(wanted).max())))


def tolerance_of(backend: str, family: str) -> float:
    """Hugging Face's RMSNorm computes in float32; slopes of the reference are differences."""
    return 5e-5 if backend == "torch" and "llama" in family else 1e-8


@pytest.mark.parametrize("backend", COMPARED)
@every_refined_model
def test_backends_agree_with_the_reference(backend: str, family: str) -> None:
    tolerance = tolerance_of(backend, family)
    reference, engine = (traced(name, family).bind(SHORT, "logit_diff") for name in ("reference", backend))
    assert engine.graph == reference.graph
    rng = np.random.default_rng(0)
    masks = rng.uniform(size=(4, *engine.graph.shape))
    masks[1] = masks[1] < 0.5
    masks[2, :-1] = 1  # of the logits alone
    masks[3, :-2] = 1  # from the last layer on, or from a stream that is divided behind it
    close(engine.evaluate(masks), reference.evaluate(masks), tolerance)
    ones = np.ones(engine.graph.shape)
    for mask in (masks[0], ones):
        close(engine.gradient(mask), reference.gradient(mask), max(tolerance, 1e-6))
    for i in range(len(SHORT)):
        close(engine.activations(masks[0])[i], reference.activations(masks[0])[i], tolerance)


def in_torch_and(family: str) -> Any:
    """Every family in PyTorch, and one in JAX, which compiles for each."""
    return pytest.mark.parametrize(("backend", "family"), [*(("torch", each) for each in IN_PARTS), ("jax", family)])


@in_torch_and("gpt2, the stream in parts")
def test_backends_agree_on_mixes_and_on_gradients_of_the_source(backend: str, family: str) -> None:
    tolerance = max(1e-6, tolerance_of(backend, family))
    reference, engine = (traced(name, family).bind(SHORT, "logit_diff") for name in ("reference", backend))
    mask, ones = np.random.default_rng(0).uniform(size=engine.graph.shape), np.ones(engine.graph.shape)
    close(engine.gradient(ones, mix=[0.3, 0.7]), reference.gradient(ones, mix=[0.3, 0.7]), tolerance)
    close(engine.source_gradient(mask), reference.source_gradient(mask), tolerance)


@in_torch_and("llama in parts")
def test_backends_agree_by_a_rule(backend: str, family: str) -> None:
    rule = Rule(norms="frozen", patterns="frozen")
    reference, engine = (traced(name, family).bind(SHORT, "logit_diff") for name in ("reference", backend))
    ones = np.ones(engine.graph.shape)
    close(engine.gradient(ones, rule=rule), reference.gradient(ones, rule=rule), 1e-4 if backend == "torch" else 1e-7)


@pytest.mark.parametrize("backend", COMPARED)
def test_the_qk_fix_where_the_stream_is_in_parts(backend: str) -> None:
    """Queries and keys come after the reader of the stream."""
    reference, engine = (traced(name, "gpt2, the stream in parts").bind(SHORT, "logit_diff") for name in ("reference", backend))
    ones = np.ones(engine.graph.shape)
    close(engine.gradient(ones, rule=QK_FIX), reference.gradient(ones, rule=QK_FIX), 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_qk_fix_needs_single_heads_and_only_layers_are_dropped(backend: str) -> None:
    heads = random_dictionary(width=16, reads="attn_out")
    model = traced(backend, "gpt2").refined([part("a0", heads, (0,)), part("r2", random_dictionary(width=16, reads="stream"), (0,))])
    engine, ones = model.bind(SHORT, "logit_diff"), np.ones(model.graph.shape)
    with pytest.raises(CircuitGraphError, match="a0 is refined, so no single head of it can be patched"):
        engine.gradient(ones, rule=QK_FIX)
    with pytest.raises(CircuitGraphError, match="gradient without layer 2: the model has 2 layers, from 0"):
        engine.gradient(ones, rule=Rule(dropped_layer=2))


def test_layers_with_dictionaries_of_one_shape_are_scanned_together() -> None:
    alike = [part(f"r{n}", random_dictionary(6 + n, width=16, reads="stream"), (0, 2 + n)) for n in range(2)]
    alike += [part(f"m{n}", random_dictionary(8 + n, width=16, reads="mlp_in", has_skip=True), (1, 3 + n)) for n in range(2)]
    alike = [replace(one, dictionary=replace(one.dictionary, is_centred=False)) for one in alike]  # type: ignore[type-var]
    models = [traced(backend, "gpt2").refined(alike) for backend in ("reference", "jax")]
    assert len(models[1].module.stacks) == 1  # type: ignore[attr-defined]
    reference, engine = (model.bind(SHORT, "logit_diff") for model in models)
    masks = np.random.default_rng(1).uniform(size=(1, *engine.graph.shape))
    close(engine.evaluate(masks), reference.evaluate(masks), 1e-8)
    close(engine.gradient(masks[0]), reference.gradient(masks[0]), 1e-6)


PLACES = {
    "a1": ("attn_out", "attn_z"),
    "m0": ("mlp_out", "mlp_in", "mlp_normalized", "mlp_stream"),
    "r1": ("stream",),
}


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_a_dictionary_sees(backend: str, family: str) -> None:
    reference, model = traced("reference", family), traced(backend, family)
    dictionaries = [(at, random_dictionary(width=16, reads=reads)) for at, places in PLACES.items() for reads in places]
    for component, dictionary in (*dictionaries, ("m1", Neurons()), ("r2", random_dictionary(width=16, reads="stream"))):
        refinement = part(component, dictionary, (0,))
        seen = [[*one.seen_by(refinement, SHORT)] for one in (model, reference)]
        assert len(seen[0]) == 2 * len(SHORT)
        for got, wanted in zip(*seen, strict=True):
            assert got.dtype == np.float64
            close(got, wanted, tolerance_of(backend, family))


@pytest.mark.parametrize("backend", BACKENDS)
@every_refined_model
def test_parts_add_up_to_the_component(backend: str, family: str) -> None:
    """What the features, the skip and the error say, with the constant, is what the component says."""
    whole_name, refinements = IN_PARTS[family]
    whole, refined = traced(backend, whole_name), traced(backend, family)
    said, in_parts = (model.bind(SHORT, "logit_diff").activations() for model in (whole, refined))
    for refinement in refinements:
        if refinement.component.kind != "m" or isinstance(refinement.dictionary, Neurons):
            continue
        columns = [w for w, writer in enumerate(refined.graph.writers) if writer.component == refinement.component]
        constant = refinement.dictionary.constant
        for i in range(len(SHORT)):
            together = np.asarray(in_parts[i])[columns].sum(axis=0) + (0 if constant is None else constant)
            close(together, np.asarray(said[i])[whole.graph.writer_id(refinement.component.name)], 1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_without_the_error_it_is_the_spliced_model(backend: str) -> None:
    """With every feature a node and the error patched by nothing, the run is that of the model with the reconstruction in place."""
    model, dictionary = traced(backend, "gpt2"), random_dictionary(2, width=16, activation="jumprelu")
    refined = model.refined([part("m0", dictionary, range(dictionary.n_features))])
    graph = refined.graph
    mask = np.ones(graph.shape)
    mask[:, graph.writer_id("m0.err")] = 0
    spliced = replace(traced("reference", "gpt2").model, layers=spliced_layers(traced("reference", "gpt2").model, dictionary))  # type: ignore[attr-defined]
    wanted = spliced.traced().bind(PAIRS, "nll").evaluate(np.ones((1, *spliced.graph().shape)))
    close(refined.bind(PAIRS, "nll", "zero").evaluate(mask[None]), wanted, 1e-8)


def spliced_layers(model: ReferenceModel, dictionary: Dictionary) -> Any:
    first = model.layers[0]

    class Spliced(type(first.mlp)):  # type: ignore[misc]
        def __call__(self, x: Any, memory: Any = None) -> Any:
            y = first.mlp(x)  # type: ignore[misc]
            return dictionary.decode(y, dictionary.encode(y))

    mlp = Spliced(**{name: getattr(first.mlp, name) for name in first.mlp.__dataclass_fields__})  # type: ignore[union-attr]
    return (replace(first, mlp=mlp), *model.layers[1:])


def test_every_neuron_of_an_mlp_leaves_no_error() -> None:
    for backend in BACKENDS:
        model = traced(backend, "gpt2")
        refined = model.refined([part("m1", Neurons(64), range(64))])
        assert "m1.err" not in {writer.name for writer in refined.graph.writers}
        check = next(iter(refined.checks(SHORT)))
        assert check.holds, check


def test_on_a_linear_model_attribution_is_exact() -> None:
    planted = planted_model(seed=3, n_layers=2, n_heads=2, mlp="linear", looks_up=False)
    d_mlp = len(planted.model.layers[0].mlp.up)  # type: ignore[union-attr]
    refined = planted.traced("torch").refined([part("m0", Neurons(d_mlp), range(4)), part("m1", Neurons(d_mlp), range(2, 5))])
    engine = refined.bind(planted.pairs, "logit_diff")
    exact, estimate = ActivationPatching().run(engine).scores, EAP().run(engine).scores
    assert exact is not None
    assert estimate is not None
    close(estimate, exact, 1e-8)
    assert np.abs(exact).max() > 0.01


@pytest.mark.parametrize("reads", ["mlp_out", "mlp_in"])
def test_a_feature_that_never_fires_has_no_score(reads: Any) -> None:
    dictionary = random_dictionary(5, width=16, reads=reads)
    bias = dictionary.encoder_bias.copy()
    bias[3] = -1e3
    refined = traced("torch", "gpt2").refined([part("m0", replace(dictionary, encoder_bias=bias), (1, 3))])
    engine, graph = refined.bind(SHORT, "logit_diff"), refined.graph
    for algorithm in (EAP(), EAPIG(), ActivationPatching()):
        scores = algorithm.run(engine).scores
        assert scores is not None
        assert np.abs(scores[:, graph.writer_id("m0.f3")]).max() < 1e-12
        if reads == "mlp_in":
            assert np.abs(scores[graph.reader_id("m0.f3")]).max() < 1e-12
        assert np.abs(scores).max() > 1e-3


@settings(max_examples=15)
@given(
    seed=st.integers(0, 99),
    activation=st.sampled_from(["relu", "jumprelu", "topk", "gated"]),
    reads=st.sampled_from(["mlp_out", "attn_out", "attn_z", "stream", "mlp_in", "mlp_normalized", "mlp_stream"]),
    input_norm=st.sampled_from([None, "layer_norm", "constant_norm_rescale"]),
    norm=st.sampled_from([None, "rms", "layer"]),
    parallel=st.booleans(),
    features=st.sets(st.integers(0, 5), min_size=1),
)
def test_any_dictionary_divides_any_model(
    seed: int, activation: Any, reads: Any, input_norm: Any, norm: Any, parallel: bool, features: set[int]
) -> None:
    """`F(1)` is the model, `F(0)` the source run, and `F` of a random mask is what the derivative says near by."""
    model = ReferenceModel.random(seed, norm=norm, parallel=parallel, d_model=8, d_head=4)
    dictionary = random_dictionary(
        seed, width=8, activation=activation, reads=reads, input_norm=input_norm, has_skip=reads.startswith("mlp_") and reads != "mlp_out"
    )
    component = {"attn_out": "a1", "attn_z": "a1", "stream": "r1"}.get(reads, "m1")
    refined = model.traced().refined([part(component, dictionary, sorted(features))])
    for check in islice(refined.checks(random_pairs(seed, lengths=(4, 3))), 3):
        assert check.holds, check


def test_features_by_position() -> None:
    """An edge from a feature at one span: all spans together are the edge."""
    spans = tuple(np.array([0] * (len(ids) - 1) + [1]) for ids in SHORT.clean)
    pairs = replace(SHORT, spans=spans, span_names=("FRONT", "END"))
    reference, *others = (traced(backend, "gpt2 in parts").bind(pairs, "logit_diff") for backend in BACKENDS)
    mask = np.random.default_rng(3).uniform(size=(1, *reference.graph.shape, 2))
    for engine in others:
        close(engine.evaluate(mask), reference.evaluate(mask), 1e-8)
        close(engine.gradient(mask[0]), reference.gradient(mask[0]), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused(backend: str) -> None:
    model = traced(backend, "gpt2")
    for refinements, message in (
        ([part("m0", random_dictionary(width=12), (0,))], "maps 12 numbers to 12, and mlp_out has 16"),
        ([part("m0", Neurons(), (64,))], "there is no neuron 64; the MLP has 64"),
    ):
        with pytest.raises(CircuitGraphError, match=message):
            model.refined(refinements)
    with pytest.raises(UnknownNameError, match="'m9'"):
        model.refined([part("m9", random_dictionary(width=16), (0,))])
    with pytest.raises(CircuitGraphError, match="divides a component such as a0"):
        part("m0", random_dictionary(width=16, reads="attn_out"), (0,))
    with pytest.raises(CircuitGraphError, match="has no feature 6"):
        part("m0", random_dictionary(width=16), (6,))


def test_jax_refuses_what_a_norm_mixes() -> None:
    layer: Any = traced("jax", "gpt2").module.layer(0)  # type: ignore[attr-defined]
    norm = layer.mlp.norm
    normed = replace(layer, attention=replace(layer.attention, post_norm=norm), mlp=replace(layer.mlp, post_norm=norm))
    for refinement, message in (
        (part("m0", Neurons(), (1,)), "a norm after the MLP mixes its neurons; take a dictionary of mlp_out"),
        (
            part("a0", random_dictionary(width=16, reads="attn_z"), (1,)),
            "what its heads mix goes through a norm; take a dictionary of attn_out",
        ),
    ):
        with precisely("float64"), pytest.raises(CircuitGraphError, match=message):
            normed.refined(refinement, "float64")


def test_more_nodes_than_memory_has_room_for_are_refused() -> None:
    import circuitgraph

    model = circuitgraph.trace(traced("torch", "gpt2").module, memory_budget="100KB")  # type: ignore[attr-defined]
    wide = random_dictionary(width=16, n_features=2000)
    with pytest.raises(CircuitGraphError, match=r"refine m0: scores by reader and writer.* GB"):
        model.refined([part("m0", wide, range(2000))])


@pytest.mark.parametrize("backend", COMPARED)
def test_provenance_says_what_was_refined(backend: str) -> None:
    said = traced(backend, "gpt2 in parts").provenance["refined"]
    assert [one["component"] for one in said] == ["m0", "a1", "m1"]
    assert said[0]["features"] == 3
    assert len(said[0]["sha256"]) == 64
