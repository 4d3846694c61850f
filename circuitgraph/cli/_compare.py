"""`circuitgraph compare`: circuits beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError
from circuitgraph.cli._app import AsJson, Backend, Device, Dtype, Memory, app, found_with, loaded, part_of, print_json, stdout, trace_model
from circuitgraph.evaluation import compare
from circuitgraph.evaluation._question import Question, pose


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
    question = (
        _question(files[0], loaded(files[0]), model, task, prompts, seed, backend, device, dtype, memory_budget) if same_size else None
    )
    found = compare(circuits, question)
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


def _question(
    file: Path,
    circuit: Circuit,
    model: str | None,
    task: str | None,
    prompts: int | None,
    seed: int,
    backend: str,
    device: str | None,
    dtype: str | None,
    memory_budget: str | None,
) -> Question:
    found = circuit.provenance
    per_head_kv = not any(reader.is_grouped for reader in circuit.graph.readers)
    traced = trace_model(
        model or found_with(found, "model", file),
        backend,
        per_head_kv,
        device,
        dtype or part_of(found, "model").get("dtype"),
        memory_budget,
    )
    source = found.get("source", "corrupted")
    name = task or found_with(found, "task", file)
    question = pose(traced, name, prompts=prompts or found.get("prompts"), seed=seed, metric=found.get("metric"), source=source)
    question.check()
    return question
