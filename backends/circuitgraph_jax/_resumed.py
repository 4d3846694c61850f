"""A run from the first layer in which a mask differs from the model's own run: before it, both say the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._forward import Masking, Step, run_layer
from circuitgraph_jax._splits import Active

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Own(eqx.Module):
    """The model's own run: the stream before each layer and at the end, every writer's difference `live - source`, and what features are
    that write to later layers."""

    streams: Float[Array, "ends position d_model"]
    differences: Float[Array, "writers position d_model"]
    active: Active


def resumed(
    decoder: Decoder, start: Int[Array, ""], own: Own, source: Float[Array, "writers span d_model"], masking: Masking
) -> Float[Array, "position d_model"]:
    """The logits' input under a mask that changes nothing before layer `start`."""
    stream, bank, active = own.streams[start], own.differences[:1], own.active
    for number, place in enumerate(decoder.places):
        steps = Step(decoder.stacks[number], masking.steps(decoder, number), place.first_writers)

        def step(at: Int[Array, ""], carry: tuple[Array, Array, Active], steps: Step = steps) -> tuple[Array, Array, Active]:
            here: Step = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, at, keepdims=False), steps)
            return run_layer(*carry, source, here)[0]

        bank = jnp.concatenate([bank, own.differences[place.writer : place.end_writer]])
        first = jnp.clip(start - place.layer, 0, place.n_layers)
        stream, bank, active = lax.fori_loop(first, place.n_layers, step, (stream, bank, active))
    return masking.read_end(stream, bank)
