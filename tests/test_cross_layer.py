"""Cross-layer transcoders: features that read one layer and write to several MLPs. (All laws of engines hold of them too, in
test_engine_laws; backends are compared in test_refined.)"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from engines import IN_PARTS, SHORT, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from circuitgraph import EAP, ActivationPatching, Circuit, CircuitGraphError, FileError, Rule, UnknownNameError
from circuitgraph._dictionary import Dictionary
from circuitgraph._graph import Graph, Layer, Parts, transformer_graph
from circuitgraph._linear import LogitTarget
from circuitgraph._names import Component
from circuitgraph._refinement import Refinement
from circuitgraph.features import attribution_graph, divided, feature_cards, load_transcoders, measure, merged, refine, save_dictionary
from circuitgraph.testing import ReferenceModel, planted_model, random_cross_layer_transcoder, random_dictionary, random_pairs, strategies
from circuitgraph.testing._module import architecture_of
from circuitgraph.testing._planted import traced as traced_by

ACROSS = "gpt2 across layers"
WHOLE, PARTS = IN_PARTS[ACROSS]
PAIRS = random_pairs(3, lengths=(5, 5, 4))
MODEL = ReferenceModel.random(3, n_layers=3, d_model=8, d_head=4).traced()


def refinements(layers: dict[str, Dictionary], *features: Any) -> list[Refinement]:
    return [
        Refinement(Component.parse(at), dictionary, tuple(some)) for (at, dictionary), some in zip(layers.items(), features, strict=True)
    ]


def close(got: Any, wanted: Any, tolerance: float) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1.0, float(np.abs(wanted).max())))


# -------------------------------------------------------------------------------------------------------------------------------- the graph


def layers(n: int = 3, *, parallel: bool = False) -> Graph:
    return transformer_graph([Layer(n_heads=1, n_kv_heads=1, is_parallel=parallel)] * n)


def across() -> Graph:
    graph = layers().refine("m0", Parts((3, 8), has_readers=True))
    graph = graph.refine("m1", Parts((), has_readers=True, earlier=((0, (3, 8)),)))
    return graph.refine("m2", Parts((5,), has_skip=True, has_readers=True, earlier=((0, (3, 8)),)))


def fed_by(graph: Graph, writer: str) -> set[str]:
    return {graph.readers[r].name for r in np.flatnonzero(graph.feeds[:, graph.writer_id(writer)])}


def test_one_reader_feeds_what_a_feature_says_at_every_mlp() -> None:
    graph = across()
    assert [w.name for w in graph.writers if w.layer == 2] == ["a2.h0", "m2.f5", "m0.f3.m2", "m0.f8.m2", "m2.skip", "m2.err"]
    assert [r.name for r in graph.readers if r.kind == "feature"] == ["m0.f3", "m0.f8", "m2.f5"]
    assert list(graph.writers) == sorted(graph.writers)
    assert fed_by(graph, "m0.f3") == fed_by(graph, "m0.f3.m1") == fed_by(graph, "m0.f3.m2") == {"m0.f3"}
    assert fed_by(graph, "m1.err") == {"m0", "m1"}  # it is without what the features of m0 would say at what m0 hears
    assert fed_by(graph, "m2.err") == {"m0", "m2"}
    assert fed_by(graph, "m2.skip") == {"m2"}


def test_what_is_said_at_a_later_mlp_is_heard_after_it() -> None:
    graph = across()
    assert graph.edge_id("m0.f3->a1.h0<q>")
    assert graph.edge_id("m0.f3.m1->a2.h0<q>")
    for edge in ("m0.f3.m1->a1.h0<q>", "m0.f3.m1->m1", "m0.f3.m2->m2.f5"):
        with pytest.raises(UnknownNameError, match="does not come after"):
            graph.edge_id(edge)


def test_a_feature_is_needed_as_long_as_somebody_hears_it_anywhere() -> None:
    graph = across()
    mask = np.zeros(graph.shape, dtype=bool)
    mask[graph.edge_id("m0.f3.m2->logits")] = True
    readers, writers = graph.needed(mask)
    assert {graph.readers[r].name for r in np.flatnonzero(readers)} == {"m0.f3", "logits"}
    assert {graph.writers[w].name for w in np.flatnonzero(writers)} == {"m0.f3.m2"}


def test_earlier_features_must_be_there() -> None:
    with pytest.raises(UnknownNameError, match="m0"):
        layers().refine("m1", Parts((1,), has_readers=True, earlier=((0, (3,)),)))


@given(seed=st.integers(0, 99), data=st.data())
def test_refining_and_merging_back_is_the_identity(seed: int, data: st.DataObject) -> None:
    graph = layers(parallel=seed % 2 == 1)
    refined = graph
    chosen = [tuple(sorted(data.draw(st.sets(st.integers(0, 9), max_size=2)))) for _ in range(3)]
    for layer, numbers in enumerate(chosen):
        earlier = tuple((origin, chosen[origin]) for origin in range(layer) if chosen[origin])
        refined = refined.refine(f"m{layer}", Parts(numbers, has_readers=True, earlier=earlier))
    circuit = Circuit(graph, data.draw(strategies.masks(graph)))
    assert merged(divided(circuit, refined), graph) == circuit
    scores = np.where(refined.visible, np.random.default_rng(seed).normal(size=refined.shape), 0.0)
    whole = merged(Circuit(refined, refined.visible, scores), graph)
    assert np.isclose(np.sum(whole.scores), scores.sum())  # type: ignore[arg-type]


def test_a_circuit_across_layers_is_saved_and_drawn(tmp_path: Path) -> None:
    refined = across()
    circuit = Circuit(refined, refined.visible)
    assert Circuit.load(circuit.save(tmp_path / "circuit.json")) == circuit
    assert "m0.f3.m2" in circuit.render(tmp_path / "circuit.svg").read_text()


# --------------------------------------------------------------------------------------------------------------------------------- the runs


@settings(max_examples=15)
@given(
    seed=st.integers(0, 99),
    activation=st.sampled_from(["relu", "jumprelu", "topk", "gated"]),
    reads=st.sampled_from(["mlp_in", "mlp_normalized", "mlp_stream"]),
    norm=st.sampled_from([None, "rms", "layer"]),
    parallel=st.booleans(),
    first=st.integers(0, 1),
    data=st.data(),
)
def test_any_cross_layer_transcoder_divides_any_model(
    seed: int, activation: Any, reads: Any, norm: Any, parallel: bool, first: int, data: st.DataObject
) -> None:
    """`F(1)` is the model, `F(0)` the source run, and readers are the sum of their writers."""
    model = ReferenceModel.random(seed, norm=norm, parallel=parallel, n_layers=3, d_model=8, d_head=4)
    made = random_cross_layer_transcoder(3 - first, seed, first=first, reads=reads, activation=activation, has_skip=True)
    chosen = [sorted(data.draw(st.sets(st.integers(0, 5), max_size=3))) for _ in made]
    refined = model.traced().refined(refinements(made, *chosen))
    for check in islice(refined.checks(random_pairs(seed, lengths=(4, 3))), 3):
        assert check.holds, check


@pytest.mark.parametrize("backend", ["reference", "torch", "jax"])
def test_without_errors_it_is_the_replacement_model(backend: str) -> None:
    """With every feature a node and every error patched by nothing, MLPs say what their own features and earlier ones make of them."""
    made = random_cross_layer_transcoder(3, 4, width=16, activation="jumprelu", has_skip=True)
    refined = traced(backend, WHOLE).refined(refinements(made, *[range(6)] * 3))
    mask = np.ones(refined.graph.shape)
    mask[:, [w for w, writer in enumerate(refined.graph.writers) if writer.kind == "error"]] = 0
    wanted = replaced_logits(traced("reference", WHOLE).model, [*made.values()], SHORT.clean)  # type: ignore[attr-defined]
    said = refined.bind(SHORT, "logit_diff", "zero").evaluate(mask[None])[0]
    right, wrong = ([logits[ids].mean() for logits, ids in zip(wanted, sets, strict=True)] for sets in (SHORT.answers, SHORT.wrong_answers))
    close(said, np.subtract(right, wrong), 1e-8)


def replaced_logits(model: ReferenceModel, made: list[Dictionary], prompts: Any) -> list[np.ndarray]:
    found = []
    for tokens in prompts:
        stream, active = model.embed(tokens[None]), []
        for number, (layer, dictionary) in enumerate(zip(model.layers, made, strict=True)):
            assert layer.attention is not None
            assert layer.mlp is not None
            assert layer.mlp.norm is not None
            stream = stream + layer.attention(stream)
            seen = layer.mlp.norm(stream)
            said = dictionary.decoder_bias + seen @ dictionary.skip.T + dictionary.encode(seen) @ dictionary.decoder  # type: ignore[union-attr]
            for origin, f in enumerate(active):
                said = said + f @ made[origin].later[number - origin - 1]  # type: ignore[index]
            active.append(dictionary.encode(seen))
            stream = stream + said
        found.append(model.unembed(stream)[0, -1])
    return found


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_run_that_begins_late_knows_what_earlier_features_are(backend: str) -> None:
    """One mask at a time, so that each begins at the layer in which it differs from the model's own run."""
    reference, engine = (traced(name, ACROSS).bind(SHORT, "logit_diff") for name in ("reference", backend))
    graph = engine.graph
    for layer in (1, 2, 3):
        mask = np.ones(graph.shape)
        late = [r for r, reader in enumerate(graph.readers) if reader.layer >= layer or reader.kind == "logits"]
        mask[late] = np.random.default_rng(layer).uniform(size=(len(late), graph.shape[1]))
        close(engine.evaluate(mask[None]), reference.evaluate(mask[None]), 1e-8)


