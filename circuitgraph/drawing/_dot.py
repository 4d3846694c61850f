"""How a picture looks: a `Plan` as DOT text. The same circuit always gives the same text."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from circuitgraph._circuit import Circuit
from circuitgraph.drawing._plan import Detail, Line, Node, Plan, make_plan

if TYPE_CHECKING:
    from graphviz import Digraph

# Okabe and Ito's palette, which colour-blind readers can tell apart; the fills are tints of it.
COLOURS = {"q": "#0072B2", "k": "#D55E00", "v": "#009E73", "mlp": "#B0609A", "logits": "#3C4250", "merged": "#5B7FA6"}
COLOURS |= {"feature": "#A07300", "stream": "#3C4250", "feeds": "#B4BAC6", "adds": "#0072B2"}
MEANINGS = {"q": "query", "k": "key", "v": "value", "mlp": "MLP input", "logits": "logits", "merged": "query, key, value"}
MEANINGS |= {"feature": "feature input", "stream": "stream", "feeds": "computed from", "adds": "adds to"}
INK, FAINT = "#1F2430", "#8A90A0"
FONT = "Helvetica,Arial,DejaVu Sans,sans-serif"
_NAMED = 2  # spans beside a line
NODES: dict[str, dict[str, str]] = {
    "input": {"shape": "box", "style": "filled,rounded", "fillcolor": INK, "color": INK, "fontcolor": "white"},
    "logits": {"shape": "box", "style": "filled,rounded", "fillcolor": INK, "color": INK, "fontcolor": "white"},
    "head": {"shape": "ellipse", "style": "filled", "fillcolor": "#EAF2FA", "color": "#5B7FA6"},
    "heads": {"shape": "ellipse", "style": "filled", "fillcolor": "#EAF2FA", "color": "#5B7FA6", "peripheries": "2"},
    "mlp": {"shape": "box", "style": "filled", "fillcolor": "#FBEFD5", "color": "#C79A3A"},
    "feature": {"shape": "box", "style": "filled,rounded", "fillcolor": "#E3F3EC", "color": "#3F9B7A"},
    "neuron": {"shape": "box", "style": "filled,rounded", "fillcolor": "#E3F3EC", "color": "#3F9B7A"},
    "skip": {"shape": "box", "style": "filled,rounded", "fillcolor": "white", "color": "#3F9B7A"},
    "error": {"shape": "diamond", "style": "filled", "fillcolor": "#F3F4F7", "color": "#8A90A0"},
    "parts": {"shape": "box", "style": "filled,rounded", "fillcolor": "#E3F3EC", "color": "#3F9B7A", "peripheries": "2"},
    "reader": {"shape": "box", "style": "dashed", "color": "#8A90A0", "fontcolor": "#5A6070"},
}


def to_dot(circuit: Circuit, *, title: str | None = None, detail: Detail = "auto", labels: Mapping[str, str] | None = None) -> str:
    """The picture of a circuit as DOT text: the input at the bottom, the logits at the top, one row per layer's attention and MLP."""
    plan = make_plan(circuit, title=title, detail=detail)
    return drawn(plan, labels)


def drawn(plan: Plan, labels: Mapping[str, str] | None = None) -> str:
    """A plan as DOT text, its lines drawn by their scores. `labels`: what nodes are, by name."""
    return dot_of(plan, lambda line: _stroke(line, plan.strongest), _legend(plan), labels)


def dot_of(plan: Plan, stroke: Callable[[Line], dict[str, str]], legend: str, labels: Mapping[str, str] | None = None) -> str:
    """A plan as DOT text, its lines drawn with these attributes; `legend` is HTML-like, `labels` are for whoever points at a node."""
    said = labels or {}
    dot = _canvas(plan, legend)
    rows = [(depth, list(nodes)) for depth, nodes in groupby(plan.nodes, key=lambda node: node.depth)]
    _ruler(dot, rows)
    for _, nodes in rows:
        with dot.subgraph() as row:
            row.attr(rank="same")
            row.node(_ruler_name(nodes[0]))
            for node in nodes:
                tooltip = f"{node.name}: {said[node.name]}" if node.name in said else node.label
                row.node(node.name, label=_escape(node.label), tooltip=_escape(tooltip), **_width(node, plan), **NODES[node.kind])
    for line in plan.lines:
        dot.edge(line.tail.name, line.head.name, **tips(line), **_with_spans(line, stroke(line)))
    return str(dot.source)


def _canvas(plan: Plan, legend: str) -> Digraph:
    import graphviz

    dot = graphviz.Digraph("circuit")
    crowd = len(plan.lines) / len({node.depth for node in plan.nodes})
    dot.attr(rankdir="BT", ranksep=f"{min(0.34 + 0.025 * crowd, 1.2):.2f}", nodesep="0.18", splines="true", outputorder="edgesfirst")
    dot.attr(bgcolor="white", pad="0.25")
    dot.attr(
        label=_caption(plan, legend), labelloc="t", labeljust="c", fontname=FONT, fontcolor=INK, tooltip=_escape(plan.title or "circuit")
    )
    dot.attr("node", fontname=FONT, fontsize="12", fontcolor=INK, penwidth="1.1", height="0.34", width="0.72", margin="0.06,0.03")
    dot.attr("edge", arrowsize="0.55", arrowhead="normal", penwidth="1.2")
    return dot


