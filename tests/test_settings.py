"""Values of a type from text, and the hyper-parameters of algorithms by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from circuitgraph import _plugins
from circuitgraph._engine import Algorithm
from circuitgraph._errors import CircuitGraphError
from circuitgraph._settings import parsed


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("5", int, 5),
        ("0.5", float, 0.5),
        ("1e-3", float, 0.001),
        ("True", bool, True),
        ("no", bool, False),
        ("5", int | float, 5),
        ("5.0", float | int, 5.0),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("7", str | int, 7),
        ("none", str, "none"),
        ("b", Literal["a", "b"], "b"),
        ("3", Literal[1, 3], 3),
        ("S1, IO", tuple[str, ...], ("S1", "IO")),
        ("", tuple[str, ...], ()),
        ("1,2", Sequence[int], (1, 2)),
        ("a,2", tuple[str, int], ("a", 2)),
        ("all", Literal["all"] | tuple[int, ...], "all"),
        ("1,2", Literal["all"] | tuple[int, ...], (1, 2)),
    ],
)
def test_text_becomes_a_value(text: str, kind: Any, value: Any) -> None:
    found = parsed("x", text, kind)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("5.0", int, "x is '5.0'; expected a whole number"),
        ("much", float, "x is 'much'; expected a number"),
        ("maybe", bool, "unknown value of x 'maybe'"),
        ("noising", Literal["noisy", "clean"], "unknown value of x 'noising'; did you mean 'noisy'"),
        ("1", tuple[int, int], "x is '1'; expected 2 values"),
        ("1,b", tuple[int, ...], "x is 'b'; expected a whole number"),
        ("b", int | None, "x is 'b'; expected a whole number"),
        ("eap", Algorithm, "x cannot be given as text; set it in Python"),
        ("eap", Any, "x cannot be given as text; set it in Python"),
    ],
)
def test_text_that_does_not_fit_is_refused(text: str, kind: Any, message: str) -> None:
    with pytest.raises(CircuitGraphError, match=message):
        parsed("x", text, kind)


@dataclass(frozen=True)
class Odd:
    """One annotation names what only a type checker can see."""

    good: int
    bad: Unseen | None = None  # type: ignore[name-defined]  # noqa: F821


def test_fields_are_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plugins, "algorithm_named", lambda name: Odd)
    assert _plugins.settings("odd", ["good=3"]) == {"good": 3}
    with pytest.raises(CircuitGraphError, match="odd: bad cannot be given as text"):
        _plugins.settings("odd", ["bad=3"])
    with pytest.raises(CircuitGraphError, match="odd needs good, which has no default"):
        _plugins.new_algorithm("odd")


def test_every_algorithm_says_what_its_settings_are() -> None:
    """Of the registered ones: each field's text form is either read or refused with its name."""
    for name in ("acdc", "activation-patching", "eap", "eap-ig", "information-flow"):
        for key in _plugins.hyper_parameters(name):
            with pytest.raises(CircuitGraphError, match=f"{name}: {key}"):
                _plugins.settings(name, [f"{key}=?"])
