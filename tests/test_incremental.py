"""A run that goes on from a kept one gives what a run from the input gives, whatever was asked before."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitgraph
from circuitgraph._graph import Graph, Layer, transformer_graph
from circuitgraph._incremental import MOST_MOVES, Cost, Incremental
from circuitgraph._liveness import ALL, DEAD, LAST, Liveness
from circuitgraph._sites import Sites
from circuitgraph.algorithms import ACDC, EAP, ActivationPatching
from circuitgraph.testing import random_pairs
from circuitgraph_jax import _changed
from circuitgraph_jax import _queries as queries
from circuitgraph_jax._devices import precisely
from circuitgraph_torch._changes import Changes
from circuitgraph_torch._kept import KeptRun

# Plain, parallel, grouped, with a scale that heads share after attention, with norms over all queries, with gaps between layers.
FAMILIES = ("gpt2", "gpt_neox", "llama", "gemma2", "olmo2", "attention_only")
PAIRS = random_pairs(3, lengths=(7, 7, 7), vocabulary=VOCABULARY)
TOLERANCE = 2e-5  # relative, in float32

Change = tuple[int, float]  # an edge by its number, and what its mask becomes
Call = tuple[list[list[Change]], bool]  # lanes, each by what it changes; and whether the search goes on from the last of them


@cache
def traced(family: str, backend: str = "torch") -> Any:
    return circuitgraph.trace(tiny(family), backend=backend, per_head_kv=family == "llama")


def calls() -> st.SearchStrategy[list[Call]]:
    change = st.tuples(st.integers(0, 2**16), st.sampled_from([0.0, 0.0, 0.0, 1.0, 0.5]))
    lanes = st.lists(st.lists(change, min_size=1, max_size=3), min_size=1, max_size=4)
    return st.lists(st.tuples(lanes, st.booleans()), min_size=1, max_size=8)


def fresh(engine: Any, masks: np.ndarray) -> np.ndarray:
    """The same from the input, as the engine does it where nothing is kept."""
    out = np.empty((len(masks), engine.n_prompts))
    with torch.no_grad(), precisely("float32"):
        for number, batch in enumerate(engine.batches):
            out[:, batch.index] = batch._fresh(masks, engine._source_run(number, None))
    return out


def asked(graph: Graph, now: np.ndarray, lanes: list[list[Change]]) -> np.ndarray:
    edges = np.argwhere(graph.visible)
    masks = np.repeat(now[None], len(lanes), axis=0)
    for mask, changes in zip(masks, lanes, strict=True):
        for number, value in changes:
            mask[tuple(edges[number % len(edges)])] = value
    return masks


@settings(max_examples=40)
@given(family=st.sampled_from(FAMILIES), start=st.sampled_from([1.0, 0.7, 0.2, 0.0]), calls=calls(), metric=st.sampled_from(["kl", "nll"]))
def test_a_walk_over_masks_is_what_single_runs_say(family: str, start: float, calls: list[Call], metric: str) -> None:
    walk(traced(family), start, calls, metric)


@settings(max_examples=15)
@given(family=st.sampled_from(["gpt_neox", "gemma2"]), start=st.sampled_from([1.0, 0.2]), calls=calls())
def test_a_walk_in_jax_is_what_single_runs_say(family: str, start: float, calls: list[Call]) -> None:
    walk(traced(family, "jax"), start, calls, "nll")


def test_blocks_in_which_nothing_changes_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks so small that a tiny model has several."""
    monkeypatch.setattr(_changed, "BLOCK", 2)
    model, pairs = traced("llama", "jax"), random_pairs(1, lengths=(6, 6), vocabulary=VOCABULARY)  # a shape that nobody else compiles
    engine, other = model.bind(pairs, "nll"), model.bind(pairs, "nll")
    rng, now = np.random.default_rng(0), model.graph.visible.astype(np.float32)
    edges, n_lanes = np.argwhere(model.graph.visible), []
    monkeypatch.setattr(queries, "ends_from", lambda *args, run=queries.ends_from: n_lanes.append(len(args[1])) or run(*args))
    for _ in range(24):
        masks = np.stack([now, now])
        row = rng.choice(edges[:, 0])
        masks[:, row] = rng.choice([0, 1, 0.5], size=(2, now.shape[1]))
        np.testing.assert_allclose(engine.evaluate(masks), fresh(other, masks), rtol=0, atol=1e-4)
        now = masks[1] if rng.uniform() < 0.7 else now
    assert sum(n_lanes) >= 24


