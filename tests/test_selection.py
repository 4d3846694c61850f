"""Choosing edges from scores: laws for every selector over random graphs, then each one's own."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitgraph import Circuit
from circuitgraph._engine import Outcome
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph, Layer, transformer_graph
from circuitgraph.selection import Greedy, IntegerProgram, Selector, SignConsistent, SignedTopN, Threshold, TopN, default_size

ALIVE: tuple[Selector, ...] = (Greedy(), IntegerProgram(), SignConsistent(0.6, resamples=20, then=Greedy()))  # keep no dead edge
SELECTORS = (*ALIVE, TopN(), SignedTopN(), Threshold(0.5), SignConsistent(0.8, resamples=20))
every_selector = pytest.mark.parametrize("selector", SELECTORS, ids=repr)

# One reader and one writer per MLP; heads in a group; the graphs whose circuits can all be listed.
TINY = (
    transformer_graph([Layer(0, 0), Layer(0, 0)]),
    transformer_graph([Layer(1, 1), Layer(0, 0)]),
    transformer_graph([Layer(2, 1)]),
    transformer_graph([Layer(0, 0)]).by_span(["S", "END"]),
)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        groups, size = draw(st.sampled_from([(0, 1), (1, 1), (1, 2), (2, 1), (2, 2)]))
        flags = {name: draw(st.booleans()) for name in ("is_parallel", "heads_are_coupled")}
        layers.append(Layer(groups * size, groups, has_mlp=groups == 0 or draw(st.booleans()), **flags))
    return transformer_graph(layers)


@st.composite
def questions(draw: st.DrawFn, of: st.SearchStrategy[Graph] | None = None) -> tuple[Graph, Outcome, int]:
    """A graph, scores with ties, zeros and unscored edges, and a size."""
    graph = draw(of if of is not None else graphs())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    per_prompt = rng.normal(size=(4, *graph.shape)).astype(np.float32)
    if draw(st.booleans()):
        per_prompt = np.round(2 * per_prompt) / 2
    scores = np.where(graph.visible, per_prompt.mean(axis=0, dtype=np.float64), 0.0)
    unscored = graph.visible & (rng.random(graph.shape) < draw(st.sampled_from([0.0, 0.2])))
    scores[unscored], per_prompt[:, unscored] = np.nan, np.nan
    n_scored = int(np.isfinite(scores[graph.visible]).sum())
    return graph, Outcome(graph.visible.copy(), scores, prompt_scores=per_prompt), draw(st.integers(0, n_scored))


def total(outcome: Outcome, mask: Any) -> float:
    assert outcome.scores is not None
    return float(np.abs(outcome.scores[mask]).sum())


@every_selector
@settings(max_examples=20, deadline=None)
@given(question=questions())
def test_a_choice_is_a_small_scored_subset_and_always_the_same(selector: Selector, question: tuple[Graph, Outcome, int]) -> None:
    graph, outcome, size = question
    assert outcome.scores is not None
    before = outcome.scores.copy()
    choice = selector.choose(graph, outcome, size)
    assert choice.mask.dtype == bool
    assert choice.mask.sum() <= size
    assert not (choice.mask & ~graph.visible).any()
    assert np.isfinite(outcome.scores[choice.mask]).all()
    again = selector.choose(graph, outcome, size)
    assert np.array_equal(choice.mask, again.mask)
    assert choice.record == again.record
    assert np.array_equal(before, outcome.scores, equal_nan=True)
    if selector in ALIVE:
        assert np.array_equal(graph.prune_dead(choice.mask), choice.mask)


@every_selector
def test_bad_questions_are_refused(selector: Selector) -> None:
    graph = transformer_graph([Layer(2, 1)])
    scores = np.where(graph.visible, 1.0, 0.0)
    scores[0, 0] = np.nan
    outcome = Outcome(graph.visible, scores, prompt_scores=np.stack([scores, scores]))
    for bad, size, message in (
        (outcome, graph.n_edges, "11 edges asked for; the graph has 10 scored edges"),
        (outcome, -1, "expected a whole number of at least 0"),
        (Outcome(graph.visible), 1, "gave no scores to choose from"),
        (Outcome(graph.visible, scores[1:]), 1, "expected \\[readers, writers\\] = "),
    ):
        with pytest.raises(CircuitGraphError, match=message):
            selector.choose(graph, bad, size)


@settings(max_examples=30, deadline=None)
@given(question=questions())
def test_top_n_is_nested_and_what_circuit_top_keeps(question: tuple[Graph, Outcome, int]) -> None:
    graph, outcome, size = question
    assert outcome.scores is not None
    mask = TopN().choose(graph, outcome, size).mask
    assert mask.sum() == size
    assert np.array_equal(mask, Circuit(graph, graph.visible, outcome.scores).top(size).mask)
    if size:
        assert not (TopN().choose(graph, outcome, size - 1).mask & ~mask).any()
        rest = outcome.scores[graph.visible & ~mask]
        assert np.nanmax(np.abs(rest), initial=0.0) <= np.abs(outcome.scores[mask]).min()
    signed = SignedTopN().choose(graph, outcome, size).mask
    assert np.nanmax(outcome.scores[graph.visible & ~signed], initial=-np.inf) <= outcome.scores[signed].min(initial=np.inf)


def test_ties_go_to_the_lower_id() -> None:
    graph = transformer_graph([Layer(2, 2), Layer(2, 2)])
    outcome = Outcome(graph.visible, -graph.visible.astype(float))
    first = np.zeros(graph.shape, dtype=bool)
    first[tuple(np.argwhere(graph.visible)[:7].T)] = True
    for selector in (TopN(), SignedTopN(), Threshold(1.0)):
        assert np.array_equal(selector.choose(graph, outcome, 7).mask, first)


def test_threshold_keeps_what_reaches_it() -> None:
    graph = transformer_graph([Layer(0, 0), Layer(0, 0)])
    outcome = Outcome(graph.visible, np.array([[0.5, 0, 0], [-0.6, 0.4, 0], [0.1, -0.5, 2.0]]))
    assert {edge.name for edge in graph.edges_of(Threshold(0.5).choose(graph, outcome, 6).mask)} == {
        "input->m0",
        "input->m1",
        "m0->logits",
        "m1->logits",
    }
    assert [edge.name for edge in graph.edges_of(Threshold(0.5).choose(graph, outcome, 1).mask)] == ["m1->logits"]


def test_greedy_by_hand() -> None:
    """m1->logits is the strongest edge into the logits; only then can one into m1 be taken, however strong the one into m0 is."""
    graph = transformer_graph([Layer(0, 0), Layer(0, 0)])
    outcome = Outcome(graph.visible, np.array([[9.0, 0, 0], [0.2, -0.3, 0], [0.1, 0.25, -0.5]]))
    wanted = ["m1->logits", "m0->m1", "input->m0", "m0->logits", "input->m1", "input->logits"]
    for size in range(7):
        mask = np.zeros(graph.shape, dtype=bool)
        for name in wanted[:size]:
            mask[graph.edge_id(name)] = True
        found = Greedy().choose(graph, outcome, size).mask
        assert [edge.name for edge in graph.edges_of(found)] == [edge.name for edge in graph.edges_of(graph.prune_dead(mask))]


def test_greedy_opens_every_input_of_a_head_and_of_its_group() -> None:
    graph = transformer_graph([Layer(2, 1, has_mlp=False)])
    scores = np.where(graph.visible, 0.1, 0.0)
    for name, score in (("a0.h1->logits", 1.0), ("input->a0.h1<k>", 0.9), ("input->a0.h1<q>", 0.8), ("input->a0.h0<q>", 0.95)):
        scores[graph.edge_id(name)] = score
    kept = graph.edges_of(Greedy().choose(graph, Outcome(graph.visible, scores), 3).mask)
    assert [str(edge) for edge in kept] == [str(graph.edges_of(graph.visible)[i]) for i in (1, 2, 6)]


def best_by_hand(graph: Graph, outcome: Outcome, size: int) -> float:
    """The largest sum over all circuits of live edges."""
    scored = np.argwhere(graph.visible & np.isfinite(outcome.scores))  # type: ignore[arg-type]
    best = 0.0
    for n in range(1, size + 1):
        for edges in itertools.combinations(scored, n):
            mask = np.zeros(graph.shape, dtype=bool)
            mask[tuple(np.transpose(edges))] = True
            if total(outcome, mask) > best and np.array_equal(graph.prune_dead(mask), mask):
                best = total(outcome, mask)
    return best


@settings(max_examples=25, deadline=None)
@given(question=questions(st.sampled_from(TINY)))
def test_the_programme_is_the_best_of_all_circuits(question: tuple[Graph, Outcome, int]) -> None:
    graph, outcome, size = question
    choice = IntegerProgram().choose(graph, outcome, min(size, 5))
    assert choice.record["sum"] == pytest.approx(total(outcome, choice.mask), abs=1e-9)
    assert choice.record["sum"] == pytest.approx(best_by_hand(graph, outcome, min(size, 5)), abs=1e-7)
    assert choice.record["is_optimal"]
    assert not choice.record["is_limit_hit"]


@settings(max_examples=25, deadline=None)
@given(question=questions())
def test_the_programme_is_at_least_as_good_as_the_others(question: tuple[Graph, Outcome, int]) -> None:
    graph, outcome, size = question
    best = IntegerProgram().choose(graph, outcome, size)
    others = (Greedy().choose(graph, outcome, size).mask, graph.prune_dead(TopN().choose(graph, outcome, size).mask))
    assert total(outcome, best.mask) >= max(total(outcome, mask) for mask in others) - 1e-9
    assert best.record["bound"] >= best.record["sum"] - 1e-9


def test_a_limit_that_is_hit_is_on_record() -> None:
    graph = transformer_graph([Layer(4, 2)] * 6)
    outcome = Outcome(graph.visible, np.random.default_rng(0).normal(size=graph.shape))
    choice = IntegerProgram(time_limit=1e-6).choose(graph, outcome, 40)
    assert choice.record["is_limit_hit"]
    assert not choice.record["is_optimal"]
    assert 0 < choice.mask.sum() <= 40
    assert np.array_equal(graph.prune_dead(choice.mask), choice.mask)


def test_signs_by_hand() -> None:
    """One large prompt makes a mean positive that most resamples do not have; the edge is the strongest and is left out."""
    graph = transformer_graph([Layer(0, 0)])
    steady, lucky, negative = np.full(8, 0.2), np.array([9.0] + [-1.0] * 7), np.full(8, -0.1)
    per_prompt = np.zeros((8, 2, 2), dtype=np.float32)
    for place, samples in (((0, 0), steady), ((1, 0), lucky), ((1, 1), negative)):
        per_prompt[:, *place] = samples
    outcome = Outcome(graph.visible, per_prompt.mean(axis=0, dtype=np.float64), prompt_scores=per_prompt)
    choice = SignConsistent().choose(graph, outcome, 3)
    assert [edge.name for edge in graph.edges_of(choice.mask)] == ["input->m0", "m0->logits"]
    assert choice.record == {"consistent": 2}
    assert SignConsistent(0.5).choose(graph, outcome, 3).record == {"consistent": 3}
    nothing = Outcome(graph.visible, np.zeros((2, 2)), prompt_scores=np.zeros((8, 2, 2)))
    assert SignConsistent().choose(graph, nothing, 2).record == {"consistent": 0}


def test_signs_need_several_prompts() -> None:
    graph = transformer_graph([Layer(0, 0)])
    scores = graph.visible.astype(float)
    with pytest.raises(CircuitGraphError, match="no scores of single prompts"):
        SignConsistent().choose(graph, Outcome(graph.visible, scores), 1)
    with pytest.raises(CircuitGraphError, match="expected at least 2 prompts"):
        SignConsistent().choose(graph, Outcome(graph.visible, scores, prompt_scores=scores[None]), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(-1.0), "threshold: t is -1.0"),
        (lambda: Threshold(float("nan")), "threshold: t is nan"),
        (lambda: SignConsistent(share=0.2), "share is 0.2; expected a number from 0.5 to 1"),
        (lambda: SignConsistent(share=True), "share is True"),
        (lambda: SignConsistent(resamples=0), "resamples: 0"),
        (lambda: SignConsistent(seed=-1), "seed: -1"),
        (lambda: SignConsistent(then=TopN), "expected a selector"),
        (lambda: IntegerProgram(time_limit=0), "time_limit is 0; expected a number above 0"),
        (lambda: IntegerProgram(gap=-0.1), "gap is -0.1; expected a number of at least 0"),
    ],
)
def test_bad_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        make()


def test_default_size() -> None:
    assert [default_size(n) for n in (0, 5, 20, 1999, 32_491)] == [0, 5, 20, 20, 325]
