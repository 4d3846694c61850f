"""What to draw: which nodes, which lines, how much of them, and what the caption says. Knows nothing of DOT."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._errors import unknown_name
from circuitgraph._names import Component, Edge, Reader, Writer, WriterKind

Detail = Literal["auto", "edges", "nodes", "layers"]
Kind = Literal["q", "k", "v", "merged", "mlp", "feature", "stream", "feeds", "adds", "logits"]
PlaceKind = WriterKind | Literal["heads", "parts", "reader", "logits"]

LEGIBLE = {"edges": 130, "nodes": 160, "layers": 120}
"""The most lines that a picture of this detail may have before `auto` takes the next one, and in the last one draws only as many."""

_LISTED = 12  # names in the tooltip of a merged line


@dataclass(frozen=True, order=True)
class Node:
    """A place in the picture. `depth`: the input 0, the heads of layer `l` at `2l + 1`, its MLP at `2l + 2`, the logits at infinity.

    A `reader` is what a component reads whose parts are places of their own.
    """

    depth: float
    index: int
    name: str
    kind: PlaceKind
    label: str

    @property
    def layer(self) -> int:
        return int(self.depth - 1) // 2 if math.isfinite(self.depth) else -1


@dataclass(frozen=True)
class Line:
    """One or more edges between two places. `score`: that of the strongest; None when none is scored. `confidence`: of the surest."""

    tail: Node
    head: Node
    kind: Kind
    edges: tuple[tuple[str, float | None], ...]
    confidence: float | None = None

    @cached_property
    def score(self) -> float | None:
        return max((score for _, score in self.edges if score is not None), key=abs, default=None)

    @cached_property
    def spans(self) -> tuple[str, ...]:
        """Of edges split by span, the strongest first."""
        best: dict[str, float] = {}
        for name, score in self.edges if self.kind not in ("feeds", "adds") else ():
            span = Edge.parse(name).writer.span
            best[span] = max(best.get(span, 0.0), abs(score or 0.0))
        return tuple(span for span in sorted(best, key=lambda span: -best[span]) if span)

    @property
    def tooltip(self) -> str:
        strongest = sorted(self.edges, key=lambda edge: -abs(edge[1] or 0.0))
        lines = [name if score is None else f"{name}: {score:+.4g}" for name, score in strongest[:_LISTED]]
        return "\n".join(lines + ([f"and {len(self.edges) - _LISTED} more"] if len(self.edges) > _LISTED else []))


@dataclass(frozen=True)
class Plan:
    """A picture before it is drawn; nodes from the input up, lines in the order of the graph's edges."""

    nodes: tuple[Node, ...]
    lines: tuple[Line, ...]
    title: str
    facts: tuple[str, ...]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of line that occur, in the legend's order."""
        present = {line.kind for line in self.lines}
        return tuple(kind for kind in get_args(Kind) if kind in present)

    @property
    def strongest(self) -> float:
        return max((abs(line.score) for line in self.lines if line.score is not None), default=0.0)


def make_plan(circuit: Circuit, *, title: str | None = None, detail: Detail = "auto") -> Plan:
    """The picture of a circuit's live edges, at the first detail that stays legible, or at the one asked for."""
    if detail not in get_args(Detail):
        raise unknown_name("detail", detail, get_args(Detail))
    live = circuit.prune_dead()
    lines, facts = _chosen(live, detail)
    nodes = {end for line in lines for end in (line.tail, line.head)} or {_place(name, live, "edges") for name in ("input", "logits")}
    return Plan(
        nodes=tuple(sorted(nodes)),
        lines=lines,
        title=_title(circuit.provenance) if title is None else title,
        facts=(*_facts(circuit, live), *facts),
    )


def _chosen(live: Circuit, detail: Detail) -> tuple[tuple[Line, ...], list[str]]:
    """The lines to draw, and what the caption has to say about the choice."""
    levels: tuple[Detail, ...] = ("edges", "nodes", "layers") if detail == "auto" else (detail,)
    for level in levels:
        lines = _lines(live, level)
        if detail != "auto" or len(lines) <= LEGIBLE[level]:
            break
    facts = []
    if level != "edges" and any(len(line.edges) > 1 for line in lines):
        facts.append("q, k and v edges merged" + (", heads merged by layer" if level == "layers" else ""))
    if any(line.spans for line in lines):
        facts.append("beside a line where in the prompt, the strongest first")
    if detail == "auto" and len(lines) > (limit := LEGIBLE[level]):
        facts.append(f"the {limit} strongest of {len(lines):,} lines drawn")
        kept = set(sorted(range(len(lines)), key=lambda i: (-abs(lines[i].score or 0.0), -len(lines[i].edges), i))[:limit])
        lines = tuple(line for i, line in enumerate(lines) if i in kept)
    return lines, facts


