"""The JAX engine against itself, its own derivatives and nnsight; what it compiles, on how many devices it runs, and what only JAX does."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import VOCABULARY, tiny
from oracle import oracle_logits

import circuitgraph_jax
from circuitgraph._engine import Source
from circuitgraph._errors import CircuitGraphError, DegenerateError, TaskError, UnknownNameError
from circuitgraph._memory import MemoryBudget
from circuitgraph._pairs import PromptPairs
from circuitgraph.algorithms import ACDC, EAP
from circuitgraph.testing import random_pairs
from circuitgraph_jax import _queries as queries
from circuitgraph_jax._devices import precisely
from circuitgraph_jax._joints import Attention
from circuitgraph_jax._resumed import Own

SHAPE = (12, 12)  # that of a proof's prompts, which are compiled for anyway


@cache
def traced(family: str, dtype: str = "float32") -> circuitgraph_jax.JaxModel:
    return circuitgraph_jax.trace(tiny(family), dtype=dtype)


def pairs_of(seed: int, lengths: tuple[int, ...] = SHAPE) -> PromptPairs:
    return random_pairs(seed, lengths=lengths, vocabulary=VOCABULARY)


def bound(family: str, dtype: str = "float32", metric: str = "logit_diff") -> circuitgraph_jax._engine.JaxEngine:
    return traced(family, dtype).bind(pairs_of(0), metric)


def uniform(engine: Any, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=engine.graph.shape)


# Derivatives


def pushed_forward(engine: Any, mask: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """`dF` along a direction, per prompt, by JAX's forward mode through `ends`: nothing of the backward pass is used."""
    (batch,) = engine.batches
    with precisely("float64"):
        source = engine._source_run(0, None)
        differences = batch.live.values - source.values

        def values(mask: Any) -> Any:
            where = (jnp.asarray(0, jnp.int32), Own(batch.live.streams, differences, batch.live.active), source.whole)
            ends = queries.ends(batch.decoder, mask[None], *where)
            return queries.measured(batch.decoder, engine.metric, ends, batch._question)[0]

        return np.asarray(jax.jvp(values, (jnp.asarray(mask),), (jnp.asarray(direction),))[1])


JVP = [("llama", "logit_diff"), ("gpt_neo", "nll"), ("gemma2", "kl"), ("gpt_neox", "prob_diff")]


@pytest.mark.parametrize(("family", "metric"), JVP)
def test_gradients_are_what_jvp_says_in_random_directions(family: str, metric: str) -> None:
    engine = bound(family, "float64", metric)
    rng = np.random.default_rng(1)
    for kind in ("inside", "outside", "half live"):
        mask = rng.uniform(-1, 2, engine.graph.shape) if kind == "outside" else rng.uniform(size=engine.graph.shape)
        mask = np.where(rng.uniform(size=mask.shape) < 0.5, 1, mask) if kind == "half live" else mask
        gradient = engine.gradient(mask)
        for _ in range(2):
            direction = rng.normal(size=mask.shape)
            expected = pushed_forward(engine, mask, direction)
            assert np.allclose((gradient * direction).sum((1, 2)), expected, rtol=1e-9, atol=1e-9 * np.abs(gradient).max())


@pytest.mark.parametrize("family", ["gpt_neo", "gemma2"])
@pytest.mark.parametrize("where", ["at the model", "inside"])
def test_gradients_agree_with_finite_differences(family: str, where: str) -> None:
    engine = bound(family, "float64")
    rng = np.random.default_rng(2)
    mask = np.ones(engine.graph.shape) if where == "at the model" else rng.uniform(size=engine.graph.shape)
    gradient, step = engine.gradient(mask), 1e-5
    for r, w in rng.permutation(np.argwhere(engine.graph.visible))[:8]:
        nudge = np.zeros_like(mask)
        nudge[r, w] = step
        up, down = engine.evaluate(np.stack([mask + nudge, mask - nudge]))
        assert np.allclose((up - down) / (2 * step), gradient[:, r, w], rtol=1e-6, atol=1e-7 * np.abs(gradient).max())
    assert not gradient[:, ~engine.graph.visible].any()


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_masked_runs_agree_with_nnsight_on_the_untouched_model(family: str) -> None:
    model, engine = tiny(family), bound(family)
    values = engine.reversed().activations()
    corrupted = torch.from_numpy(np.stack([values[i] for i in range(len(values))], axis=1))
    clean = torch.from_numpy(np.stack(pairs_of(0).clean))
    for mask in (uniform(engine), 3 * uniform(engine, 1) - 1, (uniform(engine, 2) < 0.5).astype(float)):
        expected = oracle_logits(model, traced(family).architecture, clean, mask, corrupted).numpy()
        ((_, logits),) = engine.logits(mask)
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


