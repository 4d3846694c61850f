"""What the parts of refined components say, in numpy: the oracle for the backends' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._dictionary import Dictionary, Neurons
from circuitgraph._errors import CircuitGraphError
from circuitgraph._refinement import Refinement
from circuitgraph.testing._reference_parts import ReferenceAttention, ReferenceLayer, ReferenceMLP
from circuitgraph.testing._reference_rules import LIVE, Memory

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from circuitgraph.testing._reference_model import ReferenceModel

    Stream = Float[ndarray, "prompts position d_model"]
    Divided = tuple[list[Stream], Stream | float]  # what each part says, and the constant beside them
    Active = list[tuple[Stream, Stream]]  # what each feature is by its own reader, and by its MLP's, `[prompts, position, 1]`


def stream_parts(refinement: Refinement, x: Stream) -> Divided:
    """Of the stream itself."""
    return _divided(_dictionary(refinement), refinement.features, x, x)


def attention_parts(
    refinement: Refinement, attention: ReferenceAttention, mixed: Float[ndarray, "prompts position width"], said: Stream
) -> Divided:
    """Of an attention, by what its heads mixed or by what it says, biases included."""
    dictionary = _dictionary(refinement)
    if dictionary.reads == "attn_out":
        return _divided(dictionary, refinement.features, said, said)
    if attention.post_norm is not None:
        raise CircuitGraphError(f"refine {refinement.component}: what its heads mix goes through a norm; take a dictionary of attn_out")
    projection = attention.scale * np.concatenate([*attention.o], axis=1).T
    bias = 0.0 if attention.o_bias is None else attention.scale * attention.o_bias
    parts, constant = _divided(dictionary, refinement.features, mixed, mixed)
    return [part @ projection for part in parts], (0.0 if dictionary.constant is None else constant @ projection) + bias


def mlp_parts(
    refinement: Refinement, mlp: ReferenceMLP, x: Stream, own: Sequence[Stream], memory: Memory, active: dict[int, Active]
) -> Divided:
    """Of an MLP that reads `x`; a transcoder's features read their `own` inputs. `active`: what the features of earlier layers are, by
    layer, to which this one's are added."""
    dictionary, features = refinement.dictionary, [*refinement.features]
    if isinstance(dictionary, Neurons):
        _check_neurons(refinement, mlp)
        hidden = mlp.hidden(x, memory)
        parts = [mlp.scale * hidden[..., n, None] * mlp.down[:, n] for n in features]
        if refinement.parts.has_error:
            return [*parts, mlp.out(hidden, memory) - sum(parts)], 0.0
        return parts, mlp.out(np.zeros_like(hidden[0, 0]))
    said = mlp(x, memory)
    if not dictionary.is_transcoder:
        return _divided(dictionary, features, said, said)
    seen = _normed(dictionary, mlp, x, memory)
    parts, constant = _divided(dictionary, features, seen, said)
    heard = [dictionary.encode(_normed(dictionary, mlp, stream, memory), [f]) for f, stream in zip(features, own, strict=True)]
    active[refinement.component.layer] = [*zip(heard, (dictionary.encode(seen, [f]) for f in features), strict=True)]
    of_earlier, rest = [], parts[len(features) :]
    for one in refinement.earlier:
        for (f, f_of_mlp), row in zip(active[one.component.layer], one.rows_at(refinement.component.layer), strict=True):
            of_earlier.append(f * row)
            rest[-1] = rest[-1] - f_of_mlp * row
    return [*(f * dictionary.decoder[n] for f, n in zip(heard, features, strict=True)), *of_earlier, *rest], constant


