"""What a dictionary reads in the model's own run: the stream, what a component says or reads, what its heads mix, what its neurons are; and
what its features add to the logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuitgraph._dictionary import Neurons
from circuitgraph._pairs import PromptPairs
from circuitgraph._refinement import Refinement
from circuitgraph_jax._batch import Parts
from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._devices import precisely
from circuitgraph_jax._layer import Layer
from circuitgraph_jax._splits import projection, side_by_side, transcoded

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray


def width_of(decoder: Decoder, refinement: Refinement) -> int:
    """How many numbers the place has that a refinement's dictionary reads. The graph has the component."""
    number, reads = refinement.component.layer, refinement.dictionary.reads
    if reads not in ("attn_z", "neurons"):
        return int(decoder.embedding.shape[1])
    (stack,) = (stack for stack, place in zip(decoder.stacks, decoder.places, strict=True) if number in place.numbers)
    if reads == "neurons":
        assert stack.mlp is not None
        return int(stack.mlp.down.shape[-1])
    assert stack.attention is not None
    return stack.attention.n_heads * int(stack.attention.out_weights.shape[-2])


def logit_weights(decoder: Decoder, refinement: Refinement, features: Sequence[int]) -> Float[Array, "features vocabulary"]:
    """The direct effect on the logits of what features say at activation 1."""
    number, dictionary, chosen = refinement.component.layer, refinement.dictionary, np.asarray(features, dtype=int)
    if isinstance(dictionary, Neurons):
        mlp = decoder.layer(number).mlp
        assert mlp is not None
        return decoder.weights(mlp.down.T[chosen] * mlp.scale)
    rows = jnp.asarray(dictionary.rows(chosen), decoder.embedding.dtype)
    if dictionary.reads == "attn_z":
        attention = decoder.layer(number).attention
        assert attention is not None
        rows = rows @ projection(attention)
    return decoder.weights(rows)


def seen_by(parts: Parts, refinement: Refinement, pairs: PromptPairs) -> Iterator[Float[ndarray, "position width"]]:
    """For each clean prompt, then for each corrupted one; one by one, so that JAX compiles for each length once."""
    number, reads = refinement.component.layer, refinement.dictionary.reads
    with precisely(parts.dtype):
        layer = None if reads == "stream" else parts.decoder.layer(number)
    for ids in (*pairs.clean, *pairs.corrupted):
        with precisely(parts.dtype):
            stream = _streams(parts.decoder, jnp.asarray(ids, jnp.int32))[number]
            seen = stream if layer is None else _seen(layer, reads, stream)
        yield np.asarray(seen, dtype=np.float64)


@eqx.filter_jit
def _streams(decoder: Decoder, tokens: Int[Array, " position"]) -> Float[Array, "ends position d_model"]:
    return decoder.streams(tokens)


@eqx.filter_jit
def _seen(layer: Layer, reads: str, stream: Float[Array, "position d_model"]) -> Float[Array, "position width"]:
    """In a layer that the stream comes to."""
    after = stream
    if layer.attention is not None:
        attention = layer.attention
        mixed = attention.mix(attention.project(stream[None]))
        if reads == "attn_z":
            return side_by_side(mixed)
        said = attention.write(mixed)
        if reads == "attn_out":
            return said
        after = stream + said
    x, mlp = stream if layer.is_parallel else after, layer.mlp
    assert mlp is not None  # the graph has it
    if reads == "neurons":
        return mlp.inner(mlp.expand(x))
    return mlp(x) if reads == "mlp_out" else transcoded(reads, mlp, x)
