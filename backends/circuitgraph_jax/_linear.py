"""A run of one prompt in which attention patterns, the scales of norms and what MLPs say are held, so that all else is linear.

What a target hears is then a sum over writers and positions, and the share of each is the target's derivative in how much of its own words
a writer says there, from 1. One pass down the layers serves all targets; each has a pass back of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from circuitgraph._linear import HELD, FeatureTarget, LinearPrompt, LogitTarget
from circuitgraph_jax import _queries as queries
from circuitgraph_jax._batch import Parts
from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._devices import Devices, precisely
from circuitgraph_jax._layer import Layer
from circuitgraph_jax._rules import Way
from circuitgraph_jax._splits import CrossLayerSplit, TranscoderSplit, transcoded

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

_AT_ONCE = 32  # targets; fewer are filled up, so that each length of a prompt is compiled for once


class JaxLinearRun:
    """One prompt of a model whose MLPs are in parts, or some of them. See `circuitgraph._linear.LinearRun`."""

    def __init__(self, parts: Parts, prompt: LinearPrompt) -> None:
        self._dtype, self._prompt = parts.dtype, prompt
        with precisely(self._dtype):
            self._decoder: Decoder = Devices.of(parts.devices[:1], 1).everywhere(parts.decoder)

    @property
    def said(self) -> Float[ndarray, "writers position d_model"]:
        return np.asarray(self._values, dtype=np.float64)

    @property
    def logits(self) -> Float[ndarray, " vocabulary"]:
        with precisely(self._dtype):
            return np.asarray(self._decoder.logits(self._end), dtype=np.float64)

    def features(self, layer: int) -> Float[ndarray, "position features"]:
        dictionary, chosen = self._prompt.dictionary(layer), np.asarray(self._prompt.features(layer), dtype=np.int32)
        with precisely(self._dtype):
            dictionary = dictionary.on(lambda array: jnp.asarray(array, self._dtype))
            return np.asarray(dictionary.encode(self._heard[layer], chosen), dtype=np.float64)

    def attributions(self, targets: Sequence[FeatureTarget | LogitTarget]) -> Float[ndarray, "targets writers position"]:
        self._prompt.check_targets(targets)
        out = np.zeros((len(targets), *self._values.shape[:2]))
        with precisely(self._dtype):
            for at in range(0, len(targets), _AT_ONCE):
                chunk = targets[at : at + _AT_ONCE]
                out[at : at + len(chunk)] = np.asarray(self._attributions(chunk))[: len(chunk)]
        return out

    def _attributions(self, targets: Sequence[FeatureTarget | LogitTarget]) -> Float[Array, "targets writers position"]:
        """Of so many at most, and of nothing for what is missing."""
        layers, positions = np.zeros((2, _AT_ONCE), dtype=np.int32)
        directions, tokens = np.zeros((_AT_ONCE, self._values.shape[-1])), np.full(_AT_ONCE, -1, dtype=np.int32)
        for t, target in enumerate(targets):
            if isinstance(target, LogitTarget):
                layers[t], positions[t], tokens[t] = len(self._heard) - 1, len(self._prompt.tokens) - 1, target.token
            else:
                layers[t], positions[t] = target.layer, target.position
                directions[t] = self._prompt.dictionary(target.layer).encoder[:, target.feature]
        is_logit = tokens >= 0
        if is_logit.any():  # by way of the host: an array that a device has made is another kind to compile for
            of_logits = _logit_directions(self._decoder, self._end, jnp.asarray(tokens))
            directions[is_logit] = np.asarray(of_logits, dtype=np.float64)[is_logit]
        where = (jnp.asarray(layers), jnp.asarray(positions), jnp.asarray(directions, self._dtype))
        found: Array = _attributions(self._decoder, self._values, *where)
        return found

    @property
    def _values(self) -> Float[Array, "writers position d_model"]:
        return self._live.values[0]

    @property
    def _end(self) -> Float[Array, " d_model"]:
        """The stream behind the last token."""
        return self._live.streams[0, -1, -1]

    @cached_property
    def _live(self) -> queries.Live:
        with precisely(self._dtype):
            run: queries.Live = queries.live(self._decoder, jnp.asarray(self._prompt.tokens[None], jnp.int32))
        return run

    @cached_property
    def _heard(self) -> Float[Array, "ends position d_model"]:
        with precisely(self._dtype):
            heard: Array = _heard(self._decoder, jnp.ones(self._values.shape[:2], self._dtype), self._values)
        return heard


@eqx.filter_jit
def _attributions(
    decoder: Decoder,
    said: Float[Array, "writers position d_model"],
    layers: Int[Array, " targets"],
    positions: Int[Array, " targets"],
    directions: Float[Array, "targets d_model"],
) -> Float[Array, "targets writers position"]:
    """Of targets that are what is heard in a layer (one behind the last: the end) at a position, along a direction."""
    heard, back = jax.vjp(lambda amounts: _heard(decoder, amounts, said), jnp.ones(said.shape[:2], said.dtype))

    def one(layer: Array, position: Array, direction: Array) -> Array:
        found: Array = back(jnp.zeros_like(heard).at[layer, position].set(direction))[0]
        return found

    return jax.vmap(one)(layers, positions, directions)


@eqx.filter_jit
def _logit_directions(decoder: Decoder, end: Float[Array, " d_model"], tokens: Int[Array, " targets"]) -> Float[Array, "targets d_model"]:
    """The gradients of logits, less the mean of all, in the stream behind the last token; no token: that of the mean."""
    logits, back = jax.vjp(Way.of(HELD).decoder(decoder).logits, end)

    def one(token: Array) -> Array:
        found: Array = back(jax.nn.one_hot(token, len(logits), dtype=logits.dtype) - 1 / len(logits))[0]
        return found

    return jax.vmap(one)(tokens)


@eqx.filter_jit
def _heard(
    decoder: Decoder, amounts: Float[Array, "writers position"], said: Float[Array, "writers position d_model"]
) -> Float[Array, "ends position d_model"]:
    """What is heard in each layer (see `_layer`), and last the stream at the end, where the input and each MLP, or part of one, says this
    much of what it said. What heads and skips say is made anew."""
    decoder, spoken, heard = Way.of(HELD).decoder(decoder), amounts[..., None] * said, []
    stream = spoken[0]
    for stack, place in zip(decoder.stacks, decoder.places, strict=True):
        by_layer = spoken[place.writer : place.end_writer].reshape(place.n_layers, place.n_writers, *stream.shape)
        stream, of_stack = lax.scan(lambda stream, here: _layer(stream, *here), stream, (stack, by_layer))
        heard.append(of_stack)
    return jnp.concatenate([*heard, stream[None]])


def _layer(
    stream: Float[Array, "position d_model"], layer: Layer, spoken: Float[Array, "writers position d_model"]
) -> tuple[Float[Array, "position d_model"], Float[Array, "position d_model"]]:
    """The stream after a layer, and what its transcoder reads, or else what its MLP hears."""
    after = stream
    if layer.attention is not None:
        after = stream + layer.attention.write(Way.of(HELD).mix(layer.attention, layer.attention.project(stream[None])))
    heard = stream if layer.is_parallel else after
    of_mlp, split = spoken[layer.n_writers_before_mlp :], layer.splits.mlp
    if layer.mlp is None:
        return after, heard
    split = split.transcoder if isinstance(split, CrossLayerSplit) else split
    if isinstance(split, TranscoderSplit):
        dictionary = split.output.dictionary
        heard = transcoded(dictionary.reads, layer.mlp, heard)
        skipped = dictionary.affine(heard)
        of_mlp = of_mlp if skipped is None else of_mlp.at[-2].set(skipped)  # where it stands: before the error, which is last
    return layer.after_mlp(after, of_mlp), heard
