"""Methods that ask for gradients (EAP, EAP-IG, RelP, attribution patching), and the baselines that ask for none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from engines import EXACT as EXACT_ROWS
from engines import Row, bound, every_engine

from circuitgraph._engine import EXACT, QK_FIX, RELP, Algorithm, Engine, Rule, Source, SteppedAlgorithm
from circuitgraph._errors import CircuitGraphError, DegenerateError
from circuitgraph._graph import Graph, Layer, transformer_graph
from circuitgraph.algorithms import EAP, EAPIG, ActivationPatching, AttributionPatching, InformationFlow, Magnitude, Random, RelP
from circuitgraph.algorithms._information_flow import POSITIONS_AT_ONCE
from circuitgraph.algorithms._quadrature import RULES, by_weight, knots
from circuitgraph.testing import ReferenceModel, random_pairs

with_rules = pytest.mark.parametrize("row", EXACT_ROWS, ids=str)

GRADIENTS: dict[str, Any] = {
    "eap": EAP(),
    "relp": RelP(),
    "eap-ig inputs": EAPIG(points=2),
    "eap-ig activations": EAPIG("activations", points=2),
    "eap-ig left": EAPIG(points=2, quadrature="left"),
    "clean-corrupted": EAPIG(points=2, quadrature="trapezoid"),
}
OTHERS: dict[str, Any] = {
    "eap-ig mask": EAPIG("mask", points=2),
    "attribution": AttributionPatching(),
    "atp*": AttributionPatching(("qk-fix", "grad-drop")),
    "information flow": InformationFlow(),
    "magnitude": Magnitude(),
    "random": Random(),
}
PAIRS = random_pairs(4, lengths=(4, 5, 4))
FEW = random_pairs(1, lengths=(3, 3))
LINEAR: dict[str, Any] = {"n_heads": 0, "norm": None, "act": "identity", "n_layers": 3}
SOURCES = ("corrupted", "zero", "mean", "mean-per-position", "optimal")


@cache
def tiny(metric: str = "logit_diff", **settings: Any) -> Engine:
    """One layer, where a gradient of the reference takes some milliseconds, and smooth enough that an integral is soon exact."""
    return ReferenceModel.random(2, **{"n_layers": 1, "n_heads": 1, "d_mlp": 4, **settings}).bind(FEW, metric)


def run(algorithm: Any, engine: Engine) -> Any:
    """Its outcome, of which the scores are known to be there."""
    return algorithm.run(engine)


def ones(engine: Engine) -> np.ndarray:
    return np.ones(engine.graph.shape)


def mean_metric(engine: Engine, mask: np.ndarray) -> float:
    return float(engine.evaluate(mask[None]).mean())


def expected_from(engine: Engine, gradient: np.ndarray) -> np.ndarray:
    sign = 1 if engine.metric.higher_is_better else -1
    return np.where(engine.graph.visible, sign * gradient.mean(axis=0), 0.0)


# -------------------------------------------------------------------------------------------------------------------- what all of them do


@pytest.mark.parametrize("name", [*GRADIENTS, *OTHERS])
def test_every_outcome_is_well_formed(name: str) -> None:
    algorithm, engine = {**GRADIENTS, **OTHERS}[name], tiny(n_layers=2)
    outcome, visible = run(algorithm, engine), engine.graph.visible
    assert isinstance(algorithm, Algorithm)
    assert (outcome.mask == visible).all()
    assert outcome.done == 1.0
    assert outcome.scores.dtype == np.float64
    assert outcome.scores[visible].any()
    assert not outcome.scores[~visible].any()
    if outcome.prompt_scores is None:
        assert name in ("atp*", "random")
    else:
        assert outcome.prompt_scores.dtype == np.float32
        assert outcome.prompt_scores.shape == (engine.n_prompts, *engine.graph.shape)
        assert np.allclose(outcome.prompt_scores.mean(axis=0), outcome.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", [EAPIG("activations", 1), EAPIG("mask", 3), AttributionPatching(("grad-drop",))], ids=repr)
def test_progress_ends_in_the_result(algorithm: Any) -> None:
    engine = tiny(n_layers=2, d_mlp=0)
    assert isinstance(algorithm, SteppedAlgorithm)
    steps: list[Any] = [*algorithm.steps(engine)]
    done = [step.done for step in steps]
    assert len(done) > 2
    assert done == sorted(done)
    assert done[-1] == 1.0 > done[-2]
    assert np.array_equal(steps[-1].scores, run(algorithm, engine).scores)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_exact_on_a_linear_model(name: str, source: str) -> None:
    engine, exact = linear(source)
    assert np.abs(exact).max() > 0.1
    estimate = run(GRADIENTS[name], engine)
    assert np.allclose(estimate.scores, exact, atol=1e-8)


@cache
def linear(source: Any) -> tuple[Engine, np.ndarray]:
    model = ReferenceModel.random(4, **LINEAR)
    constants = np.random.default_rng(0).normal(size=(4, 8)) if source == "optimal" else None
    engine = model.bind(PAIRS, "logit_diff", Source(source, constants=constants))
    return engine, run(ActivationPatching(), engine).scores


@pytest.mark.parametrize(
    "algorithm", [EAP(), RelP(), EAPIG("inputs"), EAPIG("activations"), EAPIG("mask"), AttributionPatching()], ids=repr
)
def test_a_metric_without_gradient_is_refused(algorithm: Any) -> None:
    with pytest.raises(DegenerateError, match="accuracy"):
        run(algorithm, tiny("accuracy"))


@pytest.mark.parametrize("algorithm", [RelP(), AttributionPatching(), EAPIG(points=1, quadrature="right")], ids=repr)
def test_kl_is_refused_at_the_clean_run(algorithm: Any) -> None:
    with pytest.raises(DegenerateError, match="kl has zero gradient at the clean run"):
        run(algorithm, tiny("kl"))


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (EAPIG, {"path": "input"}, "path is 'input'; expected 'inputs' or"),
        (EAPIG, {"quadrature": "simpson"}, "quadrature is 'simpson'; expected 'midpoint' or"),
        (EAPIG, {"points": 0}, "points: 0; expected a whole number of at least 1"),
        (EAPIG, {"points": 2.0}, "points: 2.0"),
        (EAPIG, {"points": 1, "quadrature": "trapezoid"}, "points: 1; expected a whole number of at least 2"),
        (AttributionPatching, {"corrections": "qk-fix"}, "'qk-fix'; expected a tuple of 'qk-fix' and 'grad-drop'"),
        (AttributionPatching, {"corrections": ("qk",)}, "expected a tuple"),
        (AttributionPatching, {"corrections": ("qk-fix", "qk-fix")}, "expected a tuple"),
        (AttributionPatching, {"corrections": (["qk-fix"],)}, "expected a tuple"),
        (Random, {"seed": -1}, "seed: -1"),
    ],
)
def test_bad_settings_are_named(cls: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        cls(**settings)


# --------------------------------------------------------------------------------------------------------------------------------- EAP-IG


@pytest.mark.parametrize("rule", RULES)
def test_quadrature_integrates_what_it_should(rule: Any) -> None:
    """Constants, all rules; lines, the symmetric ones; degree 2n - 1, Gauss and Legendre's."""
    points, weights = knots(rule, 4)
    assert np.isclose(weights.sum(), 1)
    assert ((points >= 0) & (points <= 1)).all()
    assert np.isclose(weights @ points, 0.5) == (rule not in ("left", "right"))
    assert np.isclose(weights @ points**7, 1 / 8) == (rule == "gauss-legendre")
    grouped = sum(weight * np.mean(np.power(group, 3)) for weight, group in by_weight(rule, 4))
    assert np.isclose(grouped, weights @ points**3)
    assert len(by_weight(rule, 4)) == {"gauss-legendre": 2, "trapezoid": 2}.get(rule, 1)


