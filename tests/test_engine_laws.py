"""What any engine obeys, whatever computes it: every law over every row of the table in `engines.py`.

A law is a function of a traced model, prompt pairs and a tolerance. The pairs are of two lengths, with several as long as the last. It asks
through the protocol only, so it says the same of a backend that comes from outside.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from engines import JAX_IN_PARTS, PAIRS, ROWS, Row, every_backend, traced

from circuitgraph._architecture import Architecture
from circuitgraph._engine import Source, TracedModel, WriterValues
from circuitgraph._errors import CircuitGraphError, DegenerateError, TaskError, UnknownNameError
from circuitgraph._memory import MemoryBudget
from circuitgraph._metrics import METRICS, Metric, Target, log_softmax
from circuitgraph._pairs import PromptPairs
from circuitgraph.testing import ReferenceEngine, ReferenceModel, ReferenceTrace
from circuitgraph.testing._reference_run import source_values

Law = Callable[[TracedModel, PromptPairs, float], None]

DIFFERENTIABLE = ("logit_diff", "kl")
SOURCES = ("corrupted", "zero", "mean", "mean-per-position")


@dataclass(frozen=True, eq=False)
class Values:
    """Writer values that no engine made: one array per prompt."""

    prompts: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, prompt: int) -> np.ndarray:
        return self.prompts[prompt]


def swapped(pairs: PromptPairs) -> PromptPairs:
    return replace(pairs, clean=pairs.corrupted, corrupted=pairs.clean)


def one_length(pairs: PromptPairs) -> PromptPairs:
    """Those as long as the last: enough for most laws, and JAX compiles for each length."""
    return pairs.select([i for i, ids in enumerate(pairs.clean) if len(ids) == len(pairs.clean[-1])])


def ones(model: TracedModel) -> np.ndarray:
    return np.ones(model.graph.shape)


def random_masks(model: TracedModel, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(n, *model.graph.shape))


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    """Equal shapes, and no difference above `tolerance` of the largest value (or of 1)."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1.0, float(np.abs(expected).max(initial=0))))


def assert_same_values(got: WriterValues, expected: WriterValues, tolerance: float) -> None:
    assert len(got) == len(expected)
    for i in range(len(expected)):
        assert_close(got[i], expected[i], tolerance)


def measured(metric: Metric, logits: np.ndarray, clean_logits: np.ndarray, pairs: PromptPairs) -> np.ndarray:
    """A metric of plain logits, prompt by prompt."""
    out = np.empty(len(pairs))
    for bucket in pairs.buckets():
        right, wrong = bucket.answers, bucket.wrong_answers
        target = Target(right.ids, right.weights, wrong.ids, wrong.weights, log_softmax(clean_logits[bucket.index].astype(float)))
        out[bucket.index] = metric(logits[bucket.index].astype(float), target)
    return out


# ------------------------------------------------------------------------------------------------------------------------------- the laws


