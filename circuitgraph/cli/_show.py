"""`circuitgraph show`, and the lists of what there is."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from circuitgraph import _discover, zoo
from circuitgraph._circuit import Circuit
from circuitgraph._task import list_tasks
from circuitgraph.cli._app import AsJson, Backend, Device, Dtype, Memory, PerHead, app, loaded, print_json, print_rows, stdout, trace_model


@app.command(epilog="Example: circuitgraph show induction/circuit.json -o induction.pdf")
def show(
    file: Annotated[Path, typer.Argument(help="A circuit file, or the folder that discover wrote.")],
    picture: Annotated[Path | None, typer.Option("--output", "-o", help="Draw it into this SVG, PDF, PNG or DOT file.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many edges to list, the strongest first.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Print a circuit's edges and where it came from; draw it with -o."""
    circuit = loaded(file)
    if picture is not None:
        circuit.render(picture)
    edges = _scored_edges(circuit)
    if as_json:
        print_json({"edges": [{"edge": name, "score": score} for name, score in edges], "provenance": dict(circuit.provenance)})
        return
    table = Table("edge", "score", box=None, pad_edge=False)
    for name, score in edges[:limit]:
        table.add_row(name, "" if score is None else f"{score:.4g}")
    stdout.print(table)
    if len(edges) > limit:
        typer.echo(f"... and {len(edges) - limit} more (--limit)")
    typer.echo(f"\n{circuit!r}")
    for key, value in circuit.provenance.items():
        if key != "architecture":
            typer.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    if picture is not None:
        typer.echo(f"wrote {picture}")


@app.command(epilog="Example: circuitgraph trace zoo:tiny-english")
def trace(
    model: Annotated[str, typer.Argument(help="Hugging Face id, local folder, GGUF file or zoo: name.")],
    architecture: Annotated[bool, typer.Option("--architecture", help="Print the wiring that was found, as JSON.")] = False,
    backend: Backend = "torch",
    per_head_kv: PerHead = False,
    device: Device = None,
    dtype: Dtype = None,
    memory_budget: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Find a model's wiring, print the size of its graph and the proof that the replay is the model."""
    traced = trace_model(model, backend, per_head_kv, device, dtype, memory_budget)
    if architecture:
        typer.echo(traced.architecture.to_json())
        return
    graph, checks = traced.graph, []
    if not as_json:
        typer.echo(f"{traced.name}: {traced.architecture.family}, {graph!r}")
        for note in traced.architecture.notes:
            typer.echo(f"  {note}")
    for check in _discover.checks(traced):
        checks.append(check)
        if not as_json:
            typer.echo(f"  {check}")
    if as_json:
        sizes = {"writers": len(graph.writers), "readers": len(graph.readers), "edges": graph.n_edges, "nodes": len(graph.nodes)}
        proof = [{**asdict(c), "error": c.error if isfinite(c.error) else None, "holds": c.holds} for c in checks]
        print_json({"model": traced.name, "family": traced.architecture.family, **sizes, "checks": proof})
    if not all(check.holds for check in checks):
        raise typer.Exit(2)


@app.command(epilog="Example: circuitgraph tasks --json")
def tasks(as_json: AsJson = False) -> None:
    """List the bundled tasks."""
    listed = list_tasks()
    rows = [{"name": t.name, "about": t.task.description or t.task.source if t.task else f"cannot be read: {t.error}"} for t in listed]
    print_json(rows) if as_json else print_rows(rows)


@app.command(epilog="Example: circuitgraph models")
def models(as_json: AsJson = False) -> None:
    """List the bundled models, and those that come as a package. Any decoder of Hugging Face can be named as well."""
    rows = [{"name": name, "about": zoo.about(folder)} for name, folder in zoo.zoo_models().items()]
    rows += [{"name": name, "about": about} for name, about in zoo.PACKAGED.items()]
    print_json(rows) if as_json else print_rows(rows)


def _scored_edges(circuit: Circuit) -> list[tuple[str, float | None]]:
    if circuit.scores is None:
        return [(edge.name, None) for edge in circuit.edges]
    scored = [(edge.name, float(circuit.scores[circuit.graph.edge_id(edge)])) for edge in circuit.edges]
    return sorted(((name, score if score == score else None) for name, score in scored), key=lambda row: -abs(row[1] or 0.0))
