"""Where along the stream each row and column of a mask lives: the graph's ids, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._architecture import Architecture
from circuitgraph._graph import Graph

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray


@dataclass(frozen=True)
class Site:
    """Readers `first` to `stop` that see the first `n_visible` writers."""

    first: int
    stop: int
    n_visible: int


@dataclass(frozen=True)
class LayerSites:
    """A layer's readers, and the ids of the writers they feed: heads `first_head` onwards, then the MLP."""

    attention: Site | None
    mlp: Site | None
    first_head: int
    n_heads: int
    mlp_writer: int


@dataclass(frozen=True, eq=False)
class Sites:
    """All layers' sites, and that of the logits."""

    graph: Graph
    layers: tuple[LayerSites, ...]
    logits: Site

    @classmethod
    def of(cls, graph: Graph, architecture: Architecture) -> Sites:
        seen = graph.visible.sum(axis=1)
        layers: list[LayerSites] = []
        row, writer = 0, 1
        for block in architecture.blocks:
            n_heads = block.attention.q.n_heads if block.attention else 0
            n_readers = sum(r.layer == len(layers) and r.kind != "mlp" for r in graph.readers)
            attention = Site(row, row + n_readers, int(seen[row])) if n_readers else None
            row += n_readers
            mlp = Site(row, row + 1, int(seen[row])) if block.mlp else None
            layers.append(LayerSites(attention, mlp, writer, n_heads, writer + n_heads))
            row += block.mlp is not None
            writer += n_heads + (block.mlp is not None)
        return cls(graph, tuple(layers), Site(row, row + 1, int(seen[row])))

    @cached_property
    def layer_of_row(self) -> Int[ndarray, " readers"]:
        """The layer of each reader; the logits come after the last."""
        layers = np.full(len(self.graph.readers), len(self.layers))
        for number, layer in enumerate(self.layers):
            for site in (layer.attention, layer.mlp):
                if site:
                    layers[site.first : site.stop] = number
        return layers

    def first_difference(self, masks: Float[ndarray, "lanes readers writers"]) -> Int[ndarray, " lanes"]:
        """Per mask, the first layer in which some edge is not fully live."""
        differs = ((masks != 1) & self.graph.visible).any(axis=2)
        first: Int[ndarray, " lanes"] = np.where(differs, self.layer_of_row, len(self.layers)).min(axis=1)
        return first

    def writers_before(self, layer: int) -> int:
        """How many writers come before a layer."""
        if layer == len(self.layers):
            return len(self.graph.writers)
        return self.layers[layer].first_head