@pytest.mark.parametrize("edge", ["m0.f1.m2->logits", "m0.f2.m1->a2.h0<q>", "m1.err->logits", "m1.f5.m2->logits"])
def test_only_what_is_needed_is_run(edge: str) -> None:
    """What an earlier feature says may be needed where nothing else is, of its own MLP or of the one that says it."""
    reference, engine = (traced(name, ACROSS).bind(SHORT, "logit_diff") for name in ("reference", "torch"))
    graph = engine.graph
    mask = np.zeros(graph.shape)
    for reader in ("m0", "m0.f1", "m0.f2", "m1", "m1.f5", edge.partition("->")[2]):
        mask[graph.reader_id(reader), graph.writer_id("input")] = 1
    mask[graph.edge_id(edge)] = mask[graph.edge_id("a2.h0->logits")] = 1
    close(engine.evaluate(mask[None]), reference.evaluate(mask[None]), 1e-8)


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_a_dropped_layer_says_what_earlier_features_do(dropped: int) -> None:
    """Nothing goes back through a dropped layer's readers; what earlier features say there does go back, through theirs."""
    reference, engine = (traced(name, ACROSS).bind(SHORT, "logit_diff") for name in ("reference", "torch"))
    ones, rule = np.ones(engine.graph.shape), Rule(dropped_layer=dropped)
    close(engine.gradient(ones, rule=rule), reference.gradient(ones, rule=rule), 1e-7)
    assert np.abs(engine.gradient(ones, rule=rule) - engine.gradient(ones)).max() > 1e-3


