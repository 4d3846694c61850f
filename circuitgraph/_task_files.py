"""Task files as plain values: TOML (a task), CSV or JSONL (rows of prompts).

A CSV or JSONL file has the columns `clean`, `corrupted`, `answer` and, if wanted, `wrong_answer` and `template`. In JSONL, answers may
be lists. Texts are taken as they are: an answer that follows a word begins with its space.
"""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from circuitgraph._errors import FileError, TaskError, unknown_name

Values = dict[str, Any]

_COLUMNS = ("clean", "corrupted", "answer", "wrong_answer", "template")
_REQUIRED = ("clean", "corrupted", "answer")


def builtin_folder() -> Path:
    """The folder of what comes with circuitgraph."""
    here = Path(__file__).parent
    return here / "tasks" if (here / "tasks").is_dir() else here.parent / "tasks"  # in a wheel, in a checkout


def builtin_files() -> dict[str, Path]:
    """The task files that come with circuitgraph, by name."""
    return {path.stem: path for path in sorted(builtin_folder().glob("*.toml"), key=lambda path: path.stem)}


def builtin_file(name: str) -> Path:
    """The file of a built-in task. Raises `UnknownNameError`."""
    known = builtin_files()
    if name not in known:
        raise unknown_name("task", name, known)
    return known[name]


def is_file_name(name: str) -> bool:
    """Whether it is meant as a file's: it has a folder, or the ending of a task file."""
    return name != Path(name).name or Path(name).suffix.lower() in _READERS


def file_of(task: Any) -> Path | None:
    """The file that is meant by a path, or by a text that is no built-in task's name."""
    if isinstance(task, Path):
        return task
    return Path(task) if isinstance(task, str) and is_file_name(task) else None


def values_in(path: Path) -> Values:
    """The fields of the task in a file. Raises `FileError` where there is none, `TaskError` that names the line and the column."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise TaskError(f"its name does not end in {', '.join(_READERS)}")
    try:
        return reader(path, path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileError(f"there is no such file; built-in tasks are {', '.join(builtin_files())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"it cannot be read as UTF-8 text: {error}") from None


def _read_toml(_: Path, text: str) -> Values:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TaskError(f"not valid TOML: {error}") from None


def _read_csv(path: Path, text: str) -> Values:
    table = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        columns = next(table, [])
        _check_columns(columns)
        rows = []
        for cells in table:
            if not cells:
                continue  # a blank line
            if len(cells) != len(columns):
                raise TaskError(f"line {table.line_num}: {len(cells)} cells for {len(columns)} columns ({', '.join(columns)})")
            rows.append(_row(table.line_num, dict(zip(columns, cells, strict=True))))
    except csv.Error as error:
        raise TaskError(f"line {table.line_num}: {error}") from None
    return _task_of(path, rows)


def _read_jsonl(path: Path, text: str) -> Values:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(f"line {number}, column {error.colno}: not valid JSON: {error.msg}") from None
        if not isinstance(values, dict):
            raise TaskError(f'line {number}: {line[:40]!r} is not an object; expected {{"clean": ..., "corrupted": ..., "answer": ...}}')
        rows.append(_row(number, values))
    return _task_of(path, rows)


def _check_columns(columns: list[str]) -> None:
    for column in columns:
        if column not in _COLUMNS:
            raise TaskError(f"line 1: {unknown_name('column', column, _COLUMNS)}")
        if columns.count(column) > 1:
            raise TaskError(f"line 1: the column {column!r} stands {columns.count(column)} times; one of them would be lost")
    for column in _REQUIRED:
        if column not in columns:
            raise TaskError(
                f"line 1: the column {column!r} is missing; the columns are {', '.join(_COLUMNS)} (the last two may be left out)"
            )


def _row(line: int, values: dict[str, Any]) -> Values:
    for column in values:
        if column not in _COLUMNS:
            raise TaskError(f"line {line}: {unknown_name('column', column, _COLUMNS)}")
    for column in _REQUIRED:
        if values.get(column) in (None, "", []):
            raise TaskError(f"line {line}, column {column}: it is {'missing' if column not in values else 'empty'}")
    values = {column: value for column, value in values.items() if value not in (None, "", [])}
    for column, value in values.items():
        texts = value if column in ("answer", "wrong_answer") and isinstance(value, list) else [value]
        if not all(isinstance(text, str) and text for text in texts):
            raise TaskError(f"line {line}, column {column}: {value!r} is no text")
    return values


def _task_of(path: Path, rows: list[Values]) -> Values:
    if not rows:
        raise TaskError("there is no row")
    has_wrong = [bool(row.get("wrong_answer")) for row in rows]
    if any(has_wrong) and not all(has_wrong):
        raise TaskError(f"row {has_wrong.index(False) + 1} has no wrong_answer, others have; give every row one, or none")
    return {"name": path.stem, "source": path.name, "metric": "logit_diff" if all(has_wrong) else "nll", "row": rows}


_READERS: Mapping[str, Callable[[Path, str], Values]] = {".toml": _read_toml, ".csv": _read_csv, ".jsonl": _read_jsonl}
