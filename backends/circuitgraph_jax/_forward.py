"""The edge-masked forward `F(m)` of one prompt, scanned over the layers. Lanes and prompts are added by `vmap`.

The bank holds every writer's difference `live - source`. It grows from stack to stack, so that the first layers read from a small one; what
is not written yet is never read. A reader's input is written in one of two forms that are equal: from the live stream,
`stream + (m - 1) @ bank`, or from the source run, `source_stream + m @ bank`. The one with fewer non-zero coefficients is used, so that
nothing large cancels: `m = 1` and `m = 0` add nothing at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._joints import Layer
from circuitgraph_jax._run import Run, Tape, grown, keep
from circuitgraph_jax._spans import Spans

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class SourceStreams(eqx.Module):
    """The streams that readers would see in the source run; per stack those before each layer's attention and its MLP.

    `span` is the positions, or 1 where all are alike.
    """

    before_attention: tuple[Float[Array, "layers span d_model"], ...]
    before_mlp: tuple[Float[Array, "layers span d_model"], ...]
    end: Float[Array, "span d_model"]

    @classmethod
    def of(cls, decoder: Decoder, values: Float[Array, "writers span d_model"]) -> SourceStreams:
        """From what the writers say there."""
        stream, before_attention, before_mlp = values[0], [], []
        for stack, place in zip(decoder.stacks, decoder.places, strict=True):
            said = values[place.writer : place.end_writer].reshape(place.n_layers, place.n_writers, *values.shape[1:])
            n_heads = stack.attention.n_heads if stack.attention else 0
            heads, mlps = said[:, :n_heads].sum(1), said[:, n_heads:].sum(1)
            constants = None if stack.attention is None else jax.vmap(lambda attention: attention.constant)(stack.attention)
            heads = heads if constants is None else heads + constants[:, None]
            ends = stream + jnp.cumsum(heads + mlps, axis=0)
            starts = jnp.concatenate([stream[None], ends[:-1]])
            before_attention.append(starts)
            before_mlp.append(starts if stack.is_parallel else starts + heads)
            stream = ends[-1]
        return cls(tuple(before_attention), tuple(before_mlp), stream)


class Edges(eqx.Module):
    """Some readers' rows of a mask, ready to be read through."""

    coefficients: Float[Array, "readers writers"]
    from_live: Bool[Array, " readers"]

    @classmethod
    def of(cls, mask: Float[Array, "readers writers"], visible: Bool[Array, "readers writers"]) -> Edges:
        return cls(*_smaller_form(mask, visible))

    def __getitem__(self, readers: slice) -> Edges:
        return Edges(self.coefficients[readers], self.from_live[readers])

    def by_layer(self, n_layers: int, n_writers: int) -> Edges:
        """With a leading axis of layers, from the first writers only."""
        return Edges(self.coefficients[:, :n_writers].reshape(n_layers, -1, n_writers), self.from_live.reshape(n_layers, -1))

    def read(
        self, stream: Float[Array, "position d_model"], source: Float[Array, "span d_model"], bank: Float[Array, "writers position d_model"]
    ) -> Float[Array, "readers position d_model"]:
        """The readers' inputs."""
        mixed = self.coefficients @ bank.reshape(len(bank), -1)  # one plain matrix product: einsum would transpose the bank
        return mixed.reshape(-1, *stream.shape) + jnp.where(self.from_live[:, None, None], stream, source)

    def to_stream(self, grads: Float[Array, "readers position d_model"]) -> Float[Array, "readers position d_model"]:
        """Of the gradients of the readers' inputs, what goes back to the live stream."""
        return jnp.where(self.from_live[:, None, None], grads, 0)

    def to_bank(self, grads: Float[Array, "readers position d_model"]) -> Float[Array, "writers position d_model"]:
        """Of the gradients of the readers' inputs, what goes back to each writer's difference."""
        mixed = self.coefficients.T @ grads.reshape(len(grads), -1)
        return mixed.reshape(-1, *grads.shape[1:])


class SpanEdges(eqx.Module):
    """`Edges` of a mask with a last axis of spans: those of each position are the ones of its span."""

    coefficients: Float[Array, "readers writers spans"]
    from_live: Bool[Array, "readers spans"]
    spans: Spans

    @classmethod
    def of(cls, mask: Float[Array, "readers writers spans"], visible: Bool[Array, "readers writers"], spans: Spans) -> SpanEdges:
        return cls(*_smaller_form(mask, visible[..., None]), spans)

    def __getitem__(self, readers: slice) -> SpanEdges:
        return SpanEdges(self.coefficients[readers], self.from_live[readers], self.spans)

    def by_layer(self, n_layers: int, n_writers: int) -> SpanEdges:
        coefficients = self.coefficients[:, :n_writers].reshape(n_layers, -1, n_writers, self.spans.n)
        spans = jax.tree.map(lambda a: jnp.broadcast_to(a, (n_layers, *a.shape)), self.spans)
        return SpanEdges(coefficients, self.from_live.reshape(n_layers, -1, self.spans.n), spans)

    def read(
        self, stream: Float[Array, "position d_model"], source: Float[Array, "span d_model"], bank: Float[Array, "writers position d_model"]
    ) -> Float[Array, "readers position d_model"]:
        mixed = jnp.einsum("rwp,wpd->rpd", self.spans.at_positions(self.coefficients), bank)
        return mixed + jnp.where(self.spans.at_positions(self.from_live)[..., None], stream, source)

    def to_stream(self, grads: Float[Array, "readers position d_model"]) -> Float[Array, "readers position d_model"]:
        return jnp.where(self.spans.at_positions(self.from_live)[..., None], grads, 0)

    def to_bank(self, grads: Float[Array, "readers position d_model"]) -> Float[Array, "writers position d_model"]:
        return jnp.einsum("rwp,rpd->wpd", self.spans.at_positions(self.coefficients), grads)


