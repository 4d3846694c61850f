"""Refined components: what each part says, from what the component's own joints compute. For one prompt, as the joints are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from circuitgraph._dictionary import Dictionary, Neurons
from circuitgraph._errors import CircuitGraphError
from circuitgraph._refinement import Refinement
from circuitgraph_jax._joints import MLP, Attention

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Inner = Callable[[MLP, tuple[Array, ...]], Array]  # of an MLP, `MLP.inner` or what a rule has in its place

_NAMES = ("name", "layer", "model")  # of a dictionary: they change nothing that is computed, so nothing is compiled for them


class OutputSplit(eqx.Module):
    """Divides vectors by a dictionary of them: features, a skip if there is one, and the rest. `constant` is beside them, of nobody.

    `arrays` are the dictionary's and `kind` its other fields, so that layers with dictionaries of one shape can be stacked.
    """

    arrays: dict[str, Array]
    features: Int[Array, " features"]
    kind: tuple[tuple[str, Any], ...] = eqx.field(static=True)
    n_writers: int = eqx.field(static=True)

    @classmethod
    def of(cls, refinement: Refinement, dtype: Any) -> OutputSplit:
        dictionary = refinement.dictionary
        assert isinstance(dictionary, Dictionary)  # neurons are an MLP's, and have a split of their own
        dictionary = dictionary.on(lambda array: jnp.asarray(array, dtype))
        named = {field.name: getattr(dictionary, field.name) for field in fields(dictionary)}
        arrays = {name: value for name, value in named.items() if isinstance(value, Array)}
        kind = tuple((name, value) for name, value in named.items() if name not in (*arrays, *_NAMES))
        return cls(arrays, jnp.asarray(refinement.features, jnp.int32), kind, len(refinement.parts.writers(refinement.component)))

    @property
    def dictionary(self) -> Dictionary:
        given: dict[str, Any] = {**self.arrays, **dict(self.kind)}
        return Dictionary(**given)

    @property
    def n_features(self) -> int:
        return int(self.features.shape[-1])

    @property
    def constant(self) -> Float[Array, " d_model"] | None:
        constant: Array | None = self.dictionary.constant
        return constant

    def __call__(
        self, seen: Float[Array, "position d_in"], said: Float[Array, "position d_model"]
    ) -> Float[Array, "writers position d_model"]:
        """Of what was `said`, by what the dictionary has `seen` (which is the same but for a transcoder)."""
        dictionary = self.dictionary
        scale, affine = dictionary.output_scale(seen), dictionary.affine(seen)
        f = dictionary.encode(seen, self.features)
        parts = self.decoded((f if scale is None else f * scale).T)
        parts = parts if affine is None else jnp.concatenate([parts, affine[None]])
        rest = said - parts.sum(0)
        return jnp.concatenate([parts, (rest if self.constant is None else rest - self.constant)[None]])

    def decoded(self, f: Float[Array, "features position"]) -> Float[Array, "features position d_model"]:
        """What features say at these activations."""
        return f[..., None] * self.arrays["decoder"][self.features][:, None]


class AttentionSplit(eqx.Module):
    """Divides an attention by a dictionary of what it says, biases included."""

    output: OutputSplit

    def __call__(self, attention: Attention, mixed: Float[Array, "heads position head_dim"]) -> Float[Array, "writers position d_model"]:
        said = attention.write(mixed)
        return self.output(said, said)

    def constant(self, attention: Attention) -> Float[Array, " d_model"] | None:
        """What the attention adds to the stream that is no part of it."""
        return self.output.constant


class MixedSplit(eqx.Module):
    """Divides an attention by a dictionary of what its heads mix, which goes through the output projection after that."""

    output: OutputSplit

    def __call__(self, attention: Attention, mixed: Float[Array, "heads position head_dim"]) -> Float[Array, "writers position d_model"]:
        z = side_by_side(mixed)
        return self.output(z, z) @ projection(attention)

    def constant(self, attention: Attention) -> Float[Array, " d_model"] | None:
        said, own = self.output.constant, attention.constant
        if said is None:
            return own
        projected = said @ projection(attention)
        return projected if own is None else projected + own


class MLPSplit(eqx.Module):
    """Divides an MLP by a dictionary of what it says."""

    output: OutputSplit

    @property
    def n_readers(self) -> int:
        return 1

    @property
    def n_writers(self) -> int:
        return self.output.n_writers

    def __call__(self, mlp: MLP, x: Float[Array, "readers position d_model"], inner: Inner) -> Float[Array, "writers position d_model"]:
        """From the readers' inputs, or the one that all of them share."""
        said = mlp.finish(inner(mlp, mlp.expand(x[0])))
        return self.output(said, said)

    def constant(self, mlp: MLP) -> Float[Array, " d_model"] | None:
        """What the MLP adds to the stream that is no part of it."""
        return self.output.constant


