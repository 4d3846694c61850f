"""`discover` and `evaluate` in every engine: the flow, what it records, what it refuses and what it warns of."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import engines
import numpy as np
import pytest
from engines import BACKENDS
from toy_tasks import Greedy

import circuitgraph as cg
from circuitgraph._engine import Engine, Outcome, TracedModel
from circuitgraph.evaluation import faithfulness
from circuitgraph.evaluation._bootstrap import mean_interval, ratio_interval
from circuitgraph.evaluation._question import pose
from circuitgraph.testing import ReferenceModel


@dataclass(frozen=True)
class Changed:
    """A traced model with something changed."""

    whole: TracedModel
    changes: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.changes[name] if name in self.changes else getattr(self.whole, name)

    def bind(self, *question: Any) -> Engine:
        return self.whole.bind(*question)

    def logits(self, pairs: cg.PromptPairs) -> Any:
        return self.__getattr__("logits")(pairs)

    def checks(self, pairs: cg.PromptPairs) -> Iterator[cg.Check]:
        for check in self.whole.checks(pairs):
            yield dataclasses.replace(check, error=1.0) if check.name == self.changes.get("broken") else check


@cache
def solved(traced: TracedModel, n: int = 8, *, seed: int = 0, right: bool = True) -> cg.PromptPairs:
    """Random prompts whose answers are what the model says (or, not `right`, what it says least)."""
    draw, vocabulary = np.random.default_rng(seed), traced.architecture.vocabulary
    clean = draw.integers(vocabulary, size=(n, 5))
    corrupted = np.where(np.arange(5) >= 3, (clean + 1 + draw.integers(vocabulary - 1, size=clean.shape)) % vocabulary, clean)
    order = np.argsort(traced.logits(cg.PromptPairs(clean, corrupted, clean[:, 0])), axis=1)
    best, worst = order[:, -1], order[:, 0]
    return cg.PromptPairs(clean, corrupted, best if right else worst, worst if right else best)


@pytest.fixture(params=BACKENDS)
def traced(request: pytest.FixtureRequest) -> TracedModel:
    return engines.traced(request.param, "llama")


# What no backend has a part in: JAX would compile for each of these questions.
without_jax = pytest.mark.parametrize("traced", ["reference", "torch"], indirect=True)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", cg.CircuitGraphWarning)
        yield


ALGORITHMS = [cg.EAP(), cg.ActivationPatching(), cg.ActivationPatching(level="node"), cg.ACDC(threshold=0.01)]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)
def test_circuit_carries_its_protocol(traced: TracedModel, algorithm: cg.Algorithm) -> None:
    circuit = cg.discover(traced, solved(traced), algorithm, metric="logit_diff", seed=3)
    found = circuit.provenance
    json.dumps(dict(found), allow_nan=False)
    assert found["model"]["name"] == traced.name
    assert found["model"]["weights_sha256"] == traced.provenance["weights_sha256"]
    assert found["architecture"] == json.loads(traced.architecture.to_json())
    assert found["task"]["name"] == "token ids"
    assert found["algorithm"] == {"class": type(algorithm).__name__, **dataclasses.asdict(algorithm)}  # type: ignore[call-overload]
    assert (found["prompts"], found["seed"], found["source"], found["metric"]) == (8, 3, "corrupted", "logit_diff")
    assert found["task_accuracy"] == 1.0
    assert found["edges_kept"] == circuit.n_edges
    assert {"metric_clean", "metric_corrupted", "metric_circuit", "faithfulness", "seconds", "date"} <= set(found)
    assert {"circuitgraph", "numpy"} <= set(found["versions"])


def test_same_seed_same_circuit(traced: TracedModel) -> None:
    one, two = (cg.discover(traced, solved(traced), cg.ACDC(threshold=0.01)) for _ in range(2))
    assert np.array_equal(one.mask, two.mask)


def test_other_edges_drop_what_was_measured(traced: TracedModel) -> None:
    circuit = cg.discover(traced, solved(traced), cg.EAP()).top(10)
    assert not {"metric_circuit", "faithfulness", "edges_kept"} & set(circuit.provenance)
    assert circuit.provenance["metric_clean"] is not None


def test_report_of_everything_and_of_nothing(traced: TracedModel) -> None:
    graph, pairs = traced.graph, solved(traced)
    everything = cg.evaluate(traced, pairs, cg.Circuit(graph, graph.visible))
    assert everything.faithfulness == pytest.approx(1.0)
    assert everything.complement == pytest.approx(0.0)
    assert everything.metric_circuit == pytest.approx(everything.metric_clean)
    nothing = cg.evaluate(traced, pairs, cg.Circuit(graph, np.zeros(graph.shape, dtype=bool)))
    assert nothing.faithfulness == pytest.approx(0.0)
    assert nothing.complement == pytest.approx(1.0)


def test_faithfulness_is_the_ratio_of_means(traced: TracedModel) -> None:
    pairs = solved(traced)
    circuit = cg.discover(traced, pairs, cg.EAP()).top(15)
    engine = traced.bind(pairs, "logit_diff")
    masks = np.stack([circuit.mask, np.ones(circuit.mask.shape), np.zeros(circuit.mask.shape)]).astype(np.float32)
    kept, clean, source = engine.evaluate(masks).mean(axis=1)
    report = cg.evaluate(traced, pairs, circuit)
    assert report.faithfulness == pytest.approx((kept - source) / (clean - source))
    low, high = report.faithfulness_interval or (np.nan, np.nan)
    assert low <= report.faithfulness <= high
    assert json.loads(report.to_json())["prompts"] == 8
    assert "faithfulness" in str(report)


@without_jax
def test_metric_is_the_algorithms_then_the_tasks(traced: TracedModel) -> None:
    @dataclass(frozen=True)
    class WantsNLL:
        default_metric: ClassVar[str] = "nll"

        def run(self, engine: Engine) -> Outcome:
            return Outcome(engine.graph.visible)

    assert cg.discover(traced, solved(traced), WantsNLL()).provenance["metric"] == "nll"
    assert cg.discover(traced, solved(traced), WantsNLL(), metric="prob_diff").provenance["metric"] == "prob_diff"
    assert cg.discover(traced, solved(traced), cg.EAP()).provenance["metric"] == "logit_diff"
    assert cg.discover(traced, solved(traced), cg.ACDC(threshold=0.01)).provenance["metric"] == "kl"


def test_kl_of_the_model_to_itself_is_zero(traced: TracedModel) -> None:
    found = cg.discover(traced, solved(traced), cg.ACDC(threshold=0.01), metric="kl").provenance
    assert found["metric_clean"] == pytest.approx(0.0, abs=1e-9)
    assert found["faithfulness"] == pytest.approx(1 - found["metric_circuit"] / found["metric_corrupted"])


def test_progress_is_told(traced: TracedModel) -> None:
    told: list[tuple[float, str]] = []
    cg.discover(traced, solved(traced), cg.ACDC(threshold=0.01), progress=lambda fraction, text: told.append((fraction, text)))
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert {"tracing the model", "checking the trace", "ACDC"} <= {text for _, text in told}


def test_model_that_fails_the_task_is_reported(traced: TracedModel) -> None:
    with pytest.warns(cg.CircuitGraphWarning, match="fails the task token ids: accuracy 0%"):
        circuit = cg.discover(traced, solved(traced, right=False), cg.EAP())
    with pytest.warns(cg.CircuitGraphWarning, match="fails the task token ids: accuracy 0%"):
        cg.evaluate(traced, solved(traced, right=False), circuit)


@without_jax
def test_one_prompt_has_no_interval(traced: TracedModel) -> None:
    with pytest.warns(cg.CircuitGraphWarning, match="one prompt only"):
        circuit = cg.discover(traced, solved(traced), cg.EAP(), prompts=1)
    with pytest.warns(cg.CircuitGraphWarning, match="one prompt only"):
        assert cg.evaluate(traced, solved(traced), circuit, prompts=1).faithfulness_interval is None


def test_question_without_an_answer_is_refused(traced: TracedModel) -> None:
    pairs = solved(traced, 12)
    swapped = np.arange(12) < 6  # half of the pairs the other way round: the mean difference vanishes
    clean = [b if s else a for a, b, s in zip(pairs.clean, pairs.corrupted, swapped, strict=True)]
    corrupted = [a if s else b for a, b, s in zip(pairs.clean, pairs.corrupted, swapped, strict=True)]
    undecided = cg.PromptPairs([*clean, *corrupted], [*corrupted, *clean], pairs.answers * 2, pairs.wrong_answers * 2)
    with pytest.raises(cg.DegenerateError, match="every circuit would look perfect"):
        cg.discover(traced, undecided, cg.EAP())
    with pytest.raises(cg.DegenerateError, match="every circuit would look perfect"):
        cg.evaluate(traced, undecided, cg.Circuit(traced.graph, traced.graph.visible))


@pytest.mark.parametrize("check", ["F(1) is the model", "F(0) is the source run"])
def test_trace_that_is_not_the_model_is_refused(traced: TracedModel, check: str) -> None:
    broken = Changed(traced, {"broken": check})
    with pytest.raises(cg.TraceError, match=f"differs from the model: FAIL {re.escape(check)}"):
        cg.discover(broken, solved(traced), cg.EAP())
    with pytest.raises(cg.TraceError, match=f"differs from the model: FAIL {re.escape(check)}"):
        cg.evaluate(broken, solved(traced), cg.Circuit(traced.graph, traced.graph.visible))


def test_nan_in_the_model_is_refused(traced: TracedModel) -> None:
    broken = Changed(traced, {"logits": lambda pairs: np.full((len(pairs), traced.architecture.vocabulary), np.nan)})
    with pytest.raises(cg.TraceError, match="logits for prompt 0 are NaN"):
        cg.discover(broken, solved(traced), cg.EAP())


@dataclass(frozen=True)
class Says:
    """An algorithm with a fixed answer."""

    outcome: Any

    def run(self, engine: Engine) -> Outcome:
        return self.outcome(engine.graph)  # type: ignore[no-any-return]


REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("class, not instance", cg.ACDC, {}, "expected an instance"),
    ("no algorithm", "eap", {}, "expected an instance"),
    ("metric", cg.EAP(), {"metric": "logit_dif"}, "did you mean 'logit_diff'"),
    ("source", cg.EAP(), {"source": "corupted"}, "did you mean 'corrupted'"),
    ("metric class", cg.EAP(), {"metric": cg.LogitDiff}, r"an instance such as LogitDiff\(\)"),
    ("source of another type", cg.EAP(), {"source": 3}, "unknown source 3; known: corrupted"),
    ("prompts", cg.EAP(), {"prompts": 0}, "prompts: 0; expected a whole number of at least 1"),
    ("prompts, bool", cg.EAP(), {"prompts": True}, "prompts: True; expected a whole number"),
    ("prompts, float", cg.EAP(), {"prompts": 2.0}, "prompts: 2.0; expected a whole number"),
    ("seed", cg.EAP(), {"seed": -1}, "seed: -1; expected a whole number of at least 0"),
    ("seed, None", cg.EAP(), {"seed": None}, "seed: None; expected a whole number"),
    ("tokens of the mean", cg.EAP(), {"source": cg.Source("mean", cg.PromptPairs([[99]], [[1]], [2]))}, "token id 99 is not in"),
    ("too many prompts", cg.EAP(), {"prompts": 99}, "there are 8 pairs"),
    ("flat gradient", cg.EAP(), {"metric": "kl"}, "zero gradient at the clean run"),
    ("mask of another shape", Says(lambda graph: Outcome(np.ones((2, 2), dtype=bool))), {}, "expected \\[readers, writers\\]"),
    ("NaN scores", Says(lambda graph: Outcome(graph.visible, np.full(graph.shape, np.nan))), {}, "every score is NaN"),
]


@pytest.mark.parametrize(("algorithm", "options", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused_with_a_reason(traced: TracedModel, algorithm: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(cg.CircuitGraphError, match=message):
        cg.discover(traced, solved(traced), algorithm, **options)


@pytest.mark.parametrize("task", [None, 3, {}, ["ioi"]])
def test_what_is_no_task_is_refused(traced: TracedModel, task: Any) -> None:
    with pytest.raises(cg.TaskError, match="expected a name, a file, a Task or PromptPairs"):
        cg.discover(traced, task, cg.EAP())


def test_what_is_no_circuit_is_refused(traced: TracedModel) -> None:
    with pytest.raises(cg.CircuitGraphError, match=r"circuit: 'file.json'; expected a Circuit, such as Circuit.load"):
        cg.evaluate(traced, solved(traced), "file.json")  # type: ignore[arg-type]


def test_evaluate_warns_of_other_weights(traced: TracedModel) -> None:
    circuit = cg.discover(traced, solved(traced), cg.EAP())
    found = {**circuit.provenance, "model": {**circuit.provenance["model"], "weights_sha256": "others"}}
    with pytest.warns(cg.CircuitGraphWarning, match="the weights of .* are others"):
        cg.evaluate(traced, solved(traced), dataclasses.replace(circuit, provenance=found))
    odd = {**circuit.provenance, "model": None, "task": 3}
    assert cg.evaluate(traced, solved(traced), dataclasses.replace(circuit, provenance=odd)).prompts == 8


def test_nothing_kept_is_warned_of(traced: TracedModel) -> None:
    with pytest.warns(cg.CircuitGraphWarning, match="no edge was kept"):
        circuit = cg.discover(traced, solved(traced), cg.ACDC(threshold=1e9))
    report = cg.evaluate(traced, solved(traced), circuit)
    assert "-0.000" not in str(dataclasses.replace(report, faithfulness=-1e-9, faithfulness_interval=(-1e-9, -0.0)))


@without_jax
def test_kl_of_answers_that_do_not_change_is_warned_of(traced: TracedModel) -> None:
    """KL divergence is never negative, so its own interval would let every question through."""
    pairs = solved(traced)
    swapped = cg.PromptPairs([*pairs.clean, *pairs.corrupted], [*pairs.corrupted, *pairs.clean], pairs.answers * 2, pairs.wrong_answers * 2)
    with pytest.warns(cg.CircuitGraphWarning, match="logit_diff cannot tell the model .* so what kl measures is not the answers"):
        cg.discover(traced, swapped, cg.ACDC(threshold=0.01))


def test_provenance_names_the_prompts(traced: TracedModel) -> None:
    one, same, other = (cg.discover(traced, solved(traced, seed=s), cg.EAP()).provenance["prompts_digest"] for s in (0, 0, 1))
    assert one == same != other


def test_text_task_needs_a_tokenizer(traced: TracedModel) -> None:
    with pytest.raises(cg.TaskError, match="tokenizer"):
        cg.discover(traced, "ioi", cg.EAP())


def test_token_outside_the_vocabulary_is_refused(traced: TracedModel) -> None:
    vocabulary = traced.architecture.vocabulary
    pairs = cg.PromptPairs([[0, 1]], [[0, 2]], [vocabulary], [1])
    with pytest.raises(cg.TaskError, match=f"token id {vocabulary}"):
        cg.discover(traced, pairs, cg.EAP())


def test_tokens_are_drawn_from_the_vocabulary_even_if_the_tokenizer_is_larger(traced: TracedModel) -> None:
    model = Changed(traced, {"tokenizer": Greedy()})
    question = pose(model, "induction", prompts=20)
    assert len(model.tokenizer) > traced.architecture.vocabulary > question.pairs.largest_token


def test_circuit_of_another_graph_is_refused(traced: TracedModel) -> None:
    other = ReferenceModel.random(seed=0, n_layers=1).graph()
    with pytest.raises(cg.CircuitGraphError, match="the circuit is of Graph"):
        cg.evaluate(traced, solved(traced), cg.Circuit(other, other.visible))


def test_traced_model_takes_no_options(traced: TracedModel) -> None:
    assert cg.trace(traced) is traced
    with pytest.raises(cg.CircuitGraphError, match="dtype cannot change"):
        cg.trace(traced, dtype="float64")


def test_check_trace_needs_no_pairs(traced: TracedModel) -> None:
    checks = cg.check_trace(traced)
    assert [check.name for check in checks[:2]] == ["F(1) is the model", "F(0) is the source run"]
    assert all(check.holds for check in checks)


def test_a_circuit_is_of_no_backend(traced: TracedModel) -> None:
    """Found in one engine, it is the same circuit in the others, and nobody is warned of other weights."""
    pairs = solved(engines.traced("reference", "llama"))
    circuit = cg.discover(traced, pairs, cg.ACDC(threshold=0.01))
    assert circuit.n_edges > 0
    for backend in BACKENDS:
        report = cg.evaluate(engines.traced(backend, "llama"), pairs, circuit)
        for name, value in report.to_dict().items():
            if isinstance(value, float):
                assert value == pytest.approx(circuit.provenance.get(name, value), abs=1e-4), name


def test_intervals() -> None:
    values = np.random.default_rng(0).normal(1.0, 1.0, size=400)
    low, high = mean_interval(values) or (np.nan, np.nan)
    standard_error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.2 * standard_error)
    assert high == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.2 * standard_error)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert ratio_interval(2 * values, values) == pytest.approx((2.0, 2.0))
    assert mean_interval(values[:1]) is None


def test_one_bad_prompt_does_not_drown_the_ratio() -> None:
    clean, source = np.array([1.0, 1e-9, 1.0]), np.zeros(3)
    assert faithfulness(np.array([0.5, 0.1, 0.5]), clean, source).value == pytest.approx(0.55, abs=1e-6)