def test_jax_goes_back_past_a_dropped_layer() -> None:
    reference, engine = (traced(name, ACROSS).bind(SHORT, "logit_diff") for name in ("reference", "jax"))
    ones, rule = np.ones(engine.graph.shape), Rule(dropped_layer=2)
    close(engine.gradient(ones, rule=rule), reference.gradient(ones, rule=rule), 1e-7)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_features_of_a_layer_may_write_to_a_window(backend: str) -> None:
    """Not all later layers need be written to, and a layer between may have no feature of its own."""
    made = random_cross_layer_transcoder(3, 2, width=16)
    made["m0"] = replace(made["m0"], later=made["m0"].later[:1])  # type: ignore[index]
    refined = traced(backend, WHOLE).refined(refinements(made, (0, 1, 2), (), (5,)))
    assert "m0.f0.m2" not in {writer.name for writer in refined.graph.writers}
    check = next(iter(refined.checks(SHORT)))
    assert check.holds, check


def test_on_a_linear_model_attribution_is_exact() -> None:
    """Of features that are always active, where no head asks for anything."""
    planted = planted_model(seed=3, n_layers=2, n_heads=2, mlp="linear", looks_up=False)
    blocks = [replace(one, attention=replace(one.attention, q=0 * one.attention.q)) for one in planted.model.layers]  # type: ignore[union-attr, type-var]
    model = replace(planted.model, layers=tuple(blocks))
    made = random_cross_layer_transcoder(2, 1, width=model.embedding.shape[1], reads="mlp_stream")
    made = {at: replace(one, encoder_bias=one.encoder_bias + 30) for at, one in made.items()}
    refined = traced_by(model, "torch", architecture=architecture_of(model)).refined(refinements(made, (0, 3), (1,)))
    engine = refined.bind(planted.pairs, "logit_diff")
    exact, estimate = ActivationPatching().run(engine).scores, EAP().run(engine).scores
    assert exact is not None
    assert estimate is not None
    close(estimate, exact, 1e-8)
    assert np.abs(exact[:, refined.graph.writer_id("m0.f0.m1")]).max() > 1e-4
    assert np.abs(exact[refined.graph.reader_id("m0.f0")]).max() > 1e-4


