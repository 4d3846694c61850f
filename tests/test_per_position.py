"""`PerPosition`: any algorithm by span, and what becomes of the circuits that it finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import ROWS, Row
from test_engine_laws_rules import SPANNED, SPANS

from circuitgraph import Circuit, discover, evaluate
from circuitgraph._engine import Algorithm, last_outcome
from circuitgraph._errors import CircuitGraphError
from circuitgraph._pairs import PromptPairs
from circuitgraph.algorithms import (
    ACDC,
    EAP,
    EAPIG,
    ActivationPatching,
    AttributionPatching,
    InformationFlow,
    Magnitude,
    PathPatching,
    PerPosition,
    Random,
    RelP,
)
from circuitgraph.evaluation import Protocol, Scale
from circuitgraph.files import from_mib, to_mib
from circuitgraph.testing import ReferenceModel, ReferenceTrace, random_pairs

pytestmark = pytest.mark.filterwarnings("ignore::circuitgraph.evaluation.CircuitGraphWarning")  # random models fail

ONE_SPAN = replace(random_pairs(5), spans=[[0] * 5] * 3, span_names=["ALL"])
MODEL = ReferenceModel.random(7, n_layers=1, n_kv_heads=1).traced()  # heads share their keys and values
SHORT_MODEL = ReferenceModel.random(6, n_layers=1, d_mlp=0, norm=None).traced()


def by_span(scores: Any) -> Any:
    """The columns of a writer as a last axis."""
    return np.reshape(scores, (len(scores), -1, len(SPANS)))


@pytest.mark.parametrize(
    "algorithm",
    [
        ACDC(threshold=0.01),
        ActivationPatching(),
        ActivationPatching(direction="denoising"),
        EAP(),
        EAPIG("mask"),
        EAPIG("activations", points=2),
        RelP(),
        AttributionPatching(("qk-fix",)),
        PathPatching(("logits",)),
        Random(),
    ],
    ids=repr,
)
def test_one_span_is_the_algorithm_itself(algorithm: Algorithm) -> None:
    engine = MODEL.bind(ONE_SPAN, getattr(algorithm, "default_metric", None) or "logit_diff")
    plain, split = algorithm.run(engine), PerPosition(algorithm).run(engine)
    assert split.graph == engine.graph.by_span(["ALL"])
    assert np.array_equal(split.mask, plain.mask)
    assert plain.scores is not None
    np.testing.assert_allclose(split.scores, plain.scores, rtol=0, atol=1e-9)


@pytest.mark.parametrize("row", [row for row in ROWS if row.family == "gpt2" and row.backend != "jax"], ids=str)
def test_gradient_scores_of_spans_add_up(row: Row) -> None:
    engine = row.traced.bind(SPANNED, "logit_diff")
    plain, split = EAP().run(engine), PerPosition(EAP()).run(engine)
    assert split.graph == engine.graph.by_span(SPANS)
    assert split.graph.writers[2].name == "input@END"
    np.testing.assert_allclose(by_span(split.scores).sum(-1), plain.scores, rtol=0, atol=1e-7)
    assert split.prompt_scores is not None
    np.testing.assert_allclose(split.prompt_scores.mean(0), split.scores, rtol=0, atol=1e-6)
    to_logits = by_span(split.scores)[-1]
    assert not to_logits[:, :2].any()  # only the last token is read
    assert to_logits[:, 2].any()


def test_patching_a_span_by_hand() -> None:
    engine = MODEL.bind(SPANNED, "logit_diff")
    nodes, edges = (PerPosition(ActivationPatching(level)).run(engine) for level in ("node", "edge"))  # type: ignore[arg-type]
    masks = np.ones((3, *engine.graph.shape, len(SPANS)))
    masks[1, :, 1, 2] = masks[2, -1, 1, 2] = 0
    whole, node, edge = engine.evaluate(masks).mean(axis=1)
    assert nodes.record["nodes"]["a0.h0@END"] == pytest.approx(whole - node, abs=1e-12)
    assert edges.graph is not None
    assert edges.scores is not None
    assert edges.scores[edges.graph.edge_id("a0.h0@END->logits")] == pytest.approx(whole - edge, abs=1e-12)
    assert abs(whole - node) > 1e-3


def test_acdc_decides_span_by_span() -> None:
    """What stays is what its decisions say, and the metric is that of the masks by span."""
    engine = SHORT_MODEL.bind(SPANNED, "kl")
    steps = list(PerPosition(ACDC(threshold=0.02)).steps(engine))
    outcome = steps[-1]
    assert {step.graph for step in steps} == {engine.graph.by_span(SPANS)}
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert outcome.graph is not None
    removed = {name for name, *_, is_removed in outcome.record["decisions"] if is_removed}
    kept = {edge.name for edge in outcome.graph.edges_of(outcome.mask)}
    assert kept
    assert not kept & removed
    final = engine.evaluate(by_span(outcome.mask.astype(float))[None]).mean()
    assert outcome.record["metric"][-1] == pytest.approx(final, abs=1e-9)
    assert {edge.writer.span for edge in outcome.graph.edges_of(outcome.mask) if edge.reader.kind == "logits"} == {"END"}


def test_what_goes_around_an_algorithm_looks_like_it() -> None:
    assert PerPosition(ACDC(threshold=0.1)).default_metric == "kl"
    assert PerPosition(EAP()).default_metric is None
    engine = MODEL.bind(ONE_SPAN, "logit_diff")
    assert np.array_equal(last_outcome(PerPosition(EAP()).steps(engine)).mask, PerPosition(EAP()).run(engine).mask)


def test_what_cannot_be_asked_by_position_is_refused() -> None:
    for wrong in (EAP, None, "eap", PerPosition(EAP())):
        with pytest.raises(CircuitGraphError, match="per position: algorithm: .*; expected (an instance with|one that is not)"):
            PerPosition(wrong)  # type: ignore[arg-type]
    with pytest.raises(CircuitGraphError, match="per position: the prompts have no spans; take a task whose prompts have slots, or give"):
        PerPosition(EAP()).run(MODEL.bind(random_pairs(5), "logit_diff"))
    engine = MODEL.bind(SPANNED, "logit_diff")
    for algorithm in (InformationFlow(), Magnitude(), PathPatching(("logits",), through=("mlp",))):
        with pytest.raises(CircuitGraphError, match="what a writer says is not known by span; take an algorithm of masks and gradients"):
            PerPosition(algorithm).run(engine)


# --- the circuits ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Circuit:
    return discover(MODEL, SPANNED, PerPosition(EAP()))


def test_a_circuit_by_span_is_evaluated_by_span(found: Circuit) -> None:
    assert found.graph == MODEL.graph.by_span(SPANS)
    assert found.provenance["algorithm"] == {"class": "PerPosition", "algorithm": {"class": "EAP"}}
    assert found.provenance["protocol"]["positions"] == "spans"
    assert found.provenance["faithfulness"] == pytest.approx(1.0)
    chosen = found.top(12)
    report = evaluate(MODEL, SPANNED, chosen)
    by_hand = MODEL.bind(SPANNED, "logit_diff").evaluate(by_span(chosen.mask.astype(float))[None]).mean()
    assert report.metric_circuit == pytest.approx(by_hand, abs=1e-6)
    assert report.edges_total == 3 * MODEL.graph.n_edges


def test_a_circuit_by_span_is_saved_and_loaded(found: Circuit, tmp_path: Path) -> None:
    chosen = found.top(5)
    assert all("@" in edge.name for edge in chosen.edges)
    assert Circuit.load(chosen.save(tmp_path / "by_span.json")) == chosen
    with pytest.raises(CircuitGraphError, match="to_mib: the format knows no positions; this circuit is split by the spans S1, S2, END"):
        to_mib(chosen)
    plain = Circuit(MODEL.graph, MODEL.graph.visible)
    assert from_mib(to_mib(plain, d_model=8)).graph.spans == ()


def test_prompts_with_other_spans_are_refused(found: Circuit) -> None:
    other = replace(SPANNED, span_names=["IO", "S", "END"])
    for pairs, theirs in ((other, "IO, S, END"), (replace(SPANNED, spans=(), span_names=()), "none")):
        with pytest.raises(CircuitGraphError, match=f"is split by the spans S1, S2, END; the prompts have {theirs}; ask"):
            evaluate(MODEL, pairs, found)
    bound = SHORT_MODEL.bind(SPANNED, "logit_diff")
    with pytest.raises(CircuitGraphError, match="but the model is .*; trace it as it was traced then"):
        Scale(bound, found.graph, Protocol("logit_diff", prompts=2))


def test_a_picture_says_where_beside_the_lines(found: Circuit) -> None:
    writers, readers = found.graph.writers, found.graph.readers
    scores = np.zeros(found.graph.shape)
    for edge, score in {"input@S1->a0.h0<q>": 1, "input@S2->a0.h0<q>": 3, "input@END->a0.h0<q>": 2, "a0.h0@END->logits": 1}.items():
        scores[found.graph.edge_id(edge)] = score
    drawn = Circuit(found.graph, scores > 0, scores, found.provenance).to_dot()
    assert '"a0.h0" -> logits [label=" END"' in drawn.replace("\t", "")
    assert '[label=" S2, END …"' in drawn  # the strongest first
    assert "input@S2->a0.h0<q>: +3" in drawn
    assert "@" not in "".join(line for line in drawn.splitlines() if "->" not in line)  # nodes are not split
    assert "PerPosition(EAP)" in drawn
    assert "beside a line where in the prompt" in drawn
    assert "edges merged" not in drawn
    layers = found.to_dot(detail="layers")
    assert f"a0\\n{len({w.node for w in writers if w.kind == 'head'})} heads" in layers
    assert len(readers) == MODEL.graph.shape[0]


def test_spans_of_a_task_reach_the_circuit() -> None:
    """From a task's slots to edges with names, in numpy alone."""
    from toy_tasks import WORDS, simple

    model = ReferenceModel.random(9, n_layers=1, n_heads=1, d_mlp=0, vocabulary=len(WORDS))
    circuit = discover(ReferenceTrace(model, tokenizer=WORDS), simple(), PerPosition(EAP()), prompts=4)
    assert circuit.graph.spans == ("BEGIN", "A", "A+", "B1", "B1+", "B2", "B2+", "END")
    assert not circuit.scores[:, 0].any()  # clean and corrupted prompts begin alike
    assert circuit.scores[circuit.graph.edge_id("input@B2->a0.h0<v>")] != 0
    assert isinstance(simple().pairs(WORDS, 1), PromptPairs)