def _ruler(dot: Digraph, rows: list[tuple[float, list[Node]]]) -> None:
    """The layers' numbers at the left, one under the other: an invisible column that keeps the rows in order."""
    names = []
    seen: set[int] = set()
    with dot.subgraph() as ruler:
        ruler.attr("node", shape="plaintext", fontsize="10", fontcolor=FAINT, group="ruler", width="0.6", tooltip=" ")
        for _, nodes in rows:
            layer = nodes[0].layer
            is_new = nodes[0].kind not in ("input", "logits") and layer not in seen
            seen.add(layer)
            names.append(_ruler_name(nodes[0]))
            ruler.node(names[-1], label=f"layer {layer}" if is_new else "")
        ruler.attr("edge", style="invis", weight="100")
        for below, above in pairwise(names):
            ruler.edge(below, above)


def _ruler_name(node: Node) -> str:
    return f"row {node.depth:g}"


def _width(node: Node, plan: Plan) -> dict[str, str]:
    """Wide enough for the lines that end there to stay apart."""
    if node.kind not in ("input", "logits"):
        return {}
    return {"width": f"{min(1.1 + 0.09 * sum(node in (line.tail, line.head) for line in plan.lines), 6):.2f}"}


def _stroke(line: Line, strongest: float) -> dict[str, str]:
    """Colour by what is read, width and strength by |score|, dashes for a negative score; the confidence beside the line."""
    stroke = {} if line.confidence is None else {"label": f" {line.confidence:.0%}", "fontsize": "8", "fontcolor": FAINT, "fontname": FONT}
    if line.score is None or strongest == 0:
        return {**stroke, "color": COLOURS[line.kind]}
    share = (abs(line.score) / strongest) ** 0.5
    stroke["color"] = f"{COLOURS[line.kind]}{round(0x70 + (0xF4 - 0x70) * share):02X}"
    stroke["penwidth"] = f"{0.7 + 3.1 * share:.2f}"
    stroke["arrowsize"] = f"{0.4 + 0.3 * share:.2f}"
    return {**stroke, "style": "dashed"} if line.score < 0 else stroke


def _with_spans(line: Line, stroke: dict[str, str]) -> dict[str, str]:
    """Beside the line, before what else stands there, the parts of the prompt at which its edges lie: the first few of them."""
    if not line.spans:
        return stroke
    more = " \N{HORIZONTAL ELLIPSIS}" if len(line.spans) > _NAMED else ""
    label = f" {_escape(', '.join(line.spans[:_NAMED]))}{more}{stroke.get('label', '')}"
    return {"fontsize": "8", "fontname": FONT, "fontcolor": COLOURS[line.kind], **stroke, "label": label}


def tips(line: Line) -> dict[str, str]:
    """What the edges of a line are, for whoever points at it."""
    return dict.fromkeys(("tooltip", "edgetooltip", "labeltooltip", "headtooltip", "tailtooltip"), _escape(line.tooltip))


def _caption(plan: Plan, legend: str) -> str:
    """Title, facts and legend as one HTML-like table."""
    rows = []
    if plan.title:
        rows.append(f'<TR><TD><FONT POINT-SIZE="17"><B>{_html(plan.title)}</B></FONT></TD></TR>')
    rows.append(f'<TR><TD><FONT POINT-SIZE="12" COLOR="{FAINT}">{_html("  ·  ".join(plan.facts))}</FONT></TD></TR>')
    if plan.lines:
        rows.append(f'<TR><TD>{legend}</TD></TR><TR><TD HEIGHT="6"></TD></TR>')
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="3">{"".join(rows)}</TABLE>>'


def _legend(plan: Plan) -> str:
    """One line of text: a table would be stretched to the picture's width."""
    parts = [swatch(COLOURS[kind], "\N{BLACK SQUARE}", MEANINGS[kind]) for kind in plan.kinds]
    if any(line.score is not None and line.score < 0 for line in plan.lines):
        parts.append(swatch(INK, "\N{EN DASH} \N{EN DASH}", "negative score"))
    if plan.strongest:
        parts.append(f'<FONT POINT-SIZE="11" COLOR="{FAINT}">width: |score|</FONT>')
    if any(line.confidence is not None for line in plan.lines):
        parts.append(f'<FONT POINT-SIZE="11" COLOR="{FAINT}">per cent: confidence</FONT>')
    return joined(parts)


def joined(parts: Sequence[str]) -> str:
    """The parts of a legend in one line."""
    return f'<FONT POINT-SIZE="11" COLOR="{INK}">    </FONT>'.join(parts)


def swatch(colour: str, stroke: str, meaning: str) -> str:
    """A sign of a legend with what it means."""
    return f'<FONT POINT-SIZE="11" COLOR="{colour}"><B>{stroke}</B></FONT><FONT POINT-SIZE="11" COLOR="{INK}"> {_html(meaning)}</FONT>'


def _printable(text: str) -> str:
    """Without control characters, which XML cannot hold; lines stay."""
    return "".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _html(text: str) -> str:
    return html.escape(_printable(text).replace("\n", " "))


def _escape(text: str) -> Any:
    """Text that DOT shows as it is."""
    import graphviz

    return graphviz.nohtml(graphviz.escape(_printable(text)).replace("\n", "\\n"))