def full_mask_is_the_model(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    assert model.logits(pairs).shape == (len(pairs), model.architecture.vocabulary)
    for name, metric in METRICS.items():
        asked = pairs if name == "kl" else one_length(pairs)
        logits = model.logits(asked)
        value = model.bind(asked, name).evaluate(ones(model)[None])
        assert_close(value, measured(metric(), logits, logits, asked)[None], tolerance)


def empty_mask_is_the_source_run(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    clean, corrupted = model.logits(pairs), model.logits(swapped(pairs))
    for name in DIFFERENTIABLE:
        value = model.bind(pairs, name).evaluate(0 * ones(model)[None])
        assert_close(value, measured(METRICS[name](), corrupted, clean, pairs)[None], tolerance)


def writers_say_what_they_hear(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    """Under an empty mask each hears the source run, so it says what it says there; only the input says what it says."""
    engine = model.bind(pairs, "logit_diff")
    clean, corrupted = engine.activations(), engine.reversed().activations()
    assert_same_values(engine.activations(ones(model)), clean, tolerance)
    nothing = engine.activations(0 * ones(model))
    expected = Values(tuple(np.concatenate([clean[i][:1], corrupted[i][1:]]) for i in range(len(pairs))))
    assert_same_values(nothing, expected, tolerance)


def the_source_is_what_it_says_on_its_prompts(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    """Each kind of source against writer values made by hand, which stand in for the source of any engine."""
    data = swapped(pairs.select(range(len(pairs) - 1, 0, -1)))  # fewer prompts, in another order
    mask = random_masks(model, 1, seed=1)
    given = model.bind(pairs, "logit_diff", "zero")
    asked = [(Source(kind), pairs) for kind in SOURCES] + [
        (Source("mean", data), swapped(data)),
        (Source("mean-per-position", swapped(pairs)), pairs),
    ]
    for source, prompts in asked:
        said = model.bind(swapped(prompts), "logit_diff").activations()
        values = source_by_hand(source.kind, [np.asarray(said[i], dtype=float) for i in range(len(said))], pairs)
        engine = model.bind(pairs, "logit_diff", source)
        assert_close(engine.evaluate(mask), given.evaluate(mask, source=values), tolerance)


def source_by_hand(kind: str, said: list[np.ndarray], pairs: PromptPairs) -> Values:
    if kind == "corrupted":
        return Values(tuple(said))
    lengths = [len(ids) for ids in pairs.clean]
    if kind == "mean-per-position":
        return Values(tuple(np.mean([values for values in said if values.shape[1] == n], axis=0) for n in lengths))
    vectors = np.concatenate(said, axis=1)
    mean = 0 * vectors[:, :1] if kind == "zero" else vectors.mean(axis=1, keepdims=True)
    return Values(tuple(np.repeat(mean, n, axis=1) for n in lengths))


def gradient_is_the_derivative(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    pairs = one_length(pairs)
    edges = np.random.default_rng(2).permutation(np.argwhere(model.graph.visible))[:8]
    step = tolerance ** (1 / 3) / 2
    for name in DIFFERENTIABLE:
        engine = model.bind(pairs, name)
        for mask in (random_masks(model, 1, seed=2)[0], *((ones(model),) if name == "logit_diff" else ())):
            gradient = engine.gradient(mask)
            masks = np.repeat(mask[None], 2 * len(edges), axis=0)
            for i, (r, w) in enumerate(edges):
                masks[2 * i : 2 * i + 2, r, w] += step, -step
            values = engine.evaluate(masks)
            slopes = (values[0::2] - values[1::2]) / (2 * step)
            found = gradient[:, edges[:, 0], edges[:, 1]].T
            np.testing.assert_allclose(found, slopes, rtol=0, atol=20 * tolerance ** (2 / 3) * np.abs(gradient).max())


def mixing_moves_the_input_along_its_edges(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    """Where nothing hears the input but the logits, a mixed input is a mask between 0 and 1 on that edge."""
    if not model.graph.visible[-1, 0]:
        return  # the stream in between is refined
    pairs = one_length(pairs)
    engine = model.bind(pairs, "kl")
    only_input = 0 * ones(model)
    only_input[-1, 0] = 1
    mixed = engine.gradient(only_input, mix=0.3)
    assert_close(mixed[:, -1, 0], engine.gradient(0.3 * only_input)[:, -1, 0], max(tolerance, 1e-7))
    assert_close(engine.gradient(only_input, mix=1.0), engine.gradient(only_input), 0)
    assert not np.allclose(mixed[:, -1, 0], engine.gradient(only_input)[:, -1, 0], rtol=1e-3, atol=0)


def what_is_no_edge_counts_for_nothing(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    pairs = one_length(pairs)
    engine, mask = model.bind(pairs, "logit_diff"), random_masks(model, 1, seed=3)[0]
    visible = model.graph.visible
    assert_close(engine.evaluate(np.where(visible, mask, 7.0)[None]), engine.evaluate(mask[None]), tolerance)
    assert not engine.gradient(mask)[:, ~visible].any()


def lanes_are_single_masks(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    """Also where lanes differ from the model in late readers only, so that an engine may start them late."""
    engine, rng = model.bind(pairs, "logit_diff"), np.random.default_rng(4)
    masks = np.ones((6, *model.graph.shape))
    for mask in masks[1:]:
        rows = rng.integers(0, len(mask), 2)
        mask[rows] = rng.uniform(size=(2, mask.shape[1]))
    alone = np.concatenate([engine.evaluate(mask[None]) for mask in masks])
    assert_close(engine.evaluate(masks), alone, tolerance)
    assert_close(engine.evaluate(masks[::-1]), alone[::-1], tolerance)
    assert len(np.unique(alone.round(6), axis=0)) > 2


def each_prompt_has_its_own_number(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    """Whatever the order, and whoever shares its batch."""
    mask = random_masks(model, 1, seed=5)
    order = list(range(len(pairs)))[::-1]
    engine, other, single = (model.bind(pairs.select(index), "logit_diff") for index in (range(len(pairs)), order, [len(pairs) - 1]))
    values = engine.evaluate(mask)
    assert_close(other.evaluate(mask), values[:, order], tolerance)
    assert_close(single.evaluate(mask), values[:, -1:], tolerance)
    said = engine.activations(mask[0])
    assert_same_values(other.activations(mask[0]), Values(tuple(said[i] for i in order)), tolerance)
    assert np.ptp(values) > 1e-3


def reversing_exchanges_prompts_but_not_the_question(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    ends, mask = np.stack([0 * ones(model), ones(model)]), random_masks(model, 1, seed=6)
    for name in DIFFERENTIABLE:  # kl still compares with the clean run
        engine = model.bind(pairs, name)
        reverse = engine.reversed()
        assert_close(reverse.evaluate(ends), engine.evaluate(ends)[::-1], tolerance)
        assert_close(reverse.reversed().evaluate(mask), engine.evaluate(mask), tolerance)
        assert (reverse.graph, reverse.metric, reverse.n_prompts) == (engine.graph, engine.metric, engine.n_prompts)
    for source in ("corrupted", "mean", "mean-per-position"):  # means are then over the clean prompts
        denoising, plain = model.bind(pairs, "logit_diff", source).reversed(), model.bind(swapped(pairs), "logit_diff", source)
        assert_close(denoising.evaluate(mask), plain.evaluate(mask), tolerance)
    with pytest.raises(DegenerateError, match="denoising restores clean values, and source 'zero' has none"):
        model.bind(pairs, "logit_diff", "zero").reversed()


def explicit_values_replace_the_source_of_every_query(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    """Its own kind of values, or anyone's."""
    pairs = one_length(pairs)
    engine, mask = model.bind(pairs, "logit_diff"), random_masks(model, 1, seed=7)
    other, own = model.bind(pairs, "logit_diff", "mean-per-position"), engine.reversed().activations()
    anyones = Values(tuple(np.array(own[i]) for i in range(len(own))))
    for values in (own, anyones):
        assert_close(other.evaluate(mask, source=values), engine.evaluate(mask), tolerance)
        assert_close(other.gradient(mask[0], source=values), engine.gradient(mask[0]), max(tolerance, 1e-7))
        assert_same_values(other.activations(mask[0], source=values), engine.activations(mask[0]), tolerance)
    assert not np.allclose(other.evaluate(mask), engine.evaluate(mask), rtol=1e-3, atol=0)


def answers_have_their_shapes(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    pairs = one_length(pairs)
    engine, n = model.bind(pairs, "logit_diff"), len(pairs)
    values, gradient, said = engine.evaluate(ones(model)[None]), engine.gradient(ones(model)), engine.activations()
    assert (values.shape, values.dtype) == ((1, n), np.float64)
    assert (gradient.shape, gradient.dtype) == ((n, *model.graph.shape), np.float64)
    assert isinstance(said, WriterValues)
    assert len(said) == n == engine.n_prompts
    shapes = {(np.asarray(said[i]).shape, np.asarray(said[i]).dtype.name) for i in range(n)}
    assert shapes == {((len(model.graph.writers), len(pairs.clean[0]), model.architecture.d_model), model.provenance["dtype"])}
    assert engine.evaluate(np.empty((0, *model.graph.shape))).shape == (0, n)


def a_mask_may_be_of_any_numbers(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    pairs = one_length(pairs)
    engine, mask = model.bind(pairs, "logit_diff"), random_masks(model, 1, seed=8) < 0.5
    expected = engine.evaluate(mask.astype(float))
    for other in (mask, mask.astype(int), mask.astype(np.float32), mask.tolist(), mask.astype(object), np.asfortranarray(mask)):
        assert_close(engine.evaluate(other), expected, tolerance)
    assert_same_values(engine.activations(mask[0]), engine.activations(mask[0].astype(float)), tolerance)
    assert_close(engine.gradient(mask[0]), engine.gradient(mask[0].astype(float)), max(tolerance, 1e-7))


def asking_changes_nothing(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    """The same question has the same answer, whatever was asked in between and done with the answers: to the last bit, or for `evaluate`,
    which may go on from the run before, within rounding."""
    pairs = one_length(pairs)
    engine, mask = model.bind(pairs, "logit_diff"), random_masks(model, 1, seed=9)
    before = mask.copy()
    values, gradient, said = engine.evaluate(mask), engine.gradient(mask[0]), engine.activations(mask[0])
    kept = values.copy(), gradient.copy(), [np.array(said[i]) for i in range(len(said))]
    values[:], gradient[:] = 9.0, 9.0
    engine.evaluate(1 - mask, source=engine.reversed().activations())
    engine.gradient(mask[0], mix=0.5)
    again = engine.activations(mask[0])
    assert_close(engine.evaluate(mask), kept[0], tolerance)
    assert np.array_equal(engine.gradient(mask[0]), kept[1])
    assert all(np.array_equal(again[i], kept[2][i]) for i in range(len(again)))
    assert np.array_equal(mask, before)


def questions_without_an_answer_are_refused(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    full = ones(model)
    with pytest.raises(DegenerateError, match="kl has zero gradient at the clean run.*acdc or activation-patching"):
        model.bind(pairs, "kl").gradient(np.where(model.graph.visible, 1, 0.5))
    with pytest.raises(DegenerateError, match="accuracy has no gradient"):
        model.bind(pairs, "accuracy").gradient(0.5 * full)


def bad_masks_are_refused(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    engine, full = model.bind(pairs, "logit_diff"), ones(model)
    readers, writers = full.shape
    for mask in (full, full[None, 1:], full[None, :, 1:], full[None, None], 1.0, None, [], [full.tolist(), [[1.0]]], "all", {}):
        with pytest.raises(CircuitGraphError, match=r"mask.*expected (\[lanes, readers, writers\] with|an array of numbers)"):
            engine.evaluate(mask)  # type: ignore[arg-type]
    for ask in (engine.activations, engine.gradient):
        for mask in (full[None], full.T if readers != writers else full[1:], 1.0, "all"):
            with pytest.raises(
                CircuitGraphError, match=rf"mask.*expected (\[readers, writers\] with \({readers}, {writers}\)|an array of num)"
            ):
                ask(mask)  # type: ignore[arg-type]
        for spoilt in (np.nan, np.inf):
            with pytest.raises(CircuitGraphError, match="mask: it holds NaN or infinity"):
                ask(spoilt * full)
    with pytest.raises(CircuitGraphError, match="mask: it holds NaN or infinity"):
        engine.evaluate(np.stack([full, np.nan * full]))


def bad_questions_are_refused(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    zeros, vocabulary = 0 * ones(model)[None], model.architecture.vocabulary
    beyond = PromptPairs([[1, vocabulary]], [[2, 1]], [3], [4])
    no_such_token = f"token id {vocabulary} is not in the model's vocabulary of {vocabulary}"
    with pytest.raises(TaskError, match=no_such_token):
        model.bind(beyond, "nll")
    with pytest.raises(TaskError, match=no_such_token):
        model.bind(pairs, "nll", Source("mean", beyond))
    with pytest.raises(TaskError, match=no_such_token):
        model.logits(beyond)
    with pytest.raises(TaskError, match="needs a wrong answer"):
        model.bind(replace(pairs, wrong_answers=None), "logit_diff")
    with pytest.raises(UnknownNameError, match="unknown metric 'logit_dif'; did you mean 'logit_diff'"):
        model.bind(pairs, "logit_dif")
    with pytest.raises(UnknownNameError, match="unknown source 'corupted'; did you mean 'corrupted'"):
        model.bind(pairs, "nll", "corupted")  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"mean per position: no reference prompt has \d+ tokens; give data"):
        model.bind(pairs, "nll", Source("mean-per-position", PromptPairs([[1, 2]], [[2, 2]], [3]))).evaluate(zeros)
    with pytest.raises(CircuitGraphError, match=f"source values of 0 prompts for an engine with {len(pairs)}"):
        model.bind(pairs, "nll").evaluate(zeros, source=Values(()))


def prompts_beyond_the_learned_positions_are_refused(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    if model.architecture.positions is None:
        return
    long = PromptPairs([[1] * 70], [[2] * 70], [3])
    with pytest.raises(TaskError, match="does not take prompts of 70 tokens"):
        model.bind(long, "nll").evaluate(ones(model)[None])
    with pytest.raises(TaskError, match="does not take prompts of 70 tokens"):
        model.logits(long)


def a_model_says_what_it_is(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    engine = model.bind(pairs, "nll")
    assert engine.graph == model.graph
    assert (model.graph == model.architecture.graph()) == ("refined" not in model.provenance)
    assert engine.metric == METRICS["nll"]()
    assert engine.n_prompts == len(pairs)
    assert Architecture.from_json(model.architecture.to_json()) == model.architecture
    said = dict(model.provenance)
    json.dumps(said, allow_nan=False)
    assert {"id", "weights_sha256", "dtype", "device", "backend", "versions"} <= set(said)
    assert said["id"] == model.name
    assert len(said["weights_sha256"]) == 64
    assert said["versions"]


def a_trace_proves_itself(model: TracedModel, pairs: PromptPairs, tolerance: float) -> None:
    checks = list(model.checks(pairs.select([len(pairs) - 1])))
    assert [check.name for check in checks] == [
        "F(1) is the model",
        "F(0) is the source run",
        "readers are the sum of their writers",
        "padding changes nothing",
        "readers move the output",
    ]
    assert all(check.holds for check in checks), "\n".join(map(str, checks))


LAWS: tuple[Law, ...] = (
    full_mask_is_the_model,
    empty_mask_is_the_source_run,
    writers_say_what_they_hear,
    the_source_is_what_it_says_on_its_prompts,
    gradient_is_the_derivative,
    mixing_moves_the_input_along_its_edges,
    what_is_no_edge_counts_for_nothing,
    lanes_are_single_masks,
    each_prompt_has_its_own_number,
    reversing_exchanges_prompts_but_not_the_question,
    explicit_values_replace_the_source_of_every_query,
    answers_have_their_shapes,
    a_mask_may_be_of_any_numbers,
    asking_changes_nothing,
    questions_without_an_answer_are_refused,
    bad_masks_are_refused,
    bad_questions_are_refused,
    prompts_beyond_the_learned_positions_are_refused,
    a_model_says_what_it_is,
    a_trace_proves_itself,
)


# JAX compiles for each law: one family will do. `test_engine_laws_rules` asks the other, `test_jax_differential` all.
@pytest.mark.parametrize("row", [row for row in ROWS if str(row) != "jax-llama"], ids=str)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_every_law_holds_in_every_row(law: Law, row: Row) -> None:
    law(row.traced, PAIRS, row.tolerance)


LIGHT: tuple[Law, ...] = (
    what_is_no_edge_counts_for_nothing,
    explicit_values_replace_the_source_of_every_query,
    answers_have_their_shapes,
    a_mask_may_be_of_any_numbers,
    questions_without_an_answer_are_refused,
    bad_masks_are_refused,
    bad_questions_are_refused,
    a_model_says_what_it_is,
)
"""Those that ask nothing, or one metric of prompts of one length: what JAX compiles for one of them does for all."""


@pytest.mark.parametrize("row", JAX_IN_PARTS, ids=str)
@pytest.mark.parametrize("law", LIGHT, ids=lambda law: law.__name__)
def test_light_laws_hold_in_jax_with_parts(law: Law, row: Row) -> None:
    law(row.traced, PAIRS, row.tolerance)


@every_backend
def test_a_group_of_heads_is_equal_rows_of_its_heads(backend: str) -> None:
    """With grouped-query attention, the graph that splits groups asks nothing new of equal rows, and something new of others."""
    grouped, split = traced(backend, "llama"), traced(backend, "llama", per_head_kv=True)
    assert len(grouped.graph.readers) < len(split.graph.readers)
    assert split.graph == split.architecture.graph(per_head_kv=True)
    pairs = one_length(PAIRS)
    masks = random_masks(grouped, 1, seed=10)
    rows = [grouped.graph.reader_id(reader) for reader in split.graph.readers]
    engine = split.bind(pairs, "logit_diff")
    assert_close(engine.evaluate(masks[:, rows]), grouped.bind(pairs, "logit_diff").evaluate(masks), 2e-5)
    one, other, both = np.ones((3, *split.graph.shape))
    one[split.graph.reader_id("a1.h0<k>"), 0] = other[split.graph.reader_id("a1.h1<k>"), 0] = 0
    both[:] = one * other
    values = [engine.evaluate(mask[None])[0, 0] for mask in (one, other, both)]
    assert len(set(np.round(values, 4))) == 3


def with_little_memory(model: Any) -> Any:
    """The same model, with room for one prompt and one lane at a time, and for no kept run."""
    return replace(model, _parts=replace(model._parts, budget=MemoryBudget(total=1, host=1 << 30)))


@pytest.mark.parametrize("row", [row for row in ROWS if row.backend != "reference"], ids=str)
def test_batches_that_memory_cuts_change_nothing(row: Row) -> None:
    """An engine may run prompts in parts and forget what it ran; nobody notices."""
    pairs, mask = one_length(PAIRS), random_masks(row.traced, 1, seed=11)
    whole = row.traced.bind(pairs, "logit_diff")
    cut = with_little_memory(row.traced).bind(pairs, "logit_diff")
    assert [len(engine.batches) for engine in (whole, cut)] == [1, len(pairs)]  # type: ignore[attr-defined]
    assert_close(cut.evaluate(mask), whole.evaluate(mask), row.tolerance)
    assert_close(cut.evaluate(mask, source=whole.reversed().activations()), whole.evaluate(mask), row.tolerance)
    assert_close(cut.gradient(mask[0]), whole.gradient(mask[0]), row.tolerance)
    assert_same_values(cut.activations(mask[0]), whole.activations(mask[0]), row.tolerance)


@pytest.mark.parametrize("row", [row for row in ROWS if row.backend != "reference"], ids=str)
def test_what_runs_out_of_memory_is_asked_once_more_by_halves(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, mask = one_length(PAIRS), random_masks(row.traced, 1, seed=11)
    expected = row.traced.bind(pairs, "logit_diff").evaluate(mask)
    engine: Any = row.traced.bind(pairs, "logit_diff")
    batch = type(engine.batches[0])
    evaluate, sizes = batch.evaluate, list[int]()

    def cramped(self: Any, *asked: Any) -> Any:
        sizes.append(len(self))
        if len(self) > 1:
            raise MemoryError("no room for two")
        return evaluate(self, *asked)

    monkeypatch.setattr(batch, "evaluate", cramped)
    assert_close(engine.evaluate(mask), expected, row.tolerance)
    assert sizes == [2, 1, 1]
    assert_close(engine.evaluate(mask), expected, row.tolerance)
    assert sizes == [2, 1, 1, 1, 1]  # it has learned
    monkeypatch.setattr(batch, "evaluate", lambda *_: (_ for _ in ()).throw(MemoryError("no room at all")))
    with pytest.raises(CircuitGraphError, match=r"out of memory, with batches half as large too \(no room at all\); ask with fewer"):
        engine.evaluate(mask)


@pytest.mark.parametrize("row", [row for row in ROWS if row.backend != "reference"], ids=str)
def test_scores_that_would_not_fit_are_refused_before_anything_runs(row: Row) -> None:
    model = replace(row.traced, _parts=replace(row.traced._parts, budget=MemoryBudget(total=1000, host=1000)))  # type: ignore
    engine: Any = model.bind(PAIRS, "logit_diff")
    engine.batches = None
    with pytest.raises(CircuitGraphError, match=r"scores by prompt, reader and writer 3 x \d+ x \d+ take .* GB.*larger memory_budget"):
        engine.gradient(ones(row.traced))


# ------------------------------------------------------------------------------------------------- the laws are red where they should be


def _mean_of_the_clean_prompts(self: Any) -> Any:
    return source_values(self.model, self.graph, self.pairs if self.source.kind == "corrupted" else swapped(self.pairs), self.source)


def _filled(self: Any, mask: Any, **options: Any) -> Any:
    return ReferenceEngine.gradient(self, mask, **options) + 1e-3 * ~self.graph.visible


def _scribbled(self: Any, masks: Any, **options: Any) -> Any:
    values = ReferenceEngine.evaluate(self, masks, **options)
    np.asarray(masks)[...] = 1.0
    return values


def _as_its_batch(self: Any, masks: Any, **options: Any) -> Any:
    values = ReferenceEngine.evaluate(self, masks, **options)
    return values + 1e-6 * values.mean(axis=1, keepdims=True)


def _inverted(self: Any, masks: Any, **options: Any) -> Any:
    return ReferenceEngine.evaluate(self, ~masks if np.asarray(masks).dtype == bool else masks, **options)


def _unchecked(self: Any, masks: Any, **options: Any) -> Any:
    return ReferenceEngine.evaluate(self, np.nan_to_num(masks) if isinstance(masks, np.ndarray) else masks, **options)


MUTANTS: list[tuple[Law, str, Any]] = [
    (full_mask_is_the_model, "evaluate", lambda self, masks, **o: ReferenceEngine.evaluate(self, masks, **o) + 1e-6),
    (full_mask_is_the_model, "evaluate", lambda self, masks, **o: ReferenceEngine.evaluate(self, np.clip(masks, 0, 0.999), **o)),
    (empty_mask_is_the_source_run, "evaluate", lambda self, masks, **o: ReferenceEngine.evaluate(self, np.clip(masks, 1e-3, 1), **o)),
    (writers_say_what_they_hear, "activations", lambda self, mask=None, **o: ReferenceEngine.activations(self, None, **o)),
    (the_source_is_what_it_says_on_its_prompts, "_own_source", property(_mean_of_the_clean_prompts)),
    (gradient_is_the_derivative, "gradient", lambda self, mask, **o: 1.001 * ReferenceEngine.gradient(self, mask, **o)),
    (mixing_moves_the_input_along_its_edges, "gradient", lambda self, mask, mix=1.0, **o: ReferenceEngine.gradient(self, mask, **o)),
    (what_is_no_edge_counts_for_nothing, "gradient", _filled),
    (lanes_are_single_masks, "evaluate", lambda self, masks, **o: ReferenceEngine.evaluate(self, np.sort(masks, axis=0), **o)),
    (each_prompt_has_its_own_number, "evaluate", _as_its_batch),
    (reversing_exchanges_prompts_but_not_the_question, "reversed", lambda self: replace(ReferenceEngine.reversed(self), is_reversed=False)),
    (
        explicit_values_replace_the_source_of_every_query,
        "gradient",
        lambda self, mask, source=None, **o: ReferenceEngine.gradient(self, mask, **o),
    ),
    (answers_have_their_shapes, "evaluate", lambda self, masks, **o: ReferenceEngine.evaluate(self, masks, **o).astype(np.float32)),
    (a_mask_may_be_of_any_numbers, "evaluate", _inverted),
    (asking_changes_nothing, "evaluate", _scribbled),
    (questions_without_an_answer_are_refused, "gradient", lambda self, mask, **o: ReferenceEngine.gradient(self, 0.5 * mask, **o)),
    (bad_masks_are_refused, "evaluate", _unchecked),
    (prompts_beyond_the_learned_positions_are_refused, "logits", lambda self, pairs: np.zeros((len(pairs), 13))),
    (bad_questions_are_refused, "logits", lambda self, pairs: np.zeros((len(pairs), 13))),
    (a_model_says_what_it_is, "provenance", {"id": "reference-0"}),
    (a_trace_proves_itself, "checks", lambda self, pairs: iter(list(ReferenceTrace.checks(self, pairs))[:2])),
]


@pytest.mark.parametrize(("law", "name", "change"), MUTANTS, ids=[f"{law.__name__}-{i}" for i, (law, _, _) in enumerate(MUTANTS)])
def test_a_broken_engine_breaks_the_law(law: Law, name: str, change: Any) -> None:
    broken = type("Broken", (ReferenceEngine,), {name: change})

    class Trace(ReferenceTrace):
        def bind(self, *question: Any) -> Any:
            whole = super().bind(*question)
            return broken(**{field: getattr(whole, field) for field in ("model", "graph", "pairs", "metric", "source")})

    trace = type("Trace", (Trace,), {} if hasattr(ReferenceEngine, name) else {name: change})
    model = ReferenceModel.random(0, n_layers=1)
    law(ReferenceTrace(model), PAIRS, 1e-9)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        law(trace(model), PAIRS, 1e-9)


def test_every_law_can_be_broken() -> None:
    assert {law for law, _, _ in MUTANTS} == set(LAWS)
