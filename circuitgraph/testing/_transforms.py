"""The same question put otherwise: tokens renamed, prompts padded, heads in another order, the stream turned, another unit. What is found
must follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph
from circuitgraph._metrics import Metric
from circuitgraph._pairs import PromptPairs
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceAttention, ReferenceLayer

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray


def renamed(model: ReferenceModel, pairs: PromptPairs, name_of: Int[ndarray, " vocabulary"]) -> tuple[ReferenceModel, PromptPairs]:
    """Token `t` is called `name_of[t]` from now on, in the model and in the prompts."""
    order = np.argsort(name_of)
    same = replace(model, embedding=model.embedding[order], unembedding=model.unembedding[order])
    rows = {name: tuple(name_of[ids] for ids in getattr(pairs, name)) for name in ("clean", "corrupted", "answers", "wrong_answers")}
    return same, replace(pairs, **rows)


def padded(model: ReferenceModel, pairs: PromptPairs, n: int) -> tuple[ReferenceModel, PromptPairs]:
    """With `n` tokens 0 before every prompt, which no other position looks at, and which have positions of their own."""
    layers = [
        layer if layer.attention is None else replace(layer, attention=replace(layer.attention, n_padding=n)) for layer in model.layers
    ]
    positions = None if model.positions is None else np.pad(model.positions, ((n, 0), (0, 0)))
    clean, corrupted = (tuple(np.pad(ids, (n, 0)) for ids in prompts) for prompts in (pairs.clean, pairs.corrupted))
    return replace(model, layers=tuple(layers), positions=positions), replace(pairs, clean=clean, corrupted=corrupted)


def turned(model: ReferenceModel, turn: Float[ndarray, "d_model d_model"]) -> ReferenceModel:
    """The residual stream `x` is `turn @ x`, an orthogonal matrix. Raises `CircuitGraphError` for a model with norms, whose gains belong to
    single numbers of the stream."""
    if model.final_norm is not None or any(
        part.norm for layer in model.layers for part in (layer.attention, layer.mlp) if part is not None
    ):
        raise CircuitGraphError(f"{model.name}: a stream that norms read cannot be turned")
    return replace(
        model,
        embedding=model.embedding @ turn.T,
        unembedding=model.unembedding @ turn.T,
        positions=None if model.positions is None else model.positions @ turn.T,
        layers=tuple(_turned_layer(layer, turn) for layer in model.layers),
    )


def _turned_layer(layer: ReferenceLayer, turn: Float[ndarray, "d_model d_model"]) -> ReferenceLayer:
    def written(vector: Any) -> Any:
        return None if vector is None else turn @ vector

    attention, mlp = layer.attention, layer.mlp
    if attention is not None:
        q, k, v = (part @ turn.T for part in (attention.q, attention.k, attention.v))
        attention = replace(attention, q=q, k=k, v=v, o=turn @ attention.o, o_bias=written(attention.o_bias))
    if mlp is not None:
        gate = None if mlp.gate is None else mlp.gate @ turn.T
        mlp = replace(mlp, up=mlp.up @ turn.T, gate=gate, down=turn @ mlp.down, down_bias=written(mlp.down_bias))
    return ReferenceLayer(attention, mlp, layer.is_parallel)


def reordered(model: ReferenceModel, orders: Sequence[Int[ndarray, " heads"]]) -> ReferenceModel:
    """The heads of each layer in another order: head `h` is the one that was `orders[layer][h]`. Of heads that share no keys."""
    layers = []
    for layer, order in zip(model.layers, orders, strict=True):
        attention = layer.attention
        if attention is not None:
            attention = _reordered_attention(attention, order)
        layers.append(replace(layer, attention=attention))
    return replace(model, layers=tuple(layers))


def _reordered_attention(attention: ReferenceAttention, order: Int[ndarray, " heads"]) -> ReferenceAttention:
    if attention.n_kv_heads != attention.n_heads:
        raise CircuitGraphError(f"{attention.n_heads} heads that share {attention.n_kv_heads} keys cannot be reordered one by one")
    names = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias")
    parts = {name: getattr(attention, name) for name in names}
    return replace(attention, **{name: part[order] for name, part in parts.items() if part is not None})


def places_of(graph: Graph, orders: Sequence[Int[ndarray, " heads"]]) -> tuple[Int[ndarray, " readers"], Int[ndarray, " writers"]]:
    """Where every reader and every writer of the reordered model was before."""

    def before(end: Any) -> Any:
        if end.layer < 0 or end.index < 0:
            return end
        return replace(end, index=int(orders[end.layer][end.index]))

    readers = [graph.reader_id(before(reader)) for reader in graph.readers]
    writers = [graph.writer_id(before(writer)) for writer in graph.writers]
    return np.array(readers), np.array(writers)


def scaled(metric: Metric, by: float) -> Metric:
    """A metric in other units."""
    return cast("Metric", _Scaled(metric, by))


@dataclass(frozen=True)
class _Scaled:
    """A metric times a number."""

    metric: Metric
    by: float
    name: ClassVar[str] = "scaled"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.metric, name)

    def __call__(self, logits: Any, target: Any) -> Any:
        return self.by * self.metric(logits, target)
