"""`circuitgraph compare`: circuits beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from circuitgraph._circuit import Circuit
from circuitgraph._engine import TracedModel
from circuitgraph._errors import CircuitGraphError
from circuitgraph.cli._app import AsJson, Backend, Device, Dtype, Memory, app, found_with, loaded, part_of, print_json, stdout, trace_model
from circuitgraph.evaluation import compare


@app.command("compare", epilog="Example: circuitgraph compare acdc eap --same-size -o both.svg")
def compare_files(
    files: Annotated[list[Path], typer.Argument(metavar="A B [C...]", help="Circuit files, or the folders that discover wrote.")],
    same_size: Annotated[
        bool, typer.Option("--same-size", help="Also run the model on each, cut to as many edges as the smallest has.")
    ] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Another model for --same-size.")] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="Another task for --same-size.")] = None,
    prompts: Annotated[int | None, typer.Option("--prompts", "-n", min=1, help="How many prompts for --same-size.")] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Which prompts are drawn for --same-size.")] = 1,
    picture: Annotated[Path | None, typer.Option("--output", "-o", help="Draw all into one SVG, PDF, PNG or DOT file.")] = None,
    backend: Backend = "torch",
    device: Device = None,
    dtype: Dtype = None,
    memory_budget: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Say what circuits of one model have in common: overlap, Jaccard index against chance, a joint picture."""
    circuits = dict(zip(_names(files), map(loaded, files), strict=True))
    if same_size:
        traced, name, count = _asked(files[0], next(iter(circuits.values())), model, task, backend, device, dtype, memory_budget)
        found = compare(circuits, traced, name, prompts=prompts or count, seed=seed)
    else:
        found = compare(circuits)
    if picture is not None:
        found.render(picture)
    if as_json:
        print_json(found.to_dict())
        return
    stdout.print(found)
    if picture is not None:
        typer.echo(f"wrote {picture}")


def _names(files: list[Path]) -> list[str]:
    """Short where that tells them apart."""
    short = [file.name if file.is_dir() else (file.parent.name or file.stem) if file.stem == "circuit" else file.stem for file in files]
    names = short if len(set(short)) == len(short) else [str(file) for file in files]
    if len(set(names)) < len(names):
        raise CircuitGraphError(f"compare: {names[0]} is given twice; expected different circuits")
    return names


def _asked(
    file: Path,
    circuit: Circuit,
    model: str | None,
    task: str | None,
    backend: str,
    device: str | None,
    dtype: str | None,
    memory_budget: str | None,
) -> tuple[TracedModel, str, int | None]:
    """The model, the task, and how many prompts: those of the first circuit where nothing else is said."""
    found = circuit.provenance
    per_head_kv = not any(reader.is_grouped for reader in circuit.graph.readers)
    name, dtype = model or found_with(found, "model", file), dtype or part_of(found, "model").get("dtype")
    traced = trace_model(name, backend, per_head_kv, device, dtype, memory_budget)
    return traced, task or found_with(found, "task", file), found.get("prompts")
