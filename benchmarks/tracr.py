"""The circuits of compiled programs, beside those that Conmy et al. 2023 list: `python -m benchmarks.tracr`.

For each program, ablation and length of input: how many edges there are, how many have weights that can carry a signal, how many change
an output when patched alone, how many ACDC keeps, and how many the paper's code lists. Before it the paper's own table, ours beside what
it published (`benchmarks.tracr_paper`). Exact but for the chance in subnetwork probing, whose training takes most of the time (it needs
JAX); no figure of the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from benchmarks import tracr_paper
from benchmarks.machine import Watch
from benchmarks.tables import Table, options, publish
from benchmarks.tracr_paper import LISTS, PUBLISHED, published
from benchmarks.tracr_probing import N_STEPS, PENALTIES
from circuitgraph.algorithms import ACDC
from circuitgraph.testing import COMPILED, compiled_model
from circuitgraph.testing._outputs import Ablation

THRESHOLD = 1e-6
LENGTHS = {"reverse": (3, 5), "shuffle_dyck2": (3,)}  # of the others 3; what has another circuit at another length


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--programs", nargs="+", choices=COMPILED, default=COMPILED)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn for the paper's table (default: 0)")
    chosen = parser.parse_args(arguments)
    watch = Watch()
    found = [
        circuit(name, ablation, length) for name in chosen.programs for ablation in get_args(Ablation) for length in LENGTHS.get(name, (3,))
    ]
    command = f"python -m benchmarks.tracr --programs {' '.join(chosen.programs)} --seed {chosen.seed}"
    paper = [published(compiled_model(name), ablation, chosen.seed) for name, ablation in PUBLISHED if name in chosen.programs]
    if paper:
        published_table(paper).show()
    publish(table(found), [*found, *paper], command=command, watch=watch, file=chosen.json)


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
        "paper": sorted(LISTS[name].split()) if name in LISTS and ablation == "zero" else None,
    }


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


def published_table(found: Sequence[dict[str, Any]]) -> Table:
    """The paper's table of Tracr models, ours / the paper's."""
    rows = [
        (
            case["program"],
            case["ablation"],
            *(
                f"{case['areas'][method][kind]:.3f} / {case['published'][method][kind]:.3f}"
                for kind in (0, 1)
                for method in tracr_paper.METHODS
            ),
        )
        for case in found
    ]
    notes = (
        "Pessimistic AUROC in the graph of the paper's code, ours / the paper's, on the inputs of the paper's code.",
        f"ACDC at {len(tracr_paper.SWEEP)} thresholds ({tracr_paper.SWEEP[0]:g} to {tracr_paper.SWEEP[-1]:g}).",
        f"Subnetwork probing at {len(PENALTIES)} penalties, {N_STEPS:,} steps each. Counted as for the paper, an MLP that it masks stays.",
        f"One sample after it decides. Of {tracr_paper.N_SAMPLES} samples nine in ten give: {'; '.join(map(_between, found))}.",
        f"Without the MLPs that it masks: {'; '.join(map(_without_masked_mlps, found))}.",
        "HISP: every score is exactly 0, here and in the paper's data, so its column is the order in which ties were listed; our HISP",
        "raises DegenerateError.",
    )
    columns = ("program", "ablation", *(f"{kind}: {method}" for kind in ("edges", "nodes") for method in tracr_paper.METHODS))
    return Table("The ACDC paper's table of Tracr models", columns, rows, notes)


def _between(case: dict[str, Any]) -> str:
    (edges, nodes), (to_edges, to_nodes) = case["between"]
    return f"{case['program']}, {case['ablation']}: edges {edges:.3f} to {to_edges:.3f}, nodes {nodes:.3f} to {to_nodes:.3f}"


def _without_masked_mlps(case: dict[str, Any]) -> str:
    edges, nodes = case["without_masked_mlps"]
    return f"{case['program']}, {case['ablation']}: edges {edges:.3f}, nodes {nodes:.3f}"


def compared(edges: Sequence[str] | None, measured: Sequence[str]) -> str:
    """How many edges, and how they differ from those measured."""
    if edges is None:
        return "-"
    more, fewer = len({*edges} - {*measured}), len({*measured} - {*edges})
    parts = [f"{count} {what}" for count, what in ((more, "without effect"), (fewer, "missing")) if count]
    return f"{len(edges)} ({', '.join(parts) or 'the same'})"


if __name__ == "__main__":
    main()
