"""The compiled functions: what an engine asks, over prompts and lanes. Each is compiled once per shape and kept by JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from circuitgraph._engine import EXACT
from circuitgraph._metrics import Metric, Target, log_softmax
from circuitgraph_jax._backward import LiveRun, MaskedRun, RunBeside
from circuitgraph_jax._changed import Changes, Difference, Kept, Rows
from circuitgraph_jax._collect import edge_scores, source_gradients
from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._forward import Edges, Masking, SourceStreams, SpanEdges, forward
from circuitgraph_jax._live import live_run
from circuitgraph_jax._resumed import Own, resumed
from circuitgraph_jax._rules import Way
from circuitgraph_jax._run import Run
from circuitgraph_jax._spans import Spans
from circuitgraph_jax._splits import Active

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_T = TypeVar("_T")


class Live(eqx.Module):
    """The model's own run: what the writers say, the stream before each layer and at the end, and what features are that write to later
    layers."""

    values: Float[Array, "prompts writers position d_model"]
    streams: Float[Array, "prompts ends position d_model"]
    active: Active


class Source(eqx.Module):
    """The source run: what the writers say there, and what readers would see. `span` is the positions, or 1 where all are alike."""

    values: Float[Array, "prompts writers span d_model"]
    streams: SourceStreams


class Question(eqx.Module):
    """What a metric compares with, one row per prompt. `tokens` are those whose logits it needs (`None`: all); the target's columns are
    places in them."""

    tokens: Int[Array, "prompts tokens"] | None
    answers: Int[Array, "prompts right"]
    answer_weights: Float[Array, "prompts right"]
    wrong_answers: Int[Array, "prompts wrong"]
    wrong_weights: Float[Array, "prompts wrong"]
    clean_log_probs: Float[Array, "prompts vocabulary"] | None

    def measure(self, decoder: Decoder, metric: Metric, x: Float[Array, " d_model"]) -> Float[Array, ""]:
        """The metric of one prompt (this question being that prompt's) from the logits' input at its last position."""
        logits = decoder.logits(x, self.tokens)
        target = Target(self.answers, self.answer_weights, self.wrong_answers, self.wrong_weights, self.clean_log_probs)
        value: Array = metric(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), target)
        return value


def over_rows(one: Callable[..., _T]) -> Callable[..., _T]:
    """`jax.vmap`, but a single row is asked by itself: to batch all that a query does takes as long as to trace it."""

    def rows(*args: Any) -> _T:
        if any(len(leaf) != 1 for leaf in jax.tree.leaves(args)):
            return jax.vmap(one)(*args)  # which refuses what is not of one length
        alone: _T = jax.tree.map(lambda a: a[None], one(*jax.tree.map(lambda a: a[0], args)))
        return alone

    return rows


@eqx.filter_jit
def plain_logits(decoder: Decoder, tokens: Int[Array, "prompts position"]) -> Float[Array, "prompts position vocabulary"]:
    """The model's logits, without a graph."""
    return over_rows(decoder)(tokens)


@eqx.filter_jit
def last_log_probs(decoder: Decoder, tokens: Int[Array, "prompts position"]) -> Float[Array, "prompts vocabulary"]:
    """The model's log probabilities after the last token."""
    logits = over_rows(lambda ids: decoder.logits(decoder.stream(ids)[-1]))(tokens)
    logs: Array = log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return logs


@eqx.filter_jit
def live(decoder: Decoder, tokens: Int[Array, "prompts position"]) -> Live:
    """What every writer says in the model's own run."""

    def one(ids: Array) -> Live:
        x = decoder.embed(ids)
        run = live_run(decoder, x, jnp.zeros((decoder.visible.shape[1], 1, x.shape[-1]), x.dtype))
        return Live(run.bank, jnp.concatenate([*(tape.start for tape in run.tapes), run.end[None]]), run.active)

    return over_rows(one)(tokens)


@eqx.filter_jit
def source_streams(decoder: Decoder, values: Float[Array, "prompts writers span d_model"]) -> SourceStreams:
    """What readers would see where every writer says these values."""
    return over_rows(lambda said: SourceStreams.of(decoder, said))(values)


@eqx.filter_jit
def differences(
    values: Float[Array, "prompts writers position d_model"], source: Float[Array, "prompts writers span d_model"]
) -> Float[Array, "prompts writers position d_model"]:
    """`live - source` of the model's own run."""
    return values - source


@eqx.filter_jit
def masked_run(
    decoder: Decoder,
    mask: Float[Array, "readers writers ..."],
    tokens: Int[Array, "prompts position"],
    source: Source,
    spans: Spans | None = None,
) -> tuple[Float[Array, "prompts writers position d_model"], Float[Array, "prompts position d_model"]]:
    """Every writer's difference `live - source` in the run under a mask, and the logits' inputs."""

    def one(ids: Array, said: Array, masking: Masking) -> tuple[Array, Array]:
        run = forward(decoder, decoder.embed(ids), said, masking)
        return run.bank, run.end

    return over_rows(one)(tokens, source.values, _masking(decoder, mask, source, spans))


@eqx.filter_jit
def logits_of(decoder: Decoder, ends: Float[Array, "prompts position d_model"]) -> Float[Array, "prompts position vocabulary"]:
    """All logits, from their inputs."""
    return over_rows(decoder.logits)(ends)


@eqx.filter_jit
def measured(
    decoder: Decoder, metric: Metric, ends: Float[Array, "lanes prompts d_model"], question: Question
) -> Float[Array, "lanes prompts"]:
    """The metric from the logits' inputs at the last position. A function of its own, so that the long ones below are compiled once for
    all metrics."""

    def one(x: Array, question: Question) -> Array:
        return question.measure(decoder, metric, x)

    return over_rows(lambda of_lane: over_rows(one)(of_lane, question))(ends)


@eqx.filter_jit
def ends(
    decoder: Decoder,
    masks: Float[Array, "lanes readers writers ..."],
    start: Int[Array, ""],
    own: Own,
    source: Source,
    spans: Spans | None = None,
) -> Float[Array, "lanes prompts d_model"]:
    """The logits' inputs at the last position, under masks that change nothing before layer `start`."""

    def one(masking: Masking, own: Own, said: Array) -> Array:
        return resumed(decoder, start, own, said, masking)[-1]

    def lane(mask: Array) -> Array:
        return over_rows(one)(_masking(decoder, mask, source, spans), own, source.values)

    return over_rows(lane)(masks)


@eqx.filter_jit
def kept(
    decoder: Decoder,
    values: Float[Array, "prompts writers position d_model"],
    differences: Float[Array, "prompts writers position d_model"],
) -> Kept:
    """The model's own run, to be the first that others are evaluated from."""
    return over_rows(lambda *run: Kept.of(decoder, *run))(values, differences)


@eqx.filter_jit
def moved(
    decoder: Decoder,
    mask: Float[Array, "readers writers"],
    start: Int[Array, ""],
    kept: Kept,
    kept_mask: Float[Array, "readers writers"],
    source: Source,
    changes: Changes,
) -> Kept:
    """The run under a mask that has other rows than the kept run from layer `start` on."""
    rows = Rows.of(mask, kept_mask, decoder.visible)
    return over_rows(lambda *run: Difference(rows, *run).moved(decoder, start, changes))(kept, source.values, source.streams)


@eqx.filter_jit
def ends_from(
    decoder: Decoder,
    masks: Float[Array, "lanes readers writers"],
    start: Int[Array, ""],
    kept: Kept,
    kept_mask: Float[Array, "readers writers"],
    source: Source,
    changes: Changes,
    by_stream: bool,
) -> Float[Array, "lanes prompts d_model"]:
    """`ends` under masks that have other rows than the kept run from layer `start` on. `by_stream`: as of a `Difference`."""

    def lane(mask: Array) -> Array:
        rows = Rows.of(mask, kept_mask, decoder.visible)

        def one(kept: Kept, said: Array, streams: SourceStreams) -> Array:
            return Difference(rows, kept, said, streams, by_stream).end(decoder, start, changes)

        return over_rows(one)(kept, source.values, source.streams)

    return over_rows(lane)(masks)


@eqx.filter_jit
def masked_gradient(
    decoder: Decoder,
    metric: Metric,
    tokens: Int[Array, "prompts position"],
    mixes: Float[Array, " mixes"],
    mask: Float[Array, "readers writers ..."],
    source: Source,
    directions: Float[Array, "prompts writers position d_model"] | None,
    question: Question,
    way: Way,
    spans: Spans | None = None,
) -> Float[Array, "prompts readers writers ..."]:
    """`dF/dm` per prompt under a mask, summed over runs whose embedding is `source + mix * (clean - source)`.

    `directions` are the writers' differences if not those of the run itself.
    """
    maskings = _masking(decoder, mask, source, spans)

    def one(
        mix: Array, ids: Array, said: Array, masking: Masking, directions: Array | None, question: Question, spans: Spans | None
    ) -> Array:
        planned = MaskedRun(_mixed(decoder, ids, said, mix), said, masking)
        return _scores(decoder, metric, planned, directions, question, way, spans)

    return _over_mixes(one, mixes, tokens, source.values, maskings, directions, question, spans)


@eqx.filter_jit
def live_gradient(
    decoder: Decoder,
    metric: Metric,
    tokens: Int[Array, "prompts position"],
    mixes: Float[Array, " mixes"],
    source: Float[Array, "prompts writers span d_model"],
    directions: Float[Array, "prompts writers position d_model"] | None,
    question: Question,
    way: Way,
    spans: Spans | None = None,
) -> Float[Array, "prompts readers writers ..."]:
    """`masked_gradient` at `m = 1`."""

    def one(mix: Array, ids: Array, said: Array, directions: Array | None, question: Question, spans: Spans | None) -> Array:
        planned = LiveRun(_mixed(decoder, ids, said, mix), said)
        return _scores(decoder, metric, planned, directions, question, way, spans)

    return _over_mixes(one, mixes, tokens, source, directions, question, spans)


@eqx.filter_jit
def gradient_beside(
    decoder: Decoder,
    metric: Metric,
    tokens: Int[Array, "prompts position"],
    others: Int[Array, "prompts position"],
    question: Question,
    way: Way,
    spans: Spans | None = None,
) -> Float[Array, "prompts readers writers ..."]:
    """`dF/dm` per prompt at `m = 1`, the source being the model's own run on other prompts, which is made on the way."""

    def one(ids: Array, other: Array, question: Question, spans: Spans | None) -> Array:
        return _scores(decoder, metric, RunBeside(decoder.embed(ids), decoder.embed(other)), None, question, way, spans)

    return over_rows(one)(tokens, others, question, spans)


@eqx.filter_jit
def source_gradient(
    decoder: Decoder,
    metric: Metric,
    tokens: Int[Array, "prompts position"],
    mask: Float[Array, "readers writers ..."],
    source: Source,
    question: Question,
    spans: Spans | None = None,
) -> Float[Array, "prompts writers d_model"]:
    """The gradient of `F` per prompt in what each writer says in the source run, the same at every position."""

    def one(ids: Array, said: Array, masking: Masking, question: Question, spans: Spans | None) -> Array:
        run = forward(decoder, decoder.embed(ids), said, masking)
        grad_end = _grad_end(decoder, metric, run, question)
        return source_gradients(decoder, run, masking, Way.of(EXACT), grad_end, mask, spans)

    return over_rows(one)(tokens, source.values, _masking(decoder, mask, source, spans), question, spans)


def _scores(
    decoder: Decoder,
    metric: Metric,
    planned: MaskedRun | LiveRun | RunBeside,
    directions: Array | None,
    question: Question,
    way: Way,
    spans: Spans | None = None,
) -> Float[Array, "readers writers ..."]:
    run, by_rule = planned.forward(decoder), way.decoder(decoder)
    grad_end = _grad_end(by_rule, metric, run, question)
    return edge_scores(by_rule, run, planned.masking, way, grad_end, run.bank if directions is None else directions, spans)


def _grad_end(decoder: Decoder, metric: Metric, run: Run, question: Question) -> Float[Array, "position d_model"]:
    """Of the logits' input."""
    grad: Array = jax.grad(lambda end: question.measure(decoder, metric, end[-1]))(run.end)
    return grad


def _over_mixes(one: Callable[..., Array], mixes: Float[Array, " mixes"], *by_prompt: Any) -> Array:
    """The sum over mixes of what `one(mix, ...)` says of each prompt."""
    of_each = over_rows(lambda mix: over_rows(lambda *prompt: one(mix, *prompt))(*by_prompt))(mixes)
    return of_each.sum(0, dtype=jnp.promote_types(of_each.dtype, jnp.float32))


def _mixed(decoder: Decoder, ids: Int[Array, " position"], said: Float[Array, "writers span d_model"], mix: Float[Array, ""]) -> Array:
    return said[0] + mix * (decoder.embed(ids) - said[0])


def _masking(decoder: Decoder, mask: Float[Array, "readers writers ..."], source: Source, spans: Spans | None) -> Masking:
    """With one copy of the edges per prompt: reading through them is then a plain product of matrices for each, in the bank's own order."""
    if spans is None:
        one = Edges.of(mask, decoder.visible)
        edges = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(source.values), *a.shape)), one)
    else:
        edges = over_rows(lambda of_prompt: SpanEdges.of(mask, decoder.visible, of_prompt))(spans)
    return Masking(edges, source.streams)