def _lines(live: Circuit, detail: Detail) -> tuple[Line, ...]:
    """The live edges, merged where the detail says so. An edge into a shared reader gives a line to each head that uses it."""
    merged: dict[tuple[Node, Node, Kind], dict[str, float | None]] = {}
    places = {name: _place(name, live, detail) for name in live.nodes}
    for r in np.flatnonzero(live.mask.any(axis=1)):
        reader = live.graph.readers[r]
        kind: Kind = "merged" if detail in ("nodes", "layers") and reader.kind in ("q", "k", "v") else reader.kind
        parts = [places[name] for name in live.nodes_of(reader)]
        gate = _gate(live, reader, detail)
        heads = dict.fromkeys(parts if gate is None else [gate])
        for w in np.flatnonzero(live.mask[r]):
            writer = live.graph.writers[w]
            score = None if live.scores is None or math.isnan(live.scores[r, w]) else float(live.scores[r, w])
            for head in heads:
                merged.setdefault((places[writer.node], head, kind), {})[f"{writer}->{reader}"] = score
        if gate is not None:
            for part in dict.fromkeys(parts):
                merged.setdefault((gate, part, "feeds"), {})[f"{gate.name} feeds {part.name}"] = None
    lines = {key: edges for key, edges in merged.items() if key[0] != key[1]}
    return tuple(Line(*key, tuple(edges.items()), _surest(live, edges if key[2] != "feeds" else ())) for key, edges in lines.items())


def _surest(live: Circuit, edges: Iterable[str]) -> float | None:
    """The largest confidence of some edges, where the circuit has any."""
    if live.confidence is None:
        return None
    known = [float(value) for name in edges if not math.isnan(value := live.confidence[live.graph.edge_id(name)])]
    return max(known, default=None)


def _place(name: str, live: Circuit, detail: Detail) -> Node:
    if name == "logits":
        return Node(math.inf, 0, "logits", "logits", "logits")
    writer = Writer.parse(name)
    if detail == "layers" and writer.component is not None:
        return _parts_of(live, writer.component)
    if detail == "layers" and writer.kind == "head":
        written = map(live.graph.writers.__getitem__, np.flatnonzero(live.mask.any(axis=0)))
        heads = len({other.node for other in written if other.depth == writer.depth})
        return Node(writer.depth, 0, f"a{writer.layer}", "heads", f"a{writer.layer}\n{heads} head{'s' * (heads != 1)}")
    return Node(writer.depth, writer.index, name, writer.kind, name)


def _gate(live: Circuit, reader: Reader, detail: Detail) -> Node | None:
    """The place of what a component reads that is in parts, one for all of its readers; none for a reader that is one node's."""
    fed = live.graph.writers[int(np.argmax(live.graph.feeds[live.graph.reader_id(reader)]))]
    if reader.kind in ("feature", "logits") or fed.component is None:
        return None
    return _parts_of(live, fed.component) if detail == "layers" else Node(reader.depth, 0, fed.component.name, "reader", fed.component.name)


def _parts_of(live: Circuit, component: Component) -> Node:
    """All parts of a component in one place."""
    written = [live.graph.writers[w] for w in np.flatnonzero(live.mask.any(axis=0))]
    parts = [writer for writer in written if writer.component == component]
    depth = next(writer.depth for writer in live.graph.writers if writer.component == component)
    return Node(depth, 0, component.name, "parts", f"{component}\n{len(parts)} part{'s' * (len(parts) != 1)}")


def _title(provenance: Mapping[str, Any]) -> str:
    """What was asked of which model and by which method, as far as the provenance says."""
    return " · ".join(name for name in (_name(provenance.get(key)) for key in ("task", "model", "algorithm")) if name)


def _name(value: Any) -> str:
    """The provenance says a thing by its name, or by a mapping that has one; an algorithm around another one by both."""
    if isinstance(value, Mapping):
        inside = _name(value.get("algorithm"))
        value = next((value[key] for key in ("name", "id", "class", "kind") if value.get(key)), "")
        return f"{value}({inside})" if inside and isinstance(value, str) else _name(value)
    return value if isinstance(value, str) else ""


def _facts(circuit: Circuit, live: Circuit) -> list[str]:
    facts = [f"{circuit.n_edges:,} of {circuit.graph.n_edges:,} edges"]
    faithfulness = find_number(circuit.provenance, "faithfulness")
    if faithfulness is not None:
        facts.append(f"faithfulness {faithfulness:.3g}")
    if dead := circuit.n_edges - live.n_edges:
        facts.append(f"{dead:,} not drawn: no path from input to logits")
    return facts


def find_number(provenance: Mapping[str, Any], key: str) -> float | None:
    """A number of the provenance, at the top or one level below; of a mapping of numbers, the one called `value` or `mean`."""
    for part in (provenance, *(value for value in provenance.values() if isinstance(value, Mapping))):
        value = part.get(key)
        if isinstance(value, Mapping):
            value = value.get("value", value.get("mean"))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None