# ------------------------------------------------------------------------------------------------------------ dictionaries and their choice


def test_later_layers_must_be_handed_over_too() -> None:
    made = random_cross_layer_transcoder(3, 2)
    every = refinements(made, (0, 1), (2,), (3,))
    with pytest.raises(CircuitGraphError, match="features of random-2 write to m2 too, which is not among the components to refine"):
        MODEL.refined(every[:2])
    with pytest.raises(CircuitGraphError, match="write to m3 too, which is not among"):
        MODEL.refined(refinements(random_cross_layer_transcoder(3, 2, first=1), (0,), (1,), (2,))[:2])
    with pytest.raises(CircuitGraphError, match="refine m0: .* to m1 too, which is in parts already; hand over all layers"):
        MODEL.refined(every[1:]).refined(every[:1])
    with pytest.raises(CircuitGraphError, match="to m1 too, which random-5 divides by mlp_out"):
        MODEL.refined([every[0], Refinement(Component("m", 1), random_dictionary(5), (0,)), every[2]])
    assert MODEL.refined(every[1:]).graph.writer_id("m1.f2.m2")  # a later part of it is whole


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_layers_may_be_handed_over_in_any_order(backend: str) -> None:
    model, other_way = traced(backend, ACROSS), traced(backend, WHOLE).refined([PARTS[1], PARTS[0], PARTS[2]])
    mask = np.random.default_rng(0).uniform(size=(1, *model.graph.shape))
    assert other_way.graph == model.graph
    close(other_way.bind(SHORT, "logit_diff").evaluate(mask), model.bind(SHORT, "logit_diff").evaluate(mask), 1e-10)


def test_arrays_that_do_not_fit_are_refused() -> None:
    transcoder = random_dictionary(1, reads="mlp_in")
    with pytest.raises(CircuitGraphError, match=r"later has shape \(2, 6, 5\); expected \(2, 6, 8\)"):
        replace(transcoder, later=np.zeros((2, 6, 5)))
    with pytest.raises(CircuitGraphError, match="only features of a transcoder write to later MLPs"):
        replace(random_dictionary(1), later=np.zeros((1, 6, 8)))