@pytest.mark.parametrize(
    ("quadrature", "points", "weights"),
    [
        ("left", [0, 1 / 3, 2 / 3], [1 / 3, 1 / 3, 1 / 3]),  # those of EAP-IG's code
        ("midpoint", [1 / 6, 1 / 2, 5 / 6], [1 / 3, 1 / 3, 1 / 3]),
        ("trapezoid", [0, 1 / 2, 1], [1 / 4, 1 / 2, 1 / 4]),
        ("gauss-legendre", [0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5], [5 / 18, 8 / 18, 5 / 18]),
    ],
)
def test_inputs_by_hand(quadrature: Any, points: list[float], weights: list[float]) -> None:
    engine = tiny("nll")
    by_hand: Any = sum(weight * engine.gradient(ones(engine), mix=point) for point, weight in zip(points, weights, strict=True))
    found = run(EAPIG("inputs", 3, quadrature), engine)
    assert np.allclose(found.scores, expected_from(engine, by_hand), atol=1e-9)


@with_rules
def test_clean_corrupted_is_the_mean_of_two_gradients(row: Row) -> None:
    """The one at the corrupted end is that of a run on the corrupted prompts."""
    engine = bound(row)
    ends = (engine.gradient(ones(engine), mix=1.0) + engine.gradient(ones(engine), mix=0.0)) / 2
    found = run(EAPIG(points=2, quadrature="trapezoid"), engine)
    assert np.allclose(found.scores, expected_from(engine, ends), atol=1e-9)