def walk(model: Any, start: float, calls: list[Call], metric: str) -> None:
    graph = model.graph
    engine, other = model.bind(PAIRS, metric), model.bind(PAIRS, metric)
    now = (np.random.default_rng(0).uniform(size=graph.shape) < start).astype(np.float32) * graph.visible
    scale = max(1.0, float(np.abs(fresh(other, np.stack([now, graph.visible]).astype(np.float32))).max()))
    for lanes, goes_on in calls:
        masks = asked(graph, now, lanes)
        np.testing.assert_allclose(engine.evaluate(masks), fresh(other, masks), rtol=0, atol=TOLERANCE * scale)
        now = masks[-1] if goes_on else now


@pytest.mark.parametrize("family", FAMILIES)
def test_acdc_decides_as_with_runs_from_the_input(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every margin is above rounding; the lanes come from the kept run, or this would show nothing."""
    from circuitgraph_torch._batch import Batch

    model, search = traced(family), ACDC(threshold=0.002, max_lanes=4)
    from_input: list[int] = []
    run_fresh = Batch._fresh

    def counted(batch: Batch, masks: np.ndarray, source: Any) -> np.ndarray:
        from_input.append(len(masks))
        return run_fresh(batch, masks, source)

    monkeypatch.setattr(Batch, "_fresh", counted)
    ours = search.run(model.bind(PAIRS, "kl"))
    n_fresh = sum(from_input)
    monkeypatch.setattr(Batch, "evaluate", run_fresh)
    naive = search.run(model.bind(PAIRS, "kl"))
    margins = ours.record["smallest_margin"], naive.record["smallest_margin"]
    assert min(margins) > 1e-6, margins
    assert [d[0::3] for d in ours.record["decisions"]] == [d[0::3] for d in naive.record["decisions"]]
    assert np.array_equal(ours.mask, naive.mask)
    np.testing.assert_allclose(ours.scores, naive.scores, rtol=0, atol=TOLERANCE)
    assert n_fresh < 0.5 * ours.record["lanes"]


@pytest.mark.parametrize(("family", "backend"), [("gpt2", "torch"), ("gpt_neox", "jax"), ("gemma2", "jax")])
def test_a_sweep_over_all_edges_is_what_single_runs_say(family: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In JAX most lanes by a program of their own, in which nobody remembers what single writers say."""
    by_stream: list[bool] = []
    monkeypatch.setattr(queries, "ends_from", lambda *args, run=queries.ends_from: by_stream.append(args[-1]) or run(*args))
    model = traced(family, backend)
    engine, other = model.bind(PAIRS, "nll"), model.bind(PAIRS, "nll")
    scores = ActivationPatching(max_lanes=4).run(engine).scores
    assert scores is not None
    edges = np.argwhere(model.graph.visible)[::7]
    masks = np.repeat(model.graph.visible.astype(np.float32)[None], len(edges), axis=0)
    masks[np.arange(len(edges)), edges[:, 0], edges[:, 1]] = 0
    whole = fresh(other, model.graph.visible.astype(np.float32)[None]).mean()
    expected = fresh(other, masks).mean(axis=1) - whole
    np.testing.assert_allclose(scores[edges[:, 0], edges[:, 1]], expected, rtol=0, atol=TOLERANCE * max(1, np.abs(expected).max()))
    assert backend == "torch" or sum(by_stream) > 0.5 * len(by_stream)


def test_lanes_by_the_stream_may_go_on_from_a_moved_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads of the last layer hear the same in these lanes, the first of them, which was dead in the kept run, too."""
    by_stream: list[bool] = []
    monkeypatch.setattr(queries, "ends_from", lambda *args, run=queries.ends_from: by_stream.append(args[-1]) or run(*args))
    model = traced("gpt_neox", "jax")
    graph, ones = model.graph, model.graph.visible.astype(np.float32)
    engine, other = model.bind(PAIRS, "nll"), model.bind(PAIRS, "nll")
    last = max(reader.layer for reader in graph.readers)
    mlp, logits = graph.reader_id("m0"), len(graph.readers) - 1
    moved = ones.copy()
    moved[mlp, 0] = moved[logits, graph.writer_id(f"a{last}.h0")] = 0
    lanes = np.repeat(moved[None], 2, axis=0)
    engine.evaluate(lanes)
    assert not any(by_stream)
    lanes[:, mlp, 0] = 0.3, 0.7
    lanes[:, logits, 0] = 0
    lanes[1, logits, 1] = 0
    np.testing.assert_allclose(engine.evaluate(lanes), fresh(other, lanes), rtol=0, atol=1e-4)
    assert by_stream[-1]


def test_rounding_does_not_add_up() -> None:
    """Many more moves than the kept run lives for, each there and back."""
    model = traced("llama")
    engine, other = model.bind(PAIRS, "nll"), model.bind(PAIRS, "nll")
    now = model.graph.visible.astype(np.float32)
    expected = fresh(other, now[None])
    rng, worst = np.random.default_rng(1), 0.0
    for _ in range(4 * MOST_MOVES):
        row = rng.integers(len(now))
        now[row] = np.where(model.graph.visible[row], 1 - now[row].max(), 0)
        now[0, 0] = rng.integers(2)
        found = engine.evaluate(np.stack([now, now]))
        worst = max(worst, float(np.abs(found[0] - fresh(other, now[None])[0]).max()))
    assert worst < TOLERANCE * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_an_interrupted_move_leaves_nothing_wrong_behind(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = traced("gpt_neox", backend).bind(PAIRS, "nll")
    now = engine.graph.visible.astype(np.float32)
    masks = np.stack([now, now])
    masks[:, -1, 1:3] = 0
    expected = engine.evaluate(masks)
    masks[:, -1, 3:5] = 0

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*{"torch": (KeptRun, "move"), "jax": (queries, "moved")}[backend], interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.evaluate(masks)
    masks[:, -1, 3:5] = 1
    np.testing.assert_allclose(engine.evaluate(masks), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_what_hears_nothing_hears_exactly_nothing(backend: str) -> None:
    """With source zero the logits' input is then 0, which a norm leaves at 0; a rest of 1e-7 it would blow up."""
    engine = traced("gemma2", backend).bind(PAIRS, "logit_diff", "zero")
    graph = engine.graph
    now = graph.visible.astype(np.float32)
    for kept in (5, 1, 0):
        masks = np.stack([now, now])
        masks[:, -1, kept:] = 0
        masks[0, -1, kept : kept + 1] = 1
        values = engine.evaluate(masks)
    assert values[1].tolist() == [0.0] * len(PAIRS)
    assert values[0].all()
    masks = np.stack([now] * 3)
    masks[0, -1, 1], masks[1, -1] = 0, 0  # beside lanes that hear much
    masks[2, -1, 2] = 0
    values = engine.evaluate(masks)
    assert values[1].tolist() == [0.0] * len(PAIRS)
    assert values[[0, 2]].all()


@given(
    n_writers=st.integers(1, 12), shares=st.lists(st.sampled_from([0.0, 0.3, 0.9, 1.0]), min_size=6, max_size=6), seed=st.integers(0, 2**16)
)
def test_changes_are_read_as_they_are_weighed(n_writers: int, shares: list[float], seed: int) -> None:
    """By readers that hear all, most, few or none of them; two lanes of three readers, from the first layers to the last."""
    rng = np.random.default_rng(seed)
    writers = np.flatnonzero(rng.uniform(size=n_writers) < 0.7)
    changes, said = Changes(writers, 2, torch.zeros(2, 3, 4, dtype=torch.float64)), rng.normal(size=(len(writers), 2, 2, 3, 4))
    for n_visible in sorted(rng.integers(0, n_writers + 1, size=4)):
        known = writers < n_visible
        if known.any():
            changes.write(writers[known], torch.from_numpy(said[known]))
        hears = rng.uniform(size=(2, 3, n_visible)) < np.reshape(shares, (2, 3, 1))
        weights = np.where(hears, 1.0, rng.choice([0.0, 0.5, -1.0], size=hears.shape))
        got = changes.mix(weights.astype(np.float32))
        expected = np.einsum("lrw,wlpsd->lrpsd", weights[:, :, writers[known]], said[known])
        assert np.allclose(0 if got is None else got.numpy(), expected, rtol=0, atol=1e-12)


def test_other_source_values_start_another_run() -> None:
    model = traced("gpt2")
    engine, zero = model.bind(PAIRS, "logit_diff"), model.bind(PAIRS, "logit_diff", "zero")
    mask = model.graph.visible.astype(np.float32)[None].copy()
    mask[0, -1, 2] = 0
    own = engine.evaluate(mask)
    assert np.allclose(engine.evaluate(mask, source=zero.source_values()), zero.evaluate(mask), atol=1e-5)
    assert np.allclose(engine.evaluate(mask), own, atol=1e-5)
    assert not np.allclose(own, zero.evaluate(mask), atol=1e-3)


# --------------------------------------------------------------------------------------------------------------------------- number types


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_float32_is_near_float64(family: str) -> None:
    """Scores, sweep and decisions; the smallest margin is reported where it is too small to tell."""
    narrow, wide = traced(family), circuitgraph.trace(tiny(family, dtype=torch.float64))
    for metric, algorithm in (("logit_diff", EAP()), ("logit_diff", ActivationPatching(level="node"))):
        got, expected = (algorithm.run(model.bind(PAIRS, metric)).scores for model in (narrow, wide))
        assert got is not None
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    search = ACDC(threshold=0.002)
    got, expected = (search.run(model.bind(PAIRS, "kl")) for model in (narrow, wide))
    margin = expected.record["smallest_margin"]
    assert margin > 1e-5, margin
    assert np.array_equal(got.mask, expected.mask), margin


def test_scores_in_half_precision_are_summed_in_float32() -> None:
    narrow, wide = (circuitgraph.trace(tiny("llama"), dtype=dtype) for dtype in ("bfloat16", "float32"))
    got, expected = (EAP().run(model.bind(PAIRS, "logit_diff")).prompt_scores for model in (narrow, wide))
    assert got is not None
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
    assert narrow.module.lm_head.weight.dtype == torch.bfloat16
    rounded = torch.from_numpy(got).to(torch.bfloat16).double().numpy()
    assert (rounded != got).mean() > 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_kept_run_in_half_precision_is_as_near_as_runs_from_the_input(family: str, dtype: torch.dtype) -> None:
    """What is added up is in float32, so its rounding does not grow with the moves; modules compute in half precision."""
    models = (tiny(family, dtype=dtype), tiny(family, dtype=dtype).float())
    narrow, exact = (circuitgraph.trace(model).bind(PAIRS, "nll") for model in models)
    edges = np.random.default_rng(1).permutation(np.argwhere(narrow.graph.visible))[:60]
    masks = np.ones((len(edges), *narrow.graph.shape))
    for number, edge in enumerate(edges):
        masks[(slice(number, None), *edge)] = 0
    kept = np.concatenate([narrow.evaluate(some) for some in np.split(masks, 15)])
    (_, run, _) = narrow.batches[0]._kept  # type: ignore[attr-defined]
    assert (run.mask < narrow.graph.visible).any()  # it has moved
    assert {x.dtype for x in (*run.heard, run.said, run.differences)} == {torch.float32}
    assert {projected.dtype for projected in run._projected.values()} == {dtype}
    expected, anew = exact.evaluate(masks), fresh(narrow, masks)
    for measure, most in ((np.asarray, 2.5), (lambda values: np.diff(values, axis=0), 1.5)):  # a search decides by differences
        errors = [np.linalg.norm(measure(values) - measure(expected)) for values in (kept, anew)]
        assert 0 < errors[0] < most * errors[1]


# ------------------------------------------------------------------------------------------------------------------- where a run is needed


def graphs() -> st.SearchStrategy[Graph]:
    layer = st.builds(
        Layer,
        n_heads=st.just(4),
        n_kv_heads=st.sampled_from([1, 2, 4]),
        has_mlp=st.booleans(),
        is_parallel=st.booleans(),
        heads_are_coupled=st.booleans(),
    )
    return st.lists(layer, min_size=1, max_size=4).map(transformer_graph)


@given(graph=graphs(), share=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_needed_is_what_has_a_path_to_the_logits(graph: Graph, share: float, seed: int) -> None:
    kept = (np.random.default_rng(seed).uniform(size=graph.shape) < share) & graph.visible
    extent = Liveness(graph).needed(kept)
    readers, writers = graph.needed(kept)
    assert np.array_equal(extent.readers > DEAD, readers)
    assert np.array_equal(extent.writers > DEAD, writers)
    for r, reader in enumerate(graph.readers):
        heard = extent.writers[kept[r]]
        assert (heard >= extent.readers[r]).all()
        if readers[r] and reader.kind in ("k", "v"):
            assert extent.readers[r] == ALL
    assert extent.readers[-1] == LAST


@given(graph=graphs(), share=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_changed_is_what_is_needed_and_reached(graph: Graph, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kept = (rng.uniform(size=graph.shape) < share) & graph.visible
    sources = rng.uniform(size=len(graph.readers)) < 0.1
    liveness = Liveness(graph)
    needed = liveness.needed(kept)
    changed = liveness.changed(kept, sources, needed)
    told_writers = np.zeros(len(graph.writers), dtype=bool)
    for r in range(len(graph.readers)):
        told = (sources[r] or (kept[r] & told_writers).any()) and needed.readers[r] > DEAD
        assert changed.readers[r] == (needed.readers[r] if told else DEAD)
        if told:
            told_writers |= graph.feeds[r] & (needed.writers > DEAD)
    assert np.array_equal(changed.writers, np.where(told_writers, needed.writers, DEAD))


# ------------------------------------------------------------------------------------------------------------------------------- the plan


def sites(n_layers: int = 2) -> Sites:
    """Layers of two heads and an MLP."""
    return Sites.of(transformer_graph([Layer(n_heads=2, n_kv_heads=2)] * n_layers), n_layers=n_layers)


def test_lanes_that_agree_move_the_kept_run_and_one_alone_waits_for_the_next() -> None:
    incremental, graph = Incremental(sites(), length=5, cost=Cost(1.3, 0)), sites().graph
    ones = graph.visible.astype(np.float32)
    gone = ones.copy()
    gone[14, 3:] = 0
    first = incremental.plan(gone[None])
    assert first.move is None
    assert [part.readers.tolist() for part in first.parts] == [[14]]
    lanes = np.repeat(gone[None], 2, axis=0)
    lanes[0, 13, 0] = lanes[1, 13, 1] = 0
    second = incremental.plan(lanes)
    assert second.move is not None
    assert second.move.readers.tolist() == [14]
    assert [part.readers.tolist() for part in second.parts] == [[13]]
    assert np.array_equal(incremental.mask, gone)


def test_what_the_kept_run_no_longer_knows_makes_it_anew() -> None:
    incremental, graph = Incremental(sites(), length=5, cost=Cost(1.3, 0)), sites().graph
    ones = graph.visible.astype(np.float32)
    without_last_mlp = ones.copy()
    without_last_mlp[14, 6] = 0
    assert incremental.plan(np.stack([without_last_mlp] * 2)).move is not None
    revived = np.stack([ones] * 2)
    revived[0, 14, 0] = 0
    plan = incremental.plan(revived)
    assert plan.anew
    assert plan.move is None


def test_lanes_that_agree_on_nothing_move_nothing() -> None:
    incremental, graph = Incremental(sites(), length=5, cost=Cost(1.3, 0)), sites().graph
    masks = np.random.default_rng(0).uniform(size=(3, *graph.shape)).astype(np.float32)
    assert incremental.plan(masks).move is None
    assert np.array_equal(incremental.mask, graph.visible)


def test_positions_that_all_share_count_for_the_kept_run() -> None:
    """What changes everything from the first layer on is run from the input, unless half of the prompt comes before any change."""
    deep = sites(n_layers=8)
    lane = deep.graph.visible.astype(np.float32)[None]
    lane[0, deep.layer_of_row == 0, 0] = 0
    assert not Incremental(deep, length=8, cost=Cost(1.3, 0)).plan(lane).parts
    assert Incremental(deep, length=8, cost=Cost(1.3, 0), first=4).plan(lane).parts


def test_masks_that_differ_in_every_row_are_run_anew_even_behind_a_long_beginning() -> None:
    """Every such row would be added up by itself."""
    from circuitgraph_torch._batch import _COST

    deep = sites(n_layers=8)
    masks = np.random.default_rng(0).integers(0, 2, (2, *deep.graph.shape)).astype(np.float32)
    assert not Incremental(deep, length=16, cost=_COST, first=8).plan(masks).parts
    one_edge = deep.graph.visible.astype(np.float32)[None]
    one_edge[0, *np.argwhere(deep.graph.visible)[deep.graph.n_edges // 2]] = 0
    assert Incremental(deep, length=16, cost=_COST, first=8).plan(one_edge).parts
