"""The checks of `check_algorithm`, one function each: what holds of every algorithm, whatever it looks for.

A check raises `Failed` with what it saw, or `NotApplicable` with the reason why it has nothing to ask of this algorithm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from circuitgraph._discover import described, discover
from circuitgraph._engine import Algorithm, Engine, Outcome, Source, last_outcome, outcomes
from circuitgraph._errors import CircuitGraphError, DegenerateError
from circuitgraph._metrics import Metric, metric_named
from circuitgraph._pairs import PromptPairs
from circuitgraph.algorithms import ActivationPatching
from circuitgraph.evaluation._agreement import auroc
from circuitgraph.testing._planted import PlantedModel, planted_model
from circuitgraph.testing._planting import VOCABULARY
from circuitgraph.testing._random_pairs import random_pairs
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._traces import kept_trace
from circuitgraph.testing._transforms import padded, places_of, renamed, reordered, scaled, turned

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    Scores = Float[ndarray, "readers writers"]


class Failed(AssertionError):
    """A check does not hold; the message says what was seen."""


class NotApplicable(Exception):
    """A check has nothing to ask of this algorithm; the message says why."""


@dataclass(frozen=True, eq=False)
class Subject:
    """An algorithm under test. `backends`: the first of them answers; all must agree. `least_auroc`: of planted edges by |score|."""

    algorithm: Algorithm
    backends: tuple[str, ...]
    least_auroc: float = 0.95
    tolerance: ClassVar[float] = 1e-6  # of the largest score: float64, but for finite differences in the reference

    @property
    def metric(self) -> str:
        return getattr(self.algorithm, "default_metric", None) or "logit_diff"

    @cached_property
    def planted(self) -> PlantedModel:
        return planted_model(seed=9, n_layers=2, n_heads=2, prompts=3)

    @cached_property
    def engine(self) -> Engine:
        return self.bind(self.planted.model, self.planted.pairs)

    @cached_property
    def outcome(self) -> Outcome:
        return self.run(self.engine)

    def bind(
        self,
        model: ReferenceModel,
        pairs: PromptPairs,
        metric: Metric | str | None = None,
        *,
        backend: str = "",
        source: Any = "corrupted",
        **options: Any,
    ) -> Engine:
        return kept_trace(model, backend or self.backends[0], **options).bind(pairs, metric or self.metric, source)

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(outcomes(self.algorithm, engine))

    def scores(self, engine: Engine) -> Scores:
        """Raises `NotApplicable` for an algorithm that scores nothing."""
        scores = self.run(engine).scores
        if scores is None:
            raise NotApplicable("it gives no scores")
        return np.asarray(scores, dtype=float)

    def decides(self) -> bool:
        """Whether it chose its own edges."""
        return bool((self.outcome.mask != self.engine.graph.visible).any())


def expect(holds: Any, what: str) -> None:
    if not np.all(holds):
        raise Failed(what)


def _expect_same(subject: Subject, got: Outcome, wanted: Outcome, when: str, tolerance: float | None = None) -> None:
    expect(np.array_equal(got.mask, wanted.mask), f"{int((got.mask != wanted.mask).sum())} edges of the mask change {when}")
    if got.scores is not None and wanted.scores is not None:
        _expect_close(subject, np.asarray(got.scores), np.asarray(wanted.scores), f"scores change {when}", tolerance)


def _expect_close(subject: Subject, got: Scores, wanted: Scores, what: str, tolerance: float | None = None) -> None:
    got, wanted = np.nan_to_num(got), np.nan_to_num(wanted)
    allowed = (tolerance or subject.tolerance) * max(np.abs(wanted).max(initial=0.0), 1e-12)
    worst = float(np.abs(got - wanted).max(initial=0.0))
    expect(worst <= allowed, f"{what}: by {worst:.3g}, where {allowed:.3g} is rounding")


# ------------------------------------------------------------------------------------------------------------------------------ the checks


def outcome_is_well_formed(subject: Subject) -> None:
    """The mask keeps edges of the graph only; scores are numbers, 0 where there is no edge; the work is done."""
    outcome, graph = subject.outcome, subject.engine.graph if subject.outcome.graph is None else subject.outcome.graph
    expect(
        np.shape(outcome.mask) == graph.shape and np.asarray(outcome.mask).dtype == bool,
        f"the mask is no bool array of shape {graph.shape}",
    )
    expect(~np.asarray(outcome.mask) | graph.visible, "the mask keeps what is no edge of the graph")
    expect(outcome.done == 1, f"its last outcome has done = {outcome.done}; expected 1")
    if outcome.scores is not None:
        expect(np.shape(outcome.scores) == graph.shape, f"scores of shape {np.shape(outcome.scores)}; expected {graph.shape}")
        expect(np.isfinite(np.asarray(outcome.scores)[graph.visible]).any(), "no score is a finite number")
        expect(np.nan_to_num(np.asarray(outcome.scores)[~graph.visible]) == 0, "something that is no edge has a score")


def provenance_is_complete(subject: Subject) -> None:
    """A circuit says which algorithm found it, with every setting; what it puts on record is plain JSON."""
    circuit = discover(kept_trace(subject.planted.model, subject.backends[0]), subject.planted.pairs, subject.algorithm)
    expect(circuit.provenance["algorithm"] == described(subject.algorithm), "the circuit's provenance does not describe the algorithm")
    for key in ("model", "prompts_digest", "source", "versions", "seed"):
        expect(key in circuit.provenance, f"the circuit's provenance has no {key}")
    json.dumps(dict(circuit.record))


def full_and_empty_circuit_stay_what_they_are(subject: Subject) -> None:
    """After a run the full circuit still is the model and the empty one the source run: the engine was only asked."""
    masks = np.stack([np.ones(subject.engine.graph.shape), np.zeros(subject.engine.graph.shape)])
    fresh = subject.bind(subject.planted.model, subject.planted.pairs)
    wanted = fresh.evaluate(masks)
    subject.run(fresh)
    _expect_close(subject, fresh.evaluate(masks), wanted, "F(1) or F(0) change when the algorithm has run")


def same_seed_same_result(subject: Subject) -> None:
    """Two runs on new engines agree to the last bit of the mask, and of the scores within rounding."""
    again = subject.run(subject.bind(subject.planted.model, subject.planted.pairs))
    _expect_same(subject, again, subject.outcome, "from run to run", tolerance=1e-12)


def prompt_order_changes_nothing(subject: Subject) -> None:
    pairs = subject.planted.pairs
    got = subject.run(subject.bind(subject.planted.model, pairs.select(range(len(pairs) - 1, -1, -1))))
    _expect_same(subject, got, subject.outcome, "with the order of the prompts")


def batch_split_changes_nothing(subject: Subject) -> None:
    """With memory for one prompt at a time."""
    if subject.backends[0] == "reference":
        raise NotApplicable("the reference engine has no batches")
    got = subject.run(subject.bind(subject.planted.model, subject.planted.pairs, memory_budget=1 << 15))
    _expect_same(subject, got, subject.outcome, "with the size of batches")


def lengths_do_not_mix(subject: Subject) -> None:
    """Prompts of two lengths score what each length scores by itself, in the mean: nothing is padded into anything."""
    if subject.decides():
        raise NotApplicable("it decides for all prompts together")
    model = ReferenceModel.random(5, n_layers=1, norm=None, vocabulary=VOCABULARY, d_mlp=8, n_positions=8)
    pairs = random_pairs(5, lengths=(3, 5), vocabulary=VOCABULARY)
    both = subject.scores(subject.bind(model, pairs))
    each = [subject.scores(subject.bind(model, pairs.select([i]))) for i in range(2)]
    _expect_close(subject, both, (each[0] + each[1]) / 2, "the scores of prompts of two lengths are not the mean of theirs", 1e-5)


def padding_changes_nothing(subject: Subject) -> None:
    """With three masked tokens before every prompt."""
    if subject.backends[0] == "jax":
        raise NotApplicable("the JAX backend builds attention anew, from a description that has no padding")
    got = subject.run(subject.bind(*padded(subject.planted.model, subject.planted.pairs, 3)))
    _expect_same(subject, got, subject.outcome, "with padding before the prompts", 1e-5)


def names_of_tokens_do_not_matter(subject: Subject) -> None:
    name_of = np.random.default_rng(1).permutation(VOCABULARY)
    got = subject.run(subject.bind(*renamed(subject.planted.model, subject.planted.pairs, name_of)))
    _expect_same(subject, got, subject.outcome, "with the names of tokens")


def order_of_heads_does_not_matter(subject: Subject) -> None:
    """With the heads of each layer in another order, each has the same scores at its new place."""
    orders = [np.arange(2)[::-1]] * 2
    readers, writers = places_of(subject.planted.graph, orders)
    got = subject.run(subject.bind(reordered(subject.planted.model, orders), subject.planted.pairs))
    before = subject.outcome
    moved = replace(
        before,
        mask=before.mask[np.ix_(readers, writers)],
        scores=None if before.scores is None else np.asarray(before.scores)[np.ix_(readers, writers)],
    )
    _expect_same(subject, got, moved, "with the order of heads")


def axes_of_the_stream_do_not_matter(subject: Subject) -> None:
    """In a model without norms the residual stream has no axes of its own."""
    d_model = subject.planted.model.embedding.shape[1]
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(d_model, d_model)))
    got = subject.run(subject.bind(turned(subject.planted.model, turn), subject.planted.pairs))
    _expect_same(subject, got, subject.outcome, "when the residual stream is turned", 1e-5)


def clean_source_scores_nothing(subject: Subject) -> None:
    """Where the source says what the clean run says, no edge matters: every score is 0, or the question is refused."""
    pairs = subject.planted.pairs.select([0])
    engine = subject.bind(subject.planted.model, pairs, source=Source("mean-per-position", pairs))
    try:
        scores = subject.scores(engine)
    except DegenerateError:
        return
    size = max(np.abs(np.nan_to_num(subject.scores(subject.bind(subject.planted.model, pairs)))).max(), 1e-12)
    worst = float(np.abs(np.nan_to_num(scores)).max())
    expect(
        worst <= subject.tolerance * size, f"with the clean run as its source an edge scores {worst:.3g}; expected 0 or a DegenerateError"
    )


def metric_in_other_units_scales_the_scores(subject: Subject) -> None:
    """Three times the metric gives three times the scores, or the same scores."""
    if subject.decides():
        raise NotApplicable("what it decides may depend on the metric's units")
    metric = metric_named(subject.metric)
    before = subject.scores(subject.engine)
    after = subject.scores(subject.bind(subject.planted.model, subject.planted.pairs, scaled(metric, 3.0)))
    factor = 3.0 if np.abs(after).max() > 2 * np.abs(before).max() else 1.0
    _expect_close(subject, after, factor * before, "the scores do not follow the units of the metric", 1e-5)


def linear_models_are_scored_exactly(subject: Subject) -> None:
    """Where the metric is linear in every edge, its score is what patching it does, and has its sign."""
    if subject.decides():
        raise NotApplicable("it decides and estimates no effects")
    planted = planted_model(seed=1, n_layers=2, n_heads=2, mlp="linear", looks_up=False)
    engine = subject.bind(planted.model, planted.pairs, "logit_diff")
    exact = ActivationPatching().run(engine).scores
    assert exact is not None
    _expect_close(subject, subject.scores(engine), np.asarray(exact), "the scores are not the effects of the edges", 1e-5)


def silent_edges_score_nothing(subject: Subject) -> None:
    """An edge into a part that nothing on the way to the logits hears has no score."""
    if subject.outcome.scores is None:
        raise NotApplicable("it gives no scores")
    scores = np.abs(np.nan_to_num(np.asarray(subject.outcome.scores)))
    graph, truth = subject.engine.graph, subject.planted.circuit.mask
    is_heard = np.asarray(truth.any(axis=1))
    unheard = graph.visible & ~is_heard[:, None]
    worst = float(scores[unheard].max(initial=0.0))
    expect(worst <= subject.tolerance * max(scores.max(), 1e-12), f"an edge into a part that nothing hears scores {worst:.3g}; expected 0")


def backends_agree(subject: Subject) -> None:
    for backend in subject.backends[1:]:
        got = subject.run(subject.bind(subject.planted.model, subject.planted.pairs, backend=backend))
        _expect_same(subject, got, subject.outcome, f"from {subject.backends[0]} to {backend}", 1e-5)
    if len(subject.backends) == 1:
        raise NotApplicable("there is one backend")


PLANTED: tuple[Mapping[str, Any], ...] = (
    {},
    {"norm": "rms", "mlp": "gated", "n_kv_heads": 2},
    {"mlp": None},
    {"norm": "layer", "parallel": True},
)


def planted_circuits_are_found(subject: Subject) -> None:
    """Of planted circuits, without redundancy: one that decides keeps them and nothing else; one that scores ranks them first."""
    for seed, options in enumerate(PLANTED):
        _expect_found(subject, planted_model(seed, n_layers=2, **options))


def drawn_circuits_are_found(subject: Subject) -> None:
    """The same of models without norms that hypothesis draws, a tenth of its profile's examples; what fails shrinks to the smallest."""
    try:
        from hypothesis import HealthCheck, given, settings
    except ImportError:
        raise NotApplicable("hypothesis is not installed") from None
    from circuitgraph.testing.strategies import planted_models

    n = max(1, settings().max_examples // 10)

    @settings(max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck])
    @given(planted_models(max_layers=2, max_heads=2, norm=None, looks_up=True))
    def finds(planted: PlantedModel) -> None:
        _expect_found(subject, planted)

    finds()


