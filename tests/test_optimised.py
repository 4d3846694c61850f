"""Algorithms that optimise a mask, what they are made of, and constants to ablate with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from engines import SHORT, Row, bound
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Planted

from circuitgraph import Circuit, Graph, discover
from circuitgraph._discover import strongest
from circuitgraph._engine import Algorithm, Engine, Source, SteppedAlgorithm
from circuitgraph._errors import CircuitGraphError, DegenerateError
from circuitgraph._graph import Layer, transformer_graph
from circuitgraph._metrics import KLDivergence
from circuitgraph.algorithms import EAP, HISP, EdgePruning, OptimalAblation, SubnetworkProbing, UniformGradientSampling
from circuitgraph.algorithms import _hard_concrete as hc
from circuitgraph.algorithms._adam import Adam
from circuitgraph.algorithms._constant_values import ConstantValues, writer_means
from circuitgraph.algorithms._relaxed import is_record_due, loss, loss_gradient, n_wanted
from circuitgraph.algorithms._uniform_gradient_sampling import mean_where_undecided, sampled
from circuitgraph.evaluation import evaluate, optimal_source
from circuitgraph.evaluation._question import digest
from circuitgraph.testing import ReferenceModel, random_pairs

TORCH, REFERENCE = Row("torch", "gpt2"), Row("reference", "gpt2")
GRAPH = transformer_graph([Layer(n_heads=2, n_kv_heads=2)] * 2)
PATH = ("input->a0.h1<v>", "a0.h1->m0", "m0->a1.h0<k>", "m0->logits", "a1.h0->logits")

# With a few steps, for laws that hold after any number of them.
SHORT_RUNS: dict[str, Any] = {
    "edge pruning": EdgePruning(target=0.5, n_steps=3),
    "subnetwork probing": SubnetworkProbing(n_steps=3),
    "ugs": UniformGradientSampling(n_steps=3),
    "ugs optimal": UniformGradientSampling(n_steps=3, ablation="optimal"),
}
HALF = SHORT_RUNS["edge pruning"]
every_short_run = pytest.mark.parametrize("algorithm", SHORT_RUNS.values(), ids=SHORT_RUNS)


@dataclass(frozen=True, eq=False)
class Worth(Planted):
    """A loss that each edge lowers by its worth, times the mask: its gradient is known."""

    worth: Any = None

    def gradient(self, mask: Any, *, source: Any = None) -> Any:
        return np.broadcast_to(-self.worth, (self.n_prompts, *self.graph.shape))


def worth(edges: tuple[str, ...], of_each: float = 1.0, of_others: float = 0.001, graph: Graph = GRAPH) -> Any:
    """An engine where these edges are worth much and all others little."""
    table = np.where(graph.visible, of_others, 0.0)
    for edge in edges:
        table[graph.edge_id(edge)] = of_each
    return Worth(graph, lambda mask: (table * (1 - mask)).sum(), metric=KLDivergence(), worth=table)


def names(engine: Any, mask: Any) -> set[str]:
    return {edge.name for edge in engine.graph.edges_of(mask)}


# Adam and the hard-concrete distribution.


def test_adam_by_hand() -> None:
    adam = Adam(learning_rate=0.1, b1=0.9, b2=0.99, epsilon=0.0)
    assert adam.step(np.array([2.0])) == pytest.approx([-0.1])
    mean, square = 0.9 * (0.1 * 2.0) + 0.1 * -1.0, 0.99 * (0.01 * 4.0) + 0.01 * 1.0
    expected = -0.1 * (mean / (1 - 0.9**2)) / math.sqrt(square / (1 - 0.99**2))
    assert adam.step(np.array([-1.0])) == pytest.approx([expected])


def test_adam_finds_a_minimum_and_leaves_what_does_not_matter() -> None:
    x, adam = np.array([3.0, -2.0, 5.0]), Adam(0.3)
    for step in range(200):
        x = x + adam.step(np.array([x[0] - 1, 100 * (x[1] - 1), 0.0]), rate=1 - step / 200)
    assert x == pytest.approx([1, 1, 5], abs=1e-2)


@given(st.floats(-6, 6), st.floats(0.001, 0.999))
def test_the_slope_of_a_hard_concrete_sample_is_its_derivative(log_alpha: float, u: float) -> None:
    below, z, above = (float(hc.sample(np.array(log_alpha + shift), np.array(u))[0]) for shift in (-1e-6, 0, 1e-6))
    slope = float(hc.sample(np.array(log_alpha), np.array(u))[1])
    is_at_a_corner = (below in (0, 1)) != (above in (0, 1))
    assert 0 <= z <= 1
    assert is_at_a_corner or slope == pytest.approx((above - below) / 2e-6, abs=1e-5)


def test_expected_l0_is_the_share_of_samples_that_are_not_zero() -> None:
    log_alphas = np.array([-4.0, -1.0, 0.0, 0.5, 3.0])
    u = hc.uniform(np.random.default_rng(0), (20_000, 5))
    expected, slope = hc.expected_l0(log_alphas)
    assert (hc.sample(log_alphas, u)[0] > 0).mean(axis=0) == pytest.approx(expected, abs=0.012)
    assert slope == pytest.approx((hc.expected_l0(log_alphas + 1e-6)[0] - hc.expected_l0(log_alphas - 1e-6)[0]) / 2e-6, abs=1e-8)


@given(st.floats(0.01, 0.99))
def test_a_settled_mask_has_an_inverse(mask: float) -> None:
    assert float(hc.settled(np.array(hc.log_alpha_of(mask)))) == pytest.approx(mask)
    assert hc.settled(np.array([-1000.0, 1000.0])).tolist() == [0, 1]


# Uniform gradient sampling.


def test_uniform_samples_have_the_mean_p_and_are_undecided_as_often_as_said() -> None:
    p = np.array([0.1, 0.5, 0.73, 0.95])
    masks = sampled(p, np.random.default_rng(1).uniform(size=(20_000, 4)))
    undecided = (masks > 0) & (masks < 1)
    assert masks.mean(axis=0) == pytest.approx(p, abs=0.012)
    assert undecided.mean(axis=0) == pytest.approx(p * (1 - p), abs=0.012)
    assert np.quantile(masks[:, 1][undecided[:, 1]], [0.25, 0.75]) == pytest.approx([0.25, 0.75], abs=0.02)


def test_the_mean_slope_of_undecided_edges_is_what_keeping_them_changes() -> None:
    def f(m: Any) -> Any:  # not linear: the derivative of one edge depends on both
        return np.exp(m[..., 0]) * (1 + m[..., 1] ** 3)

    p, rng = np.array([0.6, 0.3]), np.random.default_rng(2)
    masks = sampled(p, rng.uniform(size=(60_000, 2)))
    slope = np.stack([f(masks), np.exp(masks[:, 0]) * 3 * masks[:, 1] ** 2], axis=-1)
    kept, removed = masks.copy(), masks.copy()
    kept[:, 0], removed[:, 0] = 1, 0
    found, _ = mean_where_undecided([*slope], [*masks])
    assert found[0] == pytest.approx((f(kept) - f(removed)).mean(), rel=0.02)


def test_an_edge_that_is_never_undecided_has_no_slope() -> None:
    slope, is_known = mean_where_undecided([np.ones((1, 2))], [np.array([[1.0, 0.5]])])
    assert slope.tolist() == [[0, 1]] == is_known.tolist()


# Known answers: each edge lowers the loss by what it is worth.


@pytest.mark.parametrize("edges", [PATH, ("input->m1", "m1->logits"), ("input->logits",)])
@pytest.mark.parametrize("seed", [0, 1])
def test_edges_that_carry_everything_are_found(edges: tuple[str, ...], seed: int) -> None:
    engine = worth(edges)
    for algorithm in (EdgePruning(target=len(edges), seed=seed), UniformGradientSampling(penalty=0.02, seed=seed)):
        outcome = algorithm.run(engine)
        assert names(engine, outcome.mask) == set(edges), algorithm
        assert outcome.scores is not None
        assert min(outcome.scores[engine.graph.edge_id(edge)] for edge in edges) > 0.6


def test_nodes_that_carry_everything_are_found() -> None:
    engine = worth(PATH)
    outcome = SubnetworkProbing(penalty=0.03).run(engine)
    kept = {name for name, score in outcome.record["nodes"].items() if score > 0.5}
    assert kept == {"input", "a0.h1", "m0", "a1.h0"}
    assert names(engine, outcome.mask) == {
        edge.name for edge in engine.graph.edges if edge.writer.node in kept and (edge.reader.node in kept or edge.reader.kind == "logits")
    }
    for w, writer in enumerate(engine.graph.writers):
        column = engine.graph.visible[:, w]
        assert outcome.scores is not None
        assert (outcome.scores[column, w] == outcome.record["nodes"][writer.name]).all()
        assert not outcome.scores[~column, w].any()


def test_a_price_above_the_worth_of_everything_leaves_nothing() -> None:
    engine = worth(PATH)
    for algorithm in (SubnetworkProbing(penalty=2.0), UniformGradientSampling(penalty=2.0)):
        assert not algorithm.run(engine).mask[1:, 1:].any()


@pytest.mark.parametrize("target", [0.1, 0.2, 12])
def test_edge_pruning_reaches_its_target(target: float) -> None:
    engine = bound(TORCH, "kl")
    sparsity = EdgePruning(target=target).run(engine).record["sparsity"]
    asked = 1 - n_wanted(target, engine.graph) / engine.graph.n_edges
    assert sparsity[-1] == pytest.approx([asked, asked], abs=0.1)
    assert sparsity[0][0] < 0.05
    assert [wanted for _, wanted in sparsity] == sorted(wanted for _, wanted in sparsity)


def test_a_warm_start_changes_the_start_and_its_rank_decides() -> None:
    engine = worth(PATH)
    algorithm = EdgePruning(target=5, n_steps=1, start=EAP(), learning_rate=1e-6)
    warm, cold = algorithm.run(engine).scores, EdgePruning(target=5, n_steps=1, learning_rate=1e-6).run(engine).scores
    assert warm is not None
    assert cold is not None
    least = min(warm[engine.graph.edge_id(edge)] for edge in PATH)
    others = [warm[engine.graph.edge_id(edge)] for edge in engine.graph.edges if edge.name not in PATH]
    assert least > max(others) > min(others)
    assert np.ptp(cold[engine.graph.visible & ~np.isin(np.arange(len(engine.graph.writers)), [0])]) < 1e-5


def test_a_start_without_scores_is_refused() -> None:
    class Unscored:
        def run(self, engine: Engine) -> Any:
            from circuitgraph import Outcome

            return Outcome(engine.graph.visible)

    with pytest.raises(CircuitGraphError, match="Unscored gives no score for each edge"):
        EdgePruning(start=Unscored()).run(worth(PATH))


# Laws of every run.


@every_short_run
def test_the_same_seed_is_the_same_run_and_another_is_another(algorithm: Any) -> None:
    engine = bound(TORCH, "kl")
    first, again = algorithm.run(engine), algorithm.run(engine)
    other = type(algorithm)(**{**vars(algorithm), "seed": 5}).run(engine)
    assert np.array_equal(first.scores, again.scores)
    assert np.array_equal(first.mask, again.mask)
    losses = [record.pop("loss") for record in (dict(first.record), dict(again.record))]
    assert np.allclose(*losses, rtol=1e-9)  # an engine that was asked before may go on from there, within rounding
    assert {**first.record, "loss": None} == {**again.record, "loss": None}
    assert not np.array_equal(first.scores, other.scores)


@every_short_run
@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
def test_steps_make_progress_and_end_with_a_record(algorithm: Any, metric: str) -> None:
    engine = bound(TORCH, metric)
    steps = list(algorithm.steps(engine))
    assert [step.done for step in steps] == pytest.approx([1 / 3, 2 / 3, 1])
    last, graph = steps[-1], engine.graph
    assert not any(step.record for step in steps[:-1])
    assert len(last.record["sparsity"]) == 3
    if algorithm != SHORT_RUNS["ugs optimal"]:  # whose constants are gone
        assert last.record["loss"][-1] == [3, pytest.approx(loss(engine, last.mask))]
    assert np.array_equal(last.mask, graph.prune_dead(last.mask))
    assert ((last.scores >= 0) & (last.scores <= 1)).all()
    assert not last.scores[~graph.visible].any()
    Circuit(graph, last.mask, last.scores, record=last.record)  # plain values only


def test_backends_agree() -> None:
    for algorithm in (EdgePruning(target=0.5, n_steps=1), UniformGradientSampling(n_steps=1, n_samples=1, ablation="optimal")):
        here, there = (algorithm.run(bound(row, "kl")).scores for row in (TORCH, REFERENCE))
        assert here is not None
        assert there is not None
        assert np.allclose(here, there, atol=1e-4)


def test_a_loss_goes_down_whichever_direction_is_better() -> None:
    for metric in ("kl", "logit_diff", "nll"):
        engine, mask = bound(TORCH, metric), np.full(bound(TORCH, metric).graph.shape, 0.7)
        down = loss_gradient(engine, mask)
        assert loss(engine, mask - 1e-3 * down) < loss(engine, mask)


def test_the_flat_place_of_kl_is_no_error() -> None:
    engine = bound(TORCH, "kl")
    assert not loss_gradient(engine, np.ones(engine.graph.shape)).any()


@settings(max_examples=30)
@given(st.integers(1, 300))
def test_the_loss_is_recorded_ten_times_and_last(steps: int) -> None:
    due = [step for step in range(1, steps + 1) if is_record_due(step, steps)]
    assert due[-1] == steps
    assert len(due) == min(steps, 10)


# HISP.


@pytest.mark.parametrize("metric", ["logit_diff", "nll"])
def test_hisp_is_the_slope_of_a_node_mask(metric: str) -> None:
    engine = bound(TORCH, metric)
    nodes = HISP(normalised=False).run(engine).record["nodes"]
    for w, writer in enumerate(engine.graph.writers):
        masks = np.ones((2, *engine.graph.shape))
        masks[0, :, w] += 1e-5
        masks[1, :, w] -= 1e-5
        up, down = engine.evaluate(masks)
        assert nodes[writer.name] == pytest.approx(float(np.abs(up - down).mean()) / 2e-5, abs=1e-6)


def test_hisp_normalises_each_layer_and_keeps_prompts() -> None:
    engine = bound(TORCH)
    outcome, plain = HISP().run(engine), HISP(normalised=False).run(engine)
    for layer in {writer.layer for writer in engine.graph.writers}:
        names_of_layer = [w.name for w in engine.graph.writers if w.layer == layer and (w.kind == "input") == (layer == -1)]
        values = np.array([outcome.record["nodes"][name] for name in names_of_layer])
        before = np.array([plain.record["nodes"][name] for name in names_of_layer])
        if "input" not in names_of_layer:
            assert np.linalg.norm(values) == pytest.approx(1)
            assert np.allclose(values * np.linalg.norm(before), before)
    assert outcome.record["nodes"]["input"] == pytest.approx(1)
    assert outcome.prompt_scores is not None
    assert outcome.scores is not None
    assert np.allclose(outcome.prompt_scores.mean(axis=0), outcome.scores, atol=1e-6)
    with pytest.raises(DegenerateError, match="kl"):
        HISP().run(bound(TORCH, "kl"))


# Optimal ablation.


class Quadratic:
    """A loss whose best constants are known: half the squared distance to a target, where a writer is patched."""

    graph = transformer_graph([Layer(n_heads=1, n_kv_heads=1)])
    metric, n_prompts, spans = KLDivergence(), 2, ()

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.said = [rng.normal(size=(3, length, 4)) for length in (3, 5)]
        self.target = rng.normal(size=(3, 4))

    def activations(self) -> Any:
        return self.said

    def source_gradient(self, mask: Any, *, source: Any) -> Any:
        patched = 1 - mask[-1][:, None]
        return np.stack([patched * (source[prompt][:, 0] - self.target) for prompt in range(2)])


def test_fitted_constants_are_the_best_ones() -> None:
    engine: Any = Quadratic()
    fitted = OptimalAblation(n_steps=400).fit(engine).constants
    assert fitted == pytest.approx(engine.target, abs=0.02)
    mask = engine.graph.visible.copy()
    mask[-1, 1] = False
    of_one = OptimalAblation(n_steps=400).fit(engine, mask).constants
    mean = np.concatenate(engine.said, axis=1).mean(axis=1)
    assert of_one is not None
    assert of_one[1] == pytest.approx(engine.target[1], abs=0.02)
    assert of_one[[0, 2]] == pytest.approx(mean[[0, 2]])  # nobody patches them


def test_writer_means_are_over_prompts_and_positions() -> None:
    values = Quadratic().said
    means, together = writer_means(values), np.concatenate(values, axis=1)
    assert means.mean == pytest.approx(together.mean(axis=1))
    assert means.spread == pytest.approx(np.sqrt(together.var(axis=1).mean(axis=1)))
    constants = ConstantValues(means.mean, means.lengths)
    assert [constants[i].shape for i in range(len(constants))] == [v.shape for v in values]
    assert np.array_equal(constants[1][:, 4], means.mean)


def test_fitted_constants_beat_mean_and_zero_on_masks_not_seen() -> None:
    engine = bound(TORCH, "kl")
    fitted = OptimalAblation(n_steps=25).fit(engine).constants
    assert fitted is not None
    means = writer_means(engine.activations())
    masks = [np.random.default_rng(i).uniform(size=engine.graph.shape) < 0.1 * i for i in range(10)]

    def mean_loss(constants: Any) -> float:
        return float(np.mean([loss(engine, mask, source=ConstantValues(constants, means.lengths)) for mask in masks]))

    assert mean_loss(fitted) < 0.8 * min(mean_loss(means.mean), mean_loss(0 * means.mean))
    again = OptimalAblation(n_steps=25).fit(engine).constants
    assert np.array_equal(fitted, again)  # type: ignore[arg-type]


def test_constants_for_one_circuit_are_better_for_it() -> None:
    pairs, model = random_pairs(2, lengths=(4, 4)), TORCH.traced
    engine = model.bind(pairs, "kl")
    mask = np.random.default_rng(4).uniform(size=model.graph.shape) < 0.5
    circuit = Circuit(model.graph, mask & model.graph.visible)
    quick = OptimalAblation(n_steps=25)
    losses = [
        loss(model.bind(pairs, "kl", source), circuit.mask)
        for source in (optimal_source(model, pairs, circuit=circuit, ablation=quick), optimal_source(model, pairs, ablation=quick), "mean")
    ]
    assert losses == sorted(losses)
    assert loss(engine, circuit.mask) > 0
    other = ReferenceModel.random(n_layers=1).traced()
    with pytest.raises(CircuitGraphError, match="circuit: it is of"):
        optimal_source(other, pairs, circuit=circuit)
    with pytest.raises(CircuitGraphError, match="ablation: 5; expected an instance"):
        optimal_source(model, pairs, ablation=5)  # type: ignore[arg-type]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts constants were fitted to, each time. The fit itself is replaced by the mean."""
    seen: list[int] = []

    def fit(self: OptimalAblation, engine: Engine, mask: Any = None) -> Source:
        seen.append(engine.n_prompts)
        return Source("optimal", constants=writer_means(engine.activations()).mean)

    monkeypatch.setattr(OptimalAblation, "fit", fit)
    return seen


