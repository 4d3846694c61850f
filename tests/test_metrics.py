"""Metrics: hand-computed values, laws, and the same numbers in numpy and torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from circuitgraph._errors import CircuitGraphError, TaskError, UnknownNameError
from circuitgraph._metrics import (
    METRICS,
    NLL,
    Accuracy,
    KLDivergence,
    LogitDiff,
    Metric,
    ProbDiff,
    Target,
    check_answers,
    log_softmax,
    metric_named,
)

PROMPTS, VOCABULARY = 3, 6
ANSWERS = np.array([[0, 1], [2, 0], [4, 5]])
ANSWER_WEIGHTS = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
WRONG = np.array([[2, 3, 4], [3, 0, 0], [1, 2, 0]])
WRONG_WEIGHTS = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])

logits_arrays = hnp.arrays(np.float64, (PROMPTS, VOCABULARY), elements=st.floats(-20, 20, width=32))


def identity(x: Any) -> Any:
    return x


def to_torch(x: Any) -> Any:
    torch = pytest.importorskip("torch")
    return torch.as_tensor(x)


def to_jax(x: Any) -> Any:
    jax = pytest.importorskip("jax")
    return jax.numpy.asarray(x)


CONVERTED = pytest.mark.parametrize("convert", [identity, to_torch, to_jax], ids=["numpy", "torch", "jax"])


@pytest.fixture(scope="module", autouse=True)
def _in_double_precision() -> Iterator[None]:
    try:
        import jax
    except ModuleNotFoundError:
        yield  # its row is skipped
    else:
        with jax.enable_x64(True):
            yield


def target(clean: np.ndarray | None = None, convert: Any = identity) -> Target:
    log_probs = None if clean is None else convert(log_softmax(clean))
    return Target(convert(ANSWERS), convert(ANSWER_WEIGHTS), convert(WRONG), convert(WRONG_WEIGHTS), log_probs)


def by_hand(name: str, logits: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Each metric with Python's loops, prompt by prompt."""
    out = []
    for row, base, answers, aw, wrong, ww in zip(logits, clean, ANSWERS, ANSWER_WEIGHTS, WRONG, WRONG_WEIGHTS, strict=True):
        a, w = answers[aw > 0], wrong[ww > 0]
        p, q = np.exp(row) / np.exp(row).sum(), np.exp(base) / np.exp(base).sum()
        out.append(
            {
                "logit_diff": row[a].mean() - row[w].mean(),
                "prob_diff": p[a].sum() - p[w].sum(),
                "nll": -np.log(p[a].sum()),
                "kl": (q * np.log(q / p)).sum(),
                "accuracy": float(row[a].max() > row[w].max()),
            }[name]
        )
    return np.array(out)


@CONVERTED
@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None, max_examples=25)  # a loaded machine is no failure
@given(logits=logits_arrays, clean=logits_arrays)
def test_values_are_those_computed_by_hand(name: str, convert: Any, logits: np.ndarray, clean: np.ndarray) -> None:
    value = np.asarray(METRICS[name]()(convert(logits), target(clean, convert)))
    assert value.shape == (PROMPTS,)
    np.testing.assert_allclose(value, by_hand(name, logits, clean), atol=1e-9, rtol=1e-9)


@CONVERTED
@pytest.mark.parametrize("name", METRICS)
def test_lanes_are_independent(name: str, convert: Any) -> None:
    lanes = np.random.default_rng(0).normal(size=(4, PROMPTS, VOCABULARY))
    metric, asked = METRICS[name](), target(lanes[0], convert)
    together = np.asarray(metric(convert(lanes), asked))
    assert together.shape == (4, PROMPTS)
    np.testing.assert_allclose(together, [np.asarray(metric(convert(lane), asked)) for lane in lanes], atol=1e-12)


@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None, max_examples=25)  # a loaded machine is no failure
@given(logits=logits_arrays, clean=logits_arrays, shift=st.floats(-50, 50))
def test_a_shift_of_all_logits_changes_nothing(name: str, logits: np.ndarray, clean: np.ndarray, shift: float) -> None:
    metric, asked = METRICS[name](), target(clean)
    if name == "accuracy" and not np.array_equal(np.argsort(logits, axis=-1), np.argsort(logits + shift, axis=-1)):
        return  # the shift rounded a tie into being
    np.testing.assert_allclose(metric(logits + shift, asked), metric(logits, asked), atol=1e-8)


