"""Metrics: the logits of one prompt's last position to one number. Written once for every backend, over the array API.

`logits` are `[..., prompts, tokens]`. Unless a metric is `full_vocabulary`, an engine may hand it only the tokens that `Target` asks about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from circuitgraph._errors import CircuitGraphError, TaskError, unknown_name

Array = Any  # an array of numpy, torch or jax


@dataclass(frozen=True, eq=False)
class Target:
    """What a metric compares with, one row per prompt, in the arrays of the engine's framework.

    `answers`, `wrong_answers`: columns of the logits, `[prompts, tokens]`, with weight 1 where they count and 0 where they fill up.
    `clean_log_probs`: `[prompts, vocabulary]` of the clean run, for metrics that are `full_vocabulary`.
    """

    answers: Array
    answer_weights: Array
    wrong_answers: Array
    wrong_weights: Array
    clean_log_probs: Array | None = None


@runtime_checkable
class Metric(Protocol):
    """Maps logits to a number per prompt.

    `flat_at_clean`: the gradient is zero at the clean run, so attribution there says nothing. `needs_wrong_answers`: prompts
    without a wrong answer are refused.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[bool]
    full_vocabulary: ClassVar[bool]
    is_differentiable: ClassVar[bool]
    flat_at_clean: ClassVar[bool]
    needs_wrong_answers: ClassVar[bool]

    def __call__(self, logits: Array, target: Target) -> Array: ...


@dataclass(frozen=True)
class LogitDiff:
    """Mean logit of the answers minus mean logit of the wrong answers, in logits (Wang et al. 2022)."""

    name: ClassVar[str] = "logit_diff"
    higher_is_better: ClassVar[bool] = True
    full_vocabulary: ClassVar[bool] = False
    is_differentiable: ClassVar[bool] = True
    flat_at_clean: ClassVar[bool] = False
    needs_wrong_answers: ClassVar[bool] = True

    def __call__(self, logits: Array, target: Target) -> Array:
        right = _weighted_sum(logits, target.answers, target.answer_weights) / target.answer_weights.sum(-1)
        wrong = _weighted_sum(logits, target.wrong_answers, target.wrong_weights) / target.wrong_weights.sum(-1)
        return right - wrong


@dataclass(frozen=True)
class ProbDiff:
    """Probability of the answers minus probability of the wrong answers, between -1 and 1 (Hanna et al. 2023)."""

    name: ClassVar[str] = "prob_diff"
    higher_is_better: ClassVar[bool] = True
    full_vocabulary: ClassVar[bool] = True
    is_differentiable: ClassVar[bool] = True
    flat_at_clean: ClassVar[bool] = False
    needs_wrong_answers: ClassVar[bool] = True

    def __call__(self, logits: Array, target: Target) -> Array:
        probs = _namespace(logits).exp(log_softmax(logits))
        right = _weighted_sum(probs, target.answers, target.answer_weights)
        return right - _weighted_sum(probs, target.wrong_answers, target.wrong_weights)


@dataclass(frozen=True)
class NLL:
    """Negative log of the probability of the answers together, in nats."""

    name: ClassVar[str] = "nll"
    higher_is_better: ClassVar[bool] = False
    full_vocabulary: ClassVar[bool] = True
    is_differentiable: ClassVar[bool] = True
    flat_at_clean: ClassVar[bool] = False
    needs_wrong_answers: ClassVar[bool] = False

    def __call__(self, logits: Array, target: Target) -> Array:
        xp = _namespace(logits)
        chosen = _columns(log_softmax(logits), target.answers)
        return -_logsumexp(xp.where(target.answer_weights > 0, chosen, _minus_infinity(chosen)))[..., 0]


