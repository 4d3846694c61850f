"""The backward pass over the tape of a forward one, from the logits down, as a rule says. Weights get no gradient.

What is made of the gradients of readers' inputs is made layer by layer, by a function that is handed in (see `_collect`). Left to itself,
JAX would keep the whole bank once per layer; here it is kept once. The writers' gradients follow the two forms of a read (see `_forward`):
a running gradient of the stream, plus corrections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._forward import Edges, LayerMasking, Masking, SpanEdges, forward
from circuitgraph_jax._layer import Layer
from circuitgraph_jax._live import live_run, run_beside
from circuitgraph_jax._recomputed import Heads
from circuitgraph_jax._rules import Way
from circuitgraph_jax._run import Run, Tape
from circuitgraph_jax._splits import Active

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class MaskedRun(eqx.Module):
    """A run to be differentiated: under a mask."""

    embedding: Float[Array, "position d_model"]
    source: Float[Array, "writers span d_model"]
    masking: Masking

    def forward(self, decoder: Decoder) -> Run:
        return forward(decoder, self.embedding, self.source, self.masking)


class LiveRun(eqx.Module):
    """A run to be differentiated: the model's own."""

    embedding: Float[Array, "position d_model"]
    source: Float[Array, "writers span d_model"]
    masking: None = None

    def forward(self, decoder: Decoder) -> Run:
        return live_run(decoder, self.embedding, self.source)


class RunBeside(eqx.Module):
    """A run to be differentiated: the model's own, the source being its run on another prompt."""

    embedding: Float[Array, "position d_model"]
    other: Float[Array, "position d_model"]
    masking: None = None

    def forward(self, decoder: Decoder) -> Run:
        return run_beside(decoder, self.embedding, self.other)


class Found(eqx.Module):
    """What the backward pass finds in a layer, or at the logits: the gradients of its readers' inputs, and its heads if it has any."""

    of_readers: Float[Array, "readers position d_model"]
    heads: Heads | None = None


class _Step(eqx.Module):
    """What one layer's step is given; with a leading axis, what a scan over a stack runs over."""

    layer: Layer
    masking: LayerMasking | None
    first_writer: Int[Array, ""]
    number: Int[Array, ""]
    tape: Tape


def backward(
    decoder: Decoder,
    run: Run,
    masking: Masking | None,
    way: Way,
    grad_end: Float[Array, "position d_model"],
    take: Callable[[Found, int], Array],
) -> list[Array]:
    """What is taken from every layer, stack by stack with a leading axis of layers, and last from the logits. `take` is told how many
    writers the layers of its stack may see."""
    corrections, active = None if masking is None else jnp.zeros_like(run.bank), jax.tree.map(jnp.zeros_like, run.active)
    grads = WriterGrads(jnp.zeros_like(run.end), corrections, active)
    grads = grads.add(None if masking is None else masking.end, grad_end[None])
    taken = [take(Found(grad_end[None]), len(run.bank))]
    for number, place in reversed([*enumerate(decoder.places)]):
        bank, n_seen = run.bank[: place.end_writer], place.end_writer

        def step(grads: WriterGrads, here: _Step, bank: Array = bank, n_seen: int = n_seen) -> tuple[WriterGrads, Array]:
            grads, found = _layer(grads, bank, way, here)
            return grads, take(found, n_seen)

        masked = None if masking is None else masking.steps(decoder, number)
        steps = _Step(decoder.stacks[number], masked, place.first_writers, place.layers, run.tapes[number])
        grads, of_layers = lax.scan(step, grads.up_to(place.end_writer), steps, reverse=True)
        taken.append(of_layers)
    return taken[::-1]


class WriterGrads(eqx.Module):
    """The gradient of what a writer says: that of the live `stream`, plus a writer's own correction where edges are not all live.

    `active`: those of what features are that write to later layers, by layer.
    """

    stream: Float[Array, "position d_model"]
    corrections: Float[Array, "writers position d_model"] | None
    active: Active

    def up_to(self, writer: int) -> WriterGrads:
        """Without the later writers, which are done with."""
        return replace(self, corrections=None if self.corrections is None else self.corrections[:writer])

    def of(self, first: Array, n: int) -> Float[Array, "some position d_model"]:
        """Of `n` writers, or the one that all writers share."""
        return self.stream[None] if self.corrections is None else self.stream + lax.dynamic_slice_in_dim(self.corrections, first, n)

    def cut(self) -> WriterGrads:
        """Before a divided stream: what comes after it is none of the stream's business, nor of those who wrote to it."""
        return replace(self, stream=jnp.zeros_like(self.stream))

    def add(self, edges: Edges | SpanEdges | None, grads: Float[Array, "readers position d_model"]) -> WriterGrads:
        """Hand the gradients of readers' inputs on to the writers they read."""
        if edges is None or self.corrections is None:
            return replace(self, stream=self.stream + _sum(grads))
        return replace(self, stream=self.stream + _sum(edges.to_stream(grads)), corrections=self.corrections + edges.to_bank(grads))