def _expect_found(subject: Subject, planted: PlantedModel) -> None:
    outcome = subject.run(subject.bind(planted.model, planted.pairs))
    truth, visible = planted.circuit.mask, planted.graph.visible
    if subject.decides():
        wrong = [edge.name for edge in planted.graph.edges_of(outcome.mask != truth)]
        expect(not wrong, f"{len(wrong)} edges of {planted!r} are decided wrongly: {', '.join(wrong[:4])}")
    elif outcome.scores is None:
        raise NotApplicable("it neither decides nor scores")
    else:
        found = auroc(np.abs(np.nan_to_num(np.asarray(outcome.scores)))[visible], truth[visible])
        expect(found is None or found >= subject.least_auroc, f"AUROC {found:.3g} on {planted!r}; expected {subject.least_auroc} at least")


def order_of_decisions_is_on_record(subject: Subject) -> None:
    """One that takes edges away one after the other says in which order, and what each was worth."""
    decisions = subject.outcome.record.get("decisions")
    if decisions is None:
        if subject.decides() and "order" in subject.outcome.record:
            return
        raise NotApplicable("it takes no decision after another")
    names = {edge.name for edge in subject.engine.graph.edges} | {reader.name for reader in subject.engine.graph.readers}
    expect(len(decisions) > 0, "its record has no decisions")
    strange = [decision for decision in decisions if str(_name(decision)) not in names]
    expect(not strange, f"its record decides on {strange[:2]}, which the graph does not have")