@pytest.mark.parametrize("quadrature", ["midpoint", "right"])
def test_activations_by_hand(quadrature: Any) -> None:
    """One kind of writer of one layer at a time stands on the path, and only its edges are scored there."""
    engine = tiny(n_heads=2)
    by_hand = 0 * ones(engine)
    points = [0.25, 0.75] if quadrature == "midpoint" else [0.5, 1]
    for kind, layer in {(writer.kind, writer.layer) for writer in engine.graph.writers}:
        those = np.array([(writer.kind, writer.layer) == (kind, layer) for writer in engine.graph.writers])
        for point in points:
            mask = ones(engine)
            mask[:, those] = point
            by_hand = by_hand + np.where(those, engine.gradient(mask), 0) / len(points)
    found = run(EAPIG("activations", 2, quadrature), engine)
    assert np.allclose(found.scores, expected_from(engine, by_hand), atol=1e-9)


@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
def test_the_edges_out_of_a_depth_add_up_to_patching_it(metric: str) -> None:
    engine = tiny(metric)
    scores = run(EAPIG("activations", 20, "gauss-legendre"), engine).scores
    for columns in ([0], [1], [2]):  # the input, the head, the MLP
        patched = ones(engine)
        patched[:, columns] = 0
        lost = (mean_metric(engine, ones(engine)) - mean_metric(engine, patched)) * (-1 if metric == "kl" else 1)
        assert abs(lost) > 0.01
        assert np.isclose(scores[:, columns].sum(), lost, atol=1e-5)


@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
def test_the_scores_along_the_mask_are_complete(metric: str) -> None:
    """All of them add up to F(1) - F(0), the better the more points; by Gauss and Legendre's as good as exactly."""
    engine = tiny(metric)
    ends = mean_metric(engine, ones(engine)) - mean_metric(engine, 0 * ones(engine))
    gaps: dict[Any, float] = {}
    rules: Any = (("midpoint", 3), ("midpoint", 9), ("gauss-legendre", 12))
    for rule, points in rules:
        outcome = run(EAPIG("mask", points, rule), engine)
        gaps[rule, points] = outcome.record["completeness_gap"]
        assert np.isclose(outcome.scores.sum() - gaps[rule, points], ends * (-1 if metric == "kl" else 1))
        assert np.isclose(outcome.record["metric_at_ones"] - outcome.record["metric_at_zeros"], ends)
    assert abs(gaps["gauss-legendre", 12]) < 1e-6
    assert 1e-4 < abs(gaps["midpoint", 9]) < abs(gaps["midpoint", 3]) / 4


def test_completeness_is_exact_where_the_metric_is_a_polynomial() -> None:
    """A linear model of three layers is one of degree 4 in m, so its derivative is integrated exactly by two points; not by one."""
    engine, _ = linear("corrupted")
    gaps = [run(EAPIG("mask", points, "gauss-legendre"), engine).record["completeness_gap"] for points in (1, 2)]
    assert abs(gaps[0]) > 1e-3
    assert abs(gaps[1]) < 1e-8