def test_what_identifies_it() -> None:
    first = random_cross_layer_transcoder(2, 3)["m0"]
    assert first.later is not None
    assert first.sha256() != replace(first, later=first.later + 1).sha256()
    assert first.prefix(2).later.shape == (1, 2, 8)  # type: ignore[union-attr]
    (record, *_) = MODEL.refined(refinements(random_cross_layer_transcoder(3, 2), (0, 1), (), (3,))).provenance["refined"]
    assert (record["also_writes_to"], record["features"]) == (["m1", "m2"], 2)


def test_what_knows_one_layer_alone_refuses(tmp_path: Path) -> None:
    first = random_cross_layer_transcoder(2, 3)["m0"]
    with pytest.raises(CircuitGraphError, match="SAELens has no form for a layer of a cross-layer transcoder"):
        save_dictionary(first, tmp_path)
    with pytest.raises(CircuitGraphError, match="is one layer of a cross-layer transcoder"):
        measure("zoo:tiny-english", first, "subject-verb-agreement", component="m0", prompts=2)


def test_the_loudest_features_become_nodes_by_what_they_say_everywhere() -> None:
    made = random_cross_layer_transcoder(3, 2, n_features=20)
    refined = refine(MODEL, made, PAIRS, top=3)
    for one, (at, dictionary) in zip(refined.refinements, made.items(), strict=True):
        seen = np.concatenate([*MODEL.seen_by(Refinement(Component.parse(at), dictionary, (0,)), PAIRS)])
        f = dictionary.encode(seen)
        rows = [dictionary.decoder, *([] if dictionary.later is None else dictionary.later)]
        energy = sum((f[..., None] * row).reshape(-1, 20, 8) ** 2 for row in rows).sum(axis=(0, 2))
        assert [*one.features] == sorted(np.argsort(-energy)[:3].tolist())
        assert one.fold is not None
        assert one.fold.share == pytest.approx(1 - np.sort(energy)[-3:].sum() / energy.sum())


def test_a_layer_of_which_nothing_is_chosen() -> None:
    """It is in parts if earlier features write to it, and whole if none does."""
    made = random_cross_layer_transcoder(3, 2, n_features=20)

    def silent(at: str) -> Dictionary:
        return replace(made[at], encoder_bias=np.full(20, -1e3))

    refined = refine(MODEL, {**made, "m1": silent("m1")}, PAIRS, top=2)
    assert [(str(one.component), len(one.features)) for one in refined.refinements] == [("m0", 2), ("m1", 0), ("m2", 2)]
    refined = refine(MODEL, {**made, "m0": silent("m0")}, PAIRS, top=2)
    assert [str(one.component) for one in refined.refinements] == ["m1", "m2"]
    with pytest.raises(CircuitGraphError, match="refine m0: no feature of random-2 is active on these prompts"):
        refine(MODEL, {at: silent(at) for at in made}, PAIRS)


@pytest.mark.parametrize("backend", ["reference", "torch", "jax"])
def test_what_a_feature_adds_to_the_logits_it_adds_at_all_mlps(backend: str) -> None:
    model, (first, *_) = traced(backend, WHOLE), PARTS
    dictionary = first.dictionary
    assert isinstance(dictionary, Dictionary)
    assert dictionary.later is not None
    together = replace(dictionary, decoder=dictionary.decoder + dictionary.later.sum(0), later=None)
    wanted = model.logit_weights(Refinement(first.component, together, (1, 4)), (1, 4))
    close(model.logit_weights(first, (1, 4)), wanted, 1e-10)


def test_one_card_for_each_feature() -> None:
    cards = feature_cards(traced("reference", ACROSS), SHORT, examples=1, tokens=2)
    assert [card.name for card in cards] == ["m0.f1", "m0.f2", "m1.f5", "m2.f5"]


# ------------------------------------------------------------------------------------------------------------------------------------ files


