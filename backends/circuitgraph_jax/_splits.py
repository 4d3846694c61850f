"""Refined components: what each part says, from what the component's own joints compute. For one prompt, as the joints are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuitgraph._dictionary import Dictionary, Neurons
from circuitgraph._errors import CircuitGraphError
from circuitgraph._refinement import Refinement
from circuitgraph_jax._joints import MLP, Attention

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Inner = Callable[[MLP, tuple[Array, ...]], Array]  # of an MLP, `MLP.inner` or what a rule has in its place
Active = dict[int, Array]  # by layer, `[2, features, position]`: see `CrossLayerSplit`

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
        dictionary = replace(dictionary, later=None).on(lambda array: jnp.asarray(array, dtype))
        named = {field.name: getattr(dictionary, field.name) for field in fields(dictionary)}
        arrays = {name: value for name, value in named.items() if isinstance(value, Array)}
        kind = tuple((name, value) for name, value in named.items() if name not in (*arrays, *_NAMES))
        n_writers = len(dictionary.parts(refinement.features).writers(refinement.component))
        return cls(arrays, jnp.asarray(refinement.features, jnp.int32), kind, n_writers)

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
        return spread(f, self.arrays["decoder"][self.features])


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
        main, own = x[0], x[1:]
        whole = self.output(transcoded(self.output.dictionary.reads, mlp, main), mlp.finish(inner(mlp, mlp.expand(main))))
        return jnp.concatenate([self.output.decoded(self.activations(mlp, own)), whole[len(own) :]]) if len(own) else whole

    def activations(self, mlp: MLP, own: Float[Array, "features position d_model"]) -> Float[Array, "features position"]:
        """Of its features, from the inputs of their readers."""
        dictionary = self.output.dictionary
        f: Array = jax.vmap(lambda x, feature: dictionary.encode(transcoded(dictionary.reads, mlp, x), feature[None])[:, 0])(
            own, self.output.features
        )
        return f

    def activations_at(self, mlp: MLP, x: Float[Array, "position d_model"]) -> Float[Array, "features position"]:
        """The same where all of them read one input."""
        dictionary = self.output.dictionary
        f: Array = dictionary.encode(transcoded(dictionary.reads, mlp, x), self.output.features).T
        return f

    def constant(self, mlp: MLP) -> Float[Array, " d_model"] | None:
        return self.output.constant


class CrossLayerSplit(eqx.Module):
    """Divides an MLP by a layer of a cross-layer transcoder: its features, those of earlier layers that write here too, and what is left.

    The activations of features go from layer to layer as `[2, features, position]`: at what their own readers hear, which is what
    they say, and at what their MLP's reader hears, which errors are without. `earlier`: how many features each earlier layer has that write
    here; `rows` `[features, d_model]`: what they add here at activation 1. `is_kept`: whether its own are needed later.
    `layer` is in the structure, so that no two of them are stacked.
    """

    transcoder: TranscoderSplit
    rows: Float[Array, "earlier d_model"]
    earlier: tuple[tuple[int, int], ...] = eqx.field(static=True)
    layer: int = eqx.field(static=True)
    is_kept: bool = eqx.field(static=True)

    @classmethod
    def of(cls, refinement: Refinement, dtype: Any) -> CrossLayerSplit:
        layer, dictionary = refinement.component.layer, refinement.dictionary
        assert isinstance(dictionary, Dictionary)
        rows = np.concatenate([np.zeros((0, dictionary.decoder.shape[1])), *(one.rows_at(layer) for one in refinement.earlier)])
        return cls(
            TranscoderSplit(OutputSplit.of(refinement, dtype)),
            jnp.asarray(rows, dtype),
            tuple((one.component.layer, len(one.features)) for one in refinement.earlier),
            layer,
            is_kept=dictionary.n_later > 0 and len(refinement.features) > 0,
        )

    @property
    def n_readers(self) -> int:
        return self.transcoder.n_readers

    @property
    def n_writers(self) -> int:
        return self.transcoder.n_writers + int(self.rows.shape[-2])

    def __call__(
        self, mlp: MLP, x: Float[Array, "readers position d_model"], inner: Inner, active: Active
    ) -> tuple[Float[Array, "writers position d_model"], Active]:
        """As any transcoder; and what features are, with its own if somebody writes them later."""
        split, main = self.transcoder, x[0]
        whole, n = split(mlp, x, inner), self.transcoder.output.n_features
        earlier = [active[layer] for layer, _ in self.earlier]
        said, taken_off = jnp.concatenate(earlier, axis=1) if earlier else jnp.zeros((2, 0, len(main)), main.dtype)
        error = whole[-1] - taken_off.T @ self.rows
        parts = jnp.concatenate([whole[:n], spread(said, self.rows), whole[n:-1], error[None]])
        if not self.is_kept:
            return parts, active
        at_main = split.activations_at(mlp, main)
        own = at_main if len(x) == 1 else split.activations(mlp, x[1:])
        return parts, {**active, self.layer: jnp.stack([own, at_main])}

    def constant(self, mlp: MLP) -> Float[Array, " d_model"] | None:
        return self.transcoder.constant(mlp)


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
    mlp: MLPSplit | TranscoderSplit | CrossLayerSplit | NeuronSplit | None = None


def attention_split(refinement: Refinement, attention: Attention) -> AttentionSplit | MixedSplit:
    """Raises `CircuitGraphError` where what the heads mix cannot be followed to the stream."""
    output = OutputSplit.of(refinement, attention.out_weights.dtype)
    if refinement.dictionary.reads == "attn_out":
        return AttentionSplit(output)
    if attention.post_norm is not None:
        raise CircuitGraphError(f"refine {refinement.component}: what its heads mix goes through a norm; take a dictionary of attn_out")
    return MixedSplit(output)


def mlp_split(refinement: Refinement, mlp: MLP) -> MLPSplit | TranscoderSplit | CrossLayerSplit | NeuronSplit:
    """Raises `CircuitGraphError` where its neurons cannot be followed to the stream."""
    if refinement.is_cross_layer:
        return CrossLayerSplit.of(refinement, mlp.down.dtype)
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


def spread(f: Float[Array, "features position"], rows: Float[Array, "features d_model"]) -> Float[Array, "features position d_model"]:
    """What features say at these activations."""
    return f[..., None] * rows[:, None]


def side_by_side(mixed: Float[Array, "heads position head_dim"]) -> Float[Array, "position width"]:
    """The heads' mixed values, as the output projection reads them."""
    return jnp.moveaxis(mixed, 0, 1).reshape(mixed.shape[1], -1)


def projection(attention: Attention) -> Float[Array, "width d_model"]:
    """From the heads' mixed values to what they add to the stream."""
    return attention.out_weights.reshape(-1, attention.out_weights.shape[-1]) * attention.scale
