"""Word lists as a task file writes them:

place = ["store", "garden"]                           words
year  = { from = 2, to = 98, digits = 2 }             the numbers 02 to 98; digits = 0 or none writes them as they are
noun  = { one = ["key", "boy"], many = ["keys", "boys"] }   forms of the same word, row by row
token = "*"                                           every token id that is not a special token
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from circuitgraph._errors import TaskError

Words = Literal["*"] | Sequence[str] | Mapping[str, int] | Mapping[str, Sequence[str]]

_EXPECTED = 'expected a list of words, { from = 0, to = 99, digits = 2 }, a table of forms such as { one = [...], many = [...] }, or "*"'
_NUMBERS = {"from", "to", "digits"}


@dataclass(frozen=True)
class WordList:
    """Rows to draw from; a row has one word per form, or just one. `is_every_token`: the words are token ids, known only later."""

    name: str
    rows: tuple[tuple[str, ...], ...]
    forms: tuple[str, ...] = ()
    is_every_token: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def word(self, row: int, form: str) -> str:
        return self.rows[row][self.forms.index(form) if form else 0]

    def without(self, rows: Iterable[int]) -> WordList:
        """The list without some of its rows."""
        gone = set(rows)
        return replace(self, rows=tuple(row for i, row in enumerate(self.rows) if i not in gone))


def checked_words(name: str, value: Any) -> Any:
    """A list as written, in plain tuples, ints and strings. Raises `TaskError` that names the list and what is wrong with it."""
    if value == "*":
        return value
    if isinstance(value, Mapping) and value and set(value) <= _NUMBERS:
        return _checked_numbers(name, value)
    if isinstance(value, Mapping) and value:
        forms = {str(form): _checked_column(f"{name}.{form}", column) for form, column in value.items()}
        if len({len(column) for column in forms.values()}) > 1:
            lengths = ", ".join(f"{form} {len(column)}" for form, column in forms.items())
            raise TaskError(f"words {name!r}: its forms have different numbers of words ({lengths}); they belong together row by row")
        _refuse_repeats(name, list(zip(*forms.values(), strict=True)))
        return forms
    words = _checked_column(name, value)
    _refuse_repeats(name, words)
    return words


def word_list(name: str, value: Any) -> WordList:
    """The list that a checked value stands for."""
    if value == "*":
        return WordList(name, (), is_every_token=True)
    if isinstance(value, Mapping):
        if "from" in value and isinstance(value["from"], int):
            return WordList(name, tuple((str(i).zfill(value.get("digits", 0)),) for i in range(value["from"], value["to"] + 1)))
        return WordList(name, tuple(zip(*value.values(), strict=True)), tuple(value))
    return WordList(name, tuple((word,) for word in value))


def _checked_numbers(name: str, value: Mapping[str, Any]) -> dict[str, int]:
    if not {"from", "to"} <= set(value) or not all(type(number) is int and number >= 0 for number in value.values()):
        raise TaskError(f"words {name!r} is {dict(value)!r}; a range of numbers is {{ from = 0, to = 99, digits = 2 }}, none below 0")
    if value["from"] > value["to"]:
        raise TaskError(f"words {name!r}: no number is from {value['from']} to {value['to']}")
    return dict(value)


def _checked_column(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise TaskError(f"words {name!r} is {value!r}; {_EXPECTED}")
    if not value:
        raise TaskError(f"words {name!r} is empty; {_EXPECTED}")
    for word in value:
        if not isinstance(word, str) or not word:
            raise TaskError(f"words {name!r} has {word!r}; every word is a text that is not empty (numbers too: write '5')")
    return tuple(value)


def _refuse_repeats(name: str, rows: Sequence[Any]) -> None:
    for i, row in enumerate(rows):
        if row in rows[:i]:
            raise TaskError(f"words {name!r} has {row!r} twice; two draws from it could then be the same word")