def _layer(grads: WriterGrads, bank: Array, way: Way, here: _Step) -> tuple[WriterGrads, Found]:
    """One layer backwards."""
    layer, after, of_readers, heads = here.layer, grads, [], None
    if layer.mlp is not None:
        grads, of_mlp = _mlp(grads, bank, way, here)
        of_readers.append(of_mlp)
    if layer.attention is not None:
        of_heads = (after if layer.is_parallel else grads).of(here.first_writer + layer.n_stream_writers, layer.n_attention_writers)
        grads, of_attention, heads = _attention(grads, of_heads, bank, way, here)
        of_readers.insert(0, of_attention)
    if layer.splits.stream is not None:
        grads, of_stream = _stream(grads, bank, way, here)
        of_readers.insert(0, of_stream)
    return grads, Found(jnp.concatenate(of_readers), heads)


def _mlp(grads: WriterGrads, bank: Array, way: Way, here: _Step) -> tuple[WriterGrads, Float[Array, "readers position d_model"]]:
    layer, masking, tape = here.layer, here.masking, here.tape
    x = tape.before_mlp[None] if masking is None else masking.read_mlp(layer, tape.before_mlp, bank)
    of_writers = grads.of(here.first_writer + layer.n_writers_before_mlp, layer.n_mlp_writers)
    if layer.splits.mlp is None:
        of_readers, active = _through_mlp(layer, way, x, tape, of_writers), grads.active
    else:
        of_readers, active = _through_mlp_parts(layer, way, x, of_writers, grads.active)
    grad = way.past(here.number, of_readers)
    return replace(grads, active=active).add(None if masking is None else masking.of_mlp(layer), grad), grad


def _through_mlp(
    layer: Layer, way: Way, x: Float[Array, "readers position d_model"], tape: Tape, of_writers: Float[Array, "writers position d_model"]
) -> Float[Array, "readers position d_model"]:
    """The gradient of the input of a whole MLP, from that of what it says."""
    mlp = layer.mlp
    assert mlp is not None
    grad = _pull(lambda hidden: way.contract(mlp, hidden), tape.hidden, of_writers[0])
    return _pull(mlp.expand, x[0], grad)[None]  # type: ignore[no-any-return]


def _through_mlp_parts(
    layer: Layer,
    way: Way,
    x: Float[Array, "readers position d_model"],
    of_writers: Float[Array, "writers position d_model"],
    active: Active,
) -> tuple[Float[Array, "readers position d_model"], Active]:
    """The gradients of the inputs of its readers, from those of its writers (of either there may be one that all share) and of what its
    features are; and with these what goes on to features of earlier layers. Parts are linear in them, so what they were does not matter."""
    inputs, grad = _each(x, layer.n_mlp_readers), _each(of_writers, layer.n_mlp_writers)
    _, pull = jax.vjp(lambda x, active: layer.mlp_parts(x, way.inner, active), inputs, jax.tree.map(jnp.zeros_like, active))
    of_readers, active = pull((grad, active))
    return of_readers, active


def _attention(
    grads: WriterGrads, of_heads: Float[Array, "writers position d_model"], bank: Array, way: Way, here: _Step
) -> tuple[WriterGrads, Float[Array, "readers position d_model"], Heads]:
    layer, masking, tape, attention = here.layer, here.masking, here.tape, here.layer.attention
    assert attention is not None
    assert tape.projected is not None  # it is what its readers say
    x = tape.before_attention[None] if masking is None else masking.read_attention(layer, tape.before_attention, bank)
    write = layer.attention_parts if len(of_heads) > 1 else attention.write  # one gradient for all writers is that of their sum
    mixed, through_mix = jax.vjp(lambda projected: way.mix(attention, projected), tape.projected)
    grad = way.past(here.number, _pull(write, mixed, of_heads if len(of_heads) > 1 else of_heads[0]))
    heads = Heads(attention, tape.before_attention, tape.projected, grad, layer.n_stream_readers)
    (grad,) = through_mix(grad)
    grad = _pull(attention.project, _each(x, layer.n_attention_readers), grad)
    return grads.add(None if masking is None else masking.of_attention(layer), grad), grad, heads


def _stream(grads: WriterGrads, bank: Array, way: Way, here: _Step) -> tuple[WriterGrads, Float[Array, "readers position d_model"]]:
    """Where the stream is divided: what came before is heard by one reader only."""
    layer, masking, tape = here.layer, here.masking, here.tape
    assert tape.before_stream is not None
    x = tape.before_stream if masking is None else masking.read_stream(layer, tape.before_stream, bank)
    of_parts = _each(grads.of(here.first_writer, layer.n_stream_writers), layer.n_stream_writers)
    grad = way.past(here.number, _pull(layer.stream_parts, x, of_parts)[None])
    return grads.cut().add(None if masking is None else masking.of_stream(layer), grad), grad


def _each(shared: Float[Array, "some position d_model"], n: int) -> Float[Array, "n position d_model"]:
    """Of each of `n`, where there may be one for all."""
    return jnp.broadcast_to(shared, (n, *shared.shape[1:]))


def _pull(function: Any, at: Any, grad: Any) -> Any:
    return jax.vjp(function, at)[1](grad)[0]


def _sum(grads: Float[Array, "readers position d_model"]) -> Float[Array, "position d_model"]:
    """Over the readers: a matrix product, which XLA does several times faster than a sum over the first axis."""
    return (jnp.ones((1, len(grads)), grads.dtype) @ grads.reshape(len(grads), -1)).reshape(grads.shape[1:])
