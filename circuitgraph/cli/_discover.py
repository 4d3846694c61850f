"""`circuitgraph discover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from circuitgraph import _choosing, _discover
from circuitgraph._circuit import Circuit
from circuitgraph._task import load_task
from circuitgraph.algorithms import PerPosition
from circuitgraph.cli._app import (
    AlgorithmName,
    AsJson,
    Backend,
    Device,
    Dtype,
    Memory,
    ModelName,
    PerHead,
    Prompts,
    Seed,
    Settings,
    TaskName,
    app,
    print_json,
    progress_bar,
    stdout,
    trace_model,
)
from circuitgraph.cli._parts import Features, Refine, dictionaries, recorded
from circuitgraph.evaluation._report import Report
from circuitgraph.features import refine as refined
from circuitgraph.files._folder import check_folder, result_folder

Threshold = Annotated[
    float | None,
    typer.Option(
        help=f"acdc: the rise of the metric that keeps an edge (default: {_choosing.ACDC_THRESHOLD}). Others: the smallest |score| kept."
    ),
]


@app.command(epilog="Example: circuitgraph discover induction --model zoo:induction-2l --algorithm acdc --threshold 0.001 -o induction")
def discover(
    task: TaskName,
    model: ModelName,
    algorithm: AlgorithmName = "eap",
    settings: Settings = None,
    threshold: Threshold = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="How many edges to choose, the strongest unless --select says otherwise (default: 1%, at least 20)."),
    ] = None,
    select: Annotated[str | None, typer.Option(help=f"How to choose from the scores: {', '.join(_choosing.SELECTORS)}.")] = None,
    faithfulness: Annotated[
        float | None, typer.Option(help="Instead of a number of edges: the fewest that reach this share of the model's behaviour.")
    ] = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the circuit, its picture and its report.")] = Path(
        "circuit"
    ),
    metric: Annotated[
        str | None, typer.Option(help="logit_diff, kl, prob_diff or nll (default: the algorithm's, else the task's).")
    ] = None,
    source: Annotated[
        str, typer.Option(help="What patched edges carry: corrupted, zero, mean, mean-per-position or optimal.")
    ] = "corrupted",
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Split every edge by the parts of the prompts that the task's slots name.")
    ] = False,
    backend: Backend = "torch",
    per_head_kv: PerHead = False,
    refine: Refine = None,
    features: Features = 32,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result in the output folder.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    memory_budget: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Find the circuit of a task in a model, and write its file, picture and report."""
    method, choose = _choosing.algorithm(algorithm, settings or [], _choosing.Choosing(threshold, top, select, faithfulness))
    if by_position:
        method = PerPosition(method)
    origin: Any = source  # `Source` refuses an unknown one
    check_folder(output, force=force)
    load_task(task)  # before the model, which takes longer
    chosen = dictionaries(refine or [])
    with progress_bar() as tell:
        tell(0.0, "tracing the model")
        traced = trace_model(model, backend, per_head_kv, device, dtype, memory_budget)
        if chosen:
            tell(0.0, "looking for active features")
            traced = refined(traced, chosen, task, top=features, prompts=prompts, seed=seed, backend=backend)
        method = _choosing.sized(method, traced.graph.n_edges)
        circuit, report = _discover.find(
            traced, task, method, prompts=prompts, seed=seed, backend=backend, metric=metric, source=origin, progress=tell, choose=choose
        )
        circuit = recorded(circuit, refine or [])
        with result_folder(output, force=force) as folder:
            _write(circuit, report, folder)
    files = sorted(str(path) for path in output.iterdir())
    if as_json:
        how = {name: circuit.provenance.get(name) for name in ("algorithm", "derived", "seconds")}
        print_json({**report.to_dict(), **how, "files": files})
        return
    stdout.print(report)
    typer.echo(f"wrote {', '.join(files)}")


def _write(circuit: Circuit, report: Report, folder: Path) -> None:
    circuit.save(folder / "circuit.json")
    circuit.render(folder / "circuit.svg")
    circuit.render(folder / "circuit.dot")
    report.save(folder / "report.json")