def seen_by(
    model: ReferenceModel, refinement: Refinement, tokens: Int[ndarray, "prompts position"]
) -> Float[ndarray, "prompts position width"]:
    """What the dictionary of a refinement reads in the model's own run."""
    stream, number, reads = model.embed(tokens), refinement.component.layer, refinement.dictionary.reads
    for layer in model.layers[:number]:
        stream = layer(stream)
    if reads == "stream":
        return stream
    layer, after = model.layers[number], stream
    if layer.attention is not None:
        after = stream + layer.attention(stream)
        if reads == "attn_out":
            return layer.attention(stream)
        if reads == "attn_z":
            return np.concatenate([layer.attention.mixed(h, stream, stream, stream) for h in range(layer.attention.n_heads)], axis=-1)
    x, mlp = stream if layer.is_parallel else after, layer.mlp
    assert mlp is not None  # the graph has it
    if isinstance(refinement.dictionary, Neurons):
        return mlp.hidden(x)
    return mlp(x) if reads == "mlp_out" else _normed(refinement.dictionary, mlp, x, LIVE)


def logit_weights(model: ReferenceModel, refinement: Refinement, features: Sequence[int]) -> Float[ndarray, "features vocabulary"]:
    """What some features say at activation 1, through the gain of the final norm and the unembedding, less the mean."""
    layer = model.layers[min(refinement.component.layer, len(model.layers) - 1)]
    rows = _rows(layer, refinement, [*features])
    if model.final_norm is not None:
        centred = rows - rows.mean(axis=-1, keepdims=True) if model.final_norm.kind == "layer" else rows
        rows = centred * model.final_norm.gain
    weights: Float[ndarray, "features vocabulary"] = model.logit_scale * (rows @ model.unembedding.T)
    weights -= weights.mean(axis=1, keepdims=True)
    return weights


def _rows(layer: ReferenceLayer, refinement: Refinement, features: list[int]) -> Float[ndarray, "features d_model"]:
    """What features add to the stream at activation 1."""
    if isinstance(refinement.dictionary, Neurons):
        assert layer.mlp is not None
        neurons: Float[ndarray, "features d_model"] = layer.mlp.scale * layer.mlp.down.T[features]
        return neurons
    rows: Float[ndarray, "features d_model"] = refinement.dictionary.rows(features)
    if refinement.dictionary.reads == "attn_z":
        assert layer.attention is not None
        rows = layer.attention.scale * rows @ np.concatenate([*layer.attention.o], axis=1).T
    return rows


def width_of(model: ReferenceModel, refinement: Refinement) -> int:
    """How many numbers the place has that a refinement's dictionary reads. The graph has the component."""
    return int(seen_by(model, refinement, np.zeros((1, 1), dtype=int)).shape[-1])


def _divided(dictionary: Dictionary, features: Sequence[int], seen: Stream, said: Stream) -> Divided:
    """Features, skip if there is one, error: they and the constant add up to `said`."""
    chosen, scale, affine = [*features], dictionary.output_scale(seen), dictionary.affine(seen)
    f = dictionary.encode(seen, chosen) * (1.0 if scale is None else scale)
    parts = [f[..., i, None] * dictionary.decoder[n] for i, n in enumerate(chosen)] + ([] if affine is None else [affine])
    constant = 0.0 if dictionary.constant is None else dictionary.constant
    return [*parts, said - sum(parts) - constant], constant


def _normed(dictionary: Dictionary, mlp: ReferenceMLP, x: Stream, memory: Memory) -> Stream:
    """What a transcoder reads of an MLP's input."""
    if dictionary.reads == "mlp_stream" or mlp.norm is None:
        return x
    norm = mlp.norm
    if dictionary.reads == "mlp_normalized":
        norm = replace(norm, gain=np.ones_like(norm.gain), bias=None)
    return norm(x, memory)


def _dictionary(refinement: Refinement) -> Dictionary:
    assert isinstance(refinement.dictionary, Dictionary)  # neurons are an MLP's
    return refinement.dictionary


def _check_neurons(refinement: Refinement, mlp: ReferenceMLP) -> None:
    if mlp.post_norm is not None:
        raise CircuitGraphError(f"refine {refinement.component}: a norm after the MLP mixes its neurons; take a dictionary of mlp_out")
