"""Where along the stream each row and column of a mask lives: the graph's ids, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._graph import Graph
from circuitgraph._names import ComponentKind

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray


@dataclass(frozen=True)
class Site:
    """Readers `first` to `stop` that see the writers `first_visible` to `n_visible`: all before them, unless the stream was refined."""

    first: int
    stop: int
    first_visible: int
    n_visible: int


@dataclass(frozen=True)
class LayerSites:
    """A layer's readers, and the ids of the writers they feed: heads and the MLP, or the parts that a refinement made of them.

    `stream`, `stream_writers`: of the stream before the layer, where that is refined. `before`: how many writers come before all these.
    """

    attention: Site | None
    mlp: Site | None
    attention_writers: range
    mlp_writers: range
    stream: Site | None
    stream_writers: range
    before: int


@dataclass(frozen=True, eq=False)
class Sites:
    """All layers' sites, that of the stream after them if it is refined, and that of the logits."""

    graph: Graph
    layers: tuple[LayerSites, ...]
    stream: Site | None
    stream_writers: range
    logits: Site

    @classmethod
    def of(cls, graph: Graph, n_layers: int) -> Sites:
        find = _Finder(graph)
        layers = tuple(map(find.layer, range(n_layers)))
        logits = find.site("logits", layer=-1)
        assert logits is not None
        return cls(graph, layers, find.site("stream", layer=n_layers), find.writers(n_layers, "r"), logits)

    @property
    def is_refined(self) -> bool:
        """Whether a component was replaced by its parts."""
        return any(writer.part_of for writer in self.graph.writers)

    @cached_property
    def layer_of_row(self) -> Int[ndarray, " readers"]:
        """The layer of each reader; the logits come after the last."""
        layers = np.full(len(self.graph.readers), len(self.layers))
        for number, layer in enumerate(self.layers):
            for site in (layer.stream, layer.attention, layer.mlp):
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
            return len(self.graph.writers) - len(self.stream_writers)
        return self.layers[layer].before


@dataclass(frozen=True, eq=False)
class _Finder:
    """Finds rows and columns by what they are called."""

    graph: Graph

    def layer(self, number: int) -> LayerSites:
        attention, mlp, stream = (self.writers(number, part) for part in ("a", "m", "r"))
        before = sum(writer.kind == "input" or writer.layer < number for writer in self.graph.writers)
        return LayerSites(
            attention=self.site("q", "k", "v", layer=number),
            mlp=self.site("mlp", "feature", layer=number),
            attention_writers=attention,
            mlp_writers=mlp,
            stream=self.site("stream", layer=number),
            stream_writers=stream,
            before=before,
        )

    def site(self, *kinds: str, layer: int) -> Site | None:
        rows = [r for r, reader in enumerate(self.graph.readers) if reader.layer == layer and reader.kind in kinds]
        if not rows:
            return None
        seen = np.flatnonzero(self.graph.visible[rows[0]])
        return Site(rows[0], rows[-1] + 1, int(seen[0]), int(seen[-1]) + 1)

    def writers(self, layer: int, part_of: ComponentKind) -> range:
        whole = {"a": "head", "m": "mlp"}.get(part_of)
        columns = [
            w
            for w, writer in enumerate(self.graph.writers)
            if writer.layer == layer and (writer.part_of == part_of or writer.kind == whole)
        ]
        return range(columns[0], columns[-1] + 1) if columns else range(0)
