"""The compiled functions: what an engine asks, over prompts and lanes. Each is compiled once per shape and kept by JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from circuitgraph._metrics import Metric, Target, log_softmax
from circuitgraph_jax._backward import end_of_run
from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._forward import Edges, Source, forward, forward_from

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class LiveRun(eqx.Module):
    """The model's own run: what the writers say, and the stream before each layer and at the end."""

    values: Float[Array, "prompts writers position d_model"]
    streams: Float[Array, "prompts ends position d_model"]


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


@eqx.filter_jit
def plain_logits(decoder: Decoder, tokens: Int[Array, "prompts position"]) -> Float[Array, "prompts position vocabulary"]:
    """The model's logits, without a graph."""
    return jax.vmap(decoder)(tokens)


@eqx.filter_jit
def last_log_probs(decoder: Decoder, tokens: Int[Array, "prompts position"]) -> Float[Array, "prompts vocabulary"]:
    """The model's log probabilities after the last token."""
    logits = jax.vmap(lambda ids: decoder.logits(decoder.stream(ids)[-1]))(tokens)
    logs: Array = log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return logs


@eqx.filter_jit
def live_run(decoder: Decoder, tokens: Int[Array, "prompts position"]) -> LiveRun:
    """What every writer says in the model's own run."""

    def one(ids: Array) -> LiveRun:
        x = decoder.embed(ids)
        nothing = Source.of(decoder, jnp.zeros((decoder.visible.shape[1], 1, x.shape[-1]), x.dtype))
        run = forward(decoder, x, nothing, None)
        return LiveRun(run.bank, jnp.concatenate([*(tape.before_attention for tape in run.tapes), run.end[None]]))

    return jax.vmap(one)(tokens)


@eqx.filter_jit
def source_run(decoder: Decoder, values: Float[Array, "prompts writers span d_model"]) -> Source:
    """Writer values, ready to be patched in."""
    return jax.vmap(lambda said: Source.of(decoder, said))(values)


@eqx.filter_jit
def differences(
    values: Float[Array, "prompts writers position d_model"], source: Source
) -> Float[Array, "prompts writers position d_model"]:
    """`live - source` of the model's own run."""
    return values - source.values


@eqx.filter_jit
def masked_bank(
    decoder: Decoder, mask: Float[Array, "readers writers"] | None, tokens: Int[Array, "prompts position"], source: Source
) -> Float[Array, "prompts writers position d_model"]:
    """Every writer's difference `live - source` in the run under a mask."""
    edges = _edges(decoder, mask, len(tokens))
    return jax.vmap(lambda ids, source, edges: forward(decoder, decoder.embed(ids), source, edges).bank)(tokens, source, edges)


@eqx.filter_jit
def masked_logits(
    decoder: Decoder, mask: Float[Array, "readers writers"], tokens: Int[Array, "prompts position"], source: Source
) -> Float[Array, "prompts position vocabulary"]:
    """All logits of the run under a mask."""

    def one(ids: Array, source: Source, edges: Edges | None) -> Array:
        return decoder.logits(forward(decoder, decoder.embed(ids), source, edges).end)

    return jax.vmap(one)(tokens, source, _edges(decoder, mask, len(tokens)))


@eqx.filter_jit
def evaluate(
    decoder: Decoder,
    metric: Metric,
    masks: Float[Array, "lanes readers writers"],
    start: Int[Array, ""],
    streams: Float[Array, "prompts ends position d_model"],
    differences: Float[Array, "prompts writers position d_model"],
    source: Source,
    question: Question,
) -> Float[Array, "lanes prompts"]:
    """`F` of masks that differ from 1 in layer `start` or later only. `streams` and `differences` are those of the model's own run."""

    def one(edges: Edges | None, streams: Array, differences: Array, source: Source, question: Question) -> Array:
        end = forward_from(decoder, start, streams[start], differences, source, edges)
        return question.measure(decoder, metric, end[-1])

    def lane(mask: Array) -> Array:
        return jax.vmap(one)(_edges(decoder, mask, len(streams)), streams, differences, source, question)

    return jax.vmap(lane)(masks)


@eqx.filter_jit
def gradient(
    decoder: Decoder,
    metric: Metric,
    mask: Float[Array, "readers writers"] | None,
    tokens: Int[Array, "prompts position"],
    mix: Float[Array, ""],
    source: Source,
    directions: Float[Array, "prompts writers position d_model"] | None,
    question: Question,
) -> Float[Array, "prompts readers writers"]:
    """`dF/dm` per prompt, the embedding being `source + mix * (clean - source)`; see `circuitgraph_jax._backward.end_of_run`."""

    def one(ids: Array, source: Source, edges: Edges | None, directions: Array | None, question: Question) -> Array:
        x = source.values[0] + mix * (decoder.embed(ids) - source.values[0])

        def measured(nudges: Array) -> Array:
            return question.measure(decoder, metric, end_of_run(nudges, decoder, x, source, edges, directions)[-1])

        value, pull = jax.vjp(measured, jnp.zeros(decoder.visible.shape, x.dtype))
        scores: Array = pull(jnp.ones_like(value))[0]
        return scores

    return jax.vmap(one)(tokens, source, _edges(decoder, mask, len(tokens)), directions, question)


def _edges(decoder: Decoder, mask: Float[Array, "readers writers"] | None, n_prompts: int) -> Edges | None:
    """One copy of the edges per prompt: reading through them is then a plain product of matrices for each, in the bank's own order."""
    if mask is None:
        return None
    one = Edges.of(mask, decoder.visible)
    return Edges(*(jnp.broadcast_to(a, (n_prompts, *a.shape)) for a in (one.coefficients, one.from_live)))
