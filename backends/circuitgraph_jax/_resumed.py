"""A run that goes on from a kept one at some layer, and recomputes there what changes where it is needed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from circuitgraph._liveness import ALL, DEAD, Extent
from circuitgraph._sites import Sites
from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._forward import Edges, Masking, Step, run_layer
from circuitgraph_jax._run import keep
from circuitgraph_jax._splits import Active

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Kept(eqx.Module):
    """What was said in a run: the stream before each layer and at the end, every writer's difference `live - source`, and what features are
    that write to later layers."""

    streams: Float[Array, "ends position d_model"]
    differences: Float[Array, "writers position d_model"]
    active: Active


class Again(eqx.Module):
    """Per layer, what is recomputed: whether its attention is, and where its MLP is (`DEAD`, `LAST` or `ALL`)."""

    attention: Bool[Array, " layers"]
    mlp: Int[Array, " layers"]

    @classmethod
    def of(cls, changed: Extent, sites: Sites) -> Again:
        layers = sites.layers
        heads = [changed.writers[layer.attention_writers.start : layer.attention_writers.stop].any() for layer in layers]
        mlps = [changed.writers[layer.mlp_writers.start] if layer.mlp else DEAD for layer in layers]
        return cls(jnp.asarray(np.array(heads, dtype=bool)), jnp.asarray(np.array(mlps, dtype=np.int32)))

    @classmethod
    def everything(cls, n_layers: int) -> Again:
        return cls(jnp.asarray(np.ones(n_layers, dtype=bool)), jnp.asarray(np.full(n_layers, ALL, dtype=np.int32)))


class _Step(eqx.Module):
    """What one layer is given; with a leading axis, those of a stack."""

    here: Step
    again: Again


def resumed(
    decoder: Decoder,
    start: Int[Array, ""],
    kept: Kept,
    source: Float[Array, "writers span d_model"],
    masking: Masking,
    again: Again,
) -> tuple[Float[Array, "position d_model"], Float[Array, "writers position d_model"]]:
    """The logits' input and the bank of a run that is the kept one up to layer `start`, and after it wherever nothing is recomputed.

    What is dead says what it said in the kept run, to the stream and to the bank alike, so that a reader that does not hear it hears the
    source exactly. A layer with parts is always run anew.
    """
    stream, bank, active = kept.streams[start], kept.differences[:1], kept.active
    for number, place in enumerate(decoder.places):
        layers = slice(place.layer, place.layer + place.n_layers)
        parts = Again(again.attention[layers], again.mlp[layers])
        steps = _Step(Step(decoder.stacks[number], masking.steps(decoder, number), place.first_writers), parts)

        def step(at: Int[Array, ""], carry: tuple[Array, Array, Active], steps: _Step = steps) -> tuple[Array, Array, Active]:
            now = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, at, keepdims=False), steps)
            if now.here.layer.is_divided:
                return run_layer(*carry, source, now.here)[0]
            stream, bank, active = carry
            return *_layer(stream, bank, source, now.here, now.again), active

        bank = jnp.concatenate([bank, kept.differences[place.writer : place.end_writer]])
        first = jnp.clip(start - place.layer, 0, place.n_layers)
        stream, bank, active = lax.fori_loop(first, place.n_layers, step, (stream, bank, active))
    return masking.read_end(stream, bank), bank


def _layer(stream: Array, bank: Array, source: Float[Array, "writers span d_model"], here: Step, again: Again) -> tuple[Array, Array]:
    """One layer of which nothing is in parts."""
    layer, writer, after = here.layer, here.first_writer, stream
    if layer.attention is not None:
        attention, said = layer.attention, lax.dynamic_slice_in_dim(source, writer, layer.n_attention_writers)

        def attend() -> Array:
            return attention.write_each(attention.mix(attention.project(here.masking.read_attention(layer, stream, bank)))) - said

        changed = lax.cond(again.attention, attend, lambda: lax.dynamic_slice_in_dim(bank, writer, layer.n_attention_writers))
        bank = keep(bank, changed, writer)
        after = stream + (changed + said).sum(0)
        after = after if attention.constant is None else after + attention.constant
    if layer.mlp is not None:
        mlp, at = layer.mlp, writer + layer.n_attention_writers
        said, before = lax.dynamic_slice_in_dim(source, at, 1)[0], stream if layer.is_parallel else after
        known = lax.dynamic_slice_in_dim(bank, at, 1)[0]

        def everywhere() -> Array:
            return mlp(here.masking.read_mlp(layer, before, bank)[0]) - said

        def at_the_end() -> Array:
            there = replace(here.masking, before_mlp=here.masking.before_mlp[-1:])
            return known.at[-1:].set(mlp(there.read_mlp(layer, before[-1:], bank[:, -1:])[0]) - said[-1:])

        last = at_the_end if isinstance(here.masking.edges, Edges) else everywhere  # edges by span are read at all positions
        changed = lax.switch(again.mlp, (lambda: known, last, everywhere))
        bank = keep(bank, changed[None], at)
        after = after + changed + said
    return after, bank
