"""`circuitgraph benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from circuitgraph import _choosing
from circuitgraph._benchmark import benchmark
from circuitgraph._circuit import Circuit
from circuitgraph.cli._app import AsJson, Backend, Device, Dtype, Memory, PerHead, Seed, app, loaded, print_json, progress_bar, trace_model


@app.command("benchmark", epilog="Example: circuitgraph benchmark -m zoo:tiny-english -t ioi -a eap -a eap-ig:points=8 -a acdc -o results")
def run_benchmark(
    models: Annotated[list[str], typer.Option("--model", "-m", help="A model; again for more.")],
    tasks: Annotated[list[str], typer.Option("--task", "-t", help="A task; again for more.")],
    algorithms: Annotated[
        list[str], typer.Option("--algorithm", "-a", metavar="NAME[:SETTING=VALUE...]", help="An algorithm; again for more.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder: what it holds already is not measured again.")],
    prompts: Annotated[int, typer.Option("--prompts", "-n", min=1, help="How many prompts discovery sees.")] = 32,
    test_prompts: Annotated[int | None, typer.Option(min=1, help="How many other prompts the numbers are of (default: as many).")] = None,
    seed: Seed = 0,
    source: Annotated[str, typer.Option(help="What patched edges carry.")] = "corrupted",
    reference: Annotated[
        list[str] | None, typer.Option(metavar="TASK=FILE", help="The known circuit of a task, for AUROC; again for more.")
    ] = None,
    backend: Backend = "torch",
    per_head_kv: PerHead = False,
    device: Device = None,
    dtype: Dtype = None,
    memory_budget: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Measure algorithms on tasks and models alike, with random and magnitude scores beside them; can be interrupted and taken up again."""
    chosen = dict(_choosing.named(text) for text in algorithms)
    references = dict(map(_reference, reference or ()))
    with progress_bar() as tell:
        table = benchmark(
            models,
            tasks,
            chosen,
            folder=output,
            prompts=prompts,
            test_prompts=test_prompts,
            seed=seed,
            source=source,  # type: ignore[arg-type]
            references=references,
            trace=lambda model: trace_model(model, backend, per_head_kv, device, dtype, memory_budget),
            progress=tell,
        )
    if as_json:
        print_json(table.to_dict())
        return
    typer.echo(table)
    typer.echo(f"wrote {output / 'table.md'}, {output / 'table.json'}")


def _reference(text: str) -> tuple[str, Circuit]:
    task, _, file = text.partition("=")
    if not file:
        raise typer.BadParameter(f"--reference {text}: expected TASK=FILE, such as ioi=known/circuit.json")
    return task, loaded(Path(file))