# Compiling


@contextmanager
def compilations() -> Iterator[Counter[str]]:
    """What XLA compiles inside, by the name of the function."""
    seen: Counter[str] = Counter()

    def listen(event: str, duration: float, **details: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen[str(details.get("fun_name"))] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def ask_everything(model: circuitgraph_jax.JaxModel, seed: int, threshold: float) -> None:
    """ACDC, and every other query that there is, on new prompts."""
    engine = model.bind(pairs_of(seed, (7, 7, 7)), "logit_diff")
    ACDC(threshold=threshold).run(engine)
    EAP().run(model.bind(pairs_of(seed, (7, 7, 7)), "logit_diff"))
    rng = np.random.default_rng(seed)
    masks, ones = rng.uniform(size=(6, *engine.graph.shape)), np.ones(engine.graph.shape)
    engine.evaluate(masks)
    for source in (None, engine.reversed().activations()):
        for mask in (ones, masks[0]):
            engine.gradient(mask, source=source)
            engine.gradient(mask, mix=float(rng.uniform(0.1, 0.9)), source=source)
            engine.activations(mask, source=source)
    engine.activations()
    for kind in ("zero", "mean", "mean-per-position"):
        other = model.bind(pairs_of(seed, (7, 7, 7)), "logit_diff", kind)
        other.evaluate(masks[:1])
        other.gradient(masks[0])


def test_a_shape_is_compiled_once() -> None:
    model = traced("llama")
    engine = model.bind(pairs_of(6, (7, 7, 7)), "kl")
    with compilations() as of_acdc:
        outcome = ACDC(threshold=0.001).run(engine)
        ACDC(threshold=0.3, group_first=False).run(engine)
    assert outcome.record["lanes"] > 50
    by_query = {name: n for name, n in of_acdc.items() if any(name == f"jit({query})" for query in vars(queries))}
    for query, most in {"ends": 3, "ends_from": 4, "measured": 3}.items():
        assert by_query.pop(f"jit({query})", 0) <= most, "lanes come by 1, 4 and 16, the first of them perhaps without a bank"
    assert set(by_query.values()) == {1}, by_query
    with compilations() as again:
        ACDC(threshold=0.3).run(engine)
        ACDC(threshold=0.1, group_first=False).run(model.bind(pairs_of(7, (7, 7, 7)), "kl"))
        ACDC(threshold=0.3).run(model.bind(pairs_of(7, (7, 7, 7, 7)), "kl"))  # three prompts are filled up to four
    assert not again


def test_other_numbers_in_the_same_shapes_compile_nothing() -> None:
    """Other prompts, thresholds and mixes; another model of the same shapes, whose windows, scales and frequencies are others too."""
    ask_everything(traced("llama"), 8, 0.05)
    with compilations() as again:
        ask_everything(traced("llama"), 9, 0.2)
    assert not again
    other = traced("mistral")
    with compilations() as again:
        ask_everything(other, 10, 0.01)
        circuitgraph_jax.trace(tiny("mistral", seed=1))
    assert not again


def test_another_metric_compiles_only_itself() -> None:
    """The runs are the same, from the input and from the kept run."""
    model, pairs = traced("llama"), pairs_of(12, (8, 8))
    graph, edges = model.graph, np.argwhere(model.graph.visible)[-4:]
    single = np.repeat(graph.visible.astype(float)[None], len(edges), axis=0)
    single[np.arange(len(edges)), edges[:, 0], edges[:, 1]] = 0
    asked = (single, np.random.default_rng(12).uniform(size=(1, *graph.shape)))
    first, other = model.bind(pairs, "nll"), model.bind(pairs, "prob_diff")
    for masks in asked:
        first.evaluate(masks)
    with compilations() as again:
        values = [other.evaluate(masks) for masks in asked]
    assert again.keys() == {"jit(measured)"}
    assert all(np.abs(value - first.evaluate(masks)).min() > 1e-3 for masks, value in zip(asked, values, strict=True))


def test_one_row_beside_several_is_refused() -> None:
    add = queries.over_rows(lambda a, b: a + b)
    for n in (1, 3):
        assert add(jnp.ones((n, 2)), jnp.ones((n, 2))).shape == (n, 2)
    with pytest.raises(ValueError, match="inconsistent sizes"):
        add(jnp.ones((1, 2)), jnp.ones((3, 2)))


def test_a_model_that_looks_ahead_fails_the_check_of_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = traced("llama"), pairs_of(13, (17, 17))  # a shape that nobody else compiles
    pattern = Attention._pattern
    monkeypatch.setattr(Attention, "_pattern", lambda self, q, k, distance: pattern(self, q, k, distance + 1))
    assert [check.name for check in model.checks(pairs) if not check.holds] == ["padding changes nothing"]


# Devices

# PyTorch says what one device says (`test_jax_differential`), and compiles nothing.
ON_DEVICES = """
from contextlib import ExitStack
from dataclasses import replace

import jax
import numpy as np
from lifted import lifted

import circuitgraph_jax
import circuitgraph_torch
from circuitgraph.algorithms import ACDC, EAP, ActivationPatching
from circuitgraph.testing import random_pairs
from circuitgraph_jax import _queries as queries

shapes, hlo, watch_hlo = [], {}, False

def watch(name):
    query = getattr(queries, name)

    def watched(*args):
        values = query(*args)
        if name == "measured":
            shapes.append((values.shape, values.addressable_shards[0].data.shape))
        if watch_hlo and name not in hlo:
            hlo[name] = query.lower(*args).compile().compiled.as_text()
        return values

    setattr(queries, name, watched)

for name in ("ends", "ends_from", "measured"):
    watch(name)

def same(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert np.abs(got - expected).max() <= 1e-9 * np.abs(expected).max(), np.abs(got - expected).max()

assert len(jax.devices()) == 4
many = circuitgraph_jax.trace("zoo:induction-2l", dtype="float64")
one = circuitgraph_jax.trace("zoo:induction-2l", dtype="float64", devices=jax.devices()[:1])
everything = ExitStack()
everything.enter_context(lifted())
torch = circuitgraph_torch.trace("zoo:induction-2l", dtype="float64")
# How many devices prompts and lanes are shared out to; how many prompts there are with those that fill up.
for n_prompts, by_prompt, by_lane, rows in [(6, 4, 1, 8), (3, 2, 2, 4), (1, 1, 4, 1)]:
    spans = np.random.default_rng(1).integers(0, 2, (n_prompts, 9))
    pairs = replace(random_pairs(n_prompts, lengths=[9] * n_prompts, vocabulary=100), spans=spans, span_names=["A", "B"])
    ours, theirs = (model.bind(pairs, "logit_diff") for model in (many, torch))
    masks = np.random.default_rng(n_prompts).uniform(size=(7, *ours.graph.shape))
    shapes.clear()
    watch_hlo = n_prompts == 3  # both prompts and lanes are shared out
    got = ours.evaluate(masks)
    for whole, part in shapes:
        assert whole[1] == rows and part == (whole[0] // by_lane, rows // by_prompt), (whole, part)
    assert sum(whole[0] for whole, _ in shapes) == 7 + -7 % by_lane
    same(got, theirs.evaluate(masks))
    by_span = np.random.default_rng(0).uniform(size=(*ours.graph.shape, 2))
    for mask, mix in ((np.ones(ours.graph.shape), 1.0), (by_span, (0.3, 0.6)))[: 2 if n_prompts == 3 else 1]:
        same(ours.gradient(mask, mix=mix), theirs.gradient(mask, mix=mix))
    values, expected = ours.activations(masks[1]), theirs.activations(masks[1])
    assert len(values) == n_prompts
    for prompt in range(n_prompts):
        same(values[prompt], expected[prompt])
    (batch,) = values.batches
    assert batch.shape[0] == rows and batch.addressable_shards[0].data.shape[0] == rows // by_prompt
    assert len({shard.index[0].start for shard in batch.addressable_shards}) == by_prompt
    said = one.bind(pairs, "logit_diff").activations()
    assert len(said.batches[0].sharding.device_set) == 1
    same(ours.evaluate(masks[:1], source=said), theirs.evaluate(masks[:1], source=said))  # values of other devices
watch_hlo = True
for algorithm in (EAP(), ActivationPatching(max_lanes=4), ACDC(threshold=0.05, max_lanes=4)):
    pairs = random_pairs(4, lengths=(9, 9, 9), vocabulary=100)
    got, expected = (algorithm.run(model.bind(pairs, "logit_diff")) for model in (many, torch))
    assert np.array_equal(got.mask, expected.mask)
    same(got.scores, expected.scores)
everything.close()
assert {"ends_from", "measured"} <= hlo.keys()
assert not any(name in text for text in hlo.values() for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
"""


def test_four_devices_give_the_numbers_of_one() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(str(here / folder) for folder in ("", "backends", "tests"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_devices_that_are_not_there() -> None:
    with pytest.raises(CircuitGraphError, match="devices 'tpu' cannot be used here"):
        circuitgraph_jax.trace("zoo:induction-2l", devices="tpu")
    with pytest.raises(CircuitGraphError, match="none given"):
        circuitgraph_jax.trace("zoo:induction-2l", devices=[])


# What only JAX does


def test_models_of_several_dtypes_live_side_by_side() -> None:
    assert not jax.config.jax_enable_x64
    mask = uniform(bound("llama"))
    double, single = bound("llama", "float64"), bound("llama", "float32")
    before = single.evaluate(mask[None])
    exact = double.evaluate(mask[None])
    assert not jax.config.jax_enable_x64
    assert jnp.ones(1).dtype == jnp.float32
    assert double.activations().batches[0].dtype == np.float64
    assert single.activations().batches[0].dtype == np.float32
    assert np.allclose(single.evaluate(mask[None]), before, rtol=1e-6, atol=1e-6)
    assert 1e-12 < np.abs(before - exact).max() < 1e-4 * np.abs(exact).max()
    said = double.activations(mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns where it cuts float64 down
        patched = single.evaluate(mask[None], source=said)
    assert np.allclose(patched, double.evaluate(mask[None], source=said), rtol=1e-4, atol=1e-4)
    with pytest.raises(CircuitGraphError, match="NaN"):
        double.evaluate(mask[None] * np.nan)
    assert not jax.config.jax_enable_x64


def test_bfloat16_is_near() -> None:
    """Within the tolerance of its proof, of the numbers in float32."""
    rough, exact = bound("llama", "bfloat16"), bound("llama", "float32")
    mask = uniform(exact)
    near = 0.1
    for got, expected in (
        (rough.evaluate(mask[None]), exact.evaluate(mask[None])),
        (rough.gradient(mask), exact.gradient(mask)),
        (rough.activations(mask)[0], exact.activations(mask)[0]),
    ):
        assert np.isfinite(got).all()
        assert 1e-5 < np.abs(got - expected).max() / np.abs(expected).max() < near
    assert traced("llama", "bfloat16").provenance["dtype"] == "bfloat16"
    with pytest.raises(UnknownNameError, match="bfloat16"):
        circuitgraph_jax.trace(tiny("llama"), dtype="bfloat")


def test_prompts_and_lanes_that_memory_cuts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of(11, (7, 5, 7, 7))
    whole = traced("llama").bind(pairs, "logit_diff")
    masks = np.random.default_rng(11).uniform(size=(6, *whole.graph.shape))
    expected = whole.evaluate(masks), whole.gradient(masks[0]), whole.activations(masks[1])
    assert len(whole.batches) == 2
    small = replace(whole._parts, budget=MemoryBudget(total=1, host=1 << 30))
    for batch in whole.batches:
        batch._parts = small
    lanes: list[int] = []
    ends = queries.ends
    monkeypatch.setattr(queries, "ends", lambda *args: lanes.append(len(args[1])) or ends(*args))
    assert np.allclose(whole.evaluate(masks), expected[0], atol=2e-5)
    assert lanes == [1] * 12
    cut = replace(traced("llama"), _parts=small).bind(pairs, "logit_diff")
    assert len(cut.batches) == 4
    assert np.allclose(cut.evaluate(masks), expected[0], atol=2e-5)
    assert np.allclose(cut.gradient(masks[0]), expected[1], atol=2e-5)
    assert all(np.allclose(cut.activations(masks[1])[i], expected[2][i], atol=2e-5) for i in range(4))
    assert np.allclose(cut.evaluate(masks[:1], source=expected[2]), whole.evaluate(masks[:1], source=expected[2]), atol=2e-5)


def test_lanes_that_start_late_agree_with_whole_runs() -> None:
    engine = bound("gpt_neo")  # in two stacks, each of which may be begun in the middle
    masks = np.ones((engine.graph.shape[0] + 1, *engine.graph.shape))
    for row in range(len(masks) - 1):
        masks[row + 1, row:] = uniform(engine, row)[row:]
    masks = np.random.default_rng(0).permutation(masks)
    together = engine.evaluate(masks)
    for mask, values in zip(masks, together, strict=True):
        ((_, logits),) = engine.logits(mask)
        last, pairs = logits[:, -1], pairs_of(0)
        expected = [last[i, pairs.answers[i][0]] - last[i, pairs.wrong_answers[i][0]] for i in range(len(pairs))]
        assert np.allclose(values, expected, atol=2e-5 * np.abs(last).max())


def test_bad_questions_are_refused() -> None:
    """Where JAX itself would say nothing: it clamps positions and tokens that are out of bounds."""
    model, engine = traced("gpt2"), bound("gpt2")
    ones = np.ones(engine.graph.shape)
    with pytest.raises(TaskError, match="does not take prompts of 65 tokens: it has learned positions for 64"):
        model.bind(pairs_of(0, (65,)), "nll")
    with pytest.raises(TaskError, match="does not take prompts of 65 tokens"):
        model.bind(pairs_of(0), "nll", Source("mean", pairs_of(0, (65,))))
    with pytest.raises(TaskError, match="does not take prompts of 65 tokens"):
        model.logits(pairs_of(0, (65,)))
    assert np.isfinite(model.logits(pairs_of(0, (64,)))).all()
    for beyond in (VOCABULARY, 500):
        with pytest.raises(TaskError, match=f"token id {beyond} is not in the model's vocabulary of {VOCABULARY}"):
            model.bind(PromptPairs(clean=[[beyond, 1]], corrupted=[[2, 1]], answers=[3]), "nll")
        with pytest.raises(TaskError, match=f"token id {beyond}"):
            model.bind(PromptPairs(clean=[[4, 1]], corrupted=[[2, 1]], answers=[beyond]), "nll")
    with pytest.raises(TaskError, match="token id 500"):
        model.bind(pairs_of(0), "nll", Source("mean", PromptPairs(clean=[[500]], corrupted=[[2]], answers=[3])))
    for query in (lambda mask: engine.evaluate(mask[None]), engine.gradient, engine.activations):
        for bad in (np.nan, np.inf):
            with pytest.raises(CircuitGraphError, match="NaN or infinity"):
                query(np.where(engine.graph.visible, ones, bad))
        with pytest.raises(CircuitGraphError, match=r"mask of shape .*expected \[.*readers, writers\]"):
            query(ones[:, :-1])
    with pytest.raises(CircuitGraphError, match=r"expected \[lanes, readers, writers\]"):
        engine.evaluate(ones)
    with pytest.raises(CircuitGraphError, match=r"expected \[readers, writers\]"):
        engine.gradient(ones[None])
    with pytest.raises(CircuitGraphError, match="source values of 1 prompts for an engine with 2"):
        engine.evaluate(ones[None], source=model.bind(pairs_of(0).select([0]), "nll").activations())
    with pytest.raises(DegenerateError, match="zero gradient at the clean run"):
        model.bind(pairs_of(0), "kl").gradient(ones)
    with pytest.raises(DegenerateError, match="no gradient"):
        model.bind(pairs_of(0), "accuracy").gradient(ones)
    with pytest.raises(DegenerateError, match="zero"):
        model.bind(pairs_of(0), "nll", "zero").reversed()
    with pytest.raises(TaskError, match="needs a wrong answer"):
        model.bind(PromptPairs(clean=[[5, 1]], corrupted=[[2, 1]], answers=[3]), "logit_diff")
    with pytest.raises(TaskError, match="no reference prompt has 12 tokens"):
        model.bind(pairs_of(0), "nll", Source("mean-per-position", pairs_of(0, (7,)))).evaluate(ones[None] * 0)
