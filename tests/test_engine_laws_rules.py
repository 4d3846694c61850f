"""What any engine obeys when it is asked by spans, with a backward rule, over several mixes, or for the gradient of its source.

Laws of the kind of `test_engine_laws.py`, through the protocol only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from engines import ROWS, SHORT, Row, traced
from test_engine_laws import Values, assert_close, assert_same_values, ones, random_masks

from circuitgraph._engine import EXACT, QK_FIX, RELP, Engine, Rule, Source, TracedModel
from circuitgraph._errors import CircuitGraphError, DegenerateError
from circuitgraph.testing import ReferenceModel, random_pairs

Law = Callable[[TracedModel, float], None]

FAMILIES = ("gpt2", "llama", "gemma", "neox")
ROWS_HERE = tuple(row for row in ROWS if row.family in FAMILIES)

SPANS = ("S1", "S2", "END")
SPANNED = replace(SHORT, spans=[[0, 0, 1, 1, 2], [1, 0, 0, 0, 2]], span_names=SPANS)
# Each with the families that it is asked of: every combination is compiled for.
RULES = {
    "relp": (RELP, ("gpt2", "llama")),
    "qk fix": (QK_FIX, ("gpt2", "llama")),
    "frozen norms": (Rule(norms="frozen"), ("gpt2",)),
    "frozen patterns": (Rule(patterns="frozen"), ("llama",)),
    "ratio": (Rule(activations="ratio"), ("gpt2",)),
    "half": (Rule(gates="half"), ("llama",)),
    "dropped layer": (Rule(dropped_layer=0), ("gpt2",)),
    "fixed and dropped": (Rule(patterns="recomputed", dropped_layer=1), ("llama",)),
}
ASKED = [
    pytest.param(rule, row, id=f"{name}-{row}")
    for name, (rule, families) in RULES.items()
    for row in ROWS_HERE
    if row.family in families and row.backend != "reference"
]


def by_span(model: TracedModel, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(*model.graph.shape, len(SPANS)))


def some_edges(model: TracedModel, n: int, kinds: str = "qkvmlogits") -> list[tuple[int, int]]:
    """A few edges into readers of these kinds, always the same."""
    edges = [(int(r), int(w)) for r, w in np.argwhere(model.graph.visible) if model.graph.readers[r].kind[0] in kinds]
    return [edges[i] for i in np.random.default_rng(0).permutation(len(edges))[:n]]


def arrays(engine: Engine, mask: np.ndarray | None = None) -> list[np.ndarray]:
    values = engine.activations(mask)
    return [np.array(values[i], dtype=float) for i in range(len(values))]


# ------------------------------------------------------------------------------------------------------------------------------- the laws


def equal_in_all_spans_is_the_plain_mask(model: TracedModel, tolerance: float) -> None:
    engine, plain = model.bind(SPANNED, "logit_diff"), model.bind(SHORT, "logit_diff")
    assert (engine.spans, plain.spans, engine.reversed().spans) == (SPANS, (), SPANS)
    mask = random_masks(model, 1, seed=20)[0]
    spread = np.repeat(mask[..., None], len(SPANS), axis=-1)
    for same in (mask, spread):
        assert_close(engine.evaluate(same[None]), plain.evaluate(mask[None]), tolerance)
        assert_same_values(engine.activations(same), plain.activations(mask), tolerance)
        assert_close(engine.source_gradient(same), plain.source_gradient(mask), max(tolerance, 1e-7))
    gradient = engine.gradient(spread)
    assert gradient.shape == (len(SHORT), *model.graph.shape, len(SPANS))
    assert gradient.dtype == np.float64
    assert_close(gradient.sum(-1), plain.gradient(mask), max(tolerance, 1e-7))
    assert_close(engine.gradient(mask), plain.gradient(mask), max(tolerance, 1e-7))
    lanes = np.stack([by_span(model, seed) for seed in (1, 2, 3)])
    assert_close(engine.evaluate(lanes), np.concatenate([engine.evaluate(lane[None]) for lane in lanes]), tolerance)


def a_span_is_its_positions(model: TracedModel, tolerance: float) -> None:
    """To patch an edge in one span is to patch it everywhere with what the writer says anyway outside of the span."""
    engine, moved = model.bind(SPANNED, "logit_diff"), []
    for number, (r, w) in enumerate(some_edges(model, 5)):
        mask = random_masks(model, 1, seed=number)[0]
        mask[:, w] = 1
        in_span = np.repeat(mask[..., None], len(SPANS), axis=-1)
        in_span[r, w, number % len(SPANS)], everywhere = 0, mask.copy()
        everywhere[r, w] = 0
        source, said = arrays(engine.reversed()), arrays(engine, mask)
        for i, inside in enumerate(SPANNED.spans):
            source[i][w] = np.where((inside == number % len(SPANS))[:, None], source[i][w], said[i][w])
        patched = engine.evaluate(in_span[None])
        assert_close(patched, engine.evaluate(everywhere[None], source=Values(tuple(source))), tolerance)
        assert_same_values(engine.activations(in_span), engine.activations(everywhere, source=Values(tuple(source))), tolerance)
        moved.append(np.abs(patched - engine.evaluate(mask[None])).max())
    assert max(moved) > 1e-3


def the_gradient_of_a_span_is_the_derivative(model: TracedModel, tolerance: float) -> None:
    engine, mask = model.bind(SPANNED, "kl"), by_span(model, 22)
    step = tolerance ** (1 / 3) / 2
    edges = [(r, w, number % len(SPANS)) for number, (r, w) in enumerate(some_edges(model, 6))]
    masks = np.repeat(mask[None], 2 * len(edges), axis=0)
    for i, edge in enumerate(edges):
        masks[(2 * i, *edge)] += step
        masks[(2 * i + 1, *edge)] -= step
    values, gradient = engine.evaluate(masks), engine.gradient(mask)
    slopes = (values[0::2] - values[1::2]) / (2 * step)
    found = np.stack([gradient[(slice(None), *edge)] for edge in edges])
    np.testing.assert_allclose(found, slopes, rtol=0, atol=20 * tolerance ** (2 / 3) * np.abs(gradient).max())


def several_mixes_are_their_mean(model: TracedModel, tolerance: float) -> None:
    engine, full = model.bind(SPANNED, "logit_diff"), ones(model)
    mixes = (0.2, 0.5, 1.0)
    for mask, rule in ((full, RELP), (by_span(model, 23), EXACT)):
        alone = np.mean([engine.gradient(mask, mix=mix, rule=rule) for mix in mixes], axis=0)
        assert_close(engine.gradient(mask, mix=mixes, rule=rule), alone, max(tolerance, 1e-7))
    assert_close(engine.gradient(full, mix=[0.5]), engine.gradient(full, mix=0.5), max(tolerance, 1e-7))
    assert np.isfinite(model.bind(SHORT, "kl").gradient(full, mix=mixes)).all()  # only mix = 1 alone is flat


def no_rule_is_the_gradient(model: TracedModel, tolerance: float) -> None:
    engine, mask = model.bind(SHORT, "logit_diff"), random_masks(model, 1, seed=24)[0]
    assert_close(engine.gradient(mask, rule=Rule()), engine.gradient(mask), 1e-12)


def frozen_patterns_leave_queries_and_keys_out(model: TracedModel, tolerance: float) -> None:
    engine, mask = model.bind(SHORT, "logit_diff"), random_masks(model, 1, seed=25)[0]
    looks = np.array([reader.kind in ("q", "k") for reader in model.graph.readers])
    frozen, exact = engine.gradient(mask, rule=Rule(patterns="frozen")), engine.gradient(mask)
    assert not frozen[:, looks].any()
    after_attention = [r for r, reader in enumerate(model.graph.readers) if reader.layer in (-1, len(model.architecture.blocks) - 1)]
    others = [r for r in after_attention if not looks[r]]  # nothing looks at what comes of them
    assert_close(frozen[:, others], exact[:, others], max(tolerance, 1e-7))


def nothing_goes_back_through_a_dropped_layer(model: TracedModel, tolerance: float) -> None:
    engine, mask = model.bind(SPANNED, "logit_diff"), by_span(model, 26)
    layers = np.array([reader.layer for reader in model.graph.readers])
    exact = engine.gradient(mask)
    first, last = (engine.gradient(mask, rule=Rule(dropped_layer=layer)) for layer in (0, int(layers.max())))
    assert not first[:, layers == 0].any()
    assert_close(first[:, layers != 0], exact[:, layers != 0], max(tolerance, 1e-7))  # they are after it
    assert not last[:, layers == layers.max()].any()
    assert_close(last[:, -1], exact[:, -1], max(tolerance, 1e-7))
    for r, reader in enumerate(model.graph.readers):  # what is left goes straight to the logits
        if reader.kind == "mlp" and reader.layer == 0 and layers.max() == 1:
            assert not np.allclose(last[:, r], exact[:, r], rtol=1e-3, atol=0)


def the_qk_fix_is_what_attention_says_when_patched(model: TracedModel, tolerance: float) -> None:
    """To first order after that: the edges from the changed heads, with the change for a source."""
    graph, full = model.graph, np.repeat(ones(model)[..., None], len(SPANS), axis=-1)
    if any(block.attention and block.attention.post_norm for block in model.architecture.blocks):
        return  # there a head's change moves the scale of all
    engine = model.bind(SPANNED, "logit_diff")
    fixed, exact = engine.gradient(full, rule=QK_FIX), engine.gradient(full)
    others = [r for r, reader in enumerate(graph.readers) if reader.kind not in ("q", "k")]
    assert_close(fixed[:, others], exact[:, others], max(tolerance, 1e-7))
    for number, (r, w) in enumerate(some_edges(model, 4, "qk")):
        patched, span = full.copy(), number % len(SPANS)
        patched[r, w, span] = 0
        before, after = arrays(engine), arrays(engine, patched)
        source, heads = [values.copy() for values in before], np.flatnonzero(graph.feeds[r])
        for i in range(len(SHORT)):
            source[i][heads] = 2 * before[i][heads] - after[i][heads]  # so that live - source is the change
        change = engine.gradient(ones(model), source=Values(tuple(source)))[:, :, heads].sum((1, 2))
        assert_close(fixed[:, r, w, span], -change, max(tolerance, 1e-7))


def the_qk_fix_patches_all_spans_at_once_without_a_span_axis(model: TracedModel, tolerance: float) -> None:
    everywhere = replace(SHORT, spans=[[0] * 5] * 2, span_names=["ALL"])
    spanned, plain = (model.bind(pairs, "logit_diff") for pairs in (everywhere, SPANNED))
    one_span = spanned.gradient(ones(model)[..., None], rule=QK_FIX)[..., 0]
    assert_close(plain.gradient(ones(model), rule=QK_FIX), one_span, max(tolerance, 1e-7))


def the_gradient_of_a_source_is_the_derivative(model: TracedModel, tolerance: float) -> None:
    engine, graph = model.bind(SPANNED, "logit_diff"), model.graph
    rng, step = np.random.default_rng(27), tolerance ** (1 / 3) / 2
    for mask in (random_masks(model, 1, seed=27)[0], by_span(model, 27)):
        gradient = engine.source_gradient(mask)
        assert (gradient.shape, gradient.dtype) == ((len(SHORT), len(graph.writers), model.architecture.d_model), np.float64)
        for w in rng.choice(len(graph.writers), 3, replace=False):
            by = rng.normal(size=model.architecture.d_model)
            values = []
            for sign in (1, -1):
                source = arrays(engine.reversed())
                for said in source:
                    said[w] += sign * step * by
                values.append(engine.evaluate(mask[None], source=Values(tuple(source)))[0])
            slope = (values[0] - values[1]) / (2 * step)
            np.testing.assert_allclose(gradient[:, w] @ by, slope, rtol=0, atol=20 * tolerance ** (2 / 3) * max(1, np.abs(slope).max()))
    assert_close(engine.source_gradient(ones(model)), np.zeros(gradient.shape), max(tolerance, 1e-7))


def an_optimal_source_says_its_constants(model: TracedModel, tolerance: float) -> None:
    width = (len(model.graph.writers), model.architecture.d_model)
    constants = np.random.default_rng(28).normal(size=width)
    mask = random_masks(model, 1, seed=28)
    by_hand = Values(tuple(np.repeat(constants[:, None], len(ids), axis=1) for ids in SHORT.clean))
    engine, other = model.bind(SHORT, "logit_diff", Source("optimal", constants=constants)), model.bind(SHORT, "logit_diff")
    assert_close(engine.evaluate(mask), other.evaluate(mask, source=by_hand), tolerance)
    assert_close(engine.gradient(mask[0]), other.gradient(mask[0], source=by_hand), max(tolerance, 1e-7))
    with pytest.raises(CircuitGraphError, match=r"source 'optimal' without constants: fit them first .*optimal_source"):
        model.bind(SHORT, "logit_diff", "optimal")
    with pytest.raises(CircuitGraphError, match=r"source 'optimal': constants of shape \(2, 3\); this model has"):
        model.bind(SHORT, "logit_diff", Source("optimal", constants=np.zeros((2, 3))))
    with pytest.raises(DegenerateError, match="denoising restores clean values, and source 'optimal' has none"):
        engine.reversed()


def what_cannot_be_asked_is_refused(model: TracedModel, tolerance: float) -> None:
    engine, plain, full = model.bind(SPANNED, "logit_diff"), model.bind(SHORT, "logit_diff"), ones(model)
    for ask in (engine.activations, engine.gradient, engine.source_gradient, lambda mask: engine.evaluate(mask[None])):
        with pytest.raises(CircuitGraphError, match=r"mask of shape .*the prompts have 3 spans \(S1, S2, END\)"):
            ask(np.ones((*full.shape, 2)))
    for ask in (plain.activations, plain.gradient, plain.source_gradient, lambda mask: plain.evaluate(mask[None])):
        with pytest.raises(CircuitGraphError, match="mask of shape .*a last axis of spans needs prompts with spans"):
            ask(np.ones((*full.shape, 3)))
    with pytest.raises(CircuitGraphError, match="recomputed attention patterns is that of the model itself; expected a mask of ones"):
        plain.gradient(0.5 * full, rule=QK_FIX)
    n_layers = len(model.architecture.blocks)
    for layer in (n_layers, -1):
        with pytest.raises(CircuitGraphError, match=f"gradient without layer {layer}: the model has {n_layers} layers"):
            plain.gradient(full, rule=Rule(dropped_layer=layer))
    for mix in ((), float("nan"), [0.5, float("inf")]):
        with pytest.raises(CircuitGraphError, match="mix: .*expected a number between 0"):
            plain.gradient(full, mix=mix)
    with pytest.raises(DegenerateError, match="kl has zero gradient at the clean run"):
        model.bind(SHORT, "kl").gradient(full, mix=[1.0, 1.0])
    with pytest.raises(DegenerateError, match="accuracy has no gradient"):
        model.bind(SHORT, "accuracy").source_gradient(0.5 * full)


LAWS: tuple[Law, ...] = (
    equal_in_all_spans_is_the_plain_mask,
    a_span_is_its_positions,
    the_gradient_of_a_span_is_the_derivative,
    several_mixes_are_their_mean,
    no_rule_is_the_gradient,
    frozen_patterns_leave_queries_and_keys_out,
    nothing_goes_back_through_a_dropped_layer,
    the_qk_fix_is_what_attention_says_when_patched,
    the_qk_fix_patches_all_spans_at_once_without_a_span_axis,
    the_gradient_of_a_source_is_the_derivative,
    an_optimal_source_says_its_constants,
    what_cannot_be_asked_is_refused,
)


@pytest.mark.parametrize("row", [row for row in ROWS_HERE if str(row) != "jax-gpt2"], ids=str)  # JAX compiles for each: one family will do
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_every_law_holds_in_every_row(law: Law, row: Row) -> None:
    law(row.traced, row.tolerance)


@pytest.mark.parametrize("row", [row for row in ROWS if row.family in ("llama", "granite")], ids=str)
def test_relp_gives_the_whole_metric_out_to_the_input(row: Row) -> None:
    """Without biases every frozen or halved part is homogeneous, so the input's edges add up to F (as relevance does in RelP's paper)."""
    engine = row.traced.bind(SHORT, "logit_diff", "zero")
    whole = engine.evaluate(ones(row.traced)[None])[0]
    assert_close(engine.gradient(ones(row.traced), rule=RELP)[:, :, 0].sum(-1), whole, max(row.tolerance, 1e-7))
    assert not np.allclose(engine.gradient(ones(row.traced))[:, :, 0].sum(-1), whole, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("rule", "row"), ASKED)
def test_every_rule_is_the_references(rule: Rule, row: Row) -> None:
    """Central differences of a surrogate forward, against whatever a backend does, on the same weights."""
    oracle, engine = (model.bind(SPANNED, "logit_diff") for model in (traced("reference", row.family), row.traced))
    full = np.repeat(ones(row.traced)[..., None], len(SPANS), axis=-1)
    for mix in (1.0, 0.4)[: 2 if rule in (RELP, QK_FIX) else 1]:
        assert_close(engine.gradient(full, rule=rule, mix=mix), oracle.gradient(full, rule=rule, mix=mix), max(10 * row.tolerance, 1e-7))
    if rule == RELP:
        mask = by_span(row.traced, 30)
        assert_close(engine.gradient(mask, rule=rule), oracle.gradient(mask, rule=rule), max(10 * row.tolerance, 1e-7))


def test_a_linear_model_has_nothing_for_a_rule_to_change() -> None:
    engine = ReferenceModel.random(8, n_heads=0, norm=None, act="identity", n_layers=3).bind(random_pairs(8), "logit_diff")
    mask = np.random.default_rng(31).uniform(size=engine.graph.shape)
    assert_close(engine.gradient(mask, rule=RELP), engine.gradient(mask), 1e-8)


def test_the_qk_fix_is_exact_where_everything_after_attention_is_linear() -> None:
    engine = ReferenceModel.random(9, n_layers=1, d_mlp=0, norm=None).bind(random_pairs(9), "logit_diff")
    edges = [(r, 0) for r, reader in enumerate(engine.graph.readers) if reader.kind in ("q", "k")]
    masks = np.ones((1 + len(edges), *engine.graph.shape))
    for mask, edge in zip(masks[1:], edges, strict=True):
        mask[edge] = 0
    values = engine.evaluate(masks)
    fixed, exact = (engine.gradient(masks[0], rule=rule) for rule in (QK_FIX, EXACT))
    for drop, edge in zip(values[0] - values[1:], edges, strict=True):
        assert_close(fixed[(slice(None), *edge)], drop, 1e-8)
        assert not np.allclose(exact[(slice(None), *edge)], drop, rtol=1e-2)
