"""Cards of features: where they are active, what they promote, labels, pages and tooltips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import traced
from test_features import MODEL, PAIRS, of_first_mlp

import circuitgraph as cg
from circuitgraph import CircuitGraphError, FileError, UnknownNameError
from circuitgraph._names import Component
from circuitgraph._refinement import Refinement
from circuitgraph.features import Neurons, feature_cards, read_labels, refine, save_cards
from circuitgraph.testing import random_dictionary

DICTIONARY = random_dictionary(2, n_features=20)
REFINED = refine(MODEL, {"m0": DICTIONARY}, PAIRS, top=4)


def test_examples_are_the_prompts_of_the_largest_activations() -> None:
    cards = feature_cards(REFINED, PAIRS, examples=2)
    assert [card.name for card in cards] == [writer.name for writer in REFINED.graph.writers if writer.kind == "feature"]
    rows = [*PAIRS.clean, *PAIRS.corrupted]
    for card in cards:
        number = int(card.name.partition(".f")[2])
        activations = [DICTIONARY.encode(of_first_mlp(row))[:, number] for row in rows]
        order = np.argsort([-values.max() for values in activations], kind="stable")
        assert [example.peak for example in card.examples] == pytest.approx([activations[i].max() for i in order[:2]])
        assert card.examples[0].tokens == tuple(f" {token}" for token in rows[order[0]])
        assert card.frequency == pytest.approx(np.mean(np.concatenate(activations) > 0))


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logit_weights_are_the_direct_effect(family: str, backend: str) -> None:
    """Of every kind of part, in the backends as in the reference."""
    wide: dict[str, Any] = {"width": 16}
    for component, dictionary in (
        ("m1", random_dictionary(1, **wide)),
        ("a1", random_dictionary(2, reads="attn_z", **wide)),
        ("a0", random_dictionary(3, reads="attn_out", **wide)),
        ("r2", random_dictionary(4, reads="stream", **wide)),
        ("m0", Neurons()),
    ):
        refinement = Refinement(Component.parse(component), dictionary, (0, 3, 5))
        got, wanted = (traced(name, family).logit_weights(refinement, [0, 3, 5]) for name in (backend, "reference"))
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert got.shape == (3, 30)
        np.testing.assert_allclose(got.mean(axis=1), 0, atol=1e-6)


def test_a_card_names_the_tokens_that_a_feature_speaks_for() -> None:
    (card,) = feature_cards(REFINED, PAIRS, [REFINED.graph.writers[3].name], tokens=2, labels={REFINED.graph.writers[3].name: "plurals"})
    number = REFINED.graph.writers[3].index
    weights = MODEL.logit_weights(REFINED.refinements[0], [number])[0]
    assert [token for token, _ in card.promotes] == [str(token) for token in np.argsort(-weights)[:2]]
    assert [weight for _, weight in card.suppresses] == pytest.approx(np.sort(weights)[:2])
    assert str(card).startswith(f"{card.name}: plurals (active at")
    assert "promotes" in str(card)


def test_what_is_no_feature_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown feature 'm0.f99'"):
        feature_cards(REFINED, PAIRS, ["m0.f99"])
    with pytest.raises(CircuitGraphError, match="is not refined, so it has no features"):
        feature_cards(MODEL, PAIRS)


def test_labels_are_read_from_ours_and_from_neuronpedia_s(tmp_path: Path) -> None:
    ours, theirs, other = (tmp_path / name for name in ("ours.json", "theirs.json", "other.json"))
    ours.write_text(json.dumps({"m0.f3": "plural nouns"}))
    theirs.write_text(json.dumps([{"modelId": "gpt2-small", "layer": "0-mlp", "index": "3", "description": " plural nouns "}]))
    other.write_text(json.dumps([1, 2]))
    assert read_labels(ours) == read_labels(theirs, "m0") == {"m0.f3": "plural nouns"}
    with pytest.raises(FileError, match="give component, such as 'm3'"):
        read_labels(theirs)
    with pytest.raises(FileError, match="expected an object of labels by name"):
        read_labels(other)
    other.write_text("{")
    with pytest.raises(FileError, match="is not JSON"):
        read_labels(other)


def test_a_page_and_the_tooltips_of_a_picture(tmp_path: Path) -> None:
    cards = feature_cards(REFINED, PAIRS, labels={"m0.f0": "<b>"})
    page = save_cards(cards, tmp_path / "features.html", title="Tiny & small").read_text()
    assert "<title>Tiny &amp; small</title>" in page
    assert all(card.name in page for card in cards)
    assert "<script" not in page
    assert "rgba(230,159,0,1.00)" in page
    circuit = cg.Circuit(REFINED.graph, REFINED.graph.visible)
    name = cards[0].name
    picture = circuit.render(tmp_path / "circuit.svg", labels={name: "what it is for"}).read_text()
    assert f"{name}: what it is for" in picture
    page = circuit.render(tmp_path / "circuit.html", labels={name: "what it is for"}).read_text()
    assert page.startswith("<!doctype html>")
    assert f"{name}: what it is for" in page
    assert "<?xml" not in page


def test_a_card_of_a_dictionary_with_a_tokenizer() -> None:
    model = refine("zoo:tiny-english", {"m0": Neurons()}, "subject-verb-agreement", top=2, prompts=4)
    card = feature_cards(model, "subject-verb-agreement", prompts=4, examples=1)[0]
    assert card.name.startswith("m0.n")
    assert "".join(card.examples[0].tokens).startswith((" The ", " A ")), card
