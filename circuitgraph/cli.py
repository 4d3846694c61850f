"""The command line: parses and prints. What it computes stands in the library under the same names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from circuitgraph import _choosing, _discover, _plugins, zoo
from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError
from circuitgraph._task import list_tasks, load_task
from circuitgraph.drawing import plot_format
from circuitgraph.evaluation import MEASURES, Agreement, Curve, Measure, measures_named
from circuitgraph.evaluation._question import NO_TASK, CircuitGraphWarning
from circuitgraph.evaluation._report import Report, evaluate
from circuitgraph.files import check_place, load_any
from circuitgraph.files._folder import check_folder, result_folder

_UsageError: Any = typer.BadParameter.__base__  # click's, which newer versions of typer have inside

_stdout = Console()
_stderr = Console(stderr=True)


class _Commands(TyperGroup):
    """Every command ends the same way: what circuitgraph refuses is one line on stderr and exit code 2, Ctrl-C is 130."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **more: Any) -> Any:
        if not args:
            return super().make_context(info_name, args, *rest, **more)  # prints the help, by an error
        with _one_line():
            return super().make_context(info_name, args, *rest, **more)

    def invoke(self, ctx: Any) -> Any:
        with _one_line(), warnings.catch_warnings():
            warnings.simplefilter("always", CircuitGraphWarning)
            warnings.showwarning = _show_warning(warnings.showwarning)
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        _say("error", f"{error.format_message()} (see --help)", "bold red")
        raise typer.Exit(2) from None
    except CircuitGraphError as error:
        _say("error", str(error), "bold red")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        _say("stopped", "interrupted; nothing was written", "yellow")
        raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Finds the part of a neural network that does a job, and proves it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="A bundled task, or a TOML, JSONL or CSV file.")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="Hugging Face id, local folder, GGUF file or zoo: name.")]
