"""ACDC against a sequential implementation written from the description of the paper's code, one run per removal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from engines import Row, bound, every_engine
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from circuitgraph._engine import Engine, Outcome
from circuitgraph._errors import CircuitGraphError
from circuitgraph.algorithms import ACDC
from circuitgraph.testing import ReferenceModel, random_pairs


class Sequential:
    """The paper's walk over named edges: a set of edges, one forward pass per question, no lanes."""

    def __init__(self, engine: Engine, threshold: float, group_first: bool, head_order: str) -> None:
        self.engine, self.graph, self.threshold = engine, engine.graph, threshold
        self.edges = {(e.writer.name, e.reader.name) for e in self.graph.edges}
        self.asked: list[tuple[str, bool]] = []
        self.current = self.loss()
        layers = max(writer.layer for writer in self.graph.writers) + 1
        self.visit("logits", head_order)
        for layer in reversed(range(layers)):
            self.visit(f"m{layer}", head_order)
            inputs = [r for kind in "vkq" for r in reversed(self.graph.readers) if (r.kind, r.layer) == (kind, layer)]
            if group_first:
                for reader in inputs:
                    self.attempt(reader.name, {edge for edge in self.edges if edge[1] == reader.name})
            for reader in inputs:
                self.visit(reader.name, head_order)

    def is_used(self, *nodes: str) -> bool:
        return any(writer in nodes for writer, _ in self.edges)

    def fed(self, reader: str) -> list[str]:
        row = self.graph.feeds[self.graph.reader_id(reader)]
        return [writer.name for writer, is_fed in zip(self.graph.writers, row, strict=True) if is_fed]

    def attempt(self, name: str, removed: set[tuple[str, str]]) -> None:
        reader = next(iter(removed))[1] if removed else "logits"
        if reader != "logits" and not self.is_used(*self.fed(reader)):
            self.edges -= {edge for edge in self.edges if edge[1] == reader}
            return
        if removed:
            self.edges -= removed
            new = self.loss()
            self.asked.append((name, new - self.current < self.threshold))
            if new - self.current < self.threshold:
                self.current = new
            else:
                self.edges |= removed

    def visit(self, reader: str, head_order: str) -> None:
        layers = range(max(writer.layer for writer in self.graph.writers), -1, -1)
        n_heads = 1 + max((writer.index for writer in self.graph.writers), default=0)
        heads = range(n_heads) if head_order == "ascending" else range(n_heads - 1, -1, -1)
        for sender in [name for layer in layers for name in (f"m{layer}", *(f"a{layer}.h{h}" for h in heads))] + ["input"]:
            if (sender, reader) in self.edges:
                self.attempt(f"{sender}->{reader}", {(sender, reader)})

    def loss(self) -> float:
        mask = np.zeros(self.graph.shape)
        for writer, reader in self.edges:
            mask[self.graph.reader_id(reader), self.graph.writer_id(writer)] = 1
        value = float(self.engine.evaluate(mask[None]).mean())
        return -value if self.engine.metric.higher_is_better else value


@dataclass
class Counting:
    """An engine that counts the queries and the lanes, and may spoil the answers."""

    inner: Engine
    lanes: list[int]
    answer: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def evaluate(self, masks: Any, **options: Any) -> Any:
        self.lanes.append(len(masks))
        values = self.inner.evaluate(masks, **options)
        return values if self.answer is None else np.full_like(values, self.answer)


def names(outcome: Outcome, engine: Engine) -> set[tuple[str, str]]:
    return {(edge.writer.name, edge.reader.name) for edge in engine.graph.edges_of(outcome.mask)}


def small_engine(metric: str = "kl", seed: int = 0, **options: Any) -> Engine:
    return ReferenceModel.random(seed, **options).bind(random_pairs(seed, lengths=(4, 3)), metric)


def check_walk(engine: Engine, outcome: Outcome, algorithm: ACDC) -> None:
    expected = Sequential(engine, algorithm.threshold, algorithm.group_first, algorithm.head_order)
    assert [(name, is_removed) for name, _, _, is_removed in outcome.record["decisions"]] == expected.asked
    assert names(outcome, engine) == expected.edges


