"""The deeper measures against brute force, against planted answers, and against what they must refuse."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Planted, independent_edges, linear, ranked, some_edges

import circuitgraph as cg
from circuitgraph._graph import Layer, transformer_graph
from circuitgraph.evaluation import (
    MEASURES,
    Agreement,
    Completeness,
    Curve,
    HypothesisTests,
    Measure,
    Minimality,
    Protocol,
    Scale,
    auroc,
    matched,
)
from circuitgraph.evaluation._agreement import mib_auroc
from circuitgraph.evaluation._hsic import hsic_test
from circuitgraph.evaluation._knockout import node_version, without
from circuitgraph.evaluation._multiplicity import adjusted
from circuitgraph.evaluation._sign_test import prompts_for_correlation, prompts_for_sign_test, sign_test
from circuitgraph.files import from_mib, load_any, save_mib
from circuitgraph.testing import ReferenceModel, random_pairs

GRAPH = transformer_graph([Layer(n_heads=2, n_kv_heads=2)])  # parts a0.h0, a0.h1, m0
GRAPHS = (
    GRAPH,
    transformer_graph([Layer(4, 2), Layer(4, 2, is_parallel=True)]),
    transformer_graph([Layer(4, 1, heads_are_coupled=True)] * 2),
)
HALF = ["input->a0.h0<v>", "a0.h0->logits", "a0.h0->m0", "m0->logits", "input->a0.h1<v>", "a0.h1->m0"]


def circuit_of(graph: cg.Graph, edges: list[str]) -> cg.Circuit:
    mask = np.zeros(graph.shape, dtype=bool)
    for edge in edges:
        mask[graph.edge_id(edge)] = True
    return cg.Circuit(graph, mask)


def small_scale(n_layers: int = 1) -> Scale:
    engine = ReferenceModel.random(seed=0, n_layers=n_layers).bind(random_pairs(3, lengths=[3]), "logit_diff")
    return Scale(engine, engine.graph, Protocol("logit_diff", prompts=1))


def all_subsets(items: Any) -> list[set[str]]:
    items = [*items]
    return [set(chosen) for chosen in chain.from_iterable(combinations(items, k) for k in range(len(items) + 1))]


# --- edges and nodes apart


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(GRAPHS), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_node_version_is_every_edge_between_the_nodes(graph: cg.Graph, seed: int, density: float) -> None:
    kept = cg.Circuit(graph, graph.visible & (np.random.default_rng(seed).random(graph.shape) < density)).prune_dead()
    between = cg.Circuit(graph, node_version(kept))
    assert (kept.mask <= between.mask).all()
    assert between.nodes == kept.nodes
    nodes = set(kept.nodes)
    for edge in graph.edges:
        ends = edge.writer.node in nodes and any(node in nodes for node in graph.nodes_of(edge.reader))
        assert between.is_kept(edge) == ends


def test_edge_and_node_circuits_are_both_reported() -> None:
    """A chain input->m0->logits of edges; as a circuit of nodes, input->logits is live too, and the report tells them apart."""
    model = ReferenceModel.random(seed=5, n_heads=0, n_layers=1)
    pairs = random_pairs(3, lengths=[3])
    chain_of_edges = circuit_of(model.graph(), ["input->m0", "m0->logits"])
    with pytest.warns(cg.CircuitGraphWarning):
        report = cg.evaluate(model.traced(), pairs, chain_of_edges, metric="logit_diff")
    assert (report.edges_kept, report.edges_between_nodes, report.nodes_kept) == (2, 3, 3)
    assert report.node_faithfulness == pytest.approx(1.0)
    assert abs(report.faithfulness - 1.0) > 0.1
    assert report.protocol.granularity == "edge"


# --- completeness and minimality


@pytest.mark.parametrize("granularity", ["edge", "node"])
def test_completeness_and_minimality_are_those_of_brute_force(granularity: Any) -> None:
    scale, circuit = small_scale(), circuit_of(GRAPH, HALF if granularity == "edge" else HALF[:4])
    mask = circuit.mask if granularity == "edge" else node_version(circuit)
    parts = {"a0.h0", "a0.h1", "m0"} if granularity == "edge" else {"a0.h0", "m0"}

    def f(base: Any, knocked_out: set[str]) -> Any:
        return scale.engine.evaluate(without(GRAPH, base, knocked_out)[None].astype(np.float32))[0].mean()

    gap = f(GRAPH.visible, set()) - f(GRAPH.visible & False, set())
    incomplete = Completeness(sampled=8, granularity=granularity).measure(scale, circuit)
    worst = max(abs(f(mask, K) - f(GRAPH.visible, K)) / abs(gap) for K in all_subsets(parts))
    assert incomplete.worst.score.value == pytest.approx(worst)
    assert worst > 0.01
    assert len([s for s in incomplete.sets if s.how == "sampled"]) == 2 ** len(parts)
    needs = Minimality(sampled=8, granularity=granularity).measure(scale, circuit).nodes
    assert {need.node for need in needs} == parts
    for need in needs:
        most = max(abs(f(mask, K | {need.node}) - f(mask, K)) / abs(gap) for K in all_subsets(parts - {need.node}))
        assert need.score.value == pytest.approx(most)
    assert [need.score.value for need in needs] == sorted(need.score.value for need in needs)
    assert incomplete.protocol.granularity == granularity


def test_searched_sets_are_what_they_say() -> None:
    """With few samples the search cannot beat brute force, and each number is that of its own set."""
    scale = small_scale(n_layers=2)
    graph = scale.graph
    kept = cg.Circuit(graph, graph.visible & (np.random.default_rng(0).random(graph.shape) < 0.7))
    incomplete = Completeness(sampled=2, greedy_steps=3).measure(scale, kept)
    assert {s.how for s in incomplete.sets} == {"sampled", "greedy", "heads", "MLPs"}
    for s in incomplete.sets:
        inside, whole = scale.metrics([without(graph, mask, s.nodes) for mask in (kept.mask, graph.visible)]).mean(axis=1)
        assert s.score.value == pytest.approx(abs(inside - whole) / abs(scale.gap))
        assert (s.circuit, s.model) == pytest.approx((inside, whole))
        assert np.mean(s.per_prompt) == pytest.approx((inside - whole) / scale.gap)
    greedy = next(s for s in incomplete.sets if s.how == "greedy")
    singles = [scale.metrics([without(graph, m, {v}) for m in (kept.mask, graph.visible)]).mean(axis=1) for v in kept.nodes[1:-1]]
    assert greedy.score.value >= max(abs(a - b) for a, b in singles) / abs(scale.gap) - 1e-12  # its first step has looked at all of them
    for need in Minimality(sampled=1, greedy_steps=2).measure(scale, kept).nodes:
        assert need.node not in need.beside
        before, after = scale.metrics([without(graph, kept.mask, K) for K in (need.beside, {*need.beside, need.node})]).mean(axis=1)
        assert need.score.value == pytest.approx(abs(after - before) / abs(scale.gap))


def backup(mask: Any) -> float:
    """Either head does the job."""
    return float(max(mask[GRAPH.edge_id("a0.h0->logits")], mask[GRAPH.edge_id("a0.h1->logits")]))


def test_a_backup_that_was_left_out_is_incompleteness() -> None:
    engine = Planted(GRAPH, backup)
    alone = circuit_of(GRAPH, ["input->a0.h0<v>", "a0.h0->logits"])
    assert engine.scale().faithfulness(alone.mask).value == 1.0
    found = Completeness().measure(engine.scale(), alone)
    assert (found.worst.score.value, found.worst.nodes) == (1.0, ("a0.h0",))
    both = circuit_of(GRAPH, ["input->a0.h0<v>", "a0.h0->logits", "input->a0.h1<v>", "a0.h1->logits"])
    assert Completeness().measure(engine.scale(), both).worst.score.value == 0.0
    rows = dict(found.rows())
    assert any("without a0.h0" in value for value in rows.values())


@pytest.mark.parametrize("sampled", [0, 8])
def test_a_backup_is_needed_once_the_other_is_gone(sampled: int) -> None:
    """By the greedy search alone, and by every set; the MLP does nothing and is found to be needless."""
    engine = Planted(GRAPH, backup)
    found = Minimality(sampled=sampled).measure(engine.scale(), cg.Circuit(GRAPH, GRAPH.visible))
    scores = {need.node: need.score.value for need in found.nodes}
    assert scores == {"m0": 0.0, "a0.h0": 1.0, "a0.h1": 1.0}
    assert next(need for need in found.nodes if need.node == "a0.h0").beside == ("a0.h1",)
    assert found.rows()[0][0] == "minimality, m0"


def test_roles_are_sets_of_their_own() -> None:
    engine, whole = Planted(GRAPH, backup), cg.Circuit(GRAPH, GRAPH.visible)
    found = Completeness(sampled=1, roles={"doers": ["a0.h0", "a0.h1"], "nobody": []}).measure(engine.scale(), whole)
    assert [s.nodes for s in found.sets if s.how == "doers"] == [("a0.h0", "a0.h1")]
    with pytest.raises(cg.UnknownNameError, match="node of a role 'a9.h9'"):
        Completeness(roles={"doers": ["a9.h9"]}).measure(engine.scale(), whole)


# --- agreement with a reference


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_auroc_is_the_share_of_pairs_in_order(items: list[tuple[int, bool]]) -> None:
    scores, wanted = np.array([float(s) for s, _ in items]), np.array([w for _, w in items])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[wanted] for b in scores[~wanted]]
    assert auroc(scores, wanted) == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_precision_recall_and_nodes() -> None:
    reference = circuit_of(GRAPH, ["input->a0.h0<v>", "a0.h0->logits", "input->a0.h0<q>"])
    scores = np.zeros(GRAPH.shape)
    scores[GRAPH.edge_id("input->a0.h0<v>")] = -3
    scores[GRAPH.edge_id("a0.h0->logits")] = 2
    scores[GRAPH.edge_id("m0->logits")] = 1
    scores[GRAPH.edge_id("input->a0.h1<q>")] = np.nan
    found = dataclasses.replace(circuit_of(GRAPH, ["input->a0.h0<v>", "a0.h0->logits", "input->m0", "m0->logits"]), scores=scores)
    match = matched(found, reference)
    assert (match.edges.shared, match.edges.precision, match.edges.recall) == (2, 0.5, pytest.approx(2 / 3))
    # 3 wanted with |score| 3, 2, 0; 10 others: 1, NaN below all, eight times 0
    assert match.edges.auroc == pytest.approx((10 + 10 + 1 + 8 / 2) / 30)
    assert match.nodes is not None
    assert (match.nodes.kept, match.nodes.reference, match.nodes.shared, match.nodes.auroc) == (2, 1, 1, 1.0)
    empty = matched(circuit_of(GRAPH, []), reference)
    assert (empty.edges.precision, empty.edges.recall, empty.edges.auroc) == (None, 0.0, None)
    assert "precision none kept" in dict(empty.rows())["edges against the reference"]
    json.dumps(match.to_dict(), allow_nan=False)


def test_mib_auroc_is_that_of_its_ten_points() -> None:
    """Written again the slow way: at each size, the strongest edge into what is there, then the rates, then the sum of trapezoids."""
    graph = transformer_graph([Layer(2, 2)] * 2)
    rng = np.random.default_rng(3)
    scores = np.where(graph.visible, rng.normal(size=graph.shape), 0.0)
    wanted = graph.visible & (rng.random(graph.shape) < 0.3)
    rates = []
    for fraction in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1):
        left, taken, nodes = fraction * graph.n_edges, set(), {"logits"}
        while left > 0:
            left -= 1
            ready = [edge for edge in graph.edges if edge.reader.node in nodes and edge not in taken]
            best = max(ready, key=lambda edge: abs(scores[graph.edge_id(edge)]))
            taken.add(best)
            nodes.add(best.writer.node)
        mask = circuit_of(graph, [edge.name for edge in taken]).prune_dead().mask
        rates.append(((mask & ~wanted).sum() / (graph.visible & ~wanted).sum(), (mask & wanted).sum() / wanted.sum()))
    area = sum((x2 - x1) / rates[-1][0] * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(rates))
    assert mib_auroc(graph, scores, wanted) == pytest.approx(area)
    exact = matched(cg.Circuit(graph, graph.visible, scores), cg.Circuit(graph, wanted), mib_compat=True)
    assert exact.mib_auroc == pytest.approx(area)
    assert exact.edges.auroc != pytest.approx(area)


def test_a_reference_of_another_architecture_is_refused_with_both_named() -> None:
    other = cg.Circuit(GRAPHS[1], GRAPHS[1].visible, provenance={"model": {"name": "zoo:other"}})
    message = r"another architecture: it is of zoo:other, Graph\(11 writers.*, the circuit of Graph\(4 writers"
    with pytest.raises(cg.CircuitGraphError, match=message):
        matched(cg.Circuit(GRAPH, GRAPH.visible), other)
    with pytest.raises(cg.CircuitGraphError, match="keeps no edge"):
        matched(cg.Circuit(GRAPH, GRAPH.visible), circuit_of(GRAPH, []))


def test_a_mib_file_is_evaluated_and_exported_unchanged(tmp_path: Path) -> None:
    traced = ReferenceModel.random(seed=0).traced()
    engine = traced.bind(random_pairs(3, lengths=[3]), "logit_diff")
    found = cg.Circuit(traced.graph, traced.graph.visible, cg.EAP().run(engine).scores).top(20)
    before = save_mib(found, tmp_path / "before.json", d_model=traced.architecture.d_model)
    circuit = load_any(before)
    assert circuit == from_mib(before)
    scale = Scale(engine, traced.graph, Protocol("logit_diff", prompts=1))
    assert scale.faithfulness(circuit.mask) == scale.faithfulness(found.mask)
    curve = Curve(grid=(0.1, 1.0)).measure(scale, circuit)
    assert curve.cpr == Curve(grid=(0.1, 1.0)).measure(scale, found).cpr
    assert save_mib(circuit, tmp_path / "after.json").read_bytes() == before.read_bytes()
    ours = found.save(tmp_path / "ours.json")
    assert load_any(ours) == found


# --- hypothesis tests


@pytest.mark.parametrize(("n", "epsilon", "alpha"), [(20, 0.1, 0.05), (50, 0.05, 0.1), (33, 0.0, 0.05)])
def test_sign_test_keeps_its_level(n: int, epsilon: float, alpha: float) -> None:
    """At the edge of the null, where it is hardest, a false rejection is as likely as promised, and not much less."""
    from scipy.stats import binom

    p = np.array([sign_test(k, n, epsilon) for k in range(n + 1)])
    level = binom.pmf(np.arange(n + 1), n, 0.5 + epsilon)[p <= alpha].sum()
    assert alpha / 10 < level <= alpha
    assert sign_test(n / 2, n, epsilon) == 1.0
    assert sign_test(3, n, epsilon) == pytest.approx(sign_test(n - 3, n, epsilon))


def test_the_prompts_it_takes_are_the_fewest() -> None:
    from scipy.stats import binom

    n = prompts_for_sign_test(0.1, wins=0.9, alpha=0.05, power=0.8)

    def power(n: int) -> float:
        return float(sum(binom.pmf(k, n, 0.9) for k in range(n + 1) if sign_test(k, n, 0.1) <= 0.05))

    assert power(n) >= 0.8 > power(n - 1)
    assert prompts_for_sign_test(0.1, wins=0.9, alpha=0.01, power=0.8) > n
    assert prompts_for_correlation(0.3, alpha=0.05, power=0.8) == 85  # the textbook's number


def test_hsic_is_uniform_under_independence_and_sees_dependence() -> None:
    rng = np.random.default_rng(0)
    p = np.array([hsic_test(rng.normal(size=16), rng.exponential(size=16), permutations=39, seed=i)[1] for i in range(200)])
    assert abs(p.mean() - 0.5) < 0.08
    for level in (0.1, 0.25, 0.5):
        assert abs((p <= level).mean() - level) < 4 * math.sqrt(level * (1 - level) / 200)
    x = rng.normal(size=40)
    assert hsic_test(x, x**2, permutations=199)[1] == 1 / 200  # without a correlation
    assert hsic_test(np.zeros(10), x[:10], permutations=19)[1] == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_corrections_are_those_of_their_definitions(p_values: list[float]) -> None:
    p, n = np.array(p_values), len(p_values)
    ordered = sorted(p_values)
    holm = [min(1.0, max((n - j) * ordered[j] for j in range(i + 1))) for i in range(n)]
    bh = [min(1.0, *(n * ordered[j] / (j + 1) for j in range(i, n))) for i in range(n)]
    assert sorted(adjusted(p, "holm")) == pytest.approx(holm)
    assert sorted(adjusted(p, "benjamini-hochberg")) == pytest.approx(bh)
    assert (adjusted(p, "holm") >= adjusted(p, "benjamini-hochberg") - 1e-12).all()


def planted_prompts(n_edges: int = 40, n_good: int = 10, prompts: int = 32) -> tuple[Planted, Any]:
    """The first edges do the job, each its share; what the others add is noise of its own in every prompt."""
    rng = np.random.default_rng(2)
    strength = 1 + rng.random(prompts)
    contributions = 0.01 * rng.normal(size=(prompts, n_edges))
    contributions[:, :n_good] = strength[:, None] / n_good
    return linear(contributions, prompts), np.arange(n_good)


def test_an_ideal_circuit_passes() -> None:
    engine, good = planted_prompts()
    found = HypothesisTests().measure(engine.scale(), some_edges(engine, good))
    assert [test.name for test in found.tests] == ["equivalence", "independence", "minimality"]
    assert not any(test.is_rejected for test in found.tests), found
    assert found.redundant == ()
    assert all("not rejected" in value for _, value in found.rows())


@pytest.mark.parametrize("correction", ["holm", "benjamini-hochberg"])
def test_half_a_circuit_is_neither_equal_nor_alone(correction: Any) -> None:
    engine, good = planted_prompts()
    found = HypothesisTests(correction=correction).measure(engine.scale(), some_edges(engine, good[:5]))
    assert [test.is_rejected for test in found.tests[:2]] == [True, True]
    assert found.tests[0].statistic == 0.0  # it never scores better
    assert all(test.adjusted_p >= test.p for test in found.tests)
    assert found.correction == correction


@pytest.mark.parametrize("correction", ["holm", "benjamini-hochberg"])
def test_edges_that_do_nothing_are_found(correction: Any) -> None:
    engine, good = planted_prompts()
    found = HypothesisTests(correction=correction).measure(engine.scale(), some_edges(engine, [*good, 20, 21, 22]))
    assert [test.is_rejected for test in found.tests] == [False, False, True]
    assert {name for name, _ in found.redundant} == {f"input@{i}->logits" for i in (20, 21, 22)}
    assert "3 of 13 edges" in found.rows()[2][1]


def test_tests_are_the_same_by_seed() -> None:
    engine, good = planted_prompts()
    one, two = (HypothesisTests().measure(engine.scale(), some_edges(engine, good)) for _ in range(2))
    assert one == two


REFUSED: list[tuple[Any, str]] = [
    (
        lambda: HypothesisTests().measure(*few_prompts(8)),
        r"8 prompts are too few.*equivalence 20 and independence 12 are needed; use prompts=20",
    ),
    (lambda: HypothesisTests(random_edges=2).measure(*few_prompts(32)), "random_edges is 2, so no p-value could be small enough to reject"),
    (lambda: HypothesisTests(permutations=9).measure(*few_prompts(32)), "permutations is 9, so no p-value"),
    (lambda: HypothesisTests().measure(*few_prompts(32, kept=range(40))), "keeps 40 of 40 edges; expected some of them, not all"),
    (lambda: HypothesisTests().measure(*few_prompts(32, kept=())), "keeps 0 of 40 edges"),
    (lambda: HypothesisTests().measure(*few_prompts(32, metric=cg.KLDivergence())), "kl of the model itself is the same for every prompt"),
    (lambda: HypothesisTests(epsilon=0.4), "epsilon is 0.4; expected a number between 0 and 0.3"),
    (lambda: HypothesisTests(alpha=0), "alpha is 0; expected a number between 0 and 1"),
    (lambda: HypothesisTests(correction="bonferoni"), "unknown correction"),  # type: ignore[arg-type]
    (lambda: HypothesisTests(max_edges=0), "tests: max_edges"),
    (lambda: Completeness(sampled=0), "completeness: sampled"),
    (lambda: Completeness(granularity="head"), "unknown granularity 'head'"),  # type: ignore[arg-type]
    (lambda: Minimality(width=0), "minimality: width"),
    (lambda: Minimality().measure(*few_prompts(4)), "no head and no MLP that could be knocked out"),
    (lambda: Completeness().measure(*few_prompts(4)), "no head and no MLP that could be knocked out"),
    (lambda: Agreement("reference.json"), "expected a Circuit"),  # type: ignore[arg-type]
    (lambda: Scale(few_prompts(4)[0].engine, GRAPH, Protocol("logit_diff", 4)), "the circuit is of Graph.*, but the model is Graph"),
]


def few_prompts(n: int, *, kept: Any = range(10), metric: Any = None) -> tuple[Scale, cg.Circuit]:
    engine, _ = planted_prompts(prompts=n)
    asked = dataclasses.replace(engine, metric=metric) if metric else engine
    return asked.scale(), some_edges(engine, [*kept])


@pytest.mark.parametrize(("ask", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused_with_a_reason(ask: Any, message: str) -> None:
    with pytest.raises(cg.CircuitGraphError, match=message):
        ask()


# --- every measure


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_obeys_the_laws(name: str) -> None:
    """Refuses a degenerate question, is a `Measure`, prints, has its protocol in plain JSON, and is the same when asked again."""
    measure: Any = MEASURES[name]()
    assert isinstance(measure, Measure)
    assert measure.name == name
    assert measure == MEASURES[name]()
    engine, _ = planted_prompts()
    with pytest.raises(cg.DegenerateError, match="every circuit would look perfect"):
        Planted(engine.graph, lambda mask: 0.0).scale()
    graph = transformer_graph([Layer(n_heads=2, n_kv_heads=2)])
    strength = np.linspace(1, 2, 32)
    asked = Planted(graph, lambda mask: strength * mask[graph.edge_id("a0.h0->logits")] + 0.01 * mask.sum() * strength**2, 32)
    circuit = dataclasses.replace(circuit_of(graph, HALF), scores=np.where(graph.visible, 1.0, 0.0))
    found, again = (measure.measure(asked.scale(), circuit) for _ in range(2))
    assert found == again
    assert all(isinstance(text, str) for row in found.rows() for text in row)
    saved = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert saved["protocol"]["metric"] == "logit_diff"


def test_by_span_circuits_are_asked_with_a_span_axis() -> None:
    spans = ("S", "END")
    asked: list[tuple[int, ...]] = []

    def f(mask: Any) -> float:
        asked.append(mask.shape)
        return float(mask[-1, 0, 1])  # input->logits at END

    engine = Planted(GRAPH, f, spans=spans)
    split = GRAPH.by_span(spans)
    scale = engine.scale(split)
    assert scale.faithfulness(circuit_of(split, ["input@END->logits"]).mask).value == 1.0
    assert scale.faithfulness(circuit_of(split, ["input@S->logits"]).mask).value == 0.0
    assert set(asked) == {(*GRAPH.shape, 2)}
    with pytest.raises(cg.CircuitGraphError, match="split by the spans A, B; the prompts have S, END"):
        engine.scale(GRAPH.by_span(("A", "B")))
    with pytest.raises(cg.CircuitGraphError, match="split by the spans S, END; the prompts have none"):
        Planted(GRAPH, f).scale(split)


def test_nan_under_a_mask_is_refused() -> None:
    engine = Planted(independent_edges(3), lambda mask: np.nan if mask.sum() == 1 else mask.sum())
    with pytest.raises(cg.TraceError, match="logit_diff of prompt 0 is nan under a mask"):
        engine.scale().metric(some_edges(engine, [1]).mask)
    assert ranked(engine, [1, 2, 3]).n_edges == 3
