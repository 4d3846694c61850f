"""A table of figures, as text on a terminal and in Markdown, and the report that a script leaves as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from benchmarks.machine import Watch, description
from circuitgraph.files._atomic import write_bytes


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def show(self) -> None:
        """Print it, in a pipe with all the width that it needs."""
        console = Console() if sys.stdout.isatty() else Console(width=200)
        shown = RichTable(*map(escape, self.columns), title=escape(self.title), title_justify="left", box=SIMPLE_HEAD)
        for row in self.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
        for note in self.notes:
            console.print(note, soft_wrap=True, markup=False, highlight=False)

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", _line(self.columns), _line(["---"] * len(self.columns)), *map(_line, self.rows)]
        return "\n".join([*lines, *(part for note in self.notes for part in ("", note))]) + "\n"


@dataclass(frozen=True)
class Report:
    """What a script measured: the table that people read, the numbers behind it, and where and when."""

    command: str
    date: str
    machine: dict[str, str]
    load: str
    table: Table
    numbers: Sequence[dict[str, Any]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        found = json.loads(text)
        return cls(**{**found, "table": Table(**found["table"])})


def options(doc: str | None) -> argparse.ArgumentParser:
    """The parser that all scripts start from."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    return parser


def publish(
    table: Table, numbers: Sequence[dict[str, Any]], *, command: str, watch: Watch, file: Path | None, gpu: Mapping[str, str] | None = None
) -> None:
    """Print the table, and write the report if a file is given. `gpu`: the machine's, if that was used."""
    table.show()
    load = str(watch)
    Console().print(load, soft_wrap=True, markup=False, highlight=False)
    if file is not None:
        date, machine = datetime.now(UTC).isoformat(timespec="minutes"), {**(gpu or {}), **description()}
        report = Report(command, date, machine, load, table, numbers)
        write_bytes(file, report.to_json().encode())


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def between(page: str, start: str, end: str, text: str) -> str:
    """A page with everything between two marks replaced. Raises `ValueError` where it has not both.

    >>> between("a <> b </> c", "<>", "</>", "new")
    'a <>\\n\\nnew\\n</> c'
    """
    before, opening, rest = page.partition(start)
    _, closing, after = rest.partition(end)
    if not opening or not closing:
        raise ValueError(f"the page has no {start} ... {end}")
    return f"{before}{start}\n\n{text}\n{end}{after}"
