"""`refine`: which features become nodes, what is said of the rest, and the whole story from a model to a picture of features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import SHORT, traced

import circuitgraph as cg
from circuitgraph import CircuitGraphError
from circuitgraph.drawing import to_dot
from circuitgraph.evaluation import CircuitGraphWarning
from circuitgraph.features import Dictionary, Neurons, load_dictionary, merged, refine, save_dictionary
from circuitgraph.features._refine import _is_same_model
from circuitgraph.files import save_mib
from circuitgraph.testing import ReferenceModel, random_dictionary, random_pairs

PAIRS = random_pairs(3, lengths=(5, 5, 4))
MODEL = ReferenceModel.random(3, d_model=8, d_head=4).traced()


def energies(dictionary: Dictionary, model: Any = MODEL) -> tuple[np.ndarray, np.ndarray]:
    """By hand, of what the MLP of layer 0 says: the sum of squares of what each feature says, and its largest activation."""
    said = [value for prompt in (*PAIRS.clean, *PAIRS.corrupted) for value in of_first_mlp(prompt)]
    f = dictionary.encode(np.array(said))
    return (f**2).sum(axis=0) * (dictionary.decoder**2).sum(axis=1), f.max(axis=0)


def of_first_mlp(prompt: np.ndarray) -> np.ndarray:
    model = MODEL.model
    stream, layer = model.embed(prompt[None]), model.layers[0]
    assert layer.attention is not None
    assert layer.mlp is not None
    return np.asarray(layer.mlp(stream + layer.attention(stream))[0])


def chosen(model: Any) -> list[int]:
    return [writer.index for writer in model.graph.writers if writer.kind in ("feature", "neuron")]


def test_the_loudest_features_become_nodes() -> None:
    dictionary = random_dictionary(2, n_features=20)
    energy, largest = energies(dictionary)
    refined = refine(MODEL, {"m0": dictionary}, PAIRS, top=4)
    assert chosen(refined) == sorted(np.argsort(-energy)[:4].tolist())
    fold = refined.provenance["refined"][0]["fold"]
    assert (fold["active"], fold["chosen"]) == (int((energy > 0).sum()), 4)
    assert fold["share"] == pytest.approx(1 - np.sort(energy)[-4:].sum() / energy.sum())
    floor = float(np.sort(largest)[-3])
    assert chosen(refine(MODEL, {"m0": dictionary}, PAIRS, top=None, floor=floor)) == sorted(np.flatnonzero(largest > floor).tolist())


def test_features_that_are_active_on_corrupted_prompts_alone_count() -> None:
    d = random_dictionary(2, n_features=8)
    clean = np.concatenate([of_first_mlp(prompt) for prompt in PAIRS.clean])
    bias = d.encoder_bias - (clean @ d.encoder + d.encoder_bias - d.is_centred * (d.decoder_bias @ d.encoder)).max(axis=0) - 1e-6
    quiet = replace(d, encoder_bias=bias)
    assert not (quiet.encode(clean) > 0).any()
    assert len(chosen(refine(MODEL, {"m0": quiet}, PAIRS))) > 0


def test_neurons_know_how_many_they_are() -> None:
    refined = refine(MODEL, {"m0": Neurons()}, PAIRS, top=12)
    assert len(chosen(refined)) == 12
    assert "m0.err" not in {writer.name for writer in refined.graph.writers}


def test_what_cannot_be_chosen_is_refused() -> None:
    d = random_dictionary(2)
    silent = replace(d, encoder_bias=np.full(6, -1e3))
    for dictionaries, options, message in (
        ({"m0": d}, {"top": None}, "give top, floor or both"),
        ({"m0": d}, {"top": 0}, "refine: top"),
        ({"m0": silent}, {}, "no feature of random-2 is active on these prompts"),
        ({"m0": d}, {"floor": 1e3}, "no feature of random-2 is active above 1000"),
        ({"m9": d}, {}, "'m9'"),
        ({"m0": random_dictionary(2, width=5)}, {}, "maps 5 numbers to 5, and mlp_out has 8"),
    ):
        with pytest.raises(CircuitGraphError, match=message):
            refine(MODEL, dictionaries, PAIRS, **options)  # type: ignore[arg-type]


def test_a_dictionary_from_elsewhere_is_warned_of() -> None:
    d = replace(random_dictionary(2), layer=1, model="gpt2-small")
    with pytest.warns(CircuitGraphWarning) as seen:
        refine(MODEL, {"m0": d}, PAIRS)
    said = [str(warning.message) for warning in seen]
    assert any("was trained on m1, and is asked to divide m0" in text for text in said)
    assert any("was trained on gpt2-small, and the model is reference-3" in text for text in said)
    assert _is_same_model("gpt2-small", "openai-community/gpt2")


def test_from_a_model_to_a_picture_of_features(tmp_path: Path) -> None:
    """The whole story: a dictionary from a folder, its features as nodes, a circuit, a report, files, pictures, whole components again."""
    whole = cg.trace("zoo:induction-2l")
    d_model = whole.architecture.d_model
    made = replace(random_dictionary(1, width=d_model, n_features=40, reads="stream"), layer=1)
    folder = save_dictionary(made, tmp_path / "stream")
    model = refine(
        whole, {"r1": load_dictionary(folder), "a1": random_dictionary(2, width=d_model, reads="attn_out")}, "induction", prompts=8
    )
    circuit = cg.discover(model, "induction", cg.EAP(), prompts=8)
    assert circuit.provenance["model"]["refined"][0]["component"] == "r1"
    report = cg.evaluate(model, "induction", circuit, prompts=8)
    assert report.faithfulness == pytest.approx(1)
    best = circuit.top(60).prune_dead()
    assert cg.Circuit.load(best.save(tmp_path / "circuit.json")) == best
    nodes = {name for name in best.nodes if ".f" in name}
    assert nodes
    assert nodes <= set(best.to_networkx())
    for detail in ("edges", "nodes", "layers"):
        assert "computed from" in to_dot(best, detail=detail) or detail == "layers"
    assert "r1\\n" in to_dot(best, detail="layers")
    assert best.render(tmp_path / "circuit.svg").read_text().startswith("<?xml")
    with pytest.raises(CircuitGraphError, match="parts of the stream"):
        merged(best, whole.graph)
    with pytest.raises(CircuitGraphError, match="to_mib: the format knows no features.*merged"):
        save_mib(best, tmp_path / "mib.json")


def test_jax_chooses_the_same_features() -> None:
    dictionaries: dict[str, Any] = {"m0": Neurons(), "r1": random_dictionary(3, width=16, n_features=20, reads="stream")}
    by_reference, by_jax = (refine(traced(backend, "gpt2"), dictionaries, SHORT, top=4) for backend in ("reference", "jax"))
    assert by_jax.graph == by_reference.graph
    assert by_jax.provenance["refined"][1]["fold"]["share"] == pytest.approx(by_reference.provenance["refined"][1]["fold"]["share"])


def test_sparse_feature_circuits_are_what_two_thresholds_leave() -> None:
    """By hand: nodes by the sum of their edges' effects, edges between those nodes; what leads nowhere goes."""
    refined = refine(MODEL, {"m0": random_dictionary(2, n_features=20)}, PAIRS, top=4)
    engine, estimator = refined.bind(PAIRS, "logit_diff"), cg.EAP()
    scores = np.asarray(estimator.run(engine).scores)
    effects = np.abs(scores.sum(axis=0))
    node, edge = float(np.median(effects)), float(np.quantile(np.abs(scores[refined.graph.visible]), 0.3))
    outcome = cg.SparseFeatureCircuits(node, edge, estimator).run(engine)
    graph, kept = refined.graph, set()
    for r, w in np.argwhere(graph.visible):
        heard = graph.readers[r].kind == "logits" or any(effects[fed] >= node for fed in np.flatnonzero(graph.feeds[r]))
        if heard and effects[w] >= node and abs(scores[r, w]) >= edge:
            kept.add((r, w))
    mask = np.zeros(graph.shape, dtype=bool)
    mask[tuple(np.array(sorted(kept)).T)] = True
    np.testing.assert_array_equal(outcome.mask, graph.prune_dead(mask))
    assert 0 < outcome.mask.sum() < graph.n_edges
    assert outcome.record["nodes"]["m0.err"] == pytest.approx(scores.sum(axis=0)[graph.writer_id("m0.err")])
    with pytest.raises(CircuitGraphError, match="node_threshold"):
        cg.SparseFeatureCircuits(-1)
    spans = tuple(np.array([0] * (len(ids) - 1) + [1]) for ids in PAIRS.clean)
    by_span = refined.bind(replace(PAIRS, spans=spans, span_names=("FRONT", "END")), "logit_diff")
    with pytest.raises(CircuitGraphError, match="PerPosition scores no edges of the graph"):
        cg.SparseFeatureCircuits(estimator=cg.PerPosition(cg.EAP())).run(by_span)
