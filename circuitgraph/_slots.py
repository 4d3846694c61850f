"""The slot grammar of task files: a text whose slots are filled from word lists.

    {place}          a word of the list `place`, the same wherever `{place}` stands in one pair of prompts
    {name.a}         a word of `name` drawn under the key `a`; under another key stands another word, never the same
    {noun.one}       where the list has forms (`one = ["key"]`, `many = ["keys"]`): the form `one` of the row that was drawn
    {noun.a.one}     the form `one` of the row drawn under the key `a`
    {token.1:8}      the eight slots `{token.1}` to `{token.8}`, one after the other
    {{ and }}        braces themselves

That is all of it: no condition, no default, no code. A template remembers which slot stands where, and so does a filled one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from circuitgraph._errors import TaskError, unknown_name

_PIECE = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+")
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_RANGE = re.compile(r"(\d+):(\d+)")
_EXPECTED = "expected {list}, {list.key} or {list.1:8}; a brace itself is written {{ or }}"


@dataclass(frozen=True, slots=True)
class Slot:
    """A place to be filled from the list `words`. Slots with the same `draw` get the same row of that list."""

    words: str
    key: str = ""
    form: str = ""

    @property
    def draw(self) -> tuple[str, str]:
        """The list and the key."""
        return self.words, self.key

    @property
    def name(self) -> str:
        """As written, without the braces: `name.a`, `place`, `noun.a.one`."""
        return ".".join(part for part in (self.words, self.key, self.form) if part)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a slot stands in a filled text: the characters `start` to `stop`."""

    slot: Slot
    start: int
    stop: int


@dataclass(frozen=True)
class Filled:
    """A template with a word in every slot: its pieces in order, and for each the slot it fills, if any."""

    pieces: tuple[str, ...]
    slots: tuple[Slot | None, ...]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Every slot's characters, in order; a slot that stands twice has two."""
        spans, start = [], 0
        for piece, slot in zip(self.pieces, self.slots, strict=True):
            if slot is not None:
                spans.append(Span(slot, start, start + len(piece)))
            start += len(piece)
        return tuple(spans)


@dataclass(frozen=True)
class Template:
    """A parsed text: literal pieces and slots, in order."""

    text: str
    parts: tuple[str | Slot, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """In order, with repetitions."""
        return tuple(part for part in self.parts if isinstance(part, Slot))

    def fill(self, words: Mapping[Slot, str]) -> Filled:
        """Put a word into every slot."""
        pieces = tuple(words[part] if isinstance(part, Slot) else part for part in self.parts)
        return Filled(pieces, tuple(part if isinstance(part, Slot) else None for part in self.parts))


def literal(text: str) -> Filled:
    """A text without slots; braces in it are braces."""
    return Filled((text,), (None,))


def parse_template(text: str, lists: Mapping[str, Sequence[str]]) -> Template:
    """Read a template. `lists` are the word lists there are, each with its forms (none for a plain list).

    Raises `TaskError` that names the place and the slot.

    >>> [slot.name for slot in parse_template("{name.a} and {name.b}", {"name": ()}).slots]
    ['name.a', 'name.b']
    """
    parts: list[str | Slot] = []
    for piece in _PIECE.finditer(text):
        found, where = piece[0], f"at character {piece.start() + 1} of {text!r}"
        if found in ("{", "}"):
            what = "'{' is never closed" if found == "{" else "'}' closes nothing"
            raise TaskError(f"{what} {where}; {_EXPECTED}")
        if found in ("{{", "}}") or found[0] != "{":
            parts.append(found[0] if found in ("{{", "}}") else found)
            continue
        try:
            parts.extend(_slots(found[1:-1], lists))
        except TaskError as error:
            raise TaskError(f"slot {found} {where}: {error}") from None
    return Template(text, tuple(_joined(parts)))


def _slots(inside: str, lists: Mapping[str, Sequence[str]]) -> list[Slot]:
    words, *rest = inside.split(".")
    if words not in lists:
        raise TaskError(str(unknown_name("list", words, lists)) if _KEY.fullmatch(words) else _EXPECTED)
    forms = lists[words]
    form = ""
    if forms:
        if not rest or rest[-1] not in forms:
            wanted = " or ".join(f"{{{'.'.join((words, *rest[:1], f))}}}" for f in forms)
            raise TaskError(f"the list {words!r} has forms, so its slots end with one: {wanted}")
        form = rest.pop()
    if len(rest) > 1:
        raise TaskError(f"too many parts; {_EXPECTED}" if forms else f"the list {words!r} has no forms; {_EXPECTED}")
    key = rest[0] if rest else ""
    if run := _RANGE.fullmatch(key):
        first, last = int(run[1]), int(run[2])
        if first > last:
            raise TaskError(f"the range {key} runs backwards; write the smaller number first")
        return [Slot(words, str(number), form) for number in range(first, last + 1)]
    if rest and not _KEY.fullmatch(key):
        raise TaskError(f"the key {key!r} is not made of letters, digits, '_' and '-'; {_EXPECTED}")
    return [Slot(words, key, form)]


def _joined(parts: Sequence[str | Slot]) -> Iterator[str | Slot]:
    """Neighbouring literals as one, so that what stands before a slot is one piece."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text
        yield part
        text = ""
    if text:
        yield text