@pytest.mark.parametrize("path", ["inputs", "activations", "mask"])
def test_kl_works_along_a_path(path: Any) -> None:
    """The clean end adds nothing, and an engine that would refuse it is not asked."""
    engine = tiny("kl")
    assert np.abs(run(EAPIG(path), engine).scores).max() > 1e-3
    ended, half = run(EAPIG(path, 2, "right"), engine), run(EAPIG(path, 1, "midpoint"), engine)
    assert np.allclose(2 * ended.scores, half.scores, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------------------------------- RelP


@with_rules
def test_relp_goes_back_by_its_rule(row: Row) -> None:
    engine = bound(row, "nll")
    found = run(RelP(), engine).scores
    assert np.allclose(found, expected_from(engine, engine.gradient(ones(engine), rule=RELP)), atol=1e-9)
    assert not np.allclose(found, run(EAP(), engine).scores, atol=1e-3)
    steering = np.array([reader.kind in ("q", "k") for reader in engine.graph.readers])
    assert not found[steering].any()
    assert found[~steering].any()


# ------------------------------------------------------------------------------------------------------------------- attribution patching


@with_rules
@pytest.mark.parametrize("metric", ["logit_diff", "nll"])
def test_attribution_patching_is_the_derivative_of_patching_a_node(row: Row, metric: str) -> None:
    engine, visible = bound(row, metric), bound(row, metric).graph.visible
    outcome = run(AttributionPatching(), engine)
    sign = 1 if engine.metric.higher_is_better else -1
    assert list(outcome.record["nodes"]) == [writer.name for writer in engine.graph.writers]
    for w, writer in enumerate(engine.graph.writers):
        masks = np.stack([ones(engine), ones(engine)])
        masks[:, :, w] += np.array([1e-5, -1e-5])[:, None]
        up, down = engine.evaluate(masks).mean(axis=1)
        expected = sign * (up - down) / 2e-5
        assert np.isclose(outcome.record["nodes"][writer.name], expected, atol=1e-6)
        assert np.allclose(outcome.scores[visible[:, w], w], outcome.record["nodes"][writer.name])


def test_the_qk_fix_is_exact_where_all_but_the_softmax_is_linear() -> None:
    """Then each edge's estimate is what patching it does, and the input's is their sum; the plain gradient's is not."""
    engine = tiny(norm=None, d_mlp=0, n_heads=2)
    exact = run(ActivationPatching(level="edge"), engine).scores
    fixed, plain = (run(AttributionPatching(corrections), engine).record["nodes"]["input"] for corrections in (("qk-fix",), ()))
    assert np.isclose(fixed, exact[:, 0].sum(), atol=1e-8)
    assert not np.isclose(plain, exact[:, 0].sum(), atol=1e-3)


def test_grad_drop_by_hand() -> None:
    """On a linear model of three layers: what remains of a writer's effect without a layer is a product of the others' matrices."""
    model, engine = ReferenceModel.random(4, **LINEAR), linear("corrupted")[0]
    through = [np.eye(8) + layer.mlp.down @ layer.mlp.up for layer in model.layers if layer.mlp]
    live, source = engine.activations(), engine.reversed().activations()
    sizes = np.zeros((4, len(PAIRS)))
    for prompt in range(len(PAIRS)):
        wanted = model.unembedding[PAIRS.answers[prompt][0]] - model.unembedding[PAIRS.wrong_answers[prompt][0]]
        change = (live[prompt] - source[prompt])[:, -1]
        for w in range(4):
            others = [layer for layer in range(3) if layer != w - 1]
            for dropped in others:
                back = wanted
                for layer in reversed(range(w, 3)):
                    back = back if layer == dropped else back @ through[layer]
                sizes[w, prompt] += abs(back @ change[w]) / len(others)
    plain = np.array([*run(AttributionPatching(), engine).record["nodes"].values()])
    found = run(AttributionPatching(("grad-drop",)), engine)
    assert np.allclose([*found.record["nodes"].values()], np.sign(plain) * sizes.mean(axis=1), atol=1e-8)


def test_grad_drop_sees_effects_that_cancel() -> None:
    model = ReferenceModel.random(4, **{**LINEAR, "n_layers": 2}, biases=False)
    last = replace(model.layers[1], mlp=replace(model.layers[1].mlp, up=np.eye(8), down=-np.eye(8)))  # type: ignore[type-var]
    engine = replace(model, layers=(model.layers[0], last)).bind(PAIRS, "logit_diff")
    plain, dropped = (run(AttributionPatching(corrections), engine).record["nodes"] for corrections in ((), ("grad-drop",)))
    assert abs(plain["input"]) < 1e-8
    assert abs(dropped["input"]) > 0.1


def test_both_corrections_are_both() -> None:
    engine = tiny(n_layers=2)
    nodes = run(AttributionPatching(("grad-drop", "qk-fix")), engine).record["nodes"]

    def effects(rule: Rule) -> np.ndarray:
        effects: np.ndarray = np.where(engine.graph.visible, engine.gradient(ones(engine), rule=rule), 0.0).sum(axis=1)
        return effects

    fixed = effects(QK_FIX).mean(axis=0)
    without = [np.abs(effects(replace(QK_FIX, dropped_layer=layer))).mean(axis=0) for layer in (0, 1)]
    expected = np.array([without[0] / 2 + without[1] / 2, without[1], without[1], without[0], without[0]])
    assert np.allclose([*nodes.values()], np.where(fixed < 0, -1, 1) * np.diag(expected), atol=1e-9)
    assert not np.allclose(effects(QK_FIX), effects(EXACT), atol=1e-3)


def test_grad_drop_needs_a_second_layer() -> None:
    with pytest.raises(DegenerateError, match="the model has 1; use it with two or more"):
        run(AttributionPatching(("grad-drop",)), tiny())


# ----------------------------------------------------------------------------------------------------------------------- without gradient


@dataclass(frozen=True)
class Said:
    """An engine of which only what writers say is known."""

    graph: Graph
    values: list[np.ndarray]

    @property
    def n_prompts(self) -> int:
        return len(self.values)

    def activations(self) -> list[np.ndarray]:
        return self.values


def flow_by_hand(graph: Graph, values: Any) -> np.ndarray:
    scores: np.ndarray = np.zeros((len(values), *graph.shape))
    for prompt, (r, reader) in product(range(len(values)), enumerate(graph.readers)):
        said = np.asarray(values[prompt])[graph.visible[r]]
        positions = range(said.shape[1]) if reader.kind != "logits" else [said.shape[1] - 1]
        for position in positions:
            heard = said[:, position].sum(axis=0)
            near = [max(0.0, np.abs(heard).sum() - np.abs(heard - one).sum()) for one in said[:, position]]
            scores[prompt, r, graph.visible[r]] += np.array(near) / max(sum(near), 1e-300) / len(positions)
    return scores


@every_engine
def test_information_flow_by_hand(row: Row) -> None:
    engine = bound(row)
    found = run(InformationFlow(), engine)
    by_hand = flow_by_hand(engine.graph, [engine.activations()[i] for i in range(engine.n_prompts)])
    assert np.allclose(found.scores, by_hand.mean(axis=0), atol=row.tolerance)
    assert np.allclose(found.prompt_scores, by_hand, atol=1e-6)
    assert np.allclose(found.scores.sum(axis=1), 1)


def test_information_flow_where_the_shares_are_known() -> None:
    """Two writers that say different things have their part of the sum; one that is against the sum has none; two that cancel neither."""
    graph = transformer_graph([Layer(n_heads=0, n_kv_heads=0)])  # the input and an MLP
    cases: list[Any] = [([1, 0], [0, 3], [0.25, 0.75]), ([4, 0], [-1, 0], [1, 0]), ([2, 1], [-2, -1], [0, 0])]
    for first, second, shares in cases:
        engine: Any = Said(graph, [np.array([[[9, 9], first], [[0, 0], second]], dtype=float)])
        scores = run(InformationFlow(), engine).scores
        assert np.allclose(scores[1], shares)  # the logits hear the last position
        assert np.allclose(scores[0], [1, 0])  # the MLP hears the input alone, at both


def test_information_flow_of_a_long_prompt_in_parts() -> None:
    graph = transformer_graph([Layer(n_heads=2, n_kv_heads=1), Layer(n_heads=1, n_kv_heads=1, is_parallel=True)])
    said = np.random.default_rng(0).normal(size=(len(graph.writers), POSITIONS_AT_ONCE + 3, 4))
    engine: Any = Said(graph, [said])
    assert np.allclose(run(InformationFlow(), engine).scores, flow_by_hand(graph, [said])[0])


@every_engine
@pytest.mark.parametrize("source", ["corrupted", "zero", "mean"])
def test_magnitude_is_the_distance_from_the_source(row: Row, source: str) -> None:
    engine = bound(row, "logit_diff", source)
    live, patched = engine.activations(), engine.source_values()
    found = run(Magnitude(), engine)
    for w in range(len(engine.graph.writers)):
        sizes = [np.sqrt(((live[i][w] - patched[i][w]) ** 2).sum(-1)).mean() for i in range(engine.n_prompts)]
        assert np.allclose(found.scores[engine.graph.visible[:, w], w], np.mean(sizes), atol=row.tolerance)


def test_random_depends_on_the_seed_alone() -> None:
    first, again, other = (run(Random(seed), engine).scores for seed, engine in ((0, tiny()), (0, tiny("kl")), (1, tiny())))
    assert np.array_equal(first, again)
    shown = tiny().graph.visible
    assert not np.isclose(first[shown], other[shown]).any()
    assert ((first[shown] > 0) & (first[shown] < 1)).all()
