"""The order in which ACDC tries removals: that of the paper's code, as a total order over any graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np

from circuitgraph._graph import Graph

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

HeadOrder = Literal["descending", "ascending"]


@dataclass(frozen=True)
class Trial:
    """A removal to try: one edge into a reader, or all its edges at once (`is_whole_input`)."""

    reader: int
    writers: tuple[int, ...]
    is_whole_input: bool = False

    def name(self, graph: Graph) -> str:
        """The edge's name, or the reader's if it is a whole input."""
        reader = graph.readers[self.reader].name
        return reader if self.is_whole_input else f"{graph.writers[self.writers[0]]}->{reader}"


def receivers(graph: Graph) -> Iterator[tuple[int, ...]]:
    """Readers from the output back: the logits, then per layer the MLP, then the `v`, `k` and `q` inputs, heads from the highest down.

    Readers at the same depth come together: none of them decides whether another is needed.
    """

    def place(r: int) -> tuple[float, int, int]:
        reader = graph.readers[r]
        return (-reader.depth, "vkq".find(reader.kind), -reader.index)

    order = sorted(range(len(graph.readers)), key=place)
    for _, same_depth in groupby(order, key=lambda r: graph.readers[r].depth):
        yield tuple(same_depth)


def senders(graph: Graph, head_order: HeadOrder) -> tuple[int, ...]:
    """Writers from the highest layer down, an MLP before the heads of its layer, the input last."""
    sign = -1 if head_order == "descending" else 1
    return tuple(sorted(range(len(graph.writers)), key=lambda w: (-graph.writers[w].depth, sign * graph.writers[w].index)))


def whole_inputs(graph: Graph, mask: Float[ndarray, "readers writers"], readers: Sequence[int]) -> list[Trial]:
    """The head-input stage: one trial for each `q`, `k` or `v` input that still reads something."""
    heads = [r for r in readers if graph.readers[r].kind in ("q", "k", "v") and mask[r].any()]
    return [Trial(r, tuple(np.flatnonzero(mask[r]).tolist()), is_whole_input=True) for r in heads]


def single_edges(mask: Float[ndarray, "readers writers"], readers: Sequence[int], order: Sequence[int]) -> list[Trial]:
    """One trial for each kept edge into these readers, reader by reader, in the senders' order."""
    return [Trial(r, (w,)) for r in readers for w in order if mask[r, w]]
