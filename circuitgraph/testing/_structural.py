"""Which edges of a model can carry a signal at all, read off its weights: no prompt and no ablation decides on them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._graph import Graph
from circuitgraph._names import Reader, Writer
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceAttention, ReferenceMLP

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

    Range = Float[ndarray, "d_model directions"]


def structural_graph(model: ReferenceModel) -> Graph:
    """The model's graph without the edges that do not reach the logits, or whose reader's weights map all that the writer can say to 0.

    A query is heard only by keys, so an edge into `q` needs a writer that `k` hears and whose product with it is not 0, and the other way
    round. What a writer can say is overestimated by the directions it writes into; so patching any other edge, by whatever ablation,
    changes nothing at all. For models without norms and biases and with an activation that is 0 at 0, as Tracr's.
    """
    graph = model.graph()
    found = _Found(graph)
    embeddings = [model.embedding.T, np.zeros((model.embedding.shape[1], 0)) if model.positions is None else model.positions.T]
    for w, said in enumerate(embeddings if model.splits_input else [np.hstack(embeddings)]):
        found.says[w] = said
    for number, layer in enumerate(model.layers):
        for h in range(layer.attention.n_heads if layer.attention else 0):
            assert layer.attention is not None  # it has heads
            found.head(number, h, layer.attention)
        if layer.mlp is not None:
            found.mlp(number, layer.mlp)
    found.hears(Reader("logits"), model.unembedding)
    needed, _ = graph.needed(found.mask)
    return replace(graph, visible=found.mask & needed[:, None])


class _Found:
    """What has been found out on the way up: the directions that each writer writes into, and the edges that carry some of them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.says: dict[int, Range] = {}
        self.mask = np.zeros(graph.shape, dtype=bool)

    def hears(self, reader: Reader, weight: Float[ndarray, "out d_model"]) -> Bool[ndarray, " out"]:
        """Mark the edges into a reader that its weight does not map to 0; which of its outputs can be other than 0."""
        r = self.graph.reader_id(reader)
        active = np.zeros(len(weight), dtype=bool)
        for w in np.flatnonzero(self.graph.visible[r]).tolist():
            heard = (weight @ self.says[w] != 0).any(axis=1)
            self.mask[r, w] = heard.any()
            active |= heard
        return active

    def head(self, layer: int, h: int, attention: ReferenceAttention) -> None:
        active = self.hears(Reader("v", layer, h), attention.v[h])
        self.says[self.graph.writer_id(Writer("head", layer, h))] = attention.o[h][:, active]
        q, k = (self.graph.reader_id(Reader(kind, layer, h)) for kind in ("q", "k"))
        for asks in np.flatnonzero(self.graph.visible[q]).tolist():
            for answers in np.flatnonzero(self.graph.visible[k]).tolist():
                if ((attention.q[h] @ self.says[asks]).T @ (attention.k[h] @ self.says[answers])).any():
                    self.mask[q, asks] = self.mask[k, answers] = True

    def mlp(self, layer: int, mlp: ReferenceMLP) -> None:
        active = self.hears(Reader("mlp", layer), mlp.up)
        self.says[self.graph.writer_id(Writer("mlp", layer))] = mlp.down[:, active]
