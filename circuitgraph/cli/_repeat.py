"""`circuitgraph confidence` and `circuitgraph stability`: how sure the scores are, and what returns when discovery is repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from circuitgraph import _choosing
from circuitgraph._task import load_task
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
from circuitgraph.evaluation import confidence, stability
from circuitgraph.files import write_bytes
from circuitgraph.files._folder import check_folder, result_folder

Metric = Annotated[str | None, typer.Option(help="logit_diff, kl, prob_diff or nll (default: the algorithm's, else the task's).")]
SourceName = Annotated[str, typer.Option(help="What patched edges carry: corrupted, zero, mean, mean-per-position or optimal.")]


@app.command("confidence", epilog="Example: circuitgraph confidence ioi --model zoo:tiny-english --algorithm eap -n 64")
def confidence_of(
    task: TaskName,
    model: ModelName,
    algorithm: AlgorithmName = "eap",
    settings: Settings = None,
    limit: Annotated[int, typer.Option(min=1, help="How many edges to list, the strongest first.")] = 20,
    prompts: Prompts = None,
    seed: Seed = 0,
    metric: Metric = None,
    source: SourceName = "corrupted",
    backend: Backend = "torch",
    per_head_kv: PerHead = False,
    device: Device = None,
    dtype: Dtype = None,
    memory_budget: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Score every edge, with an interval over prompts, how often the sign holds, and the score in each template."""
    _, method = _choosing.named(":".join([algorithm, *(settings or [])]))
    load_task(task)
    origin: Any = source
    traced = trace_model(model, backend, per_head_kv, device, dtype, memory_budget)
    found = confidence(traced, task, method, prompts=prompts, seed=seed, metric=metric, source=origin)
    print_json(found.to_dict()) if as_json else stdout.print(found.table(limit))


@app.command("stability", epilog="Example: circuitgraph stability ioi -m zoo:tiny-english -a acdc --vary prompts --vary order --runs 20")
def stability_of(
    task: TaskName,
    model: ModelName,
    algorithm: AlgorithmName = "eap",
    settings: Settings = None,
    vary: Annotated[list[str] | None, typer.Option(help="What differs from run to run: prompts, seed, order; again for more.")] = None,
    runs: Annotated[int, typer.Option(min=2, help="How often to repeat.")] = 10,
    at_least: Annotated[float, typer.Option(help="The circuit that is written has the edges of at least this share of the runs.")] = 0.5,
    threshold: Annotated[float | None, typer.Option(help="As in discover.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="As in discover.")] = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new folder for what returned and its picture.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result in the output folder.")] = False,
    metric: Metric = None,
    source: SourceName = "corrupted",
    backend: Backend = "torch",
    per_head_kv: PerHead = False,
    device: Device = None,
    dtype: Dtype = None,
    memory_budget: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Repeat discovery with other prompts, seeds or orders, and say how often each edge returns."""
    method = _choosing.deciding(algorithm, settings or [], _choosing.Choosing(threshold, top))
    if output is not None:
        check_folder(output, force=force)
    load_task(task)
    origin: Any = source
    varied: Any = vary or ["prompts"]
    with progress_bar() as tell:
        traced = trace_model(model, backend, per_head_kv, device, dtype, memory_budget)
        found = stability(
            traced, task, method, vary=varied, runs=runs, prompts=prompts, seed=seed, metric=metric, source=origin, progress=tell
        )
    circuit = found.circuit(at_least)
    if output is not None:
        with result_folder(output, force=force) as folder:
            circuit.save(folder / "circuit.json")
            circuit.render(folder / "circuit.svg")
            write_bytes(folder / "report.json", (found.to_json() + "\n").encode())
    if as_json:
        print_json(found.to_dict())
        return
    stdout.print(found)
    if output is not None:
        typer.echo(f"wrote {', '.join(sorted(str(path) for path in output.iterdir()))}")
