"""Activation patching and attribution patching, in every engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engines import Row, bound, every_engine

from circuitgraph._engine import Algorithm, Engine, SteppedAlgorithm
from circuitgraph._errors import CircuitGraphError, DegenerateError
from circuitgraph.algorithms import ACDC, EAP, ActivationPatching
from circuitgraph.testing import ReferenceModel, random_pairs

METRICS = pytest.mark.parametrize("metric", ["logit_diff", "nll", "prob_diff"])


def mean_metric(engine: Engine, removed: list[tuple[int, int]]) -> float:
    mask = np.ones(engine.graph.shape)
    for r, w in removed:
        mask[r, w] = 0
    return float(engine.evaluate(mask[None]).mean())


def by_hand(engine: Engine, removed: list[tuple[int, int]], direction: str) -> float:
    """How much the model's performance owes to these edges."""
    asked = engine if direction == "noising" else engine.reversed()
    change = mean_metric(asked, removed) - mean_metric(asked, [])
    loss_is_bad = -1 if direction == "noising" else 1
    return change * loss_is_bad * (1 if engine.metric.higher_is_better else -1)


@every_engine
@METRICS
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_edge_patching_by_hand(row: Row, metric: str, direction: Any) -> None:
    engine = bound(row, metric)
    outcome = ActivationPatching(level="edge", direction=direction).run(engine)
    assert outcome.scores is not None
    for r, w in np.argwhere(engine.graph.visible):
        assert np.isclose(outcome.scores[r, w], by_hand(engine, [(r, w)], direction), atol=row.tolerance)
    assert (outcome.mask == engine.graph.visible).all()
    assert not outcome.scores[~engine.graph.visible].any()


@every_engine
@METRICS
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_node_patching_by_hand(row: Row, metric: str, direction: Any) -> None:
    engine = bound(row, metric)
    outcome = ActivationPatching(level="node", direction=direction).run(engine)
    assert outcome.scores is not None
    nodes = outcome.record["nodes"]
    assert list(nodes) == [writer.name for writer in engine.graph.writers]
    for w, writer in enumerate(engine.graph.writers):
        edges = [(r, w) for r in range(len(engine.graph.readers)) if engine.graph.visible[r, w]]
        expected = by_hand(engine, edges, direction)
        assert np.isclose(nodes[writer.name], expected, atol=row.tolerance)
        assert all(np.isclose(outcome.scores[edge], expected, atol=row.tolerance) for edge in edges)


@every_engine
def test_patching_the_input_is_the_corrupted_run(row: Row) -> None:
    for metric in ("logit_diff", "kl"):
        engine = bound(row, metric)
        ends = engine.evaluate(np.stack([np.ones(engine.graph.shape), np.zeros(engine.graph.shape)])).mean(axis=1)
        lost = (ends[0] - ends[1]) * (1 if metric == "logit_diff" else -1)
        for direction in ("noising", "denoising"):
            nodes = ActivationPatching("node", direction).run(engine).record["nodes"]
            assert np.isclose(nodes["input"], lost, atol=row.tolerance)


@every_engine
def test_chunks_change_nothing_but_the_progress(row: Row) -> None:
    engine = bound(row)
    whole = ActivationPatching().run(engine)
    steps = list(ActivationPatching(max_lanes=5).steps(engine))
    assert len(steps) == -(-engine.graph.n_edges // 5)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].done == 1.0 > steps[-2].done
    assert whole.scores is not None
    assert np.allclose(whole.scores, steps[-1].scores, rtol=0, atol=row.tolerance)  # type: ignore[arg-type]
    assert whole.record == pytest.approx(steps[-1].record, abs=row.tolerance)


@every_engine
@METRICS
@pytest.mark.parametrize("source", ["corrupted", "mean"])
def test_eap_is_the_derivative_of_noising(row: Row, metric: str, source: str) -> None:
    engine = bound(row, metric, source)
    scores, full = EAP().run(engine).scores, np.ones(engine.graph.shape)
    assert scores is not None
    sign = 1 if engine.metric.higher_is_better else -1
    for r, w in np.argwhere(engine.graph.visible):
        masks = np.stack([full, full])
        masks[:, r, w] += 1e-5, -1e-5
        up, down = engine.evaluate(masks).mean(axis=1)
        assert np.isclose(scores[r, w], sign * (up - down) / 2e-5, atol=1e-6)
    assert not scores[~engine.graph.visible].any()


def test_eap_is_exact_on_a_linear_model() -> None:
    model = ReferenceModel.random(4, n_heads=0, norm=None, act="identity", n_layers=3)
    engine = model.bind(random_pairs(4, lengths=(4, 5, 4)), "logit_diff")
    estimate, exact = EAP().run(engine), ActivationPatching().run(engine)
    assert estimate.scores is not None
    assert exact.scores is not None
    assert np.abs(exact.scores).max() > 0.1
    assert np.allclose(estimate.scores, exact.scores, atol=1e-8)


@every_engine
@pytest.mark.parametrize("metric", ["kl", "accuracy"])
def test_eap_refuses_metrics_without_a_gradient(row: Row, metric: str) -> None:
    with pytest.raises(DegenerateError, match=metric):
        EAP().run(bound(row, metric))


def test_bad_settings_are_named() -> None:
    for settings, message in (({"level": "head"}, "level"), ({"direction": "up"}, "direction"), ({"max_lanes": 0}, "max_lanes")):
        with pytest.raises(CircuitGraphError, match=message):
            ActivationPatching(**settings)


def test_algorithms_are_algorithms() -> None:
    for algorithm in (EAP(), ActivationPatching(), ACDC(0.1)):
        assert isinstance(algorithm, Algorithm)
    assert isinstance(ActivationPatching(), SteppedAlgorithm)
    assert isinstance(ACDC(0.1), SteppedAlgorithm)