def _name(decision: Any) -> Any:
    return decision["name"] if isinstance(decision, Mapping) else decision[0]


def what_has_no_answer_is_refused(subject: Subject) -> None:
    """With a metric that has no gradient, or none at the clean run, there are honest scores or a `DegenerateError`, never zeros or NaN."""
    for metric in ("accuracy", "kl"):
        try:
            outcome = subject.run(subject.bind(subject.planted.model, subject.planted.pairs, metric))
        except CircuitGraphError:
            continue
        if outcome.scores is not None:
            scores = np.asarray(outcome.scores)[subject.engine.graph.visible]
            expect(
                np.isfinite(scores).any() and np.nan_to_num(scores).any(),
                f"with {metric} every score is 0 or NaN; expected a DegenerateError",
            )


def bad_settings_are_refused(subject: Subject) -> None:
    """A number that makes no sense for a setting is refused when the algorithm is made, by a message of ours."""
    import dataclasses

    if not dataclasses.is_dataclass(subject.algorithm):
        raise NotApplicable("it is no dataclass")
    for field in dataclasses.fields(subject.algorithm):
        if isinstance(getattr(subject.algorithm, field.name), (int, float)) and not isinstance(
            getattr(subject.algorithm, field.name), bool
        ):
            try:
                replace(subject.algorithm, **{field.name: float("nan")})
            except CircuitGraphError:
                continue
            raise Failed(f"{field.name} = nan is accepted")


Check = Callable[[Subject], None]
CHECKS: Mapping[str, Check] = {
    check.__name__.replace("_", "-"): check
    for check in (
        outcome_is_well_formed,
        provenance_is_complete,
        full_and_empty_circuit_stay_what_they_are,
        same_seed_same_result,
        prompt_order_changes_nothing,
        batch_split_changes_nothing,
        lengths_do_not_mix,
        padding_changes_nothing,
        names_of_tokens_do_not_matter,
        order_of_heads_does_not_matter,
        axes_of_the_stream_do_not_matter,
        clean_source_scores_nothing,
        metric_in_other_units_scales_the_scores,
        linear_models_are_scored_exactly,
        silent_edges_score_nothing,
        backends_agree,
        planted_circuits_are_found,
        drawn_circuits_are_found,
        order_of_decisions_is_on_record,
        what_has_no_answer_is_refused,
        bad_settings_are_refused,
    )
}
"""By id, in the order in which they run."""
