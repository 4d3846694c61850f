"""The model's own run, `m = 1`: all readers see the one live stream, so nothing is read through a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax

from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._layer import Layer
from circuitgraph_jax._run import Run, Tape, grown, keep
from circuitgraph_jax._splits import Active

if TYPE_CHECKING:
    from jaxtyping import Float


def live_run(decoder: Decoder, embedding: Float[Array, "position d_model"], source: Float[Array, "writers span d_model"]) -> Run:
    """With the differences from given source values."""
    stream, bank, tapes = embedding, (embedding - source[0])[None], []
    active = decoder.nothing_active(embedding)
    for stack, place in zip(decoder.stacks, decoder.places, strict=True):

        def step(carry: tuple[Array, Array, Active], xs: tuple[Layer, Array]) -> tuple[tuple[Array, Array, Active], Tape]:
            (stream, bank, active), (layer, at) = carry, xs
            after, written, active, tape = _speak(layer, stream, active)
            return (after, keep(bank, written - lax.dynamic_slice_in_dim(source, at, len(written)), at), active), tape

        (stream, bank, active), tape = lax.scan(step, (stream, grown(bank, place), active), (stack, place.first_writers))
        tapes.append(tape)
    return Run(stream, bank, tuple(tapes), active)


def run_beside(decoder: Decoder, embedding: Float[Array, "position d_model"], other: Float[Array, "position d_model"]) -> Run:
    """With the differences from the model's own run on another prompt, made in the same pass: each weight is fetched once for both."""
    streams, bank, tapes = jnp.stack([embedding, other]), (embedding - other)[None], []
    active = jax.vmap(decoder.nothing_active)(streams)
    for stack, place in zip(decoder.stacks, decoder.places, strict=True):

        def step(carry: tuple[Array, Array, Active], xs: tuple[Layer, Array]) -> tuple[tuple[Array, Array, Active], Tape]:
            (streams, bank, active), (layer, at) = carry, xs
            after, written, active, tapes = jax.vmap(_speak, (None, 0, 0))(layer, streams, active)
            tape: Tape = jax.tree.map(lambda a: a[0], tapes)
            return (after, keep(bank, written[0] - written[1], at), active), tape

        (streams, bank, active), tape = lax.scan(step, (streams, grown(bank, place), active), (stack, place.first_writers))
        tapes.append(tape)
    return Run(streams[0], bank, tuple(tapes), jax.tree.map(lambda a: a[0], active))


def _speak(
    layer: Layer, before: Float[Array, "position d_model"], active: Active
) -> tuple[Array, Float[Array, "writers position d_model"], Active, Tape]:
    """One layer: the stream after it, what each of its writers says, what features are that write to later layers, and the tape."""
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
        hidden, of_mlp, active = layer.run_mlp(before_mlp[None], active)
        written.append(of_mlp)
        after = layer.after_mlp(after, of_mlp)
    before_stream = None if layer.splits.stream is None else before
    return after, jnp.concatenate(written), active, Tape(before_stream, before, projected, before_mlp, hidden)