class TranscoderSplit(eqx.Module):
    """Divides an MLP by a transcoder, each of whose features has a reader of its own, after that of the MLP."""

    output: OutputSplit

    @property
    def n_readers(self) -> int:
        return 1 + self.output.n_features

    @property
    def n_writers(self) -> int:
        return self.output.n_writers

    def __call__(self, mlp: MLP, x: Float[Array, "readers position d_model"], inner: Inner) -> Float[Array, "writers position d_model"]:
        main, own, reads = x[0], x[1:], self.output.dictionary.reads
        whole = self.output(transcoded(reads, mlp, main), mlp.finish(inner(mlp, mlp.expand(main))))
        if not len(own):
            return whole
        encode = self.output.dictionary.encode
        f: Array = jax.vmap(lambda x, feature: encode(transcoded(reads, mlp, x), feature[None])[:, 0])(own, self.output.features)
        return jnp.concatenate([self.output.decoded(f), whole[len(own) :]])

    def constant(self, mlp: MLP) -> Float[Array, " d_model"] | None:
        return self.output.constant


class NeuronSplit(eqx.Module):
    """Divides an MLP by its neurons: what its last weights read, one number at a time. Without an error all of them are there."""

    neurons: Int[Array, " neurons"]
    has_error: bool = eqx.field(static=True)

    @property
    def n_readers(self) -> int:
        return 1

    @property
    def n_writers(self) -> int:
        return int(self.neurons.shape[-1]) + self.has_error

    def __call__(self, mlp: MLP, x: Float[Array, "readers position d_model"], inner: Inner) -> Float[Array, "writers position d_model"]:
        hidden = inner(mlp, mlp.expand(x[0]))
        rows = mlp.down[:, self.neurons].T * mlp.scale
        parts = hidden[:, self.neurons].T[..., None] * rows[:, None]
        return jnp.concatenate([parts, (mlp.finish(hidden) - parts.sum(0))[None]]) if self.has_error else parts

    def constant(self, mlp: MLP) -> Float[Array, " d_model"] | None:
        return None if self.has_error or mlp.down_bias is None else mlp.down_bias * mlp.scale


class Splits(eqx.Module):
    """The refined components of one layer."""

    stream: OutputSplit | None = None
    attention: AttentionSplit | MixedSplit | None = None
    mlp: MLPSplit | TranscoderSplit | NeuronSplit | None = None


def attention_split(refinement: Refinement, attention: Attention) -> AttentionSplit | MixedSplit:
    """Raises `CircuitGraphError` where what the heads mix cannot be followed to the stream."""
    output = OutputSplit.of(refinement, attention.out_weights.dtype)
    if refinement.dictionary.reads == "attn_out":
        return AttentionSplit(output)
    if attention.post_norm is not None:
        raise CircuitGraphError(f"refine {refinement.component}: what its heads mix goes through a norm; take a dictionary of attn_out")
    return MixedSplit(output)


def mlp_split(refinement: Refinement, mlp: MLP) -> MLPSplit | TranscoderSplit | NeuronSplit:
    """Raises `CircuitGraphError` where its neurons cannot be followed to the stream."""
    if not isinstance(refinement.dictionary, Neurons):
        output = OutputSplit.of(refinement, mlp.down.dtype)
        return TranscoderSplit(output) if refinement.dictionary.is_transcoder else MLPSplit(output)
    if mlp.post_norm is not None:
        raise CircuitGraphError(f"refine {refinement.component}: a norm after the MLP mixes its neurons; take a dictionary of mlp_out")
    return NeuronSplit(jnp.asarray(refinement.features, jnp.int32), refinement.parts.has_error)


def transcoded(reads: str, mlp: MLP, x: Float[Array, "position d_model"]) -> Float[Array, "position d_model"]:
    """What a transcoder reads of an MLP's input `x`: that itself, its norm, or its norm without gain and bias."""
    if reads == "mlp_stream" or mlp.norm is None:
        return x
    return mlp.norm(x) if reads == "mlp_in" else mlp.norm.bare(x)


def side_by_side(mixed: Float[Array, "heads position head_dim"]) -> Float[Array, "position width"]:
    """The heads' mixed values, as the output projection reads them."""
    return jnp.moveaxis(mixed, 0, 1).reshape(mixed.shape[1], -1)


def projection(attention: Attention) -> Float[Array, "width d_model"]:
    """From the heads' mixed values to what they add to the stream."""
    return attention.out_weights.reshape(-1, attention.out_weights.shape[-1]) * attention.scale
