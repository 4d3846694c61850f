"""The one family of errors. Every message names the thing, says what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral
from typing import Any


class CircuitGraphError(Exception):
    """Anything circuitgraph refuses to do. The command line prints it on one line and exits with 2."""


class TraceError(CircuitGraphError):
    """A model's wiring could not be found, or its replay differs from the original."""


class TaskError(CircuitGraphError):
    """A task, its prompts or its answers cannot be used as they are."""


class DegenerateError(CircuitGraphError):
    """The question has no answer: every circuit would look perfect, or every score would be zero."""


class FileError(CircuitGraphError):
    """A file is missing, truncated, of a newer schema, or would be overwritten."""


class UnknownNameError(CircuitGraphError):
    """No writer, reader, task, metric, algorithm or model has this name."""


def unknown_name(kind: str, name: Any, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that nothing has, with the nearest names that something has.

    >>> print(unknown_name("task", "iio", ["ioi", "greater-than"]))
    unknown task 'iio'; did you mean 'ioi'?
    """
    names = sorted(known)
    if len(names) <= 12:
        otherwise = "known: " + (", ".join(names) or "none")
    else:
        otherwise = f"there are {len(names)}, for example {', '.join(names[:6])}"
    return UnknownNameError(f"unknown {kind} {name!r}; {near_names(str(name), names) or otherwise}")


def near_names(name: str, known: Iterable[str]) -> str:
    """The question whether one of the nearest names was meant, or nothing where none is near. Upper and lower case are the same.

    >>> near_names("IIO", ["ioi", "greater-than"])
    "did you mean 'ioi'?"
    """
    spelled = {n.lower(): n for n in sorted(known)}
    near = difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)
    return "did you mean " + " or ".join(repr(spelled[n]) for n in near) + "?" if near else ""


def whole_number(what: str, value: Any, least: int) -> int:
    """The value if it is a whole number of at least `least`; True and 2.0 are none.

    >>> whole_number("seed", 3, 0)
    3
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise CircuitGraphError(f"{what}: {value!r}; expected a whole number of at least {least}")
    return int(value)