def _smaller_form(mask: Float[Array, "readers writers ..."], visible: Bool[Array, "readers writers ..."]) -> tuple[Array, Array]:
    """Of the two forms of a read, the one with fewer non-zero coefficients, and whether it is the one from the live stream."""
    kept, removed = jnp.where(visible, mask, 0), jnp.where(visible, mask - 1, 0)
    from_live = jnp.count_nonzero(removed, axis=1) <= jnp.count_nonzero(kept, axis=1)
    return jnp.where(from_live[:, None], removed, kept), from_live


class Masking(eqx.Module):
    """All edges under a mask, with the source streams that readers fall back to."""

    edges: Edges | SpanEdges
    streams: SourceStreams

    def steps(self, decoder: Decoder, number: int) -> LayerMasking:
        """Of a stack, with a leading axis of layers; its edges come from the writers up to the stack's end."""
        place = decoder.places[number]
        rows = self.edges[place.reader : place.end_reader].by_layer(place.n_layers, place.end_writer)
        return LayerMasking(rows, self.streams.before_attention[number], self.streams.before_mlp[number])

    @property
    def end(self) -> Edges | SpanEdges:
        """The logits' row."""
        return self.edges[-1:]

    def read_end(self, stream: Array, bank: Array) -> Float[Array, "position d_model"]:
        """The logits' input."""
        return self.end.read(stream, self.streams.end, bank)[0]


class LayerMasking(eqx.Module):
    """The edges into one layer."""

    edges: Edges | SpanEdges
    before_attention: Float[Array, "span d_model"]
    before_mlp: Float[Array, "span d_model"]

    def read_attention(self, layer: Layer, stream: Array, bank: Array) -> Float[Array, "readers position d_model"]:
        return self.of_attention(layer).read(stream, self.before_attention, bank)

    def read_mlp(self, layer: Layer, stream: Array, bank: Array) -> Float[Array, "position d_model"]:
        return self.of_mlp(layer).read(stream, self.before_mlp, bank)[0]

    def of_attention(self, layer: Layer) -> Edges | SpanEdges:
        return self.edges[: layer.n_attention_readers]

    def of_mlp(self, layer: Layer) -> Edges | SpanEdges:
        return self.edges[layer.n_attention_readers :]


class Step(eqx.Module):
    """What one layer's step is given; with a leading axis, what a scan over a stack runs over."""

    layer: Layer
    masking: LayerMasking
    first_writer: Int[Array, ""]


def forward(
    decoder: Decoder, embedding: Float[Array, "position d_model"], source: Float[Array, "writers span d_model"], masking: Masking
) -> Run:
    """The run of one prompt under a mask."""
    stream, bank, tapes = embedding, (embedding - source[0])[None], []
    for number, place in enumerate(decoder.places):
        bank = grown(bank, place)
        (stream, bank), tape = lax.scan(lambda carry, here: _layer(*carry, source, here), (stream, bank), _steps(decoder, masking, number))
        tapes.append(tape)
    return Run(masking.read_end(stream, bank), bank, tuple(tapes))


def _steps(decoder: Decoder, masking: Masking, number: int) -> Step:
    return Step(decoder.stacks[number], masking.steps(decoder, number), decoder.places[number].first_writers)


def _layer(stream: Array, bank: Array, source: Float[Array, "writers span d_model"], here: Step) -> tuple[tuple[Array, Array], Tape]:
    layer, writer = here.layer, here.first_writer
    before, after, projected, hidden = stream, stream, None, None
    if layer.attention is not None:
        projected = layer.attention.project(here.masking.read_attention(layer, before, bank))
        mixed = layer.attention.mix(projected)
        written = layer.attention.write_each(mixed)
        bank = keep(bank, written - lax.dynamic_slice_in_dim(source, writer, len(written)), writer)
        after = before + layer.attention.write(mixed)
    before_mlp = before if layer.is_parallel else after
    if layer.mlp is not None:
        hidden = layer.mlp.expand(here.masking.read_mlp(layer, before_mlp, bank))
        written = layer.mlp.contract(hidden)
        at = writer + layer.n_heads
        bank = keep(bank, written[None] - lax.dynamic_slice_in_dim(source, at, 1), at)
        after = after + written
    return (after, bank), Tape(before, projected, before_mlp, hidden)
