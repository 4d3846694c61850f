"""The order in which ACDC tries removals: that of the paper's code, as a total order over any graph, or one with the heads shuffled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


Places = Callable[[int], int]  # of the heads of a layer by their index, the first to come at the lowest


def places(head_order: HeadOrder) -> Places:
    """Heads in the order of their indices, either way round."""
    sign = -1 if head_order == "descending" else 1
    return lambda index: sign * index


def shuffled(graph: Graph, seed: int) -> Places:
    """Heads in a random order, the same one in every layer."""
    n_heads = 1 + max((writer.index for writer in graph.writers), default=0)
    order = np.random.default_rng(seed).permutation(n_heads)
    return lambda index: int(order[index])


def receivers(graph: Graph, place_of: Places) -> Iterator[tuple[int, ...]]:
    """Readers from the output back: the logits, then per layer the MLP, then the `v`, `k` and `q` inputs of its heads.

    Readers at the same depth come together: none of them decides whether another is needed.
    """

    def place(r: int) -> tuple[float, int, int]:
        reader = graph.readers[r]
        return (-reader.depth, "vkq".find(reader.kind), place_of(max(reader.index, 0)))

    order = sorted(range(len(graph.readers)), key=place)
    for _, same_depth in groupby(order, key=lambda r: graph.readers[r].depth):
        yield tuple(same_depth)


def senders(graph: Graph, place_of: Places) -> tuple[int, ...]:
    """Writers from the highest layer down, an MLP before the heads of its layer, the input last."""

    def place(w: int) -> tuple[float, int]:
        writer = graph.writers[w]
        return (-writer.depth, place_of(max(writer.index, 0)))

    return tuple(sorted(range(len(graph.writers)), key=place))


def whole_inputs(graph: Graph, mask: Float[ndarray, "readers writers"], readers: Sequence[int]) -> list[Trial]:
    """The head-input stage: one trial for each `q`, `k` or `v` input that still reads something."""
    heads = [r for r in readers if graph.readers[r].kind in ("q", "k", "v") and mask[r].any()]
    return [Trial(r, tuple(np.flatnonzero(mask[r]).tolist()), is_whole_input=True) for r in heads]


def single_edges(mask: Float[ndarray, "readers writers"], readers: Sequence[int], order: Sequence[int]) -> list[Trial]:
    """One trial for each kept edge into these readers, reader by reader, in the senders' order."""
    return [Trial(r, (w,)) for r in readers for w in order if mask[r, w]]
