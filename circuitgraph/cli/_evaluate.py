"""`circuitgraph evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError
from circuitgraph.cli._app import (
    AsJson,
    Device,
    Dtype,
    Memory,
    Prompts,
    app,
    found_with,
    loaded,
    part_of,
    print_json,
    progress_bar,
    stdout,
    trace_model,
)
from circuitgraph.cli._parts import Refine, asked_before, dictionaries, in_the_same_parts
from circuitgraph.drawing import plot_format
from circuitgraph.evaluation import MEASURES, Agreement, Curve, Measure, measures_named
from circuitgraph.evaluation._report import evaluate
from circuitgraph.files import check_place, load_any


@app.command("evaluate", epilog="Example: circuitgraph evaluate induction/circuit.json --seed 1 --measure tests --plot curve.svg")
def evaluate_file(
    file: Annotated[Path, typer.Argument(help="A circuit file, or the folder that discover wrote.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Another model of the same graph.")] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="Another task.")] = None,
    prompts: Prompts = None,
    seed: Annotated[int | None, typer.Option("--seed", "-s", min=0, help="Another seed draws prompts that discovery has not seen.")] = None,
    backend: Annotated[str | None, typer.Option("--backend", "-b", help="What computes: torch or jax (default: what found it).")] = None,
    refine: Refine = None,
    measure: Annotated[list[str] | None, typer.Option(help=f"A deeper measure, again for more: {', '.join(MEASURES)}.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Compare with this circuit: AUROC, precision, recall.")] = None,
    mib_compat: Annotated[bool, typer.Option("--mib-compat", help="CPR, CMD and AUROC as MIB's code computes them.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the faithfulness curve into this SVG, PDF or PNG file.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report into this JSON file.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    memory_budget: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Measure a circuit again: by default with the model, backend, task, prompts and seed it was found with."""
    if output is not None:
        check_place(output)
    circuit = loaded(file)
    found = circuit.provenance
    measures = _measures(measure or (), circuit, reference, mib_compat, plot)
    name, how = model or found_with(found, "model", file), part_of(found, "model")
    per_head_kv = not any(reader.is_grouped for reader in circuit.graph.readers)
    chosen = dictionaries(refine or asked_before(circuit, file))
    with progress_bar() as tell:
        traced = trace_model(name, backend or how.get("backend") or "torch", per_head_kv, device, dtype or how.get("dtype"), memory_budget)
        report = evaluate(
            in_the_same_parts(traced, circuit, chosen) if chosen else traced,
            task or found_with(found, "task", file),
            circuit,
            prompts=prompts or (None if task else found.get("prompts")),
            seed=seed if seed is not None else found.get("seed", 0),
            measures=measures,
            progress=tell,
        )
    written = [report.save(output)] if output else []
    written += [report.plot(plot)] if plot else []
    if as_json:
        print_json(report.to_dict())
        return
    stdout.print(report)
    if written:
        typer.echo(f"wrote {', '.join(map(str, written))}")


def _measures(names: Sequence[str], circuit: Circuit, reference: Path | None, mib_compat: bool, plot: Path | None) -> Sequence[Measure]:
    """The measures asked for; a plot needs the curve, and a reference is one of its own."""
    if plot is not None:
        plot_format(plot)
    if mib_compat and reference is None and plot is None and "curve" not in names:
        raise CircuitGraphError("--mib-compat is for --measure curve and --reference; add one of them")
    chosen = dict.fromkeys([*names, *(["curve"] if plot is not None else [])])
    measures: list[str | Measure] = [Curve(mib_compat=mib_compat) if name == "curve" else name for name in chosen]
    if reference is not None:
        measures.append(Agreement(load_any(reference, circuit.graph), mib_compat=mib_compat))
    return measures_named(measures)
