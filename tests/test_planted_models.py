"""The generator of models whose circuit is known: what was planted matters, nothing else does, and every backend sees the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from circuitgraph import ACDC, EAP, EAPIG, ActivationPatching, CircuitGraphError, check_trace, discover, evaluate
from circuitgraph.evaluation._agreement import auroc
from circuitgraph.testing import PlantedModel, planted_model, strategies
from circuitgraph.testing._planted import CEILING, FLOOR, traced
from circuitgraph.testing._planting import ANSWERS, SYMBOLS

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rms, gated, grouped": {"norm": "rms", "mlp": "gated", "n_kv_heads": 2},
    "layer norms, parallel": {"norm": "layer", "parallel": True, "mlp": "relu"},
    "attention only": {"mlp": None},
    "linear": {"mlp": "linear", "looks_up": False},
    "interaction": {"interaction": True},
    "inhibition": {"inhibition": True},
    "redundant": {"redundant": True},
    "everything": {"redundant": True, "interaction": True, "inhibition": True, "norm": "rms", "mlp": "gated"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
PLAIN = [kind for kind, options in KINDS.items() if not options.get("redundant")]


def effects(planted: PlantedModel) -> np.ndarray:
    return np.abs(np.asarray(planted.circuit.scores))


@given(strategies.planted_models())
@settings(max_examples=25)
def test_any_settings_make_a_confirmed_model(planted: PlantedModel) -> None:
    """The generator measures every edge itself and raises where one is not what it should be."""
    kept, ceiling = planted.circuit.mask, CEILING[planted.model.final_norm is not None]
    assert kept.any()
    assert effects(planted)[kept].min() >= FLOOR
    assert effects(planted)[planted.graph.visible & ~kept].max(initial=0) <= ceiling
    assert np.array_equal(kept, planted.graph.prune_dead(kept))
    assert repr(planted).startswith("planted_model(seed=")


@every_kind
@pytest.mark.parametrize("seed", range(3))
def test_the_model_does_its_task(kind: str, seed: int) -> None:
    planted = planted_model(seed, **KINDS[kind])
    said = planted.model.traced().logits(planted.pairs)[:, ANSWERS : ANSWERS + SYMBOLS]
    assert (ANSWERS + said.argmax(axis=1) == np.concatenate(planted.pairs.answers)).all()


@every_kind
def test_settings_repeat_and_seeds_differ(kind: str) -> None:
    one, again, other = (planted_model(seed, **KINDS[kind]) for seed in (0, 0, 1))
    assert one.circuit == again.circuit
    assert one.model.weights_hash() == again.model.weights_hash() != other.model.weights_hash()
    assert eval(repr(one), {"planted_model": planted_model}).circuit == one.circuit


def test_options_are_there() -> None:
    roles = {part.role for part in planted_model(0, redundant=True, interaction=True, inhibition=True).wiring.parts}
    assert roles >= {"copy", "vote", "and", "against"}
    assert np.asarray(planted_model(0, inhibition=True).circuit.scores).min() < -FLOOR
    kinds = {edge.reader.kind for seed in range(4) for edge in planted_model(seed).circuit.edges}
    assert kinds == {"q", "k", "v", "mlp", "logits"}


def test_a_backup_does_nothing_alone_and_something_beside_another() -> None:
    planted = planted_model(0, redundant=True)
    scores, backups = np.asarray(planted.circuit.scores), planted.backups
    assert backups.any()
    assert (planted.circuit.mask | ~backups).all()
    assert np.abs(scores[backups]).max() < 0.02
    voters = np.unique(np.nonzero(backups & (np.arange(len(planted.graph.writers)) > 0))[1])
    engine, masks = planted.bind(), np.ones((2, *planted.graph.shape))
    masks[1][:, voters[:2]] = 0
    before, after = engine.evaluate(masks).mean(axis=1)
    assert before - after > 1


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_backends_trace_it_and_agree_with_the_reference(backend: str) -> None:
    for kind in ("rms, gated, grouped", "linear") if backend == "jax" else KINDS:
        planted = planted_model(1, n_layers=2, **{**KINDS[kind], "n_heads": 4})
        model = planted.traced(backend)
        assert model.graph == planted.graph
        got, wanted = (EAP().run(engine).scores for engine in (model.bind(planted.pairs, "logit_diff"), planted.bind()))
        assert np.allclose(got, wanted, atol=1e-6)  # type: ignore[arg-type]


def test_a_trace_of_it_passes_all_checks() -> None:
    planted = planted_model(2, norm="rms")
    assert all(check.holds for check in check_trace(planted.traced(), planted.pairs))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("seed", range(2))
def test_without_redundancy_exact_methods_are_right_and_eap_ig_nearly(kind: str, seed: int) -> None:
    planted = planted_model(seed, **KINDS[kind])
    visible, truth = planted.graph.visible, planted.circuit.mask
    model = planted.traced()
    scores = {
        name: np.abs(np.asarray(algorithm.run(model.bind(planted.pairs, "logit_diff")).scores))[visible]
        for name, algorithm in (("exact", ActivationPatching()), ("eap-ig", EAPIG()))
    }
    assert auroc(scores["exact"], truth[visible]) == 1.0
    assert (auroc(scores["eap-ig"], truth[visible]) or 0) >= 0.95
    has_norms = planted.model.final_norm is not None
    found = ACDC(2e-3 if has_norms else 1e-9, group_first=False).run(model.bind(planted.pairs, "kl")).mask
    assert not (truth & ~found).any() or "inhibition" in kind
    assert np.array_equal(found, truth) or has_norms or "inhibition" in kind


def test_a_user_discovers_and_evaluates_it_like_any_model() -> None:
    planted = planted_model(4)
    circuit = discover(planted.traced(), planted.pairs, ACDC(1e-6))
    assert np.array_equal(circuit.mask, planted.circuit.mask)
    assert evaluate(planted.traced(), planted.pairs, circuit).faithfulness == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "layers"),
        ({"n_heads": 3, "n_kv_heads": 2}, "divisor of 3"),
        ({"norm": "batch"}, "unknown planted model: norm 'batch'"),
        ({"mlp": "linear", "redundant": True}, "linear MLPs cannot decide"),
        ({"n_layers": 1, "n_heads": 2, "redundant": True}, "redundant paths need an MLP that sees 3 heads"),
        ({"n_layers": 1, "n_heads": 1, "interaction": True}, "an interaction needs an MLP that sees 2 heads"),
        ({"n_layers": 1, "n_heads": 1, "inhibition": True}, "inhibition needs two heads"),
        ({"prompts": 0}, "prompts"),
    ],
)
def test_what_cannot_be_planted_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        planted_model(0, **options)


def test_what_has_no_module_is_refused() -> None:
    from circuitgraph.testing import ReferenceModel

    with pytest.raises(CircuitGraphError, match="rotary positions have no module"):
        traced(ReferenceModel.random(0, rotary_base=1e4), "torch")
