"""Several circuits of one graph in one picture: the colour of a line says who has it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError
from circuitgraph.drawing._dot import INK, dot_of, joined, swatch
from circuitgraph.drawing._plan import Detail, Line, make_plan

OWNERS = ("#0072B2", "#D55E00", "#009E73", "#B0609A", "#E69F00", "#56B4E9")  # Okabe and Ito's, one for each circuit
SOME = "#A0A6B4"


def joint_dot(circuits: Mapping[str, Circuit], *, title: str | None = None, detail: Detail = "auto") -> str:
    """The union of circuits as DOT text. A line merged of several edges belongs to whoever has one of them."""
    if not 2 <= len(circuits) <= len(OWNERS):
        raise CircuitGraphError(f"joint picture: {len(circuits)} circuits; expected 2 to {len(OWNERS)}, as many as there are colours")
    if len({circuit.graph for circuit in circuits.values()}) > 1:
        raise CircuitGraphError("joint picture: the circuits are of different graphs; only those of one model can be drawn together")
    graph = next(iter(circuits.values())).graph
    union = Circuit(graph, np.any([circuit.mask for circuit in circuits.values()], axis=0))
    plan = make_plan(union, title=" and ".join(circuits) if title is None else title, detail=detail)
    colours = dict(zip(circuits, OWNERS, strict=False))

    def stroke(line: Line) -> dict[str, str]:
        owners = [name for name, circuit in circuits.items() if any(circuit.is_kept(edge) for edge, _ in line.edges)]
        if len(owners) == len(circuits):
            return {"color": INK, "penwidth": "1.8"}
        if len(owners) == 1:
            return {"color": colours[owners[0]]}
        return {"color": SOME, "label": f" {', '.join(owners)}", "fontsize": "8", "fontcolor": SOME}

    parts = [swatch(colour, "\N{BLACK SQUARE}", f"{name} only") for name, colour in colours.items()]
    parts.append(swatch(INK, "\N{BLACK SQUARE}", "both" if len(circuits) == 2 else "all"))
    if len(circuits) > 2:
        parts.append(swatch(SOME, "\N{BLACK SQUARE}", "some"))
    return dot_of(plan, stroke, joined(parts))
