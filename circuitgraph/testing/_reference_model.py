"""`ReferenceModel`: a small decoder given by plain float64 arrays."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from circuitgraph._engine import Source, SourceKind
from circuitgraph._errors import TaskError
from circuitgraph._graph import Graph, Layer, transformer_graph
from circuitgraph._metrics import Metric
from circuitgraph._pairs import PromptPairs
from circuitgraph._refinement import Refinement, refined
from circuitgraph.testing._reference_parts import Activation, ReferenceAttention, ReferenceLayer, ReferenceMLP, ReferenceNorm
from circuitgraph.testing._reference_rules import LIVE, Memory

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from circuitgraph.testing._reference_engine import ReferenceEngine
    from circuitgraph.testing._reference_trace import ReferenceTrace


@dataclass(frozen=True, eq=False)
class ReferenceModel:
    """A transformer as arrays. The logits are `softcap(logit_scale * unembedding @ final_norm(stream))`.

    `splits_input`: its graph has token and position embeddings as two writers, `tok` and `pos`. `refinements`: components that its graph
    has in parts; the model is the same.

    >>> model = ReferenceModel.random(seed=0, n_layers=1, n_heads=2)
    >>> model.graph()
    Graph(4 writers, 8 readers, 13 edges, 5 nodes)
    >>> model.forward(np.array([[1, 2, 3]])).shape
    (1, 3, 13)
    """

    embedding: Float[ndarray, "vocabulary d_model"]
    layers: tuple[ReferenceLayer, ...]
    unembedding: Float[ndarray, "outputs d_model"]
    positions: Float[ndarray, "position d_model"] | None = None
    final_norm: ReferenceNorm | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    name: str = "reference"
    splits_input: bool = False
    refinements: tuple[Refinement, ...] = ()

    @property
    def vocabulary(self) -> int:
        return len(self.embedding)

    def graph(self, *, per_head_kv: bool = False) -> Graph:
        """Its writers and readers. `per_head_kv` gives every head its own `k` and `v` reader."""
        layers = [_graph_layer(layer) for layer in self.layers]
        return refined(transformer_graph(layers, per_head_kv=per_head_kv, splits_input=self.splits_input), self.refinements)

    def bind(
        self, pairs: PromptPairs, metric: Metric | str, source: Source | SourceKind = "corrupted", *, per_head_kv: bool = False
    ) -> ReferenceEngine:
        """The engine that answers questions about these prompts."""
        return self.traced(per_head_kv=per_head_kv).bind(pairs, metric, source)

    def traced(self, *, per_head_kv: bool = False) -> ReferenceTrace:
        """This model as a backend's `trace` would return it."""
        from circuitgraph.testing._reference_trace import ReferenceTrace

        return ReferenceTrace(self, per_head_kv)

    def embed(self, tokens: Int[ndarray, "prompts position"]) -> Float[ndarray, "prompts position d_model"]:
        """Token and position embeddings together. Raises `TaskError` for more tokens than there are positions."""
        x: Float[ndarray, "prompts position d_model"] = self.inputs(tokens).sum(axis=-3)
        return x

    def inputs(self, tokens: Int[ndarray, "prompts position"]) -> Float[ndarray, "prompts inputs position d_model"]:
        """What the writer `input` says, or the two writers `tok` and `pos`. Raises `TaskError` as `embed` does."""
        if self.positions is not None and tokens.shape[-1] > len(self.positions):
            raise TaskError(
                f"the model does not take prompts of {tokens.shape[-1]} tokens: it has learned positions for {len(self.positions)}"
            )
        said = self.embedding_scale * self.embedding[tokens]
        at = np.zeros_like(said) + (0.0 if self.positions is None else self.positions[: tokens.shape[-1]])
        return np.stack([said, at] if self.splits_input else [said + at], axis=-3)

    def unembed(self, stream: Float[ndarray, "*batch d_model"], memory: Memory = LIVE) -> Float[ndarray, "*batch vocabulary"]:
        """The logits of a final residual stream."""
        x = stream if self.final_norm is None else self.final_norm(stream, memory)
        logits: Float[ndarray, "*batch vocabulary"] = self.logit_scale * (x @ self.unembedding.T)
        return logits if self.logit_softcap is None else self.logit_softcap * np.tanh(logits / self.logit_softcap)

    def forward(self, tokens: Int[ndarray, "prompts position"]) -> Float[ndarray, "prompts position vocabulary"]:
        """The logits, computed as any decoder does: one stream, no graph."""
        return self.unembed(self.stream(tokens))

    def stream(self, tokens: Int[ndarray, "prompts position"]) -> Float[ndarray, "prompts position d_model"]:
        """The residual stream after the last layer."""
        stream = self.embed(tokens)
        for layer in self.layers:
            stream = layer(stream)
        return stream

    def weights_hash(self) -> str:
        """SHA-256 of every array and setting of the model."""
        digest = hashlib.sha256()
        _feed(digest.update, replace(self, refinements=()))
        return digest.hexdigest()

    @classmethod
    def random(
        cls,
        seed: int = 0,
        *,
        n_layers: int = 2,
        n_heads: int = 2,
        n_kv_heads: int | None = None,
        d_model: int = 8,
        d_head: int = 4,
        d_mlp: int = 12,
        vocabulary: int = 13,
        n_positions: int = 16,
        norm: Literal["rms", "layer"] | None = "rms",
        post_norm: bool = False,
        biases: bool = True,
        rotary_base: float | None = None,
        act: Activation = "gelu",
        gated: bool = False,
        parallel: bool = False,
        scale: float = 1.0,
        logit_softcap: float | None = None,
    ) -> ReferenceModel:
        """Random weights, large enough that nothing is near linear; norms have random gains too.

        `n_heads=0` leaves attention out, `d_mlp=0` the MLPs, `n_positions=0` the learned positions.
        """
        draw = _Draw(np.random.default_rng(seed), d_model, biases)
        kv = n_heads if n_kv_heads is None else n_kv_heads
        layers = tuple(
            ReferenceLayer(
                draw.attention(n_heads, kv, d_head, norm, post_norm, scale, rotary_base) if n_heads else None,
                draw.mlp(d_mlp, act, gated, norm, post_norm, scale) if d_mlp else None,
                parallel,
            )
            for _ in range(n_layers)
        )
        return cls(
            embedding=draw.array(vocabulary, d_model) * d_model**0.5,
            layers=layers,
            unembedding=draw.array(vocabulary, d_model),
            positions=draw.array(n_positions, d_model) if n_positions else None,
            final_norm=draw.norm(norm),
            logit_softcap=logit_softcap,
            name=f"reference-{seed}",
        )