def test_a_circuit_is_evaluated_with_the_constants_of_its_discovery(fits: list[int]) -> None:
    circuit = discover("zoo:induction-2l", "induction", EAP(), prompts=6, source="optimal")
    same = evaluate("zoo:induction-2l", "induction", circuit.top(40), prompts=6)
    others = evaluate("zoo:induction-2l", "induction", circuit, prompts=9, seed=1)
    assert fits == [6, 6, 6]
    assert circuit.provenance["source"] == others.source == "optimal"
    assert same.protocol.ablation_data == others.protocol.ablation_data == circuit.provenance["source_fitted_to"]
    assert same.metric_corrupted == pytest.approx(circuit.provenance["metric_corrupted"])
    anew = evaluate("zoo:induction-2l", "induction", circuit, prompts=9, seed=1, source="optimal")  # asked for by name: on these prompts
    assert fits[-1] == 9
    assert anew.protocol.ablation_data != others.protocol.ablation_data


@pytest.mark.filterwarnings("ignore:logit_diff cannot tell")
def test_given_constants_are_asked_for_again(fits: list[int]) -> None:
    source = optimal_source(TORCH.traced, SHORT)
    circuit = discover(TORCH.traced, SHORT, HALF, source=source, metric="kl")
    assert fits == [len(SHORT)]
    assert circuit.provenance["source_fitted_to"] is None
    with pytest.raises(CircuitGraphError, match="found with constants of its own; pass that source"):
        evaluate(TORCH.traced, SHORT, circuit)
    report = evaluate(TORCH.traced, SHORT, circuit, source=source)
    assert report.metric_corrupted == pytest.approx(circuit.provenance["metric_corrupted"])
    assert report.protocol.ablation_data == circuit.provenance["source_data"]


