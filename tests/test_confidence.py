"""What returns when discovery is repeated, how sure a score is, and what circuits have in common."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import traced
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitgraph._circuit import Circuit
from circuitgraph._engine import Engine, Outcome
from circuitgraph._errors import CircuitGraphError, UnknownNameError
from circuitgraph._graph import Layer, transformer_graph
from circuitgraph.algorithms import ACDC, EAP
from circuitgraph.drawing._joint import OWNERS, joint_dot
from circuitgraph.evaluation._compare import compare
from circuitgraph.evaluation._edge_confidence import edge_confidence, strata_of
from circuitgraph.evaluation._overlap import jaccard, jaccard_by_chance
from circuitgraph.evaluation._question import pose
from circuitgraph.evaluation._stability import stability
from circuitgraph.testing import random_pairs

GRAPH = transformer_graph([Layer(2, 2), Layer(2, 2)])
PAIRS = random_pairs(7, lengths=(3,) * 5)  # whose answers the model and the source run tell apart


@dataclass(frozen=True)
class Coin:
    """Keeps a random half of the edges."""

    seed: int = 0

    def run(self, engine: Engine) -> Outcome:
        draw = np.random.default_rng(self.seed).random(engine.graph.shape)
        return Outcome(engine.graph.visible & (draw < 0.5), draw)


@dataclass(frozen=True)
class Around:
    """An algorithm inside another."""

    inner: Any
    size: int = 3

    def run(self, engine: Engine) -> Outcome:
        outcome: Outcome = self.inner.run(engine)
        return outcome


@dataclass(frozen=True)
class Loudest:
    """Keeps the edge into the logits that scores most: depends on the prompts and on nothing else."""

    def run(self, engine: Engine) -> Outcome:
        scores = EAP().run(engine).scores
        assert scores is not None
        mask = np.zeros(engine.graph.shape, dtype=bool)
        mask[-1, int(np.argmax(scores[-1]))] = True
        return Outcome(mask, scores)


# Overlap


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
@settings(max_examples=25)
def test_jaccard_is_symmetric_and_between_0_and_1(seed: int, n: int) -> None:
    a, b = np.random.default_rng(seed).random((2, n)) < 0.5
    assert jaccard(a, b) == jaccard(b, a)
    assert 0 <= jaccard(a, b) <= 1
    assert jaccard(a, a) == 1
    assert (jaccard(a, b) == 1) == np.array_equal(a, b)


@pytest.mark.parametrize(("n_a", "n_b", "n"), [(3, 5, 12), (1, 12, 12), (0, 4, 9), (6, 6, 7)])
def test_chance_is_what_random_sets_have(n_a: int, n_b: int, n: int) -> None:
    rng, fixed, found = np.random.default_rng(0), np.arange(n) < n_a, []
    for _ in range(1500):
        other = np.zeros(n, dtype=bool)
        other[rng.choice(n, n_b, replace=False)] = True
        found.append(jaccard(fixed, other))
    assert jaccard_by_chance(n_a, n_b, n) == pytest.approx(np.mean(found), abs=0.03)


# Scores


def spread(*edges: float) -> np.ndarray:
    """Scores of one prompt: the first edges as given, the others 0."""
    values = np.zeros(GRAPH.n_edges)
    values[: len(edges)] = edges
    matrix = np.zeros(GRAPH.shape)
    matrix[GRAPH.visible] = values
    return matrix


def test_sure_and_unsure_edges_are_told_apart() -> None:
    rng = np.random.default_rng(1)
    scores = np.stack([spread(2.0, rng.normal(), 1.0 + 0.1 * rng.normal()) for _ in range(40)])
    sure = edge_confidence(GRAPH, scores)
    mean, low, high, consistent = (m[GRAPH.visible] for m in (sure.mean, sure.low, sure.high, sure.sign_consistency))
    assert (low <= mean).all()
    assert (mean <= high).all()
    assert (low[0], high[0], consistent[0]) == pytest.approx((2, 2, 1))
    assert low[1] < 0 < high[1]
    assert consistent[1] < consistent[2] == 1
    assert high[2] - low[2] == pytest.approx(2 * 1.96 * 0.1 / 40**0.5, rel=0.5)
    assert (low[3], high[3]) == (0, 0)
    assert sure.rows(2)[0][0] == str(GRAPH.edges[0])
    heading, strongest, *_, count = str(sure).splitlines()
    assert heading.split() == ["edge", "score", "95%", "interval", "sign", "kept"]
    assert strongest.split() == [str(GRAPH.edges[0]), "2", "2", "to", "2", "100%"]
    assert count == f"{min(20, GRAPH.n_edges)} of {GRAPH.n_edges} edges, the strongest first"


def test_templates_are_resampled_apart() -> None:
    """A difference between templates alone is no uncertainty: every resample has as many prompts of each."""
    scores = np.stack([spread(-1.0 if i % 2 else 3.0, 1.0) for i in range(10)])
    templates = ["BABA 1" if i % 2 else f"ABBA {i}" for i in range(10)]
    apart, together = edge_confidence(GRAPH, scores, templates=templates), edge_confidence(GRAPH, scores)
    first = GRAPH.edge_id(GRAPH.edges[0])
    assert (apart.low[first], apart.high[first]) == pytest.approx((1, 1))
    assert together.low[first] < together.high[first]
    assert apart.strata["ABBA"][first] == 3
    assert apart.strata["BABA"][first] == -1
    assert not apart.sign_agrees[first]
    assert apart.sign_agrees[GRAPH.edge_id(GRAPH.edges[1])]
    assert strata_of(["1", "2"]) == {"1": [0], "2": [1]}


@pytest.mark.parametrize(
    ("scores", "templates", "message"),
    [
        (None, (), "scores per prompt"),
        (np.zeros((1, *GRAPH.shape)), (), "2 prompts"),
        (np.zeros((2, 3, 3)), (), "shape"),
        (np.zeros((2, *GRAPH.shape)), ("A",), "1 templates for 2"),
    ],
)
def test_scores_that_say_nothing_are_refused(scores: Any, templates: Any, message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        edge_confidence(GRAPH, scores, templates=templates)


# Repeated discovery


def test_chance_finds_chance() -> None:
    found = stability(traced("reference"), PAIRS, Around(Coin()), vary="seed", runs=6, metric="logit_diff")
    assert found.jaccard == pytest.approx(found.by_chance, abs=0.08)
    assert found.frequency[~found.graph.visible].max() == 0
    circuit = found.circuit(0.5)
    assert circuit.confidence is not None
    assert (circuit.confidence[circuit.mask] >= 0.5).all()
    assert found.circuit(1.0).n_edges <= circuit.n_edges
    data = json.loads(found.to_json())
    assert data["runs"] == 6
    assert set(data["frequency"].values()) <= {i / 6 for i in range(1, 7)}
    assert "Jaccard" in str(found)


def test_what_does_not_vary_returns() -> None:
    found = stability(traced("reference"), PAIRS, Loudest(), vary="prompts", runs=3, metric="logit_diff")
    same = stability(traced("reference"), PAIRS, Loudest(), vary="prompts", runs=3, metric="logit_diff")
    assert [mask.tobytes() for mask in found.circuits] == [mask.tobytes() for mask in same.circuits]
    ordered = stability(traced("reference"), PAIRS, ACDC(0.3), vary=("order",), runs=2)
    again = ACDC(0.3, order_seed=1).run(traced("reference").bind(PAIRS, "kl"))
    assert np.array_equal(ordered.circuits[1], again.mask)


@pytest.mark.parametrize(
    ("algorithm", "settings", "message"),
    [
        (EAP(), {}, "keeps every edge"),
        (EAP(), {"vary": "seed"}, "EAP has no seed"),
        (Coin(), {"vary": "order"}, "Coin has no order_seed"),
        (Coin(), {"vary": "seed", "runs": 1}, "runs"),
    ],
)
def test_stability_of_nothing_is_refused(algorithm: Any, settings: Any, message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        stability(traced("reference"), PAIRS, algorithm, **{"runs": 2, "metric": "logit_diff", **settings})
    with pytest.raises(UnknownNameError, match="prompts"):
        stability(traced("reference"), PAIRS, algorithm, vary="prompt")  # type: ignore[arg-type]


# Comparison


def test_circuits_beside_each_other() -> None:
    question = pose(traced("reference"), PAIRS, metric="logit_diff")
    graph = question.traced.graph
    scores = np.asarray(EAP().run(question.engine).scores)
    whole = Circuit(graph, graph.visible, scores)
    big, small = whole.top(30), whole.top(10)
    found = compare({"big": big, "small": small}, traced("reference"), PAIRS, metric="logit_diff")
    assert found.jaccard[0, 1] == pytest.approx(10 / 30)
    assert 0 < found.by_chance[0, 1] < found.jaccard[0, 1]
    assert np.array_equal(found.only("big").mask, (big - small).mask)
    assert found.same_size == 10
    assert found.faithfulness["big"].value == found.faithfulness["small"].value  # the same edges, once both are cut
    assert set(found.baselines) == {"random", "magnitude"}
    assert found.baselines["random"].value != found.faithfulness["small"].value
    assert "(0." in str(found)
    assert json.loads(found.to_json())["edges_in_all"] == 10
    blind = compare({"big": Circuit(graph, big.mask), "small": small}, traced("reference"), PAIRS, metric="logit_diff")
    assert set(blind.faithfulness) == {"small"}


def test_circuits_of_different_graphs_are_refused() -> None:
    small, large = (transformer_graph([Layer(2, 2)] * n) for n in (1, 2))
    with pytest.raises(CircuitGraphError, match="one model"):
        compare({"a": Circuit(small, small.visible), "b": Circuit(large, large.visible)})
    with pytest.raises(CircuitGraphError, match="two or more"):
        compare({"a": Circuit(small, small.visible)})
    with pytest.raises(CircuitGraphError, match="circuits by name"):
        compare([Circuit(small, small.visible)] * 2)  # type: ignore[arg-type]
    with pytest.raises(CircuitGraphError, match="a model and a task"):
        compare({"a": Circuit(small, small.visible), "b": Circuit(small, small.visible)}, "zoo:induction-2l")


def test_a_source_of_its_own_is_asked_for_again() -> None:
    graph = traced("reference").graph
    circuit = Circuit(graph, graph.visible, provenance={"source": "mean", "source_data": "a hash"})
    with pytest.raises(CircuitGraphError, match="a mean over its own data set; pass that source"):
        compare({"a": circuit, "b": circuit}, traced("reference"), PAIRS)


def test_confidence_is_a_share() -> None:
    with pytest.raises(CircuitGraphError, match="from 0 to 1"):
        Circuit(GRAPH, GRAPH.visible, confidence=GRAPH.visible * 1.5)
    circuit = Circuit(GRAPH, GRAPH.visible, confidence=GRAPH.visible * 0.5)
    assert (circuit | circuit).confidence is not None
    assert (circuit | Circuit(GRAPH, GRAPH.visible)).confidence is None


# Pictures


def test_pictures_say_how_sure_an_edge_is() -> None:
    circuit = Circuit(GRAPH, GRAPH.visible, confidence=np.where(GRAPH.visible, 0.25, np.nan))
    assert circuit.to_dot().count('label=" 25%"') == circuit.n_edges
    assert "confidence" in circuit.to_dot()
    assert "confidence" not in Circuit(GRAPH, GRAPH.visible).to_dot()


def test_a_joint_picture_says_who_has_an_edge(tmp_path: Path) -> None:
    whole = Circuit(GRAPH, GRAPH.visible)
    half = Circuit(GRAPH, GRAPH.visible & (np.array([r.kind for r in GRAPH.readers]) != "q")[:, None])
    dot = joint_dot({"whole": whole, "half": half}, detail="edges")
    assert dot.count(f'color="{OWNERS[0]}"') == whole.n_edges - half.n_edges
    assert dot.count("penwidth=1.8") == half.n_edges
    assert all(word in dot for word in ("whole only", "half only", "both"))
    assert compare({"whole": whole, "half": half}).render(tmp_path / "both.dot").read_text() == joint_dot({"whole": whole, "half": half})
    with pytest.raises(CircuitGraphError, match="2 to 6"):
        joint_dot({"whole": whole})
    other = transformer_graph([Layer(2, 2)])
    with pytest.raises(CircuitGraphError, match="different graphs"):
        joint_dot({"whole": whole, "other": Circuit(other, other.visible)})
