"""An attribution graph as a picture: tokens at the bottom, features by layer, logits at the top; a supernode is one place."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from circuitgraph.drawing._dot import drawn
from circuitgraph.drawing._plan import Line, Node, Plan
from circuitgraph.drawing._render import write_picture
from circuitgraph.features._attribution import AttributionGraph, AttributionNode


def render_attribution(graph: AttributionGraph, path: str | Path, *, title: str | None = None) -> Path:
    """Draw it into a file, whose suffix says the format (SVG, HTML, PDF, PNG, DOT). Prune it first: all of it is too much to see.

    Pointing at a line shows the weights behind it; features show their labels where they have some. Raises `FileError`.
    """
    return write_picture(path, lambda: drawn(planned(graph, title)))


def planned(graph: AttributionGraph, title: str | None = None) -> Plan:
    group_of = {member: group for group, members in graph.supernodes.items() for member in members}
    places = {node.name: _place(node, graph) for node in graph.nodes}
    for group, members in graph.supernodes.items():
        inside = [places[name] for name in members]
        first = min(inside)
        places[group] = Node(first.depth, first.index, group, "parts", f"{group}\n{len(inside)} nodes")
    where = [places[group_of.get(node.name, node.name)] for node in graph.nodes]
    lines: dict[tuple[Node, Node], dict[str, float | None]] = {}
    for t, s in np.argwhere(graph.weights):
        if where[s] != where[t]:
            edge = f"{graph.nodes[s].name} to {graph.nodes[t].name}"
            lines.setdefault((where[s], where[t]), {})[edge] = float(graph.weights[t, s])
    facts = (
        f"{int((graph.weights != 0).sum()):,} edges",
        f"replacement score {graph.replacement_score:.3g}",
        f"completeness score {graph.completeness_score:.3g}",
    )
    return Plan(
        nodes=tuple(sorted(set(where))),
        lines=tuple(Line(*ends, "adds", tuple(edges.items())) for ends, edges in lines.items()),
        title=_title(graph) if title is None else title,
        facts=facts,
    )


def _place(node: AttributionNode, graph: AttributionGraph) -> Node:
    if node.kind == "logit":
        return Node(math.inf, node.index, node.name, "logits", f"{node.label}\n{node.probability:.1%}")
    if node.kind == "embedding":
        return Node(0, node.position, node.name, "input", graph.tokens[node.position])
    label = f"{node.label or node.name.partition('@')[0]}\n{graph.tokens[node.position]}"
    return Node(2 * node.layer + 2, node.position, node.name, node.kind, label)


def _title(graph: AttributionGraph) -> str:
    name = graph.provenance.get("model", {}).get("name", "")
    return " · ".join(part for part in (" ".join(graph.tokens), str(name)) if part)
