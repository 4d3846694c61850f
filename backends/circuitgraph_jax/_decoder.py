"""`Decoder`: a whole model as one Equinox module, its layers stacked so that `lax.scan` runs over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from circuitgraph._refinement import Refinement
from circuitgraph_jax._joints import Norm
from circuitgraph_jax._layer import Layer
from circuitgraph_jax._splits import Active

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray


class Decoder(eqx.Module):
    """A decoder-only transformer. Each of `stacks` holds consecutive layers of one shape, their arrays with a leading axis.

    `visible[r, w]`: reader `r` sees writer `w`.
    """

    embedding: Float[Array, "vocabulary d_model"]
    embedding_scale: Float[Array, ""]
    positions: Float[Array, "position d_model"] | None
    embedding_norm: Norm | None
    stacks: tuple[Layer, ...]
    final_norm: Norm | None
    unembedding: Float[Array, "vocabulary d_model"]
    unembedding_bias: Float[Array, " vocabulary"] | None
    logit_scale: Float[Array, ""]
    logit_softcap: Float[Array, ""] | None
    visible: Bool[Array, "readers writers"]

    def __call__(self, tokens: Int[Array, " position"]) -> Float[Array, "position vocabulary"]:
        """The logits, computed as any decoder does: one stream, no graph."""
        return self.logits(self.stream(tokens))

    def stream(self, tokens: Int[Array, " position"]) -> Float[Array, "position d_model"]:
        """The residual stream after the last layer."""
        stream = self.embed(tokens)
        for stack in self.stacks:
            stream, _ = lax.scan(lambda x, layer: (layer(x), None), stream, stack)
        return stream

    def streams(self, tokens: Int[Array, " position"]) -> Float[Array, "ends position d_model"]:
        """The residual stream before each layer and after the last."""
        stream, ends = self.embed(tokens), []
        for stack in self.stacks:
            stream, before = lax.scan(lambda x, layer: (layer(x), x), stream, stack)
            ends.append(before)
        return jnp.concatenate([*ends, stream[None]])

    def embed(self, tokens: Int[Array, " position"]) -> Float[Array, "position d_model"]:
        """What the writer `input` says."""
        x = self.embedding[tokens] * self.embedding_scale
        x = x if self.positions is None else x + self.positions[: len(tokens)]
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def logits(self, x: Float[Array, "... d_model"], tokens: Int[Array, " tokens"] | None = None) -> Float[Array, "... vocabulary"]:
        """From the final stream, all of them or those of some tokens."""
        weight, bias = self.unembedding, self.unembedding_bias
        if tokens is not None:
            weight, bias = weight[tokens], None if bias is None else bias[tokens]
        y = (x if self.final_norm is None else self.final_norm(x)) @ weight.T
        y = (y if bias is None else y + bias) * self.logit_scale
        return y if self.logit_softcap is None else jnp.tanh(y / self.logit_softcap) * self.logit_softcap

    def weights(self, vectors: Float[Array, "some d_model"]) -> Float[Array, "some vocabulary"]:
        """What vectors add to the logits with the final norm's scale at 1, before soft-capping."""
        return (vectors if self.final_norm is None else self.final_norm.unscaled(vectors)) @ self.unembedding.T * self.logit_scale

    def refined(self, refinements: Sequence[Refinement], visible: Bool[ndarray, "readers writers"]) -> Decoder:
        """With some components in parts, which stay where they are: the stacks that have none are shared with this decoder."""
        stacks: list[Layer] = []
        for stack, place in zip(self.stacks, self.places, strict=True):
            here = [one for one in refinements if one.component.layer in place.numbers]
            stacks += stacked(self._divided(unstacked(stack), here, place.layer)) if here else [stack]
        behind = [one for one in refinements if one.component.layer == self.n_layers]
        stacks += stacked(self._divided([Layer(None, None, is_parallel=False)], behind, self.n_layers)) if behind else []
        return replace(self, stacks=tuple(stacks), visible=jnp.asarray(visible))

    def _divided(self, layers: list[Layer], refinements: Sequence[Refinement], first: int) -> list[Layer]:
        for one in refinements:
            at = one.component.layer - first
            layers[at] = layers[at].refined(one, self.embedding.dtype)
        return layers

    def nothing_active(self, like: Float[Array, "position d_model"]) -> Active:
        """Zeros for what features are that write to later layers, by layer."""
        counts = {layer: n for stack in self.stacks for layer, n in stack.n_active.items()}
        return {layer: jnp.zeros((2, n, len(like)), like.dtype) for layer, n in counts.items()}

    def layer(self, number: int) -> Layer:
        """One layer by itself."""
        at = next(i for i, place in enumerate(self.places) if number in place.numbers)
        return unstacked(self.stacks[at])[number - self.places[at].layer]

    @property
    def n_layers(self) -> int:
        """With the one that stands for a stream divided after the last."""
        return self.places[-1].numbers.stop

    @property
    def places(self) -> tuple[Place, ...]:
        """Where each stack lies."""
        places: list[Place] = []
        for stack in self.stacks:
            places.append(Place.of(stack, places[-1] if places else None))
        return tuple(places)


@dataclass(frozen=True)
class Place:
    """The first layer, reader and writer of a stack, how many layers it has, and how many readers and writers each of them."""

    layer: int
    reader: int
    writer: int
    n_layers: int
    n_readers: int
    n_writers: int

    @classmethod
    def of(cls, stack: Layer, before: Place | None) -> Place:
        starts = (before.layer + before.n_layers, before.end_reader, before.end_writer) if before else (0, 0, 1)
        return cls(*starts, int(jax.tree.leaves(stack)[0].shape[0]), stack.n_readers, stack.n_writers)

    @property
    def numbers(self) -> range:
        """Those of its layers."""
        return range(self.layer, self.layer + self.n_layers)

    @property
    def layers(self) -> Int[Array, " layers"]:
        """The same as an array."""
        return self.layer + jnp.arange(self.n_layers)

    @property
    def first_writers(self) -> Int[Array, " layers"]:
        """The first writer of each layer."""
        return self.writer + jnp.arange(self.n_layers) * self.n_writers

    @property
    def end_reader(self) -> int:
        return self.reader + self.n_layers * self.n_readers

    @property
    def end_writer(self) -> int:
        return self.writer + self.n_layers * self.n_writers


PIECES, SHORTEST = 4, 3  # a run over many layers is cut, so that those of the first pieces read from a smaller bank


def stacked(layers: list[Layer], join: Callable[..., Array] = lambda *arrays: jnp.stack(arrays)) -> tuple[Layer, ...]:
    """Consecutive layers whose arrays have the same shapes, stacked."""
    longest = max(SHORTEST, -(-len(layers) // PIECES))
    groups: list[list[Layer]] = []
    for layer in layers:
        if groups and len(groups[-1]) < longest and _shape(groups[-1][0]) == _shape(layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return tuple(jax.tree.map(join, *group) for group in groups)


def unstacked(stack: Layer) -> list[Layer]:
    """The layers of a stack one by one."""
    n_layers = len(jax.tree.leaves(stack)[0])
    return [jax.tree.map(lambda a, at=at: a[at], stack) for at in range(n_layers)]


def _shape(layer: Layer) -> object:
    return jax.tree.structure(layer), [(a.shape, a.dtype) for a in jax.tree.leaves(layer)]