def test_a_feature_is_one_node_of_an_attribution_graph() -> None:
    """What it says at every MLP adds up."""
    model, tokens = traced("torch", ACROSS), [1, 2, 3]
    graph = attribution_graph(model, tokens, logits=1)
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    (end,) = (node for node in graph.nodes if node.kind == "logit")
    (found,) = model.linear_run(tokens).attributions([LogitTarget(end.index)])
    at = [n for n, node in enumerate(graph.nodes) if (node.layer, node.index, node.position) == (0, 1, 2)]
    writers = [model.graph.writer_id(name) for name in ("m0.f1", "m0.f1.m1", "m0.f1.m2")]
    assert np.abs(found[writers, 2]).min() > 1e-6
    close(graph.weights[-1, at], [found[writers, 2].sum()], 1e-12)
    close(graph.weights[-1].sum(), found.sum(), 1e-9)  # nothing is left out: here every feature that is active is a node


def write_circuit_tracer(folder: Path, made: dict[str, Dictionary], dtype: torch.dtype) -> None:
    """As circuit-tracer does: `W_enc` `[features, d_model]`, `W_dec` `[features, layers from its own on, d_model]`."""
    config = {"model_kind": "cross_layer_transcoder", "model_name": MODEL.name, "feature_input_hook": "hook_resid_mid", "scan": "who/what"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "feature_output_hook": "hook_mlp_out"}))

    def save(name: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(
            {key: torch.tensor(np.ascontiguousarray(values)).to(dtype) for key, values in tensors.items()}, folder / f"{name}.safetensors"
        )

    for i, d in enumerate(made.values()):
        rows = np.concatenate([d.decoder[:, None], *([] if d.later is None else [d.later.swapaxes(0, 1)])], axis=1)
        threshold = {} if d.threshold is None else {f"threshold_{i}": d.threshold}
        save(f"W_enc_{i}", {f"W_enc_{i}": d.encoder.T, f"b_enc_{i}": d.encoder_bias, f"b_dec_{i}": d.decoder_bias, **threshold})
        save(f"W_dec_{i}", {f"W_dec_{i}": rows})


@pytest.mark.parametrize(("activation", "dtype", "tolerance"), [("relu", torch.float64, 0), ("jumprelu", torch.bfloat16, 0.02)])
def test_those_of_circuit_tracer(activation: Any, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    made = random_cross_layer_transcoder(3, 5, activation=activation)
    write_circuit_tracer(tmp_path, made, dtype)
    read = load_transcoders(tmp_path)
    assert [*read] == ["m0", "m1", "m2"]
    for layer, (d, found) in enumerate(zip(made.values(), read.values(), strict=True)):
        assert (found.reads, found.layer, found.model, found.activation) == ("mlp_stream", layer, MODEL.name, activation)
        for name in ("encoder", "decoder", "encoder_bias", "decoder_bias", "threshold", "later"):
            got, wanted = getattr(found, name), getattr(d, name)
            assert (got is None) == (wanted is None)
            if wanted is not None:
                np.testing.assert_allclose(np.asarray(got, dtype=float), wanted, atol=tolerance)
    refined = refine(MODEL, read, PAIRS, top=2)
    check = next(iter(refined.checks(PAIRS)))
    assert check.holds, check


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    made = random_cross_layer_transcoder(2, 5)
    write_circuit_tracer(tmp_path, {**made, "m2": made["m1"]}, torch.float32)
    with pytest.raises(CircuitGraphError, match=r"W_dec_0 has shape \(6, 2, 8\); expected \(6, 3, 8\), with 3 layers"):
        load_transcoders(tmp_path)
    for name in ("W_enc_2", "W_dec_1"):
        (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(FileError, match=r"cannot read .*W_dec_1.safetensors"):
        load_transcoders(tmp_path)
    save_file({"W_enc_1": torch.zeros(1)}, tmp_path / "W_enc_1.safetensors")
    with pytest.raises(CircuitGraphError, match=r"W_enc_1.safetensors: there is no tensor 'b_enc_1'"):
        load_transcoders(tmp_path)
    for file in tmp_path.glob("W_enc_*"):
        file.unlink()
    with pytest.raises(FileError, match=r"has no W_enc_0.safetensors and so on"):
        load_transcoders(tmp_path)