Prompts = Annotated[int | None, typer.Option("--prompts", "-n", min=1, help="How many prompts (default: 32, or all rows of a file).")]
Seed = Annotated[int, typer.Option("--seed", "-s", min=0, help="Which prompts are drawn.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
PerHead = Annotated[bool, typer.Option("--per-head-kv", help="Give every head its own k and v input in grouped-query attention.")]
Device = Annotated[str | None, typer.Option(help="Where to compute, such as cpu or cuda.")]
Backend = Annotated[str, typer.Option("--backend", "-b", help="What computes: torch or jax.")]
Dtype = Annotated[str | None, typer.Option(help="Number type, such as float32.")]
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
    algorithm: Annotated[
        str, typer.Option("--algorithm", "-a", help=f"One of {', '.join(_plugins.names(_plugins.ALGORITHMS)) or 'none installed'}.")
    ] = "eap",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A hyper-parameter of the algorithm. Can be repeated.")
    ] = None,
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
    source: Annotated[str, typer.Option(help="What patched edges carry: corrupted, zero, mean or mean-per-position.")] = "corrupted",
    backend: Backend = "torch",
    per_head_kv: PerHead = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result in the output folder.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Find the circuit of a task in a model, and write its file, picture and report."""
    method, choose = _choosing.algorithm(algorithm, settings or [], _choosing.Choosing(threshold, top, select, faithfulness))
    origin: Any = source  # `Source` refuses an unknown one
    check_folder(output, force=force)
    load_task(task)  # before the model, which takes longer
    with _progress() as tell:
        tell(0.0, "tracing the model")
        traced = _trace(model, backend, per_head_kv, device, dtype)
        method = _choosing.sized(method, traced.graph.n_edges)
        circuit, report = _discover.find(
            traced, task, method, prompts=prompts, seed=seed, backend=backend, metric=metric, source=origin, progress=tell, choose=choose
        )
        with result_folder(output, force=force) as folder:
            _write(circuit, report, folder)
    files = sorted(str(path) for path in output.iterdir())
    if as_json:
        how = {name: circuit.provenance.get(name) for name in ("algorithm", "derived", "seconds")}
        _print_json({**report.to_dict(), **how, "files": files})
        return
    _stdout.print(report)
    typer.echo(f"wrote {', '.join(files)}")


@app.command(epilog="Example: circuitgraph show induction/circuit.json -o induction.pdf")
def show(
    file: Annotated[Path, typer.Argument(help="A circuit file, or the folder that discover wrote.")],
    picture: Annotated[Path | None, typer.Option("--output", "-o", help="Draw it into this SVG, PDF, PNG or DOT file.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many edges to list, the strongest first.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Print a circuit's edges and where it came from; draw it with -o."""
    circuit = _load(file)
    if picture is not None:
        circuit.render(picture)
    edges = _scored_edges(circuit)
    if as_json:
        _print_json({"edges": [{"edge": name, "score": score} for name, score in edges], "provenance": dict(circuit.provenance)})
        return
    table = Table("edge", "score", box=None, pad_edge=False)
    for name, score in edges[:limit]:
        table.add_row(name, "" if score is None else f"{score:.4g}")
    _stdout.print(table)
    if len(edges) > limit:
        typer.echo(f"... and {len(edges) - limit} more (--limit)")
    typer.echo(f"\n{circuit!r}")
    for key, value in circuit.provenance.items():
        if key != "architecture":
            typer.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    if picture is not None:
        typer.echo(f"wrote {picture}")


@app.command("evaluate", epilog="Example: circuitgraph evaluate induction/circuit.json --seed 1 --measure tests --plot curve.svg")
def evaluate_file(
    file: Annotated[Path, typer.Argument(help="A circuit file, or the folder that discover wrote.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Another model of the same graph.")] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="Another task.")] = None,
    prompts: Prompts = None,
    seed: Annotated[int | None, typer.Option("--seed", "-s", min=0, help="Another seed draws prompts that discovery has not seen.")] = None,
    backend: Annotated[str | None, typer.Option("--backend", "-b", help="What computes: torch or jax (default: what found it).")] = None,
    measure: Annotated[list[str] | None, typer.Option(help=f"A deeper measure, again for more: {', '.join(MEASURES)}.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Compare with this circuit: AUROC, precision, recall.")] = None,
    mib_compat: Annotated[bool, typer.Option("--mib-compat", help="CPR, CMD and AUROC as MIB's code computes them.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the faithfulness curve into this SVG, PDF or PNG file.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report into this JSON file.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Measure a circuit again: by default with the model, backend, task, prompts and seed it was found with."""
    if output is not None:
        check_place(output)
    circuit = _load(file)
    found = circuit.provenance
    measures = _measures(measure or (), circuit, reference, mib_compat, plot)
    name, how = model or _found(found, "model", file), _part(found, "model")
    per_head_kv = not any(reader.is_grouped for reader in circuit.graph.readers)
    with _progress() as tell:
        report = evaluate(
            _trace(name, backend or how.get("backend") or "torch", per_head_kv, device, dtype or how.get("dtype")),
            task or _found(found, "task", file),
            circuit,
            prompts=prompts or (None if task else found.get("prompts")),
            seed=seed if seed is not None else found.get("seed", 0),
            measures=measures,
            progress=tell,
        )
    written = [report.save(output)] if output else []
    written += [report.plot(plot)] if plot else []
    if as_json:
        _print_json(report.to_dict())
        return
    _stdout.print(report)
    if written:
        typer.echo(f"wrote {', '.join(map(str, written))}")


@app.command(epilog="Example: circuitgraph trace zoo:tiny-english")
def trace(
    model: Annotated[str, typer.Argument(help="Hugging Face id, local folder, GGUF file or zoo: name.")],
    architecture: Annotated[bool, typer.Option("--architecture", help="Print the wiring that was found, as JSON.")] = False,
    backend: Backend = "torch",
    per_head_kv: PerHead = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Find a model's wiring, print the size of its graph and the proof that the replay is the model."""
    traced = _trace(model, backend, per_head_kv, device, dtype)
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
        _print_json({"model": traced.name, "family": traced.architecture.family, **sizes, "checks": proof})
    if not all(check.holds for check in checks):
        raise typer.Exit(2)


@app.command(epilog="Example: circuitgraph tasks --json")
def tasks(as_json: AsJson = False) -> None:
    """List the bundled tasks."""
    listed = list_tasks()
    rows = [{"name": t.name, "about": t.task.description or t.task.source if t.task else f"cannot be read: {t.error}"} for t in listed]
    _print_json(rows) if as_json else _print_rows(rows)


@app.command(epilog="Example: circuitgraph models")
def models(as_json: AsJson = False) -> None:
    """List the bundled models, and those that come as a package. Any decoder of Hugging Face can be named as well."""
    rows = [{"name": name, "about": zoo.about(folder)} for name, folder in zoo.zoo_models().items()]
    rows += [{"name": name, "about": about} for name, about in zoo.PACKAGED.items()]
    _print_json(rows) if as_json else _print_rows(rows)


def _trace(model: str, backend: str, per_head_kv: bool, device: str | None, dtype: str | None) -> Any:
    options: dict[str, Any] = {"per_head_kv": per_head_kv or None, "device": device, "dtype": dtype}
    return _discover.trace(model, backend=backend, **{name: value for name, value in options.items() if value is not None})


def _write(circuit: Circuit, report: Report, folder: Path) -> None:
    circuit.save(folder / "circuit.json")
    circuit.render(folder / "circuit.svg")
    circuit.render(folder / "circuit.dot")
    report.save(folder / "report.json")


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


def _load(file: Path) -> Circuit:
    return Circuit.load(file / "circuit.json" if file.is_dir() else file)


def _found(provenance: Any, what: str, file: Path) -> str:
    part = _part(provenance, what)
    if not part.get("name"):
        raise CircuitGraphError(f"{file} does not say which {what} it was found with; add --{what}")
    if what == "task" and part["name"] == NO_TASK:
        raise CircuitGraphError(f"{file} was found with token ids, which it does not hold; add --task, or use evaluate() in Python")
    return str(part.get("path") or part["name"])


def _part(provenance: Any, what: str) -> dict[str, Any]:
    value = provenance.get(what)
    return value if isinstance(value, dict) else {}


def _scored_edges(circuit: Circuit) -> list[tuple[str, float | None]]:
    if circuit.scores is None:
        return [(edge.name, None) for edge in circuit.edges]
    scored = [(edge.name, float(circuit.scores[circuit.graph.edge_id(edge)])) for edge in circuit.edges]
    return sorted(((name, score if score == score else None) for name, score in scored), key=lambda row: -abs(row[1] or 0.0))


@contextmanager
def _progress() -> Iterator[_discover.Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_stderr, transient=True, disable=not _stderr.is_terminal) as bar:
        row = bar.add_task("", total=1.0)
        yield lambda fraction, text: bar.update(row, completed=fraction, description=text)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def _print_rows(rows: list[dict[str, str]]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    _stdout.print(table, highlight=False)


def _show_warning(otherwise: Any) -> Any:
    def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        if issubclass(category, CircuitGraphWarning):
            _say("warning", str(message), "bold red")
        else:
            otherwise(message, category, *rest, **more)

    return show


def _say(kind: str, message: str, style: str) -> None:
    _stderr.print(Text.assemble((f"{kind}: ", style), " ".join(message.split())), soft_wrap=True)


if __name__ == "__main__":
    app(prog_name="circuitgraph")
