"""The model's own run, `m = 1`: all readers see the one live stream, so nothing is read through a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax

from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._layer import Layer
from circuitgraph_jax._run import Run, Tape, grown, keep

if TYPE_CHECKING:
    from jaxtyping import Float


def live_run(decoder: Decoder, embedding: Float[Array, "position d_model"], source: Float[Array, "writers span d_model"]) -> Run:
    """With the differences from given source values."""
    stream, bank, tapes = embedding, (embedding - source[0])[None], []
    for stack, place in zip(decoder.stacks, decoder.places, strict=True):

        def step(carry: tuple[Array, Array], xs: tuple[Layer, Array]) -> tuple[tuple[Array, Array], Tape]:
            (stream, bank), (layer, at) = carry, xs
            after, written, tape = _speak(layer, stream)
            return (after, keep(bank, written - lax.dynamic_slice_in_dim(source, at, len(written)), at)), tape

        (stream, bank), tape = lax.scan(step, (stream, grown(bank, place)), (stack, place.first_writers))
        tapes.append(tape)
    return Run(stream, bank, tuple(tapes))


def run_beside(decoder: Decoder, embedding: Float[Array, "position d_model"], other: Float[Array, "position d_model"]) -> Run:
    """With the differences from the model's own run on another prompt, made in the same pass: each weight is fetched once for both."""
    streams, bank, tapes = jnp.stack([embedding, other]), (embedding - other)[None], []
    for stack, place in zip(decoder.stacks, decoder.places, strict=True):

        def step(carry: tuple[Array, Array], xs: tuple[Layer, Array]) -> tuple[tuple[Array, Array], Tape]:
            (streams, bank), (layer, at) = carry, xs
            after, written, tapes = jax.vmap(_speak, (None, 0))(layer, streams)
            tape: Tape = jax.tree.map(lambda a: a[0], tapes)
            return (after, keep(bank, written[0] - written[1], at)), tape

        (streams, bank), tape = lax.scan(step, (streams, grown(bank, place)), (stack, place.first_writers))
        tapes.append(tape)
    return Run(streams[0], bank, tuple(tapes))


def _speak(layer: Layer, before: Float[Array, "position d_model"]) -> tuple[Array, Float[Array, "writers position d_model"], Tape]:
    """One layer: the stream after it, what each of its writers says, and the tape."""
    after, projected, hidden, written = before, None, None, []
    if layer.splits.stream is not None:
        written.append(layer.stream_parts(before))
    if layer.attention is not None:
        projected = layer.attention.project(before[None])
        mixed = layer.attention.mix(projected)
        written.append(layer.attention_parts(mixed))
        after = before + layer.attention.write(mixed)
    before_mlp = before if layer.is_parallel else after
    if layer.mlp is not None:
        hidden, of_mlp = layer.run_mlp(before_mlp[None])
        written.append(of_mlp)
        after = layer.after_mlp(after, of_mlp)
    before_stream = None if layer.splits.stream is None else before
    return after, jnp.concatenate(written), Tape(before_stream, before, projected, before_mlp, hidden)