@pytest.mark.filterwarnings("ignore:logit_diff cannot tell")
def test_optimal_just_works() -> None:
    circuit = discover(TORCH.traced, SHORT, HALF, source="optimal", metric="kl")
    assert circuit.provenance["source_fitted_to"] == digest(SHORT)
    assert evaluate(TORCH.traced, SHORT, circuit).metric_corrupted == pytest.approx(circuit.provenance["metric_corrupted"])


def test_what_an_algorithm_chose_is_not_cut_again() -> None:
    circuit = Circuit(GRAPH, GRAPH.visible, GRAPH.visible * 1.0)
    chosen = Circuit(GRAPH, worth(PATH).worth == 1, GRAPH.visible * 1.0)
    assert strongest(circuit).n_edges < circuit.n_edges
    assert strongest(chosen) == chosen
    assert strongest(chosen, top=46) != chosen


# Bad input.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EdgePruning(target=0), "target is 0; expected a share of the edges"),
        (lambda: EdgePruning(target=1.5), "target is 1.5"),
        (lambda: EdgePruning(target=True), "target is True"),
        (lambda: EdgePruning(n_steps=0), "edge pruning: n_steps: 0"),
        (lambda: EdgePruning(learning_rate=0), "learning_rate is 0; expected a number above 0"),
        (lambda: EdgePruning(initial=math.inf), "initial is inf; expected a number"),
        (lambda: EdgePruning(seed=-1), "edge pruning: seed: -1"),
        (lambda: EdgePruning(start=EAP), "start is <class"),  # type: ignore[arg-type]
        (lambda: SubnetworkProbing(penalty=0), "subnetwork probing: penalty is 0"),
        (lambda: SubnetworkProbing(learning_rate="fast"), "learning_rate is 'fast'"),  # type: ignore[arg-type]
        (lambda: HISP(normalised=2), "hisp: normalised is 2"),  # type: ignore[arg-type]
        (lambda: UniformGradientSampling(n_samples=0), "ugs: n_samples: 0"),
        (lambda: UniformGradientSampling(ablation="zero"), "ugs: ablation is 'zero'; expected 'source' or 'optimal'"),  # type: ignore[arg-type]
        (lambda: OptimalAblation(n_steps=2.0), "optimal ablation: n_steps: 2.0"),  # type: ignore[arg-type]
        (lambda: EdgePruning(target=1000).run(worth(PATH)), "1000 edges asked for, but the graph has"),
    ],
)
def test_bad_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        make()


def test_a_source_run_like_the_model_has_no_price() -> None:
    engine = worth((), of_others=0.0)
    for algorithm in (SubnetworkProbing(), UniformGradientSampling()):
        with pytest.raises(DegenerateError, match="no part of it is worth a price"):
            algorithm.run(engine)


def test_they_are_algorithms() -> None:
    for algorithm in (HISP(), *SHORT_RUNS.values()):
        assert isinstance(algorithm, Algorithm)
    for stepped in SHORT_RUNS.values():
        assert isinstance(stepped, SteppedAlgorithm)
