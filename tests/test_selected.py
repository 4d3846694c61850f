"""Algorithms around algorithms: what is chosen, combined and screened is what the inner ones said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from engines import SHORT, Row, bound

from circuitgraph._engine import Engine, Outcome, SteppedAlgorithm
from circuitgraph._errors import CircuitGraphError, DegenerateError
from circuitgraph.algorithms import ACDC, EAP, ActivationPatching, Ensemble, ScreenedBy, Selected
from circuitgraph.algorithms._screened import _Restricted
from circuitgraph.selection import Greedy, IntegerProgram, SignedTopN, Threshold, TopN
from circuitgraph.testing import ReferenceModel

TORCH = Row("torch", "gpt2")
two_engines = pytest.mark.parametrize("row", [TORCH, Row("reference", "granite")], ids=str)  # the second has heads in groups


@dataclass(frozen=True)
class Given:
    """Scores made up from a seed, for all engines alike; `split`: one for each span."""

    seed: int = 0
    scale: float = 1.0
    split: bool = False
    default_metric: str | None = None

    def run(self, engine: Engine) -> Outcome:
        graph = engine.graph.by_span(engine.spans) if self.split else engine.graph
        per_prompt = self.scale * np.random.default_rng(self.seed).normal(size=(engine.n_prompts, *graph.shape))
        per_prompt = np.where(graph.visible, per_prompt, 0).astype(np.float32)
        scores = per_prompt.mean(axis=0, dtype=np.float64)
        return Outcome(graph.visible, scores, {"seed": self.seed}, 1.0, per_prompt, graph if self.split else None)


@dataclass(frozen=True)
class Unscored:
    def run(self, engine: Engine) -> Outcome:
        return Outcome(engine.graph.visible)


@dataclass(frozen=True)
class Silent:
    def run(self, engine: Engine) -> Outcome:
        raise AssertionError

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        return iter(())


@dataclass(frozen=True)
class Constant:
    """An engine that tells no two runs apart."""

    engine: Engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def evaluate(self, masks: Any, *, source: Any = None) -> Any:
        return np.ones((len(masks), self.engine.n_prompts))


def faithfulness(engine: Engine, mask: Any) -> float:
    ends = np.stack([mask, np.ones_like(mask), np.zeros_like(mask)]).astype(np.float32)
    kept, clean, source = engine.evaluate(ends).mean(axis=1)
    return float((kept - source) / (clean - source))


def spanned() -> Engine:
    """Prompts whose positions have two names."""
    spans = [[0, 1, 0, 1, 1]] * 2
    return ReferenceModel.random(3, n_layers=1).bind(
        replace(SHORT, spans=tuple(map(np.array, spans)), span_names=("S", "END")), "logit_diff"
    )


def check_steps(algorithm: Any, engine: Engine, least: int) -> None:
    steps = list(algorithm.steps(engine))
    done = [step.done for step in steps]
    assert isinstance(algorithm, SteppedAlgorithm)
    assert len(steps) >= least
    assert done == sorted(done)
    assert done[-1] == 1.0 > max(done[:-1], default=0.0)


@two_engines
@pytest.mark.parametrize("selector", [TopN(), Greedy()], ids=repr)
def test_the_smallest_size_that_reaches_the_target(row: Row, selector: Any) -> None:
    engine = bound(row)
    outcome = Selected(Given(), selector, faithfulness=0.8).run(engine)
    found = outcome.record["selection"]
    assert found["faithfulness"] >= 0.8
    assert found["faithfulness"] == pytest.approx(faithfulness(engine, outcome.mask), abs=1e-6)
    assert found["edges"] == outcome.mask.sum() <= found["size"]
    chosen = selector.choose(engine.graph, Given().run(engine), found["size"]).mask
    assert np.array_equal(outcome.mask, engine.graph.prune_dead(chosen))
    tried = {size: value for size, _, value in found["tried"]}
    assert found["size"] - 1 in (0, *tried)
    assert all(value < 0.8 for size, value in tried.items() if size < found["size"])
    assert outcome.record["seed"] == 0
    one_by_one = Selected(Given(), selector, faithfulness=0.8, max_lanes=1).run(engine).record["selection"]
    assert one_by_one["faithfulness"] >= 0.8
    check_steps(Selected(Given(), selector, faithfulness=0.8), engine, least=3)


def test_a_size_is_a_number_or_a_share() -> None:
    engine = bound(TORCH)
    graph = engine.graph
    scores = Given().run(engine)
    for size, n in ((7, 7), (1, 1), (1.0, graph.n_edges), (0.1, round(0.1 * graph.n_edges)), (1e-9, 1), (None, graph.n_edges)):
        outcome = Selected(Given(), size=size).run(engine)
        assert np.array_equal(outcome.mask, graph.prune_dead(TopN().choose(graph, scores, n).mask))
        assert outcome.record["selection"] == {"size": n, "edges": int(outcome.mask.sum())}
    check_steps(Selected(ActivationPatching(max_lanes=20), size=9), engine, least=4)
    record = Selected(Given(), IntegerProgram(), size=9).run(engine).record["selection"]
    assert record["is_optimal"]
    with pytest.raises(CircuitGraphError, match=f"size is 9,999; the graph has {graph.n_edges} edges"):
        Selected(Given(), size=9999).run(engine)


def test_a_target_out_of_reach_says_how_near_one_came() -> None:
    engine = bound(TORCH)
    with pytest.raises(CircuitGraphError, match=r"no size reaches a faithfulness of 50; the best is .*, at size .*; lower the target"):
        Selected(Given(), faithfulness=50).run(engine)
    with pytest.raises(CircuitGraphError, match=r"the best is .*, at size 1;"):
        Selected(Given(), Threshold(1e9), faithfulness=0.5).run(engine)
    with pytest.raises(DegenerateError, match=r"of the model 1 and of the source run 1 cannot be told apart"):
        Selected(Given(), faithfulness=0.9).run(Constant(bound(TORCH)))  # type: ignore[arg-type]
    with pytest.raises(CircuitGraphError, match="no scores to choose from"):
        Selected(Unscored(), size=3).run(engine)
    with pytest.raises(CircuitGraphError, match="there are no scored edges"):
        Selected(Unscored(), faithfulness=0.9).run(engine)


def test_positions_are_chosen_apart() -> None:
    engine = spanned()
    outcome = Selected(Given(split=True), size=20).run(engine)
    assert outcome.graph is not None
    assert outcome.mask.shape == outcome.graph.shape == (engine.graph.shape[0], 2 * engine.graph.shape[1])
    target = Selected(Given(split=True), SignedTopN(), faithfulness=0.7).run(engine)
    mask = target.mask.reshape(*engine.graph.shape, 2)
    assert faithfulness(engine, mask) == pytest.approx(target.record["selection"]["faithfulness"])


@pytest.mark.parametrize("by", ["mean", "min", "max"])
def test_an_ensemble_of_one_kind_ranks_as_its_member(by: Any) -> None:
    engine = bound(TORCH)
    single = Given(3).run(engine)
    outcome = Ensemble((Given(3), Given(3, scale=0.01)), by).run(engine)
    assert np.allclose(outcome.scores, single.scores / np.abs(single.scores).max())  # type: ignore[operator, arg-type]
    assert np.array_equal(outcome.mask, engine.graph.visible)
    for n in (1, 9, 40):
        assert np.array_equal(*(TopN().choose(engine.graph, o, n).mask for o in (single, outcome)))
    check_steps(Ensemble((ActivationPatching(max_lanes=30), Given()), by), engine, least=4)


def test_an_ensemble_by_hand() -> None:
    engine = bound(TORCH)
    a, b = (Given(seed).run(engine) for seed in (1, 2))
    scaled = np.stack([o.scores / np.abs(o.scores).max() for o in (a, b)])  # type: ignore[operator, arg-type]
    for by, expected in (("mean", scaled.mean(axis=0)), ("min", scaled.min(axis=0)), ("max", scaled.max(axis=0))):
        outcome = Ensemble([Given(1), Given(2)], by).run(engine)  # type: ignore[arg-type]
        assert np.allclose(outcome.scores, expected)  # type: ignore[arg-type]
        assert [member["algorithm"] for member in outcome.record["members"]] == ["Given", "Given"]
        assert [member["record"]["seed"] for member in outcome.record["members"]] == [1, 2]
        assert (outcome.prompt_scores is None) == (by != "mean")
    mean = Ensemble((Given(1), Given(2))).run(engine)
    assert np.allclose(mean.prompt_scores.mean(axis=0), mean.scores, atol=1e-6)  # type: ignore[union-attr, arg-type]
    assert Ensemble((Given(1), ActivationPatching())).run(engine).prompt_scores is None
    split = Ensemble((Given(1, split=True), Given(2, split=True))).run(spanned())
    assert split.graph is not None
    assert split.mask.shape == split.graph.shape


def test_what_cannot_be_combined() -> None:
    with pytest.raises(CircuitGraphError, match="Unscored gave no scores to combine"):
        Ensemble((Given(), Unscored())).run(bound(TORCH))
    with pytest.raises(DegenerateError, match="Given scores every edge 0"):
        Ensemble((Given(scale=0.0),)).run(bound(TORCH))
    with pytest.raises(CircuitGraphError, match="of whole prompts and by position"):
        Ensemble((Given(), Given(split=True))).run(spanned())


@two_engines
@pytest.mark.parametrize("then", [ACDC(threshold=0.02), ActivationPatching()], ids=repr)
def test_a_screen_that_keeps_everything_changes_nothing(row: Row, then: Any) -> None:
    engine = bound(row, "kl")
    inner, outcome = then.run(engine), ScreenedBy(Given(), keep=1.0, then=then).run(engine)
    assert np.array_equal(outcome.mask, inner.mask)
    assert np.allclose(outcome.scores, inner.scores, rtol=0, atol=row.tolerance)
    assert outcome.record["screen"]["edges"] == engine.graph.n_edges
    assert set(outcome.record) == {*inner.record, "screen"}


@two_engines
def test_screened_edges_are_never_live(row: Row) -> None:
    """Patching on the screened graph by hand, and its gradient; nobody asked about the others."""
    engine = bound(row)
    graph = engine.graph
    kept = TopN().choose(graph, Given(5).run(engine), 30).mask
    exact = ScreenedBy(Given(5), keep=30, then=ActivationPatching()).run(engine)
    estimate = ScreenedBy(Given(5), keep=30, then=EAP()).run(engine)
    gradient = engine.gradient(kept.astype(np.float32)).mean(axis=0)
    masks = np.stack([kept, *(kept & ~at for at in (np.eye(kept.size, dtype=bool)[kept.ravel()].reshape(-1, *kept.shape)))])
    values = engine.evaluate(masks.astype(np.float32)).mean(axis=1)
    assert exact.scores is not None
    assert estimate.scores is not None
    assert np.allclose(exact.scores[kept], values[0] - values[1:], rtol=0, atol=row.tolerance)
    assert np.allclose(estimate.scores[kept], gradient[kept], atol=1e-6)
    assert exact.record["screen"]["metric"] == pytest.approx(values[0], abs=1e-6)
    for outcome in (exact, estimate):
        assert np.array_equal(outcome.mask, kept)
        assert np.isnan(outcome.scores[graph.visible & ~kept]).all()  # type: ignore[index]
        assert not outcome.scores[~graph.visible].any()  # type: ignore[index]


def test_no_query_brings_a_screened_edge_back() -> None:
    """Asked with every edge live, a restricted engine answers as the engine does where only the kept ones are."""
    engine = spanned()
    kept = TopN().choose(engine.graph, Given(5).run(engine), 9).mask
    restricted, live = _Restricted(engine, kept), kept.astype(float)
    ones = np.ones(kept.shape)
    assert restricted.graph.n_edges == 9
    assert np.array_equal(restricted.evaluate(ones[None]), engine.evaluate(live[None]))
    assert np.array_equal(restricted.evaluate(np.ones((1, *kept.shape, 2))), engine.evaluate(live[None]))
    assert np.array_equal(restricted.gradient(ones), engine.gradient(live) * kept)
    assert np.array_equal(restricted.source_gradient(ones), engine.source_gradient(live))
    assert np.array_equal(restricted.source_values()[0], engine.source_values()[0])
    for asked in (None, ones):
        assert np.array_equal(restricted.activations(asked)[0], engine.activations(live)[0])


def test_a_screened_search_stays_within() -> None:
    engine = bound(TORCH, "kl")
    outcome = ScreenedBy(ActivationPatching(), keep=0.3, then=ACDC(threshold=0.001)).run(engine)
    assert 0 < outcome.mask.sum() < round(0.3 * engine.graph.n_edges)
    names = {edge.name for edge in engine.graph.edges_of(~np.isnan(outcome.scores))}  # type: ignore[arg-type]
    assert outcome.record["screen"]["edges"] == round(0.3 * engine.graph.n_edges) == len(names)
    assert {name for name, *_ in outcome.record["decisions"] if "->" in name} <= names
    check_steps(ScreenedBy(ActivationPatching(max_lanes=30), keep=0.3, then=ACDC(threshold=0.001)), engine, least=6)


def test_a_screen_by_position_judges_an_edge_by_its_strongest() -> None:
    engine = spanned()
    graph, scores = engine.graph, Given(2, split=True).run(engine).scores
    strongest = np.abs(scores).reshape(*graph.shape, 2).max(axis=-1)  # type: ignore[arg-type]
    outcome = ScreenedBy(Given(2, split=True), keep=5, then=Given(4)).run(engine)
    assert np.array_equal(outcome.mask, TopN().choose(graph, Outcome(graph.visible, strongest), 5).mask)
    split = ScreenedBy(Given(2), keep=5, then=Given(4, split=True)).run(engine)
    assert split.graph == graph.by_span(engine.spans)
    assert split.mask.sum() == 10
    assert np.isnan(split.scores[split.graph.visible & ~split.mask]).all()  # type: ignore[index, union-attr]


def test_what_cannot_be_screened() -> None:
    with pytest.raises(CircuitGraphError, match="Unscored gave no scores to screen by"):
        ScreenedBy(Unscored(), then=EAP()).run(bound(TORCH))
    with pytest.raises(CircuitGraphError, match="cannot be asked in reverse"):
        ScreenedBy(Given(), then=ActivationPatching(direction="denoising")).run(bound(TORCH))
    for wrapped in (Selected(Silent()), Ensemble((Silent(),)), ScreenedBy(Silent(), then=EAP())):
        with pytest.raises(CircuitGraphError, match=r"Silent: steps\(\) yielded nothing"):
            wrapped.run(bound(TORCH))


def test_the_default_metric_is_the_inner_ones() -> None:
    assert Selected(ACDC(0.1)).default_metric == ScreenedBy(ACDC(0.1), then=ACDC(0.2)).default_metric == "kl"
    assert Ensemble((ACDC(0.1), Given(default_metric="kl"))).default_metric == "kl"
    assert Selected(EAP()).default_metric is Ensemble((ACDC(0.1), EAP())).default_metric is None
    assert ScreenedBy(EAP(), then=ACDC(0.1)).default_metric is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Selected(EAP), "selected: algorithm: .* expected an instance with a run method"),  # type: ignore[arg-type]
        (lambda: Selected(EAP(), TopN), "expected an instance with a choose method"),  # type: ignore[arg-type]
        (lambda: Selected(EAP(), size=3, faithfulness=0.9), "exclude each other"),
        (lambda: Selected(EAP(), size=0), "size is 0; expected a whole number of edges, or a share"),
        (lambda: Selected(EAP(), size=1.5), r"size is 1.5"),
        (lambda: Selected(EAP(), size=True), "size is True"),
        (lambda: Selected(EAP(), faithfulness=0), "faithfulness is 0; expected a number above 0"),
        (lambda: Selected(EAP(), faithfulness=float("nan")), "faithfulness is nan"),
        (lambda: Selected(EAP(), max_lanes=0), "max_lanes: 0"),
        (lambda: Ensemble(()), "there is no algorithm in it"),
        (lambda: Ensemble((EAP(), 3)), r"algorithms\[1\]: 3; expected an instance"),  # type: ignore[arg-type]
        (lambda: Ensemble((EAP(),), by="median"), "by is 'median'"),  # type: ignore[arg-type]
        (lambda: ScreenedBy(EAP, then=EAP()), "screened: screen"),  # type: ignore[arg-type]
        (lambda: ScreenedBy(EAP(), then=None), "screened: then: None"),  # type: ignore[arg-type]
        (lambda: ScreenedBy(EAP(), keep=0.0, then=EAP()), "keep is 0.0"),
    ],
)
def test_bad_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        make()
