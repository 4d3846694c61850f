"""The shell of every command: how it ends, what its options are called, how it prints."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from circuitgraph import _discover, _plugins
from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError
from circuitgraph.evaluation._question import NO_TASK, CircuitGraphWarning

_UsageError: Any = typer.BadParameter.__base__  # click's, which newer versions of typer have inside

stdout = Console()
stderr = Console(stderr=True)


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
        say("error", f"{error.format_message()} (see --help)", "bold red")
        raise typer.Exit(2) from None
    except CircuitGraphError as error:
        say("error", str(error), "bold red")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        say("stopped", "interrupted; nothing was written", "yellow")
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
Memory = Annotated[str | None, typer.Option("--memory-budget", help="Memory to compute with, such as 8GB (default: auto).")]
Dtype = Annotated[str | None, typer.Option(help="Number type, such as bfloat16; default: float32, or float64 where the weights are.")]
AlgorithmName = Annotated[
    str, typer.Option("--algorithm", "-a", help=f"One of {', '.join(_plugins.names(_plugins.ALGORITHMS)) or 'none installed'}.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A hyper-parameter of the algorithm. Can be repeated.")
]


def trace_model(model: str, backend: str, per_head_kv: bool, device: str | None, dtype: str | None, memory: str | None) -> Any:
    options: dict[str, Any] = {"per_head_kv": per_head_kv or None, "device": device, "dtype": dtype, "memory_budget": memory}
    return _discover.trace(model, backend=backend, **{name: value for name, value in options.items() if value is not None})


def loaded(file: Path) -> Circuit:
    return Circuit.load(file / "circuit.json" if file.is_dir() else file)


def found_with(provenance: Any, what: str, file: Path) -> str:
    part = part_of(provenance, what)
    if not part.get("name"):
        raise CircuitGraphError(f"{file} does not say which {what} it was found with; add --{what}")
    if what == "task" and part["name"] == NO_TASK:
        raise CircuitGraphError(f"{file} was found with token ids, which it does not hold; add --task, or use evaluate() in Python")
    return str(part.get("path") or part["name"])


def part_of(provenance: Any, what: str) -> dict[str, Any]:
    value = provenance.get(what)
    return value if isinstance(value, dict) else {}


@contextmanager
def progress_bar() -> Iterator[_discover.Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        row = bar.add_task("", total=1.0)
        yield lambda fraction, text: bar.update(row, completed=fraction, description=text)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def print_rows(rows: list[dict[str, str]]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    stdout.print(table, highlight=False)


def _show_warning(otherwise: Any) -> Any:
    def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        if issubclass(category, CircuitGraphWarning):
            say("warning", str(message), "bold red")
        else:
            otherwise(message, category, *rest, **more)

    return show


def say(kind: str, message: str, style: str) -> None:
    stderr.print(Text.assemble((f"{kind}: ", style), " ".join(message.split())), soft_wrap=True)
