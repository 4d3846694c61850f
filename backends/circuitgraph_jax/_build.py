"""From a description and the checkpoint's tensors to a `Decoder`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from circuitgraph import _architecture as described
from circuitgraph._errors import TraceError
from circuitgraph._tensors import tensor
from circuitgraph_jax import _joints as joints
from circuitgraph_jax._decoder import Decoder, stacked
from circuitgraph_jax._layer import Layer

if TYPE_CHECKING:
    from jax import Array

_EVERYTHING = np.iinfo(np.int32).max  # a window that shows all positions


def build(architecture: described.Architecture, tensors: Mapping[str, Any], *, per_head_kv: bool, dtype: str) -> Decoder:
    """The model of a description. Raises `TraceError` naming the tensor that is missing or the joint that is not described."""
    return _Builder(architecture, tensors, per_head_kv, jnp.dtype(dtype)).decoder()


@dataclass(frozen=True)
class _Builder:
    """`dtype` is that of the weights; `wide`, at least float32, that of numbers that are applied in it."""

    architecture: described.Architecture
    tensors: Mapping[str, Any]
    per_head_kv: bool
    dtype: Any

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.dtype, jnp.float32)

    def decoder(self) -> Decoder:
        architecture = self.architecture
        read, written = (tensor(self.tensors, f"{path}.weight") for path in (architecture.embedding, architecture.unembedding))
        embedding = self._array(read)
        unembedding = embedding if written is read else self._array(written)
        self._check_ends(embedding, unembedding)
        positions = None
        if architecture.positions is not None:
            positions = self._array(tensor(self.tensors, f"{architecture.positions}.weight")[architecture.first_position :])
        return Decoder(
            embedding=embedding,
            embedding_scale=self._number(architecture.embedding_scale),
            positions=positions,
            embedding_norm=self._norm(architecture.embedding_norm),
            stacks=stacked([self._layer(block) for block in architecture.blocks]),
            final_norm=self._norm(architecture.final_norm),
            unembedding=unembedding,
            unembedding_bias=self._bias(architecture.unembedding),
            logit_scale=self._number(architecture.logit_scale),
            logit_softcap=None if architecture.logit_softcap is None else self._number(architecture.logit_softcap),
            visible=jnp.asarray(architecture.graph(per_head_kv=self.per_head_kv).visible),
        )

    def _check_ends(self, embedding: Array, unembedding: Array) -> None:
        """Raises `TraceError` where an end of the model is not as wide as the description says; tokens that are only read are fine."""
        architecture = self.architecture
        n, d_model = architecture.vocabulary, architecture.d_model
        for path, weight, fits in (
            (architecture.unembedding, unembedding, unembedding.shape == (n, d_model)),
            (architecture.embedding, embedding, embedding.shape[0] >= n and embedding.shape[1:] == (d_model,)),
        ):
            if not fits:
                raise TraceError(f"{path}.weight has shape {weight.shape}; the description asks for {(n, d_model)}, [vocabulary, d_model]")

    def _layer(self, block: described.Block) -> Layer:
        attention = None if block.attention is None else self._attention(block.attention)
        return Layer(attention, None if block.mlp is None else self._mlp(block.mlp), block.parallel)

    def _attention(self, attention: described.Attention) -> joints.Attention:
        pattern = attention.pattern
        if pattern is None:
            raise _undescribed(attention.path, "AttentionPattern", "pattern")
        projections = (attention.q, attention.k, attention.v)
        if len({p.head_dim for p in projections}) > 1:
            raise TraceError(f"{attention.path}: queries, keys and values differ in head_dim, which this engine does not read yet")
        n_heads, n_groups, head_dim = attention.q.n_heads, attention.k.n_heads, attention.q.head_dim
        members = n_heads // n_groups
        copies = members if self.per_head_kv else 1
        weights = [self._rows(p, copies if p is not attention.q else 1) for p in projections]
        biases = [self._row_biases(p, copies if p is not attention.q else 1) for p in projections]
        out = self._linear(attention.o)
        out_bias = self._bias(attention.o)
        if out_bias is not None and attention.post_norm is not None:
            raise TraceError(f"{attention.o}: an output bias under a post-norm belongs to no head; this engine does not read it yet")
        return joints.Attention(
            norm=self._norm(attention.norm),
            weights=self._array(np.concatenate(weights)),
            biases=None if all(b is None for b in biases) else self._array(_joined(biases, weights)),
            q_norm=self._head_norm(pattern.q_norm, n_groups, members, head_dim),
            k_norm=self._head_norm(pattern.k_norm, n_groups, 1, head_dim),
            rotation=self._rotation(pattern.rotary),
            pattern_scale=self._wide(pattern.scale),
            softcap=None if pattern.softcap is None else self._wide(pattern.softcap),
            window=jnp.asarray(pattern.window or _EVERYTHING, jnp.int32),
            out_weights=self._array(out.T.reshape(n_heads, head_dim, -1)),
            out_bias=out_bias,
            post_norm=self._norm(attention.post_norm),
            scale=self._number(attention.scale),
            n_groups=n_groups,
            members=members,
            kv_readers=copies,
        )

    def _mlp(self, mlp: described.MLP) -> joints.MLP:
        inside = mlp.feed_forward
        if inside is None:
            raise _undescribed(mlp.modules[0], "FeedForward", "feed_forward")
        if inside.activation not in joints.ACTIVATIONS:
            raise TraceError(f"{mlp.modules[0]}: its activation is {inside.activation!r}; expected one of {', '.join(joints.ACTIVATIONS)}")
        gate = None if inside.gate is None else self._rows(inside.gate, 1)[0]
        gate_bias = None if inside.gate is None else self._row_biases(inside.gate, 1)
        up_bias = self._row_biases(inside.up, 1)
        return joints.MLP(
            norm=self._norm(mlp.norm),
            up=self._array(self._rows(inside.up, 1)[0]),
            up_bias=None if up_bias is None else self._array(up_bias[0]),
            gate=None if gate is None else self._array(gate),
            gate_bias=None if gate_bias is None else self._array(gate_bias[0]),
            down=self._array(self._linear(inside.down)),
            down_bias=self._bias(inside.down),
            post_norm=self._norm(mlp.post_norm),
            scale=self._number(mlp.scale),
            activation=inside.activation,
        )

    def _rotation(self, rotary: described.Rotary | None) -> joints.Rotation | None:
        """Where some layers turn and others do not, those that do not get frequencies of 0, so that all are of one shape."""
        patterns = [block.attention.pattern for block in self.architecture.blocks if block.attention and block.attention.pattern]
        some = next((pattern.rotary for pattern in patterns if pattern.rotary is not None), None)
        if rotary is None and some is not None:
            rotary = described.Rotary((0.0,) * len(some.frequencies), some.pairs)
        if rotary is None:
            return None
        return joints.Rotation(jnp.asarray(rotary.frequencies, self.wide), self._wide(rotary.scale), rotary.pairs == "interleaved")

    def _norm(self, norm: described.Norm | None) -> joints.Norm | None:
        if norm is None:
            return None
        weight = self._gain(norm)
        return joints.Norm(weight, self._bias(norm.path), self._wide(norm.eps), norm.kind == "layer")

    def _head_norm(self, norm: described.Norm | None, groups: int, members: int, head_dim: int) -> joints.Norm | None:
        """A norm of queries or keys `[groups, members, position, head_dim]`: per head, or over all heads of a kind."""
        if norm is None:
            return None
        gain, bias = self._gain(norm), self._bias(norm.path)
        is_coupled = gain is not None and gain.shape == (groups * members * head_dim,) and groups * members > 1
        axes = (0, 1, 3) if is_coupled and members > 1 else (0, 3) if is_coupled else (-1,)

        def shaped(array: Array | None) -> Array | None:
            if array is None:
                return None
            return array.reshape(1, 1, 1, head_dim) if array.size == head_dim else array.reshape(groups, members, 1, head_dim)

        return joints.Norm(shaped(gain), shaped(bias), self._wide(norm.eps), norm.kind == "layer", axes)

    def _gain(self, norm: described.Norm) -> Array | None:
        """A norm without a weight counts as weight 0 and offset 1."""
        if norm.gain_offset and f"{norm.path}.weight" not in self.tensors:
            return None
        return self._array(np.asarray(tensor(self.tensors, f"{norm.path}.weight"), np.float64) + norm.gain_offset)

    def _linear(self, path: str) -> np.ndarray[Any, Any]:
        """The weight of a linear module, `[out, in]`."""
        weight = np.asarray(tensor(self.tensors, f"{path}.weight"))
        if weight.ndim != 2:
            raise TraceError(f"{path}.weight has shape {weight.shape}; expected a matrix")
        return weight.T if self.architecture.is_transposed else weight

    def _rows(self, projection: described.Projection, copies: int) -> np.ndarray[Any, Any]:
        """`[heads, head_dim, d_model]`, every head `copies` times."""
        weight = self._linear(projection.path)
        features = np.array([[*projection.features(head)] for head in range(projection.n_heads)])
        if features.max() >= len(weight):
            raise TraceError(f"{projection.path}: it has {len(weight)} outputs, and the description asks for number {features.max()}")
        return np.repeat(weight[features], copies, axis=0)

    def _row_biases(self, projection: described.Projection, copies: int) -> np.ndarray[Any, Any] | None:
        bias = self.tensors.get(f"{projection.path}.bias")
        if bias is None:
            return None
        features = np.array([[*projection.features(head)] for head in range(projection.n_heads)])
        return np.repeat(np.asarray(bias)[features], copies, axis=0)

    def _bias(self, path: str) -> Array | None:
        bias = self.tensors.get(f"{path}.bias")
        return None if bias is None else self._array(bias)

    def _array(self, values: Any) -> Array:
        return jnp.asarray(np.asarray(values), self.dtype)

    def _number(self, value: float) -> Array:
        return jnp.asarray(value, self.dtype)

    def _wide(self, value: float) -> Array:
        return jnp.asarray(value, self.wide)


def _joined(biases: list[np.ndarray[Any, Any] | None], weights: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Projections' biases side by side, zeros where a projection has none."""
    return np.concatenate([np.zeros(w.shape[:2], w.dtype) if b is None else b for b, w in zip(biases, weights, strict=True)])


def _undescribed(path: str, kind: str, field: str) -> TraceError:
    return TraceError(
        f"{path}: the JAX backend builds the model anew, and the description does not say what happens inside this joint; give its "
        f"{field} (circuitgraph.architecture.{kind}), or, for a PyTorch model, use backend='torch', which runs the model's own code"
    )
