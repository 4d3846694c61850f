"""CPR and CMD against closed forms, on engines where each edge's contribution is planted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Planted, linear, ranked

from circuitgraph import Circuit, CircuitGraphError, DegenerateError, FileError
from circuitgraph._graph import Layer, transformer_graph
from circuitgraph.drawing import plot_curve
from circuitgraph.evaluation import MIB_GRID, Curve, FaithfulnessCurve, Protocol, check_comparable

N = 1000  # every size of the grid is a whole number of edges


def planted(n_good: int, n_bad: int = 0) -> Any:
    """Contributions that sum to 1: good edges first, edges that work against the behaviour last, nothing between."""
    contributions = np.zeros(N)
    contributions[:n_good] = 1 / (n_good - n_bad)
    contributions[N - n_bad :] = -1 / (n_good - n_bad)
    return contributions


def curve_of(contributions: Any, scores: Any, **settings: Any) -> FaithfulnessCurve:
    engine = linear(contributions)
    return Curve(**settings).measure(engine.scale(), ranked(engine, scores))


def test_perfect_ranking_has_its_closed_form() -> None:
    """100 of 1000 edges do all of it: f is min(x / 0.1, 1), and 10% is on the grid."""
    curve = curve_of(planted(100), planted(100))
    assert [point.faithfulness.value for point in curve.signed] == pytest.approx([0, *(min(x / 0.1, 1) for x in MIB_GRID)])
    assert (curve.cpr.value, curve.cmd.value) == pytest.approx((0.95, 0.05))
    x = np.log(np.array(MIB_GRID))
    f = np.minimum(np.array(MIB_GRID) / 0.1, 1)
    over_log = np.trapezoid(f, x) / (x[-1] - x[0])
    assert (curve.cpr_log.value, curve.cmd_log.value) == pytest.approx((over_log, 1 - over_log))


def test_as_mib_computes_it() -> None:
    """From 0.1% on, and the log axis not normalised."""
    curve = curve_of(planted(100), planted(100), mib_compat=True)
    under = (0.1**2 - 0.001**2) / 0.2 + 0.9
    assert (curve.cpr.value, curve.cmd.value) == pytest.approx((under, 0.999 - under))
    ours = curve_of(planted(100), planted(100))
    assert curve.cpr_log.value == pytest.approx(ours.cpr_log.value * np.log(1000))
    assert [point.edges for point in curve.signed] == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    small = linear(np.full(13, 1 / 13))
    taken = Curve(mib_compat=True).measure(small.scale(), ranked(small, np.arange(13.0))).signed
    assert [(point.fraction, point.edges) for point in taken][3:8] == [(0.01, 0), (0.02, 0), (0.05, 0), (0.1, 1), (0.2, 2)]


def test_random_ranking_is_the_diagonal() -> None:
    """Exactly where all edges are worth the same, and on average where some are worth it all."""
    rng = np.random.default_rng(0)
    same = curve_of(np.full(N, 1 / N), rng.normal(size=N))
    assert (same.cpr.value, same.cmd.value) == pytest.approx((0.5, 0.5))
    curves = [curve_of(planted(100), rng.random(N), grid=(0.1, 0.5, 1.0)) for _ in range(30)]
    assert np.mean([curve.cpr.value for curve in curves]) == pytest.approx(0.5, abs=0.02)
    assert np.mean([curve.cmd.value for curve in curves]) == pytest.approx(0.5, abs=0.02)


def test_cpr_is_unbounded_and_cmd_is_not_fooled() -> None:
    """200 edges for and 100 against: leaving those out doubles the metric."""
    contributions = planted(200, 100)
    curve = curve_of(contributions, contributions)
    assert curve.cpr.value == pytest.approx(0.2 * 2 / 2 + 0.3 * 2 + 0.5 * 1.5)
    at_20, at_50 = (next(p for p in curve.absolute if p.fraction == x).faithfulness.value for x in (0.2, 0.5))
    assert (at_20, at_50) == pytest.approx((2.0, 1.0))
    assert {(a.name, a.protocol.ranking, a.protocol.axis) for a in curve.areas} == {
        ("CPR", "signed", "linear"),
        ("CMD", "absolute", "linear"),
        ("CPR", "signed", "log"),
        ("CMD", "absolute", "log"),
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_any_ranking_has_the_area_of_its_sums(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    contributions = rng.random(n) + 0.1
    scores = np.where(rng.random(n) < 0.2, np.nan, rng.integers(-3, 4, size=n))
    engine = linear(contributions)
    curve = Curve().measure(engine.scale(), ranked(engine, scores))
    order = sorted(range(n), key=lambda i: (np.isnan(scores[i]), -np.nan_to_num(scores[i]), i))
    sizes = sorted({0, *(int(x * n) for x in MIB_GRID)})
    f = [contributions[order[:k]].sum() / contributions.sum() for k in sizes]
    assert [(point.edges, point.live) for point in curve.signed] == [(k, k) for k in sizes]
    assert curve.cpr.value == pytest.approx(np.trapezoid(f, np.array(sizes) / n))


def test_intervals_hold_the_areas_and_one_prompt_has_none() -> None:
    rng = np.random.default_rng(1)
    engine = linear(planted(100) * (1 + rng.random((12, 1))) + 0.001 * rng.normal(size=(12, N)), n_prompts=12)
    curve = Curve().measure(engine.scale(), ranked(engine, planted(100)))
    for area in curve.areas:
        low, high = area.estimate.interval or (np.nan, np.nan)
        assert low < area.value < high
    assert curve.signed[-1].faithfulness.interval == pytest.approx((1.0, 1.0))
    alone = linear(planted(100), n_prompts=1)
    assert Curve().measure(alone.scale(), ranked(alone, planted(100))).cpr.estimate.interval is None


def test_dead_ends_are_dropped() -> None:
    graph = transformer_graph([Layer(n_heads=2, n_kv_heads=2)])
    scores = np.where(graph.visible, 1.0, 0.0)
    scores[graph.edge_id("input->m0")] = 9.0  # which nobody reads at first
    scores[graph.edge_id("input->logits")] = 8.0
    engine = Planted(graph, lambda mask: float(mask[graph.edge_id("input->logits")]))
    curve = Curve(grid=(0.08, 0.16, 1.0)).measure(engine.scale(), Circuit(graph, graph.visible, scores))
    assert [(point.edges, point.live) for point in curve.signed] == [(0, 0), (1, 0), (2, 1), (13, 13)]


def test_a_curve_prints_saves_and_draws_the_same_twice(tmp_path: Path) -> None:
    curve = curve_of(planted(100), planted(100))
    names = [name for name, _ in curve.rows()]
    assert names[:4] == ["CPR, linear axis", "CMD, linear axis", "CPR, log axis", "CMD, log axis"]
    saved = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert saved["cmd"]["protocol"]["ranking"] == "absolute"
    drawn = [plot_curve(curve, tmp_path / name, title="planted").read_bytes() for name in ("a.svg", "b.svg", "a.pdf", "a.png")]
    assert drawn[0] == drawn[1]
    assert [content[:4] for content in drawn] == [b"<?xm", b"<?xm", b"%PDF", b"\x89PNG"]
    assert b"CPR 0.950 (signed), CMD 0.050 (absolute)" in drawn[0]
    assert {path.name for path in tmp_path.iterdir()} == {"a.svg", "b.svg", "a.pdf", "a.png"}
    with pytest.raises(FileError, match="ends in one of .svg, .pdf, .png"):
        plot_curve(curve, tmp_path / "a.jpg")


BAD = [
    ({"grid": (0.5, 0.1, 1.0)}, "rising fractions"),
    ({"grid": (0.1, 0.5)}, "the last of them 1"),
    ({"grid": (0.0, 1.0)}, "above 0"),
    ({"grid": (1.0,)}, "rising fractions"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_grids_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        Curve(**settings)


def test_no_scores_no_curve_and_no_gap_no_scale() -> None:
    engine = linear(planted(100))
    with pytest.raises(CircuitGraphError, match="no scores to rank edges by"):
        Curve().measure(engine.scale(), dataclasses.replace(ranked(engine, planted(100)), scores=None))
    with pytest.raises(DegenerateError, match="every circuit would look perfect"):
        linear(np.zeros(5)).scale()


def test_protocols_that_differ_are_not_compared() -> None:
    ours = Protocol("logit_diff", prompts=8, prompts_digest="a")
    check_comparable(ours, dataclasses.replace(ours), ours)
    other = dataclasses.replace(ours, ablation="zero", ranking="signed")
    with pytest.raises(CircuitGraphError, match=r"differ in ablation \(corrupted and zero\), ranking \(None and signed\)"):
        check_comparable(ours, ours, other)
    for changes, message in (
        ({"granularity": "edges"}, "unknown granularity of a protocol 'edges'; did you mean 'edge'"),
        ({"axis": "log10"}, "unknown axis of a protocol"),
        ({"prompts": 0}, "protocol: prompts"),
    ):
        with pytest.raises(CircuitGraphError, match=message):
            Protocol(**{"metric": "kl", "prompts": 3, **changes})
