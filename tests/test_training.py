"""Training dictionaries: `circuitgraph.features.train` on the tiny zoo model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from engines import PAIRS, traced

import circuitgraph as cg
from circuitgraph import CircuitGraphError, FileError, PromptPairs
from circuitgraph._names import Component
from circuitgraph._refinement import Refinement
from circuitgraph._task import load_task
from circuitgraph._training import Place
from circuitgraph.features import Dictionary, SAETraining, Trained, load_dictionary, measure, refine, save_dictionary, train
from circuitgraph.testing import random_dictionary
from circuitgraph_torch._activations import Activations
from circuitgraph_torch._places import seen_at, spots

SMALL = SAETraining(n_features=64, k=4, steps=40, batch=128, learning_rate=3e-3, dead_after=2000)
FIRST = np.random.default_rng(0).integers(3, families.VOCABULARY, size=(2, 7))


@cache
def english() -> Any:
    return cg.trace("zoo:tiny-english")


@cache
def sentences(n: int = 200) -> PromptPairs:
    return load_task("ioi").pairs(english().tokenizer, n, 0)


def trained(settings: SAETraining = SMALL, component: str = "m1", **options: Any) -> Trained:
    return train(english(), component, sentences(), settings, **options)


def same(a: Dictionary, b: Dictionary) -> bool:
    return a.sha256() == b.sha256()


def stops_at(step: int) -> Any:
    def progress(_fraction: float, text: str) -> None:
        if text.startswith(f"step {step:,} "):
            raise KeyboardInterrupt

    return progress


def places(n_layers: int) -> list[tuple[str, Any]]:
    reads = (("m", "mlp_out"), ("m", "mlp_in"), ("a", "attn_out"), ("a", "attn_z"), ("r", "stream"))
    return [(f"{kind}{layer}", read) for layer in range(n_layers) for kind, read in reads] + [(f"r{n_layers}", "stream")]


# Biases after the projection, post-norms, a parallel block, a scaled residual, a mixture of experts.
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gptj", "granite", "mixtral"])
def test_places_read_in_batches_are_those_that_refine_reads(family: str) -> None:
    model: Any = cg.trace(families.tiny(family))
    pairs = PromptPairs(clean=FIRST[:1], corrupted=FIRST[1:], answers=[[1]])
    for component, reads in places(len(model.architecture.blocks)):
        at = spots(model.architecture, Place.of(component, reads, model.architecture))
        (got,) = seen_at(model.module, at[:1], torch.from_numpy(FIRST))
        asked = Refinement(Component.parse(component), random_dictionary(0, reads=reads), (0,))
        wanted = np.stack([*model.seen_by(asked, pairs)])
        np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=f"{component} {reads}")


def whole(width: int, reads: Any, layer: int) -> Dictionary:
    """Reconstructs everything: a direction and its opposite for every dimension."""
    both = np.concatenate([np.eye(width), -np.eye(width)])
    return Dictionary(both.T.copy(), both, np.zeros(2 * width), np.zeros(width), reads, layer=layer)


@pytest.mark.parametrize(("component", "reads"), places(2)[:1] + places(2)[2:5] + places(2)[-1:])
def test_a_dictionary_that_reconstructs_all_keeps_all(component: str, reads: Any) -> None:
    """Also at a place that is not the output of one module, and where zero is left from the second position only."""
    model: Any = traced("torch")
    place = Place.of(component, reads, model.architecture)
    got = measure(model, whole(16, reads, place.component.layer), PAIRS, first_position=1)
    assert got.explained_variance == pytest.approx(1, abs=1e-9)
    assert got.spliced_loss == pytest.approx(got.loss, abs=1e-6)
    assert got.loss_recovered == pytest.approx(1, abs=1e-4)
    assert abs(got.zero_loss - got.loss) > 1e-3
    assert got.l0 == pytest.approx(16)
    assert got.positions == 2 * sum(len(ids) - 1 for ids in PAIRS.clean)


def test_measured_by_hand() -> None:
    """Explained variance, L0 and live from the activations that `refine` reads; the loss of zero ablation from a hook."""
    model, d = english(), random_dictionary(1, width=128, n_features=12, activation="jumprelu")
    d = replace(d, layer=1)
    pairs = sentences().select(range(6))
    got = measure(model, d, pairs)
    x = np.concatenate([*model.seen_by(Refinement(Component("m", 1), d, (0,)), pairs)])
    f = d.encode(x)
    left, varied = x - d.decode(x, f), x - x.mean(0)
    assert got.explained_variance == pytest.approx(1 - (left**2).sum() / (varied**2).sum(), abs=1e-4)
    assert got.l0 == pytest.approx((f > 0).sum(1).mean(), abs=0.05)
    assert got.live == pytest.approx((f > 0).any(0).mean(), abs=0.1)
    hook = model.module.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: out * 0)
    try:
        total, n = 0.0, 0
        for ids in (*pairs.clean, *pairs.corrupted):
            logits = model.module(torch.tensor(ids)[None]).logits[0, :-1].detach()
            total += float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:].copy()), reduction="sum"))
            n += len(ids) - 1
    finally:
        hook.remove()
    assert got.zero_loss == pytest.approx(total / n, abs=1e-5)


def test_training_explains_far_more_than_none_does() -> None:
    made, before = trained(), trained(replace(SMALL, steps=1))
    assert made.report.explained_variance > 0.8
    assert before.report.explained_variance < 0.4
    assert made.report.loss_recovered > 0.9
    assert made.report.l0 == pytest.approx(4, abs=0.1)
    d = made.dictionary
    assert (d.layer, d.model, d.reads, d.activation, d.k) == (1, "zoo:tiny-english", "mlp_out", "topk", 4)
    np.testing.assert_allclose(np.linalg.norm(d.decoder, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("settings", [SMALL, replace(SMALL, activation="jumprelu", buffer=1000)], ids=["topk", "jumprelu, several chunks"])
def test_what_goes_on_from_a_checkpoint_is_what_was_not_interrupted(settings: SAETraining, tmp_path: Path) -> None:
    """To the last bit; and the folder is one that SAELens reads."""
    straight = trained(settings)
    with pytest.raises(KeyboardInterrupt):
        trained(settings, folder=tmp_path / "run", checkpoint_every=9, progress=stops_at(31))
    assert json.loads((tmp_path / "run" / "checkpoint.json").read_text())["step"] == 27
    resumed = trained(settings, folder=tmp_path / "run")
    assert same(resumed.dictionary, straight.dictionary)
    assert resumed.report == straight.report
    again = trained(settings, folder=tmp_path / "run", progress=stops_at(40))  # no step is done again
    assert same(again.dictionary, straight.dictionary)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "cfg.json",
        "checkpoint-00000040.safetensors",
        "checkpoint.json",
        "sae_weights.safetensors",
        "training.json",
    ]
    read = load_dictionary(tmp_path / "run")
    assert same(read, straight.dictionary)
    assert (read.layer, read.model) == (1, "zoo:tiny-english")


def test_the_seed_decides() -> None:
    short = replace(SMALL, steps=5)
    assert same(trained(short).dictionary, trained(short).dictionary)
    assert not same(trained(short).dictionary, trained(replace(short, seed=1)).dictionary)


def test_jumprelu() -> None:
    made = trained(replace(SMALL, activation="jumprelu", steps=80))
    assert made.report.explained_variance > 0.7
    assert made.report.l0 == pytest.approx(4, rel=0.4)
    assert made.dictionary.threshold is not None
    assert (np.asarray(made.dictionary.threshold) > 0).all()


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_transcoder(activation: Any, tmp_path: Path) -> None:
    made = trained(replace(SMALL, activation=activation), reads="mlp_in", folder=tmp_path)
    assert made.dictionary.is_transcoder
    assert made.report.explained_variance > 0.5
    read = load_dictionary(tmp_path)
    assert same(read, made.dictionary)


@pytest.mark.parametrize("reads", ["mlp_out", "mlp_in"])
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_saelens_reads_what_was_trained(activation: Any, reads: Any, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    import circuitgraph_torch.saelens  # noqa: F401  # what SAELens itself has not: TopK transcoders

    made = trained(replace(SMALL, activation=activation, steps=20), reads=reads, folder=tmp_path / "trained").dictionary
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "trained"), device="cpu")
    x = np.random.default_rng(0).normal(size=(3, 7, made.d_in))
    with torch.no_grad():
        f = theirs.encode(torch.from_numpy(x).float())
        said = theirs.decode(f)
    np.testing.assert_allclose(f.numpy(), made.encode(x), atol=1e-5)
    np.testing.assert_allclose(said.numpy(), made.decode(x, made.encode(x)), atol=1e-5)
    theirs.save_model(str(tmp_path / "theirs"))
    assert same(load_dictionary(tmp_path / "theirs"), made)


@pytest.mark.parametrize(("component", "reads"), [("a1", None), ("a1", "attn_z"), ("r1", None)])
def test_other_places(component: str, reads: Any) -> None:
    made = trained(replace(SMALL, steps=20), component, reads=reads)
    assert made.report.explained_variance > 0.2
    assert made.dictionary.component == component[0]


def test_what_was_trained_divides_its_component() -> None:
    model = refine(english(), {"m1": trained(replace(SMALL, steps=5)).dictionary}, "ioi", top=4, prompts=8)
    assert "m1.err" in [writer.name for writer in model.graph.writers]


def n_revived(activation: Any, auxiliary: float) -> int:
    """How many of 32 features are active after training that started dead: with small weights, or high thresholds."""
    model, settings = english(), replace(SMALL, activation=activation, auxiliary=auxiliary, steps=120, dead_after=1000)
    trainer = model.trainer(Place.of("m1", None, model.architecture), sentences().clean, settings)
    trainer.begin()
    state = trainer.state()
    if activation == "topk":
        state["weight.encoder"][:, 32:] *= 0.05
    else:
        state["weight.log_threshold"][32:] += 2
    trainer.restore(0, state)
    for _ in range(settings.steps):
        trainer.advance()
    d = trainer.dictionary()
    x = np.concatenate([*model.seen_by(Refinement(Component("m", 1), d, (0,)), sentences().select(range(60)))])
    return int((d.encode(x)[:, 32:] > 0).any(0).sum())


@pytest.mark.parametrize(("activation", "at_least"), [("topk", 12), ("jumprelu", 1)])
def test_dead_features_come_back(activation: Any, at_least: int) -> None:
    """By the auxiliary loss, and not without it."""
    assert n_revived(activation, SMALL.auxiliary) >= at_least
    assert n_revived(activation, 0) == 0


def test_batches_go_through_every_position_once_an_epoch() -> None:
    model, settings = english(), SAETraining(8, k=2, batch=50, buffer=400)
    at = spots(model.architecture, Place.of("m1", None, model.architecture))
    prompts = sentences().clean[:60]
    activations = Activations(model.module, at, prompts, settings)
    n_chunks, n_batches = len(activations._chunks), activations._ends[-1]
    assert n_chunks > 1
    epochs = [torch.cat([activations.batch(epoch * n_batches + i)[0] for i in range(n_batches)]) for epoch in (0, 1)]
    total = sum(len(ids) for ids in prompts)
    assert total - 50 * n_chunks < len(epochs[0]) <= total
    assert not torch.equal(*epochs)
    where = activations.batch(n_batches)[0]
    assert torch.equal(Activations(model.module, at, prompts, settings).batch(n_batches)[0], where)  # the order needs no history


def test_texts_and_ids_and_tasks() -> None:
    model, short = english(), replace(SMALL, steps=2, batch=64)
    texts = [" ".join(t.strip("'") for t in model.tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in sentences().clean[:40]]
    ids = [np.asarray(row) for row in model.tokenizer(texts)["input_ids"]]
    assert same(train(model, "m1", texts, short).dictionary, train(model, "m1", ids, short).dictionary)
    assert same(train(model, "m1", "ioi", short, prompts=30).dictionary, train(model, "m1", load_task("ioi"), short, prompts=30).dictionary)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"component": "m7"}, "the model has no m7; there are m0, m1, m2"),
    ({"component": "x1"}, "'x1' is not the name of a component"),
    ({"reads": "attn_z"}, "m1 has no attn_z; that is a place of a component such as a1"),
    ({"reads": "mlp_stream"}, "unknown place of a dictionary of m1 'mlp_stream'"),
    ({"data": []}, "data has no token"),
    ({"data": [[1, 2, 3]]}, "data has one prompt only"),
    ({"data": 3}, "data is 3; expected texts"),
    ({"data": [[0.5, 1.0]]}, r"data\[0\] is array.*; expected texts, or rows of token ids"),
    ({"data": [[1, 999]]}, r"data\[0\] has token id 999; the model's vocabulary is 0 to 334"),
    ({"data": ["a", [1]]}, "expected texts alone"),
    ({"data": "a text"}, "unknown task 'a text'.*texts to train on are given in a list"),
    ({"data": [[1, 2], [3, 4]], "prompts": 3}, "prompts is 3, which says how many a task"),
    ({"data": [[1, 2], [3, 4]]}, "the prompts have 2 positions, and a batch has 128"),
    ({"data": [[5, 5, 5, 5], [7]], "settings": replace(SMALL, batch=1)}, "has variance"),
    ({"settings": replace(SMALL, learning_rate=1e30)}, "the loss of step .* is (nan|inf); take a smaller learning_rate"),
    ({"checkpoint_every": 0}, "checkpoint_every: 0; expected a whole number of at least 1"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_one_clear_message(wrong: dict[str, Any], message: str) -> None:
    asked = {"component": "m1", "data": sentences(), "settings": SMALL, **wrong}
    with pytest.raises(CircuitGraphError, match=message):
        train(english(), asked.pop("component"), asked.pop("data"), asked.pop("settings"), **asked)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 65}, "k is 65, more than the 64 features"),
        ({"activation": "relu"}, "unknown activation to train 'relu'"),
        ({"steps": 0}, "steps: 0; expected a whole number"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a number above 0"),
        ({"held_out": 1.0}, "held_out is 1.0; expected a share"),
        ({"sparsity": "0.1"}, "sparsity is '0.1'; expected a number of at least 0"),
        ({"first_position": 128}, "first_position is 128; expected less than the context"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        replace(SMALL, **wrong)


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    short = replace(SMALL, steps=2)
    trained(short, folder=tmp_path)
    with pytest.raises(CircuitGraphError, match="is of another training: its learning_rate is 0.003, and 0.1 was asked for"):
        trained(replace(short, learning_rate=0.1), folder=tmp_path)
    with pytest.raises(CircuitGraphError, match="its component is 'm1', and 'm2' was asked for"):
        trained(short, "m2", folder=tmp_path)
    (state,) = tmp_path.glob("checkpoint-*")
    state.write_bytes(state.read_bytes()[:-8])
    with pytest.raises(FileError, match="is not the file that checkpoint.json names"):
        trained(short, folder=tmp_path)


def test_a_backend_that_cannot() -> None:
    with pytest.raises(CircuitGraphError, match="a backend that does not train dictionaries; expected backend 'torch'"):
        train(traced("reference"), "m0", PAIRS, SMALL)


def test_measure_wants_a_layer() -> None:
    with pytest.raises(CircuitGraphError, match="does not say of which layer it is; give component, such as m3"):
        measure(english(), random_dictionary(0, width=128), sentences())
    with pytest.raises(CircuitGraphError, match="maps 6 numbers to 6, and mlp_out has 128"):
        measure(english(), random_dictionary(0, width=6), sentences(), component="m1")


def test_saved_and_read_by_name(tmp_path: Path) -> None:
    d = trained(replace(SMALL, steps=2)).dictionary
    assert same(load_dictionary(save_dictionary(d, tmp_path / "d")), d)


def test_the_bundled_dictionary_is_what_its_card_says() -> None:
    """On prompts that the card did not see; `python -m scripts.train_dictionary` made it."""
    d = load_dictionary("zoo:tiny-english/m1")
    assert (d.layer, d.model, d.reads, d.activation, d.k, d.n_features) == (1, "zoo:tiny-english", "mlp_out", "topk", 8, 512)
    np.testing.assert_allclose(np.linalg.norm(d.decoder, axis=1), 1, atol=1e-6)
    got = measure(english(), d, sentences())
    assert got.explained_variance > 0.97
    assert got.loss_recovered > 0.99
    assert got.l0 == pytest.approx(8, abs=0.1)
    with pytest.raises(CircuitGraphError, match=r"unknown dictionary 'zoo:tiny-english/m2'; did you mean 'zoo:tiny-english/m1'\?"):
        load_dictionary("zoo:tiny-english/m2")