@settings(deadline=None, max_examples=25)  # a loaded machine is no failure
@given(logits=logits_arrays, clean=logits_arrays)
def test_kl_is_never_negative_and_zero_at_the_clean_run(logits: np.ndarray, clean: np.ndarray) -> None:
    assert (KLDivergence()(logits, target(clean)) >= -1e-9).all()
    np.testing.assert_allclose(KLDivergence()(clean, target(clean)), 0, atol=1e-12)


@settings(deadline=None, max_examples=25)  # a loaded machine is no failure
@given(logits=logits_arrays)
def test_bounds(logits: np.ndarray) -> None:
    assert (np.abs(ProbDiff()(logits, target())) <= 1 + 1e-12).all()
    assert (NLL()(logits, target()) >= -1e-9).all()
    assert set(Accuracy()(logits, target())) <= {0.0, 1.0}


@settings(deadline=None, max_examples=25)  # a loaded machine is no failure
@given(logits=logits_arrays)
def test_exchanging_answers_turns_the_differences_round(logits: np.ndarray) -> None:
    turned = Target(WRONG, WRONG_WEIGHTS, ANSWERS, ANSWER_WEIGHTS)
    for metric in (LogitDiff(), ProbDiff()):
        np.testing.assert_allclose(metric(logits, turned), -metric(logits, target()), atol=1e-12)


def test_torch_gradients_say_which_metrics_are_flat_at_the_clean_run() -> None:
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(1).normal(size=(PROMPTS, VOCABULARY))
    for name, kind in METRICS.items():
        if not kind.is_differentiable:
            continue
        x = torch.tensor(logits, requires_grad=True)
        kind()(x, target(logits, torch.as_tensor)).sum().backward()
        assert (x.grad.abs().max().item() < 1e-12) == kind.flat_at_clean, name


def test_metrics_without_wrong_answers() -> None:
    logits = np.array([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    none = Target(np.array([[0], [0]]), np.ones((2, 1)), np.zeros((2, 0), dtype=int), np.zeros((2, 0)))
    np.testing.assert_array_equal(Accuracy()(logits, none), [1.0, 0.0])
    np.testing.assert_allclose(NLL()(logits, none), -log_softmax(logits)[:, 0])


def test_accuracy_decides_prompt_by_prompt() -> None:
    """The first prompt has no wrong answer, so its answer must beat the whole vocabulary; the second one's only its wrong answer."""
    logits = np.array([[1.0, 0.0, 2.0], [1.0, 0.0, 2.0]])
    ragged = Target(np.array([[0], [0]]), np.ones((2, 1)), np.array([[0], [1]]), np.array([[0.0], [1.0]]))
    np.testing.assert_array_equal(Accuracy()(logits, ragged), [0.0, 1.0])
    np.testing.assert_array_equal(Accuracy()(logits[:, :2], ragged), [1.0, 1.0])


def test_float32_large_logits_stay_finite() -> None:
    logits = np.array([[1e4, -1e4, 0.0]] * 3, dtype=np.float32)
    asked = Target(
        np.zeros((3, 1), int), np.ones((3, 1), np.float32), np.ones((3, 1), int), np.ones((3, 1), np.float32), log_softmax(logits)
    )
    for name, kind in METRICS.items():
        assert np.isfinite(kind()(logits, asked)).all(), name


@pytest.mark.parametrize("name", ["logit_diff", "logit-diff", " Logit-Diff "])
def test_names(name: str) -> None:
    assert metric_named(name) == LogitDiff()
    assert metric_named(LogitDiff()) == LogitDiff()


def test_unknown_metric_has_a_near_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'logit_diff'"):
        metric_named("logitdif")
    with pytest.raises(UnknownNameError, match="did you mean 'kl'"):
        metric_named("KLL")
    for wrong in (LogitDiff, 3, None):
        with pytest.raises(CircuitGraphError, match="expected a name .* or an instance"):
            metric_named(wrong)  # type: ignore[arg-type]


def test_check_answers() -> None:
    check_answers(NLL(), [[], [1]])
    with pytest.raises(TaskError, match="prompt 1 has none"):
        check_answers(LogitDiff(), [[3], []])


def test_every_metric_keeps_the_protocol() -> None:
    assert all(isinstance(kind(), Metric) for kind in METRICS.values())