@dataclass(frozen=True)
class _Draw:
    """Random parts of one width."""

    rng: np.random.Generator
    d_model: int
    biases: bool

    def array(self, *shape: int) -> Float[ndarray, "*shape"]:
        return self.rng.normal(scale=shape[-1] ** -0.5, size=shape)

    def bias(self, *shape: int) -> Float[ndarray, "*shape"] | None:
        return 0.3 * self.rng.normal(size=shape) if self.biases else None

    def norm(self, kind: Literal["rms", "layer"] | None) -> ReferenceNorm | None:
        if kind is None:
            return None
        gain = 1 + 0.3 * self.rng.normal(size=self.d_model)
        return ReferenceNorm(gain, self.bias(self.d_model) if kind == "layer" else None, kind)

    def attention(
        self, heads: int, kv: int, d_head: int, norm: Any, post_norm: bool, scale: float, rotary_base: float | None
    ) -> ReferenceAttention:
        return ReferenceAttention(
            q=1.5 * self.array(heads, d_head, self.d_model),
            k=1.5 * self.array(kv, d_head, self.d_model),
            v=self.array(kv, d_head, self.d_model),
            o=self.array(heads, self.d_model, d_head),
            q_bias=self.bias(heads, d_head),
            k_bias=self.bias(kv, d_head),
            v_bias=self.bias(kv, d_head),
            o_bias=self.bias(self.d_model),
            norm=self.norm(norm),
            post_norm=self.norm(norm) if post_norm else None,
            scale=scale,
            rotary_base=rotary_base,
        )

    def mlp(self, d_mlp: int, act: Activation, gated: bool, norm: Any, post_norm: bool, scale: float) -> ReferenceMLP:
        return ReferenceMLP(
            up=1.5 * self.array(d_mlp, self.d_model),
            down=self.array(self.d_model, d_mlp),
            act=act,
            gate=self.array(d_mlp, self.d_model) if gated else None,
            up_bias=self.bias(d_mlp),
            gate_bias=self.bias(d_mlp) if gated else None,
            down_bias=self.bias(self.d_model),
            norm=self.norm(norm),
            post_norm=self.norm(norm) if post_norm else None,
            scale=scale,
        )


def _graph_layer(layer: ReferenceLayer) -> Layer:
    attention = layer.attention
    return Layer(
        n_heads=attention.n_heads if attention else 0,
        n_kv_heads=attention.n_kv_heads if attention else 0,
        has_mlp=layer.mlp is not None,
        is_parallel=layer.is_parallel,
        heads_are_coupled=attention is not None and attention.post_norm is not None,
    )


def _feed(update: Any, value: Any) -> None:
    """Every field of nested values, in order, into a hash."""
    if is_dataclass(value):
        for field in fields(value):
            update(field.name.encode())
            _feed(update, getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            _feed(update, item)
    elif isinstance(value, np.ndarray):
        update(repr(value.shape).encode() + np.ascontiguousarray(value, dtype="<f8").tobytes())
    else:
        update(repr(value).encode())
