"""The one family of errors. Every message names the thing, says what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that nothing has, with the nearest names that something has.

    >>> print(unknown_name("task", "iio", ["ioi", "induction"]))
    unknown task 'iio'; did you mean 'ioi'?
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
    elif len(names) <= 12:
        hint = "known: " + (", ".join(names) or "none")
    else:
        hint = f"there are {len(names)}, for example {', '.join(names[:6])}"
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")