MODELS = st.fixed_dictionaries(
    {
        "n_layers": st.integers(1, 2),
        "n_heads": st.sampled_from([1, 2, 4]),
        "d_mlp": st.sampled_from([0, 8]),
        "norm": st.sampled_from(["rms", "layer", None]),
        "parallel": st.booleans(),
        "post_norm": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    options=MODELS,
    is_grouped=st.booleans(),
    metric=st.sampled_from(["kl", "logit_diff", "nll"]),
    source=st.sampled_from(["corrupted", "zero", "mean"]),
    exponent=st.floats(-4, 0),
    group_first=st.booleans(),
    head_order=st.sampled_from(["descending", "ascending"]),
)
def test_same_circuit_as_the_sequential_walk(
    seed: int, options: Any, is_grouped: bool, metric: str, source: Any, exponent: float, group_first: bool, head_order: Any
) -> None:
    kv = max(1, options["n_heads"] // 2) if is_grouped else options["n_heads"]
    model = ReferenceModel.random(seed, n_kv_heads=kv, **options)
    engine = model.bind(random_pairs(seed, lengths=(4, 3)), metric, source)
    algorithm = ACDC(10**exponent, group_first, head_order)
    outcome = algorithm.run(engine)
    assume(outcome.record["smallest_margin"] > 1e-9)
    check_walk(engine, outcome, algorithm)


@every_engine
@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize("threshold", [0.003, 0.05, 0.5])
@pytest.mark.parametrize("group_first", [True, False])
def test_same_circuit_as_the_sequential_walk_in_every_engine(row: Row, metric: str, threshold: float, group_first: bool) -> None:
    engine, algorithm = bound(row, metric), ACDC(threshold, group_first)
    outcome = algorithm.run(engine)
    assert outcome.record["smallest_margin"] > 1e-8, "a decision too close to call: choose another threshold"
    check_walk(engine, outcome, algorithm)


@every_engine
@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize("threshold", [0.001, 0.05, 0.5, 5.0])
def test_lanes_do_not_change_decisions(row: Row, metric: str, threshold: float) -> None:
    engine = bound(row, metric)
    one, *others = [ACDC(threshold, max_lanes=lanes).run(engine) for lanes in (1, 3, 16)]
    for other in others:
        for decision, expected in zip(other.record["decisions"], one.record["decisions"], strict=True):
            assert decision == pytest.approx(expected, abs=row.tolerance)
        assert other.record["metric"] == pytest.approx(one.record["metric"], abs=row.tolerance)
        assert np.array_equal(other.mask, one.mask)
        assert np.allclose(other.scores, one.scores, rtol=0, atol=row.tolerance)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [1e-6, 100.0])
def test_long_runs_of_equal_decisions_take_few_queries(threshold: float) -> None:
    counting = Counting(small_engine(seed=2, n_layers=3, n_heads=4), [])
    outcome = ACDC(threshold, group_first=False).run(counting)
    n_trials = len(outcome.record["decisions"])
    assert len(counting.lanes) < n_trials / 2
    assert max(counting.lanes) <= 16
    assert sum(counting.lanes) == outcome.record["lanes"] < 2 * n_trials


@every_engine
def test_record_replays_the_search(row: Row) -> None:
    engine = bound(row)
    algorithm = ACDC(0.05)
    outcome = algorithm.run(engine)
    record = outcome.record
    value = record["metric_at_start"]
    assert np.isclose(value, engine.evaluate(np.ones((1, *engine.graph.shape))).mean())
    for (_, delta, margin, is_removed), after in zip(record["decisions"], record["metric"], strict=True):
        assert is_removed == (delta < algorithm.threshold)
        assert margin == algorithm.threshold - delta
        value = value - delta if is_removed else value
        assert np.isclose(after, value)
    assert record["smallest_margin"] == min(abs(margin) for _, _, margin, _ in record["decisions"])
    assert np.isclose(record["metric"][-1], engine.evaluate(outcome.mask[None].astype(float)).mean())


@every_engine
def test_scores_are_the_effects_of_removals(row: Row) -> None:
    engine = bound(row, "nll")
    outcome = ACDC(0.05).run(engine)
    assert outcome.scores is not None
    deltas = {name: delta for name, delta, _, _ in outcome.record["decisions"]}
    for edge in engine.graph.edges:
        assert outcome.scores[engine.graph.edge_id(edge)] == deltas.get(edge.name, 0.0)
    assert not outcome.scores[~engine.graph.visible].any()


def test_order_is_that_of_the_papers_code() -> None:
    engine = small_engine("kl", n_layers=2, n_heads=2)
    order = ACDC(1e-9, group_first=False).run(engine).record["order"]
    heads = "a1.h1<v> a1.h0<v> a1.h1<k> a1.h0<k> a1.h1<q> a1.h0<q>"
    assert order["readers"] == f"logits m1 {heads} m0 {heads.replace('a1', 'a0')}".split()
    assert order["writers"] == ["m1", "a1.h1", "a1.h0", "m0", "a0.h1", "a0.h0", "input"]
    ascending = ACDC(1e-9, head_order="ascending").run(engine).record["order"]
    assert ascending == {"readers": order["readers"], "writers": ["m1", "a1.h0", "a1.h1", "m0", "a0.h0", "a0.h1", "input"]}


def test_whole_inputs_of_a_layer_come_before_its_edges() -> None:
    engine = small_engine("kl", n_layers=1, n_heads=2)
    decisions = [name for name, *_ in ACDC(1e-9).run(engine).record["decisions"]]
    inputs = [name for name in decisions if "->" not in name]
    assert inputs == ["a0.h1<v>", "a0.h0<v>", "a0.h1<k>", "a0.h0<k>", "a0.h1<q>", "a0.h0<q>"]
    start = decisions.index(inputs[0])
    assert decisions[start : start + 6] == inputs


def test_options_matter() -> None:
    found = {"group": 0, "order": 0}
    for seed in range(4):
        engine = small_engine("kl", seed=seed, n_heads=3, d_model=12)
        base = ACDC(0.01)
        mask = base.run(engine).mask
        found["group"] += not np.array_equal(mask, replace(base, group_first=False).run(engine).mask)
        found["order"] += not np.array_equal(mask, replace(base, head_order="ascending").run(engine).mask)
    assert min(found.values()) > 0, found


@every_engine
def test_everything_goes_at_a_huge_threshold_and_dead_edges_go_unasked(row: Row) -> None:
    engine = bound(row, "kl")
    outcome = ACDC(1e6).run(engine)
    assert not outcome.mask.any()
    logits = int(engine.graph.visible[-1].sum())
    assert len(outcome.record["decisions"]) == logits
    assert outcome.record["untested"] == engine.graph.n_edges - logits


@every_engine
def test_kept_edges_lead_to_the_logits(row: Row) -> None:
    engine = bound(row, "kl")
    masks = [ACDC(threshold).run(engine).mask for threshold in (0.001, 0.005, 0.02, 0.1)]
    assert masks[0].any()
    for mask in masks:
        readers, _ = engine.graph.needed(mask)
        assert not mask[~readers].any()
        assert not (mask & ~engine.graph.visible).any()


@every_engine
def test_deterministic_and_progressing(row: Row) -> None:
    engine = bound(row)
    first, second = ACDC(0.1).run(engine), ACDC(0.1).run(engine)
    assert first.record == second.record
    assert np.array_equal(first.mask, second.mask)
    steps = list(ACDC(0.1).steps(engine))
    assert all(a.done <= b.done for a, b in pairwise(steps))
    assert steps[-1].done == 1.0 > steps[-2].done
    assert all((later.mask <= earlier.mask).all() for earlier, later in pairwise(steps))


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_a_metric_that_is_no_number_is_refused(spoilt: float) -> None:
    with pytest.raises(CircuitGraphError, match="not finite"):
        ACDC(0.1).run(Counting(small_engine(), [], spoilt))


def test_bad_settings_are_named() -> None:
    for options, message in (
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": math.nan}, "threshold"),
        ({"threshold": "a"}, "threshold is 'a'"),
        ({"threshold": 0.1, "head_order": "up"}, "head_order"),
        ({"threshold": 0.1, "max_lanes": 0}, "max_lanes"),
    ):
        with pytest.raises(CircuitGraphError, match=message):
            ACDC(**options)


def test_a_shuffled_order_is_another_permutation_of_the_same_questions() -> None:
    engine = ReferenceModel.random(3, n_heads=4, n_layers=2).bind(random_pairs(1), "kl")
    plain = ACDC(1e-9, group_first=False).run(engine).record["order"]
    seen = set()
    for seed in (0, 1, 2):
        order = ACDC(1e-9, group_first=False, order_seed=seed).run(engine).record["order"]
        assert sorted(order["writers"]) == sorted(plain["writers"])
        assert [name.split(".")[0] for name in order["writers"]] == [name.split(".")[0] for name in plain["writers"]]
        assert [name for name in order["readers"] if "." not in name] == [name for name in plain["readers"] if "." not in name]
        seen.add((*order["writers"], *order["readers"]))
    assert len(seen) > 1
    with pytest.raises(CircuitGraphError, match="order_seed"):
        ACDC(0.1, order_seed=-1)