@dataclass(frozen=True)
class KLDivergence:
    """KL(clean run || this run) over the vocabulary, in nats (Conmy et al. 2023). Zero, with zero gradient, at the clean run."""

    name: ClassVar[str] = "kl"
    higher_is_better: ClassVar[bool] = False
    full_vocabulary: ClassVar[bool] = True
    is_differentiable: ClassVar[bool] = True
    flat_at_clean: ClassVar[bool] = True
    needs_wrong_answers: ClassVar[bool] = False

    def __call__(self, logits: Array, target: Target) -> Array:
        xp = _namespace(logits)
        clean = target.clean_log_probs
        return xp.sum(xp.exp(clean) * (clean - log_softmax(logits)), axis=-1)


@dataclass(frozen=True)
class Accuracy:
    """1 where the best answer has a larger logit than the best wrong answer (for a prompt without one: than every other token), else 0."""

    name: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    full_vocabulary: ClassVar[bool] = True
    is_differentiable: ClassVar[bool] = False
    flat_at_clean: ClassVar[bool] = False
    needs_wrong_answers: ClassVar[bool] = False

    def __call__(self, logits: Array, target: Target) -> Array:
        xp = _namespace(logits)
        right = self._best(logits, target.answers, target.answer_weights)
        is_best = right >= xp.max(logits, axis=-1)
        if target.wrong_answers.shape[-1] == 0:
            return xp.astype(is_best, logits.dtype)
        is_better = right > self._best(logits, target.wrong_answers, target.wrong_weights)
        return xp.astype(xp.where(target.wrong_weights.sum(-1) == 0, is_best, is_better), logits.dtype)

    @staticmethod
    def _best(logits: Array, columns: Array, weights: Array) -> Array:
        xp = _namespace(logits)
        chosen = _columns(logits, columns)
        return xp.max(xp.where(weights > 0, chosen, _minus_infinity(chosen)), axis=-1)


METRICS: dict[str, type[Metric]] = {m.name: m for m in (LogitDiff, ProbDiff, NLL, KLDivergence, Accuracy)}


def metric_named(metric: str | Metric) -> Metric:
    """A metric by name, or the metric itself; `logit-diff` and `logit_diff` are the same. Raises `UnknownNameError`."""
    if isinstance(metric, Metric) and not isinstance(metric, type):
        return metric
    if not isinstance(metric, str):
        raise CircuitGraphError(f"metric: {metric!r}; expected a name ({', '.join(METRICS)}) or an instance such as LogitDiff()")
    name = metric.strip().lower().replace("-", "_")
    if name not in METRICS:
        raise unknown_name("metric", metric, METRICS)
    return METRICS[name]()


def check_answers(metric: Metric, wrong_answers: Any) -> None:
    """Raises `TaskError` when the metric compares with wrong answers and a prompt has none."""
    if metric.needs_wrong_answers:
        missing = [i for i, wrong in enumerate(wrong_answers) if len(wrong) == 0]
        if missing:
            raise TaskError(f"metric {metric.name} needs a wrong answer for every prompt; prompt {missing[0]} has none (use nll or kl)")


def log_softmax(logits: Array) -> Array:
    """Over the last axis."""
    return logits - _logsumexp(logits)


def _logsumexp(x: Array) -> Array:
    xp = _namespace(x)
    top = xp.max(x, axis=-1, keepdims=True)
    return top + xp.log(xp.sum(xp.exp(x - top), axis=-1, keepdims=True))


def _columns(logits: Array, columns: Array) -> Array:
    xp = _namespace(logits)
    return xp.take_along_axis(logits, xp.broadcast_to(columns, (*logits.shape[:-1], columns.shape[-1])), axis=-1)


def _weighted_sum(values: Array, columns: Array, weights: Array) -> Array:
    return (_columns(values, columns) * weights).sum(-1)


def _minus_infinity(like: Array) -> Array:
    xp = _namespace(like)
    return xp.full_like(like, -float("inf"))


def _namespace(x: Array) -> Any:
    import array_api_compat

    return array_api_compat.array_namespace(x)
