"""`Graph`: which reader sees which writer, and which writers a reader feeds.

The bipartite DAG `writers -> edges -> readers -> feeds -> writers` as two boolean matrices with names. Ids are
positions in `writers` and `readers`; both are sorted along the residual stream, so that one pass over the readers,
forwards or backwards, is a topological one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from circuitgraph._divided import Matrices
from circuitgraph._errors import CircuitGraphError, UnknownNameError, unknown_name
from circuitgraph._names import Component, Edge, HeadInput, PartKind, Reader, Writer

if TYPE_CHECKING:
    import networkx as nx
    from jaxtyping import Bool, Float
    from numpy import ndarray


@dataclass(frozen=True)
class Layer:
    """What one layer of a transformer contributes to the graph.

    `heads_are_coupled`: a norm over all heads (OLMo 2's queries, Gemma 2's attention output) lets every `q`, `k`, `v`
    input of the layer move every head of it.
    """

    n_heads: int
    n_kv_heads: int
    has_mlp: bool = True
    is_parallel: bool = False
    heads_are_coupled: bool = False


@dataclass(frozen=True)
class Parts:
    """Into what a refinement divides a component: features or neurons by their numbers, and what is left of it.

    `has_skip`: one part is linear in the component's input; `has_error`: one is the rest. `has_readers`: each feature reads the stream by
    itself (a transcoder's do), where otherwise all of them are computed from what the component reads. `earlier`: of a cross-layer
    transcoder, features of earlier layers that write here too, each layer with their numbers.
    """

    numbers: tuple[int, ...]
    kind: Literal["feature", "neuron"] = "feature"
    has_skip: bool = False
    has_error: bool = True
    has_readers: bool = False
    earlier: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", tuple(sorted(self.numbers)))
        object.__setattr__(self, "earlier", tuple(sorted((layer, tuple(sorted(numbers))) for layer, numbers in self.earlier)))

    def writers(self, component: Component) -> tuple[Writer, ...]:
        rest: list[tuple[PartKind, int]] = [("skip", -1)] * self.has_skip
        rest += [("error", -1)] * self.has_error
        layer, part_of = component.layer, component.kind
        own = [Writer(self.kind, layer, number, part_of=part_of) for number in self.numbers]
        own += [Writer("feature", layer, number, part_of=part_of, origin=origin) for origin, numbers in self.earlier for number in numbers]
        return (*own, *(Writer(kind, layer, number, part_of=part_of) for kind, number in rest))

    def readers(self, component: Component) -> tuple[Reader, ...]:
        """Those that the refinement adds."""
        if component.kind == "r":
            return (Reader("stream", component.layer),)
        return tuple(Reader("feature", component.layer, number) for number in self.numbers) if self.has_readers else ()


@dataclass(frozen=True, eq=False)
class Graph:
    """An immutable graph of writers and readers.

    `visible[r, w]`: reader `r` sees writer `w`, so there is an edge. `feeds[r, w]`: writer `w` is computed from reader `r`.
    """

    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]
    visible: Bool[ndarray, "readers writers"]
    feeds: Bool[ndarray, "readers writers"]

    def __post_init__(self) -> None:
        shape = (len(self.readers), len(self.writers))
        for name in ("visible", "feeds"):
            matrix = np.array(getattr(self, name), dtype=bool)
            if matrix.shape != shape:
                raise CircuitGraphError(f"graph: {name} has shape {matrix.shape}, expected [readers, writers] = {shape}")
            matrix.setflags(write=False)
            object.__setattr__(self, name, matrix)
        self._check_order()

    def _check_order(self) -> None:
        if len(set(self.writers)) < len(self.writers) or len(set(self.readers)) < len(self.readers):
            raise CircuitGraphError("graph: two writers or two readers have the same name")
        row = np.arange(len(self.readers))[:, None]
        last_source = np.where(self.feeds, row, -1).max(axis=0, initial=-1)
        first_use = np.where(self.visible, row, len(self.readers)).min(axis=0, initial=len(self.readers))
        if (first_use <= last_source).any():
            writer = self.writers[int(np.argmax(first_use <= last_source))]
            raise CircuitGraphError(f"graph: writer {writer} is seen by a reader that it is computed from, or by an earlier one")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return (
            self.writers == other.writers
            and self.readers == other.readers
            and np.array_equal(self.visible, other.visible)
            and np.array_equal(self.feeds, other.feeds)
        )

    def __hash__(self) -> int:
        return hash((self.writers, self.readers, self.visible.tobytes(), self.feeds.tobytes()))

    def __repr__(self) -> str:
        return f"Graph({len(self.writers)} writers, {len(self.readers)} readers, {self.n_edges} edges, {len(self.nodes)} nodes)"

    @property
    def shape(self) -> tuple[int, int]:
        """Of a mask: `[readers, writers]`."""
        return self.visible.shape[0], self.visible.shape[1]

    @property
    def n_edges(self) -> int:
        return int(self.visible.sum())

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, by reader, then by writer."""
        return self.edges_of(self.visible)

    def edges_of(self, mask: Bool[ndarray, "readers writers"]) -> tuple[Edge, ...]:
        """The edges that a mask keeps."""
        return tuple(Edge(self.writers[w], self.readers[r]) for r, w in np.argwhere(np.asarray(mask) & self.visible))

    def largest(self, values: Float[ndarray, "readers writers"], n: int) -> Bool[ndarray, "readers writers"]:
        """A mask of the `n` edges with the largest values, or of all that have one; a tie goes to the lower id, NaN is no value.

        So that of `n` is always a subset of that of `n + 1`.
        """
        found = np.asarray(values, dtype=np.float64)[self.visible]
        best = np.argsort(-found, kind="stable")[: min(n, len(found) - int(np.isnan(found).sum()))]  # NaN sorts last
        mask = np.zeros(self.shape, dtype=bool)
        mask.flat[np.flatnonzero(self.visible)[best]] = True
        return mask

    @property
    def nodes(self) -> tuple[str, ...]:
        """The usual nodes: the input, heads, MLPs and the logits (158 in GPT-2 small)."""
        return (*dict.fromkeys(writer.node for writer in self.writers), "logits")

    def writer_id(self, writer: Writer | str) -> int:
        """The column of a writer. Raises `UnknownNameError` with the nearest names."""
        parsed = Writer.parse(writer) if isinstance(writer, str) else writer
        if parsed not in self._writer_ids:
            raise unknown_name("writer", parsed.name, (w.name for w in self.writers))
        return self._writer_ids[parsed]

    def reader_id(self, reader: Reader | str) -> int:
        """The row of a reader. `a9.h6<k>` finds the reader of its group. Raises `UnknownNameError` with the nearest names."""
        parsed = Reader.parse(reader) if isinstance(reader, str) else reader
        if parsed in self._reader_ids:
            return self._reader_ids[parsed]
        grouped = [i for i, r in enumerate(self.readers) if r.is_grouped and r.kind == parsed.kind and r.layer == parsed.layer]
        heads = {r.index for r in self.readers if r.kind == "q" and r.layer == parsed.layer}
        if not parsed.is_grouped and parsed.index in heads and grouped:
            return grouped[parsed.index * len(grouped) // len(heads)]
        raise unknown_name("reader", parsed.name, (r.name for r in self.readers))

    def edge_id(self, edge: Edge | str) -> tuple[int, int]:
        """The place `(reader, writer)` of an edge in a mask. Raises `UnknownNameError` when the reader does not see the writer."""
        parsed = Edge.parse(edge) if isinstance(edge, str) else edge
        r, w = self.reader_id(parsed.reader), self.writer_id(parsed.writer)
        if not self.visible[r, w]:
            raise UnknownNameError(f"there is no edge {parsed}: {parsed.reader} does not come after {parsed.writer}")
        return r, w

    @cached_property
    def _writer_ids(self) -> dict[Writer, int]:
        return {writer: i for i, writer in enumerate(self.writers)}

    @cached_property
    def _reader_ids(self) -> dict[Reader, int]:
        return {reader: i for i, reader in enumerate(self.readers)}

    def needed(self, mask: Bool[ndarray, "readers writers"]) -> tuple[Bool[ndarray, " readers"], Bool[ndarray, " writers"]]:
        """Which readers and writers have a kept path to the logits."""
        kept = np.asarray(mask, dtype=bool) & self.visible
        readers = np.array([reader.kind == "logits" for reader in self.readers])
        writers = np.zeros(len(self.writers), dtype=bool)
        for r in range(len(self.readers) - 1, -1, -1):
            readers[r] |= bool((self.feeds[r] & writers).any())
            if readers[r]:
                writers |= kept[r]
        return readers, writers

    def reached(self, mask: Bool[ndarray, "readers writers"]) -> tuple[Bool[ndarray, " readers"], Bool[ndarray, " writers"]]:
        """Which readers and writers have a kept path from the input."""
        kept = np.asarray(mask, dtype=bool) & self.visible
        writers = np.array([writer.kind == "input" for writer in self.writers])
        readers = np.zeros(len(self.readers), dtype=bool)
        for r in range(len(self.readers)):
            readers[r] = (kept[r] & writers).any()
            if readers[r]:
                writers |= self.feeds[r]
        return readers, writers

    def prune_dead(self, mask: Bool[ndarray, "readers writers"]) -> Bool[ndarray, "readers writers"]:
        """The kept edges that lie on a path from the input to the logits."""
        needed, _ = self.needed(mask)
        _, reached = self.reached(mask)
        pruned: Bool[ndarray, "readers writers"] = np.asarray(mask, dtype=bool) & self.visible & needed[:, None] & reached[None, :]
        return pruned

    def to_networkx(self) -> nx.DiGraph:
        """The bipartite graph. Nodes are `Writer` and `Reader` values; every edge has `kind` "edge" or "feeds"."""
        import networkx as nx

        graph = nx.DiGraph()
        graph.add_nodes_from(self.writers, side="writer")
        graph.add_nodes_from(self.readers, side="reader")
        graph.add_edges_from((e.writer, e.reader, {"kind": "edge"}) for e in self.edges)
        graph.add_edges_from((self.readers[r], self.writers[w], {"kind": "feeds"}) for r, w in np.argwhere(self.feeds))
        return graph

    def node_graph(self, mask: Bool[ndarray, "readers writers"] | None = None) -> nx.MultiDiGraph:
        """The usual graph: nodes are names, an edge's key is "q", "k", "v", "mlp" or "logits", and the span if there is one.

        A grouped `k` or `v` reader gives one edge to each head of its group, and that of a component in parts to each part. With a `mask`,
        only kept edges and their ends.
        """
        import networkx as nx

        graph = nx.MultiDiGraph()
        if mask is None:
            graph.add_nodes_from(self.nodes)
        for r, w in np.argwhere(self.visible if mask is None else np.asarray(mask, dtype=bool) & self.visible):
            reader = self.readers[r]
            for target in self.nodes_of(reader):
                writer = self.writers[w]
                key = f"{reader.kind}@{writer.span}" if writer.span else reader.kind
                graph.add_edge(writer.node, target, key=key, edge=Edge(writer, reader))
        return graph

    def nodes_of(self, reader: Reader) -> tuple[str, ...]:
        """The nodes a reader belongs to: itself, the heads of its group, or the parts of its component."""
        fed = [self.writers[w] for w in np.flatnonzero(self.feeds[self._reader_ids[reader]])]
        if any(writer.part_of for writer in fed):
            return tuple(dict.fromkeys(writer.node for writer in fed))
        if not reader.is_grouped:
            return (reader.node,)
        heads = [other.node for other in self.readers if other.kind == "q" and other.layer == reader.layer]
        groups = sum(r.kind == reader.kind and r.layer == reader.layer for r in self.readers)
        size = len(heads) // groups
        return tuple(heads[reader.index * size : (reader.index + 1) * size])

    def by_span(self, spans: Sequence[str]) -> Graph:
        """The same graph with every writer split by the spans of a prompt: `a5.h1@S2` is what `a5.h1` says there.

        The columns of a writer stand together, so a mask `[readers, writers, spans]` is one of this graph, reshaped: an edge lies at one
        position, and only heads mix positions.

        >>> from circuitgraph._graph import Layer, transformer_graph
        >>> graph = transformer_graph([Layer(n_heads=1, n_kv_heads=1)]).by_span(["S", "END"])
        >>> print(*graph.writers, graph.n_edges)
        input@S input@END a0.h0@S a0.h0@END m0@S m0@END 16
        """
        if not spans or len(set(spans)) < len(spans) or any(writer.span for writer in self.writers):
            raise CircuitGraphError(f"graph by span: {[*spans]}; expected different names, for a graph that is not split yet")
        writers = tuple(replace(writer, span=span) for writer in self.writers for span in spans)
        visible, feeds = (np.repeat(matrix, len(spans), axis=1) for matrix in (self.visible, self.feeds))
        return Graph(writers, self.readers, visible, feeds)

    @property
    def spans(self) -> tuple[str, ...]:
        """The spans by which the writers are split, if they are."""
        return tuple(dict.fromkeys(writer.span for writer in self.writers if writer.span))

    def refine(self, component: Component | str, parts: Parts) -> Graph:
        """The same graph with a component replaced by its parts: the MLP `m3`, the heads of `a3`, or the stream before layer 3, `r3`.

        Parts are ordinary writers, seen by whoever saw the component, and fed by its readers (a transcoder's features by readers of their
        own). Parts of the stream are seen by all that comes later, instead of what the stream was made of: only `r3` reads that.
        What earlier features of a cross-layer transcoder say here is fed by their own readers, which must be there. The error is without
        what they would say by their MLPs' readers, so these feed it too.
        Raises `UnknownNameError` for a component that is not there, `CircuitGraphError` for one that is refined already.

        >>> from circuitgraph._graph import Layer, Parts, transformer_graph
        >>> graph = transformer_graph([Layer(n_heads=1, n_kv_heads=1)])
        >>> print(*graph.refine("m0", Parts((3, 8))).writers)
        input a0.h0 m0.f3 m0.f8 m0.err
        >>> [edge.name for edge in graph.refine("r1", Parts((5,))).edges][-4:]
        ['a0.h0->r1', 'm0->r1', 'r1.f5->logits', 'r1.err->logits']
        """
        component = Component.parse(component) if isinstance(component, str) else component
        self._check_refinable(component, parts)
        writers, readers = parts.writers(component), parts.readers(component)
        old = [w for w, writer in enumerate(self.writers) if _is_in(writer, component)]
        first = old[0] if old else sum(writer < writers[0] for writer in self.writers)
        row = sum(reader < readers[0] for reader in self.readers) if readers else len(self.readers)
        matrices = Matrices(self.visible, self.feeds, row, first)
        if component.kind == "r":
            visible, feeds = matrices.split(len(writers))
        elif readers:
            visible, feeds = matrices.divided_by_reader(len(readers), len(writers))
        else:
            visible, feeds = matrices.divided(len(old), len(writers))
        self._feed_from_earlier(feeds, parts, first)
        return Graph(
            (*self.writers[:first], *writers, *self.writers[first + len(old) :]),
            (*self.readers[:row], *readers, *self.readers[row:]),
            visible,
            feeds,
        )

    def _feed_from_earlier(self, feeds: Bool[ndarray, "readers writers"], parts: Parts, first: int) -> None:
        """Whom the earlier layers' readers feed among the parts, which begin at column `first`."""
        column, error = first + len(parts.numbers), first + len(parts.numbers) + sum(len(numbers) for _, numbers in parts.earlier)
        error += parts.has_skip
        for origin, numbers in parts.earlier:
            feeds[self.reader_id(Reader("mlp", origin)), error] = True
            for number in numbers:
                feeds[:, column] = False
                feeds[self.reader_id(Reader("feature", origin, number)), column] = True
                column += 1

    def _check_refinable(self, component: Component, parts: Parts) -> None:
        if self.spans:
            raise CircuitGraphError(f"refine {component}: the graph is split by spans; refine it first, then split")
        if len(set(parts.numbers)) < len(parts.numbers) or not parts.writers(component):
            raise CircuitGraphError(f"refine {component}: expected features, each once; got {[*parts.numbers]}")
        if any(writer.component == component for writer in self.writers):
            raise CircuitGraphError(f"refine {component}: it is refined already; begin with the graph as it was traced")
        if parts.has_readers and component.kind != "m":
            raise CircuitGraphError(
                f"refine {component}: features that read the stream by themselves are a transcoder's, of an MLP such as m0"
            )
        layers = {reader.layer for reader in self.readers if reader.layer >= 0}
        known = [f"r{layer}" for layer in (*sorted(layers), max(layers, default=-1) + 1)]
        known += [f"{'a' if writer.kind == 'head' else 'm'}{writer.layer}" for writer in self.writers if writer.kind in ("head", "mlp")]
        if component.name not in known:
            raise unknown_name("component", component.name, dict.fromkeys(known))


def _is_in(writer: Writer, component: Component) -> bool:
    """Whether a refinement replaces this writer."""
    return writer.layer == component.layer and (writer.kind, component.kind) in (("head", "a"), ("mlp", "m"))


def transformer_graph(layers: Sequence[Layer], *, per_head_kv: bool = False, splits_input: bool = False) -> Graph:
    """The graph of a decoder: writers and readers in MIB's order.

    Writers: the input, then per layer its heads and its MLP. Readers: per layer the `q` inputs of all heads, the `k` inputs, the
    `v` inputs, the MLP; the logits last. Grouped `k` and `v` inputs are one reader per group unless `per_head_kv`.
    `splits_input`: the token and the position embeddings are two writers, `tok` and `pos`.
    """
    writers = [Writer("input", index=i) for i in (0, 1)] if splits_input else [Writer("input")]
    readers: list[Reader] = []
    seen: list[int] = []  # how many writers each reader sees
    fed: list[list[int]] = []  # which writers each reader feeds
    for number, layer in enumerate(layers):
        before = len(writers)
        heads = range(before, before + layer.n_heads)
        writers += [Writer("head", number, h) for h in range(layer.n_heads)]
        for kind in get_args(HeadInput):
            count = layer.n_heads if kind == "q" or per_head_kv else layer.n_kv_heads
            size = layer.n_heads // count if count else 1
            for i in range(count):
                readers.append(Reader(kind, number, i, is_grouped=size > 1))
                seen.append(before)
                fed.append([*heads] if layer.heads_are_coupled else [*heads[i * size : (i + 1) * size]])
        if layer.has_mlp:
            readers.append(Reader("mlp", number))
            seen.append(before if layer.is_parallel else len(writers))
            fed.append([len(writers)])
            writers.append(Writer("mlp", number))
    readers.append(Reader("logits"))
    seen.append(len(writers))
    fed.append([])

    column = np.arange(len(writers))
    feeds = np.zeros((len(readers), len(writers)), dtype=bool)
    for r, columns in enumerate(fed):
        feeds[r, columns] = True
    return Graph(tuple(writers), tuple(readers), column < np.array(seen)[:, None], feeds)
