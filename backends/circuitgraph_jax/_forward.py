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

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Edges(eqx.Module):
    """A mask, ready to be read through."""

    coefficients: Float[Array, "readers writers"]
    from_live: Bool[Array, " readers"]

    @classmethod
    def of(cls, mask: Float[Array, "readers writers"], visible: Bool[Array, "readers writers"]) -> Edges:
        kept, removed = jnp.where(visible, mask, 0), jnp.where(visible, mask - 1, 0)
        from_live = jnp.count_nonzero(removed, axis=1) <= jnp.count_nonzero(kept, axis=1)
        return cls(jnp.where(from_live[:, None], removed, kept), from_live)

    def __getitem__(self, readers: slice) -> Edges:
        return Edges(self.coefficients[readers], self.from_live[readers])

    def read(
        self,
        stream: Float[Array, "position d_model"],
        source: Float[Array, "span d_model"],
        bank: Float[Array, "writers position d_model"],
    ) -> Float[Array, "readers position d_model"]:
        """The readers' inputs."""
        mixed = self.coefficients @ bank.reshape(len(bank), -1)  # one plain matrix product: einsum would transpose the bank
        return mixed.reshape(-1, *stream.shape) + jnp.where(self.from_live[:, None, None], stream, source)


class Source(eqx.Module):
    """What the writers said in the source run, and the streams that readers would see there. `span` is the positions, or 1
    where all are alike."""

    values: Float[Array, "writers span d_model"]
    before_attention: tuple[Float[Array, "layers span d_model"], ...]
    before_mlp: tuple[Float[Array, "layers span d_model"], ...]
    end: Float[Array, "span d_model"]

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        values: Float[Array, "writers span d_model"],
    ) -> Source:
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
        return cls(values, tuple(before_attention), tuple(before_mlp), stream)


class Tape(eqx.Module):
    """What the backward pass needs of each layer of a stack (`None` where the layer has no such joint)."""

    before_attention: Float[Array, "position d_model"]
    projected: Float[Array, "readers position head_dim"] | None
    before_mlp: Float[Array, "position d_model"]
    hidden: tuple[Float[Array, "position width"], ...] | None


class Run(eqx.Module):
    """A finished run: the logits' input, every writer's difference, and per stack the tape of its layers."""

    end: Float[Array, "position d_model"]
    bank: Float[Array, "writers position d_model"]
    tapes: tuple[Tape, ...]


def forward(decoder: Decoder, embedding: Float[Array, "position d_model"], source: Source, edges: Edges | None) -> Run:
    """The run of one prompt under a mask; `None` is the model itself, where all readers see the one live stream."""
    stream, bank, tapes = embedding, (embedding - source.values[0])[None], []
    for number, place in enumerate(decoder.places):
        bank = jnp.concatenate([bank, jnp.zeros((place.end_writer - place.writer, *stream.shape), stream.dtype)])
        (stream, bank), tape = lax.scan(
            lambda carry, here: _layer(*carry, source.values, here), (stream, bank), inputs(decoder, source, edges, number)
        )
        tapes.append(tape)
    return Run(read(None if edges is None else edges[-1:], stream, source.end, bank)[0], bank, tuple(tapes))


def forward_from(
    decoder: Decoder,
    start: Int[Array, ""],
    stream: Float[Array, "position d_model"],
    differences: Float[Array, "writers position d_model"],
    source: Source,
    edges: Edges | None,
) -> Float[Array, "position d_model"]:
    """The logits' input of a run that is the model's own up to layer `start`; `stream` is the stream there, `differences` are those of
    the model's own run."""
    bank = differences[:1]
    for number, place in enumerate(decoder.places):
        stack = inputs(decoder, source, edges, number)

        def step(at: Int[Array, ""], carry: tuple[Array, Array], stack: Inputs = stack) -> tuple[Array, Array]:
            here = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, at, keepdims=False), stack)
            return _layer(*carry, source.values, here)[0]

        bank = jnp.concatenate([bank, differences[place.writer : place.end_writer]])
        stream, bank = lax.fori_loop(jnp.clip(start - place.layer, 0, place.n_layers), place.n_layers, step, (stream, bank))
    return read(None if edges is None else edges[-1:], stream, source.end, bank)[0]


class Inputs(eqx.Module):
    """What one layer's step is given; with a leading axis, what a scan over a stack's layers runs over."""

    layer: Layer
    edges: Edges | None
    before_attention: Float[Array, "span d_model"]
    before_mlp: Float[Array, "span d_model"]
    first_writer: Int[Array, ""]


def inputs(decoder: Decoder, source: Source, edges: Edges | None, number: int) -> Inputs:
    """Of a stack, with a leading axis of layers; its edges come from the writers up to the stack's end."""
    place = decoder.places[number]
    rows = None
    if edges is not None:
        part = edges[place.reader : place.end_reader]
        shape = (place.n_layers, place.n_readers)
        rows = Edges(part.coefficients[:, : place.end_writer].reshape(*shape, -1), part.from_live.reshape(shape))
    return Inputs(
        decoder.stacks[number],
        rows,
        source.before_attention[number],
        source.before_mlp[number],
        place.writer + jnp.arange(place.n_layers) * place.n_writers,
    )


def _layer(
    stream: Array,
    bank: Array,
    source: Float[Array, "writers span d_model"],
    here: Inputs,
) -> tuple[tuple[Array, Array], Tape]:
    layer, writer, edges = here.layer, here.first_writer, here.edges
    n_readers, n_heads = (layer.attention.n_readers, layer.attention.n_heads) if layer.attention else (0, 0)
    before, after, projected, hidden = stream, stream, None, None
    if layer.attention is not None:
        x = read(None if edges is None else edges[:n_readers], before, here.before_attention, bank)
        projected = layer.attention.project(x)
        mixed = layer.attention.mix(projected)
        bank = _keep(bank, layer.attention.write_each(mixed), source, writer)
        after = before + layer.attention.write(mixed)
    before_mlp = before if layer.is_parallel else after
    if layer.mlp is not None:
        x = read(None if edges is None else edges[n_readers:], before_mlp, here.before_mlp, bank)[0]
        hidden = layer.mlp.expand(x)
        written = layer.mlp.contract(hidden)
        bank = _keep(bank, written[None], source, writer + n_heads)
        after = after + written
    return (after, bank), Tape(before, projected, before_mlp, hidden)


def read(edges: Edges | None, stream: Array, source: Array, bank: Array) -> Float[Array, "readers position d_model"]:
    """The inputs of some readers; the one that all share where there is no mask."""
    return stream[None] if edges is None else edges.read(stream, source, bank)


def _keep(bank: Array, written: Float[Array, "some position d_model"], source: Array, at: Int[Array, ""]) -> Array:
    said = lax.dynamic_slice_in_dim(source, at, len(written))
    return lax.dynamic_update_slice_in_dim(bank, written - said, at, 0)
