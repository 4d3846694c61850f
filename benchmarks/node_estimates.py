"""How near each estimate of what patching a node does comes to patching it: a table of `docs/explanation/algorithms-compared.md`.

    python -m benchmarks.node_estimates                                 # all tasks: five minutes on two cores, writes the page
    python -m benchmarks.node_estimates --tasks ioi --metric prob_diff  # prints some of it

Of SmolLM2-135M. The estimates are sums of edge scores, since the first-order effect of a node is that of all its edges.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import pearsonr, spearmanr

from benchmarks.subjects import SMOLLM2
from benchmarks.tables import Table, between
from circuitgraph import EAP, EAPIG, ActivationPatching, Algorithm, AttributionPatching, Engine, Graph, RelP, Writer, load_task, trace
from circuitgraph.files import write_bytes

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "algorithms-compared.md"
START, END = "<!-- node estimates: written by `python -m benchmarks.node_estimates` -->", "<!-- end of node estimates -->"
TASKS = ("ioi", "subject-verb-agreement", "greater-than-digits", "induction")
ESTIMATES: Mapping[str, Algorithm] = {
    "attribution patching (EAP)": EAP(),
    "AtP, qk-fix": AttributionPatching(corrections=("qk-fix",)),
    "AtP, grad-drop": AttributionPatching(corrections=("grad-drop",)),
    "EAP-IG": EAPIG(),
    "RelP": RelP(),
}
COLUMNS = ("task", "metric", "estimate", "MLPs", "MLPs but the first", "heads", "MLPs by rank", "first MLP", "patched")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--metric", help="default: that of each task")
    parser.add_argument("--prompts", type=int, default=8)
    chosen = parser.parse_args(arguments)
    traced = trace(SMOLLM2)
    rows: list[tuple[str, ...]] = []
    for name in chosen.tasks:
        task = load_task(name)
        metric = chosen.metric or task.metric
        rows += [(name, metric, *cells) for cells in compared(traced.bind(task.pairs(traced.tokenizer, chosen.prompts, seed=0), metric))]
        print(f"{name}: done", flush=True)
    table = Table("Estimates of single nodes", COLUMNS, rows)
    table.show()
    if chosen == parser.parse_args([]):
        write_bytes(PAGE, between(PAGE.read_text(), START, END, table.markdown()).encode())
        print(f"wrote the table of {PAGE.name}")


def compared(engine: Engine) -> list[tuple[str, ...]]:
    """One row of cells for each estimate."""
    graph = engine.graph
    exact = node_scores(ActivationPatching(level="node"), engine)
    heads, mlps = _of_kind(graph, "head"), _of_kind(graph, "mlp")
    rows = []
    for name, algorithm in ESTIMATES.items():
        found = node_scores(algorithm, engine)
        nodes = [pearsonr(found[kind], exact[kind]).statistic for kind in (mlps, mlps[1:], heads)]
        by_rank = spearmanr(found[mlps], exact[mlps]).statistic
        rows.append((name, *(f"{value:.3f}" for value in (*nodes, by_rank, found[mlps[0]], exact[mlps[0]]))))
    return rows


def node_scores(algorithm: Algorithm, engine: Engine) -> Float[ndarray, " writers"]:
    """What patching each writer does, of a node method its own score, of one of edges the sum of those that leave it."""
    outcome = algorithm.run(engine)
    if "nodes" in outcome.record:
        return np.array([*outcome.record["nodes"].values()])
    scores: Float[ndarray, " writers"] = np.where(engine.graph.visible, outcome.scores, 0.0).sum(axis=0, dtype=np.float64)
    return scores


def _of_kind(graph: Graph, kind: str) -> list[int]:
    """The writers of a kind, in the order of their layers."""
    writers: Sequence[Writer] = graph.writers
    return [number for number, writer in enumerate(writers) if writer.kind == kind]


if __name__ == "__main__":
    main()
