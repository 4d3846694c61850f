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
from circuitgraph_jax._layer import Layer
from circuitgraph_jax._run import Run, Tape, grown, keep
from circuitgraph_jax._spans import Spans
from circuitgraph_jax._splits import Active

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class SourceStreams(eqx.Module):
    """The streams that readers would see in the source run; per stack those before each layer's attention and its MLP, and before the layer
    is divided, where it is.

    `span` is the positions, or 1 where all are alike.
    """

    before_stream: tuple[Float[Array, "layers span d_model"] | None, ...]
    before_attention: tuple[Float[Array, "layers span d_model"], ...]
    before_mlp: tuple[Float[Array, "layers span d_model"], ...]
    end: Float[Array, "span d_model"]

    @classmethod
    def of(cls, decoder: Decoder, values: Float[Array, "writers span d_model"]) -> SourceStreams:
        """From what the writers say there."""
        stream, before_stream, before_attention, before_mlp = values[0], [], [], []
        for stack, place in zip(decoder.stacks, decoder.places, strict=True):
            said = values[place.writer : place.end_writer].reshape(place.n_layers, place.n_writers, *values.shape[1:])
            attention, mlp = stack.n_stream_writers, stack.n_writers_before_mlp
            heads = _together(said[:, attention:mlp], jax.vmap(lambda layer: layer.attention_constant)(stack))
            mlps = _together(said[:, mlp:], jax.vmap(lambda layer: layer.mlp_constant)(stack))
            if stack.splits.stream is None:
                ends = stream + jnp.cumsum(heads + mlps, axis=0)
                starts = entering = jnp.concatenate([stream[None], ends[:-1]])
            else:  # whatever came before a layer, its stream is the sum of the parts
                entering = _together(said[:, :attention], jax.vmap(lambda layer: layer.stream_constant)(stack))
                ends = entering + heads + mlps
                starts = jnp.concatenate([stream[None], ends[:-1]])
            before_stream.append(None if stack.splits.stream is None else starts)
            before_attention.append(entering)
            before_mlp.append(entering if stack.is_parallel else entering + heads)
            stream = ends[-1]
        return cls(tuple(before_stream), tuple(before_attention), tuple(before_mlp), stream)

    @property
    def starts(self) -> tuple[Float[Array, "layers span d_model"], ...]:
        """Per stack, the stream that comes to each layer."""
        pairs = zip(self.before_stream, self.before_attention, strict=True)
        return tuple(attention if stream is None else stream for stream, attention in pairs)


def _together(said: Float[Array, "layers some span d_model"], constants: Float[Array, "layers d_model"] | None) -> Array:
    """What some writers say, and the constant beside them, `[layers, span, d_model]`."""
    return said.sum(1) if constants is None else said.sum(1) + constants[:, None]


class Edges(eqx.Module):
    """Some readers' rows of a mask, ready to be read through."""

    coefficients: Float[Array, "readers writers"]
    from_live: Bool[Array, " readers"]

    @classmethod
    def of(cls, mask: Float[Array, "readers writers"], visible: Bool[Array, "readers writers"]) -> Edges:
        return cls(*_smaller_form(mask, visible))

    def __getitem__(self, readers: slice | Int[Array, " some"]) -> Edges:
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
        streams = self.streams
        return LayerMasking(rows, streams.before_stream[number], streams.before_attention[number], streams.before_mlp[number])

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
    before_stream: Float[Array, "span d_model"] | None
    before_attention: Float[Array, "span d_model"]
    before_mlp: Float[Array, "span d_model"]

    def read_stream(self, layer: Layer, stream: Array, bank: Array) -> Float[Array, "position d_model"]:
        assert self.before_stream is not None  # the layer divides it
        return self.of_stream(layer).read(stream, self.before_stream, bank)[0]

    def read_attention(self, layer: Layer, stream: Array, bank: Array) -> Float[Array, "readers position d_model"]:
        return self.of_attention(layer).read(stream, self.before_attention, bank)

    def read_mlp(self, layer: Layer, stream: Array, bank: Array) -> Float[Array, "readers position d_model"]:
        return self.of_mlp(layer).read(stream, self.before_mlp, bank)

    def of_stream(self, layer: Layer) -> Edges | SpanEdges:
        return self.edges[: layer.n_stream_readers]

    def of_attention(self, layer: Layer) -> Edges | SpanEdges:
        return self.edges[layer.n_stream_readers : layer.n_stream_readers + layer.n_attention_readers]

    def of_mlp(self, layer: Layer) -> Edges | SpanEdges:
        return self.edges[layer.n_stream_readers + layer.n_attention_readers :]


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
    active = decoder.nothing_active(embedding)
    for number, place in enumerate(decoder.places):
        bank = grown(bank, place)
        (stream, bank, active), tape = lax.scan(
            lambda carry, here: run_layer(*carry, source, here), (stream, bank, active), _steps(decoder, masking, number)
        )
        tapes.append(tape)
    return Run(masking.read_end(stream, bank), bank, tuple(tapes), active)


def _steps(decoder: Decoder, masking: Masking, number: int) -> Step:
    return Step(decoder.stacks[number], masking.steps(decoder, number), decoder.places[number].first_writers)


def run_layer(
    stream: Float[Array, "position d_model"], bank: Float[Array, "writers position d_model"], active: Active, source: Array, here: Step
) -> tuple[tuple[Array, Array, Active], Tape]:
    """One layer under a mask: the stream after it, the bank with what it says and what features are that write to later layers, and the
    tape. `source` `[writers, span, d_model]`."""
    layer, writer = here.layer, here.first_writer
    before_stream, before, projected, hidden = None, stream, None, None
    if layer.splits.stream is not None:
        before_stream, before = stream, here.masking.read_stream(layer, stream, bank)
        bank = _keep(bank, layer.stream_parts(before), source, writer)
    after = before
    if layer.attention is not None:
        projected = layer.attention.project(here.masking.read_attention(layer, before, bank))
        mixed = layer.attention.mix(projected)
        bank = _keep(bank, layer.attention_parts(mixed), source, writer + layer.n_stream_writers)
        after = before + layer.attention.write(mixed)
    before_mlp = before if layer.is_parallel else after
    if layer.mlp is not None:
        hidden, written, active = layer.run_mlp(here.masking.read_mlp(layer, before_mlp, bank), active)
        bank = _keep(bank, written, source, writer + layer.n_writers_before_mlp)
        after = layer.after_mlp(after, written)
    return (after, bank, active), Tape(before_stream, before, projected, before_mlp, hidden)


def _keep(bank: Array, written: Float[Array, "some position d_model"], source: Array, at: Int[Array, ""]) -> Array:
    """The bank, with how far some writers are from the source."""
    return keep(bank, written - lax.dynamic_slice_in_dim(source, at, len(written)), at)
