"""Values of a type from text, for those who have only text: `0.02`, `true`, `S1,IO`."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from circuitgraph._errors import CircuitGraphError, unknown_name

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def parsed(what: str, text: str, kind: Any) -> Any:
    """The text as a value of a type: int, float, bool, str, a Literal, a tuple of these by commas, or None by its name in a union.

    >>> parsed("steps", "5", int), parsed("spans", "S1,IO", tuple[str, ...]), parsed("seed", "none", int | None)
    (5, ('S1', 'IO'), None)

    Raises `CircuitGraphError` that names what was set and what was expected.
    """
    if get_origin(kind) in (Union, types.UnionType):
        return _one_of(what, text, get_args(kind))
    if get_origin(kind) is Literal:
        return _literal(what, text, get_args(kind))
    if get_origin(kind) in (tuple, list, Sequence):
        return _tuple(what, text, get_args(kind))
    if kind is bool:
        return _known(what, text.lower(), _BOOLEANS)
    if kind is str:
        return text
    if kind in (int, float):
        return _number(what, text, kind)
    raise CircuitGraphError(f"{what} cannot be given as text; set it in Python")


def _number(what: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise CircuitGraphError(f"{what} is {text!r}; expected a {'whole number' if kind is int else 'number'}") from None


def _literal(what: str, text: str, options: tuple[Any, ...]) -> Any:
    return _known(what, text, {str(option): option for option in options})


def _known(what: str, text: str, values: dict[str, Any]) -> Any:
    if text not in values:
        raise unknown_name(f"value of {what}", text, values)
    return values[text]


def _tuple(what: str, text: str, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    items = [item.strip() for item in text.split(",")] if text else []
    if len(kinds) == 1 or kinds[1:] == (...,):
        kinds = (kinds[0],) * len(items)
    if len(items) != len(kinds):
        raise CircuitGraphError(f"{what} is {text!r}; expected {len(kinds)} values, with commas between them")
    return tuple(parsed(what, item, kind) for item, kind in zip(items, kinds, strict=True))


def _one_of(what: str, text: str, kinds: tuple[Any, ...]) -> Any:
    """As the first of several types that takes it: whole numbers before others, free text last."""
    if type(None) in kinds and text.lower() == "none":
        return None
    order = sorted((kind for kind in kinds if kind is not type(None)), key=lambda kind: (kind is str, kind is not int))
    refused = None
    for kind in order:
        try:
            return parsed(what, text, kind)
        except CircuitGraphError as error:
            refused = error if refused is None else refused
    raise refused or CircuitGraphError(f"{what} is {text!r}; expected none")
