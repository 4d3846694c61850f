"""The circuits of compiled programs, beside those that Conmy et al. 2023 list: `python -m benchmarks.tracr`.

For each program, ablation and length of input: how many edges there are, how many have weights that can carry a signal, how many change
an output when patched alone, how many ACDC keeps, and how many the paper's code lists. Then, as in the paper, how well ACDC over a sweep of
thresholds, subnetwork probing and HISP tell the edges of its lists from all others. Exact and quick; no figure of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np

from benchmarks.machine import Watch
from benchmarks.tables import Table, options, publish
from circuitgraph import DegenerateError
from circuitgraph.algorithms import ACDC, HISP, SubnetworkProbing
from circuitgraph.evaluation._agreement import auroc
from circuitgraph.testing import COMPILED, CompiledModel, compiled_model
from circuitgraph.testing._outputs import Ablation, OutputEngine

THRESHOLD = 1e-6
SWEEP = np.geomspace(1e-6, 1e2, 33)  # thresholds
LENGTHS = {"reverse": (3, 5), "shuffle_dyck2": (3,)}  # of the others 3; what has another circuit at another length
PAPER = {
    "reverse": "tok->a0.h0<v> tok->m0 a0.h0->m0 tok->m1 pos->m1 m0->m1 m1->m2 m2->a3.h0<q> pos->a3.h0<k> tok->a3.h0<v> a3.h0->logits",
    "frac_prevs": "tok->m0 tok->a1.h0<q> pos->a1.h0<q> tok->a1.h0<k> pos->a1.h0<k> m0->a1.h0<v> a1.h0->logits",
}
"""For zero ablation, from the paper's code, where a chain of hook points is one edge. There `frac_prevs` is called proportion."""
METHODS = ("ACDC", "subnetwork probing", "HISP")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--programs", nargs="+", choices=COMPILED, default=COMPILED)
    chosen = parser.parse_args(arguments)
    watch = Watch()
    found = [
        circuit(name, ablation, length) for name in chosen.programs for ablation in get_args(Ablation) for length in LENGTHS.get(name, (3,))
    ]
    command = f"python -m benchmarks.tracr --programs {' '.join(chosen.programs)}"
    rankings(found).show()
    publish(table(found), found, command=command, watch=watch, file=chosen.json)


def circuit(name: str, ablation: Ablation, length: int) -> dict[str, Any]:
    """The edges of one program, ablation and length, by name. ACDC is asked about structural edges; no other changes anything."""
    compiled = compiled_model(name)
    engine = compiled.engine(ablation, length, compiled.structural_graph)
    kept = ACDC(THRESHOLD).run(engine).mask
    return {
        "program": name,
        "ablation": ablation,
        "length": length,
        "edges": compiled.graph.n_edges,
        "structural": sorted(compiled.structural()),
        "measured": sorted(compiled.measured(ablation, length)),
        "acdc": sorted(edge.name for edge in engine.graph.edges_of(kept)),
        "paper": sorted(PAPER[name].split()) if name in PAPER and ablation == "zero" else None,
        "auroc": dict(areas(compiled, engine)) if name in PAPER and length == 3 else None,
    }


def areas(compiled: CompiledModel, engine: OutputEngine) -> Iterator[tuple[str, float | None]]:
    """Of the paper's list, by each method's scores of all edges; None where the method has no answer.

    An edge's score by ACDC is the highest threshold of the sweep at which it is kept. No edge that is not structural changes anything, so
    the methods are asked about these; subnetwork probing scores writers, and with them all their edges.
    """
    graph, visible = compiled.graph, compiled.graph.visible
    wanted = np.isin([edge.name for edge in graph.edges], PAPER[compiled.name].split())
    kept_at: dict[str, float] = {}
    for threshold in SWEEP:
        kept_at.update({edge.name: float(threshold) for edge in engine.graph.edges_of(ACDC(threshold).run(engine).mask)})
    yield METHODS[0], auroc(np.array([kept_at.get(edge.name, 0.0) for edge in graph.edges]), wanted)
    for method, algorithm in zip(METHODS[1:], (SubnetworkProbing(), HISP()), strict=True):
        try:
            nodes = algorithm.run(engine).record["nodes"]
        except DegenerateError:
            yield method, None
        else:
            yield method, auroc((visible * [nodes[writer.name] for writer in graph.writers])[visible], wanted)


def table(found: Sequence[dict[str, Any]]) -> Table:
    columns = ("program", "ablation", "length", "edges", "structural", "measured", "ACDC", "the paper's")
    rows = [
        (
            case["program"],
            case["ablation"],
            str(case["length"]),
            f"{case['edges']:,}",
            str(len(case["structural"])),
            str(len(case["measured"])),
            compared(case["acdc"], case["measured"]),
            compared(case["paper"], case["measured"]),
        )
        for case in found
    ]
    notes = (
        "measured: patched alone, the edge moves an output of some input by more than 1e-4; corrupted: by what it says for another one.",
        f"ACDC with the paper's metric for Tracr (mean squared difference of all outputs) at {THRESHOLD:g}, whole inputs first.",
    )
    return Table("Circuits of compiled programs", columns, rows, notes)


def rankings(found: Sequence[dict[str, Any]]) -> Table:
    """The paper's table of Tracr models."""
    cases = [case for case in found if case["auroc"] is not None]
    rows = [
        (
            *(str(case[key]) for key in ("program", "ablation")),
            *("-" if case["auroc"][method] is None else f"{case['auroc'][method]:.3f}" for method in METHODS),
        )
        for case in cases
    ]
    notes = (
        f"AUROC of all edges, on inputs of length 3. ACDC: the highest of {len(SWEEP)} thresholds ({SWEEP[0]:g} to {SWEEP[-1]:g}) at which",
        "an edge is kept.",
        "-: no answer. The distance of a model from itself has no slope, so HISP, which asks for it, is refused.",
    )
    return Table("The lists of the paper's code, found again", ("program", "ablation", *METHODS), rows, notes)


def compared(edges: Sequence[str] | None, measured: Sequence[str]) -> str:
    """How many edges, and how they differ from those measured."""
    if edges is None:
        return "-"
    more, fewer = len({*edges} - {*measured}), len({*measured} - {*edges})
    parts = [f"{count} {what}" for count, what in ((more, "without effect"), (fewer, "missing")) if count]
    return f"{len(edges)} ({', '.join(parts) or 'the same'})"


if __name__ == "__main__":
    main()
