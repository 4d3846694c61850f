"""One prompt of a task: as written (`Prompt`, `Row`), and with its slots parsed (`Pattern`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Tag

from circuitgraph._errors import TaskError, unknown_name
from circuitgraph._slots import Slot, Template, parse_template
from circuitgraph._words import WordList


class Strict(BaseModel):
    """Frozen; an unknown key is an error; a number is no text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class WordSet(Strict):
    """A set of answers: the numbers of a list that are above or below (exclusive) or up to (inclusive) a number or a slot."""

    words: str
    above: int | str | None = None
    below: int | str | None = None
    upto: int | str | None = None


def _kind_of_answer(value: Any) -> str | None:
    if isinstance(value, (Mapping, WordSet)):
        return "set"
    return "list" if isinstance(value, (list, tuple)) else "text" if isinstance(value, str) else None


_SET = "expected a text, a list of texts, or a set such as (words = 'end', above = 5)"
_TEXTS = "expected a text or a list of texts"
Text = Annotated[str, Tag("text")]
Texts = Annotated[Sequence[str], AfterValidator(tuple), Tag("list")]
Answer = Annotated[
    Text | Texts | Annotated[WordSet, Tag("set")], Discriminator(_kind_of_answer, custom_error_type="answer", custom_error_message=_SET)
]
RowAnswer = Annotated[Text | Texts, Discriminator(_kind_of_answer, custom_error_type="answer", custom_error_message=_TEXTS)]
TAGS = {"text", "list", "set"}  # pydantic puts them into the place of an error, where nobody wrote them


class Prompt(Strict):
    """A template of prompt pairs; `name` tells templates apart (ABBA and BABA) and is the prompt's number by default."""

    clean: str
    corrupted: str
    answer: Answer
    wrong: Answer = ()
    name: str = ""


class Row(Strict):
    """A prompt pair in full, as a row of a CSV or JSONL file: no slots, and braces are braces."""

    clean: str
    corrupted: str
    answer: RowAnswer
    wrong_answer: RowAnswer = ()
    template: str = ""


@dataclass(frozen=True)
class NumberSet:
    """A `WordSet` whose bounds are parsed."""

    words: str
    above: int | Template | None
    below: int | Template | None
    upto: int | Template | None

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(slot for bound in (self.above, self.below, self.upto) if isinstance(bound, Template) for slot in bound.slots)

    def among(self, words: WordList, drawn: Mapping[Slot, str]) -> tuple[str, ...]:
        """The words of the list that lie within the bounds."""

        def number(bound: int | Template | None) -> int | None:
            return int(bound.fill(drawn).text) if isinstance(bound, Template) else bound

        above, below, upto = number(self.above), number(self.below), number(self.upto)
        return tuple(
            word
            for (word,) in words.rows
            if (above is None or int(word) > above) and (below is None or int(word) < below) and (upto is None or int(word) <= upto)
        )


Answers = tuple[Template, ...] | NumberSet


def answer_slots(answers: Answers) -> tuple[Slot, ...]:
    """The slots of every answer."""
    return answers.slots if isinstance(answers, NumberSet) else tuple(slot for template in answers for slot in template.slots)


@dataclass(frozen=True)
class Pattern:
    """A `Prompt` whose templates are parsed."""

    name: str
    clean: Template
    corrupted: Template
    answers: Answers
    wrong_answers: Answers

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot once, those of the clean prompt first."""
        every = (*self.clean.slots, *self.corrupted.slots, *answer_slots(self.answers), *answer_slots(self.wrong_answers))
        return tuple(dict.fromkeys(every))

    @property
    def keys(self) -> dict[str, tuple[str, ...]]:
        """What is drawn for one pair: per list the keys, each another row."""
        keys: dict[str, dict[str, None]] = {}
        for slot in self.slots:
            keys.setdefault(slot.words, {})[slot.key] = None
        return {words: tuple(found) for words, found in keys.items()}


def compiled(prompt: Prompt, number: int, lists: Mapping[str, WordList]) -> Pattern:
    """Parse a prompt. Raises `TaskError` that names the prompt and the key."""
    where = f"prompt {number}" + (f" ({prompt.name})" if prompt.name else "")
    forms = {name: words.forms for name, words in lists.items()}

    def parse(key: str, text: str) -> Template:
        if not text:
            raise TaskError(f"{where}, {key}: the text is empty")
        try:
            return parse_template(text, forms)
        except TaskError as error:
            raise TaskError(f"{where}, {key}: {error}") from None

    def answers(key: str, value: str | Sequence[str] | WordSet) -> Answers:
        if not isinstance(value, WordSet):
            return tuple(parse(key, text) for text in ([value] if isinstance(value, str) else value))
        _check_set(f"{where}, {key}", value, lists)
        bounds = {name: parse(f"{key}.{name}", bound) if isinstance(bound := getattr(value, name), str) else bound for name in _BOUNDS}
        for name, bound in bounds.items():
            if isinstance(bound, Template) and not (bound.slots and all(_is_numeric(lists[slot.words]) for slot in bound.slots)):
                raise TaskError(
                    f"{where}, {key}: the bound {name} = {bound.text!r} is no number; expected one, or a slot of a list of numbers"
                )
        return NumberSet(value.words, **bounds)

    pattern = Pattern(
        prompt.name or str(number),
        parse("clean", prompt.clean),
        parse("corrupted", prompt.corrupted),
        answers("answer", prompt.answer),
        answers("wrong", prompt.wrong),
    )
    _check_tokens(where, pattern, lists)
    _check_draws(where, pattern, lists)
    return pattern


_BOUNDS = ("above", "below", "upto")


def _check_set(where: str, value: WordSet, lists: Mapping[str, WordList]) -> None:
    if value.words not in lists:
        raise TaskError(f"{where}: {unknown_name('list', value.words, lists)}")
    if not _is_numeric(lists[value.words]):
        raise TaskError(f"{where}: the list {value.words!r} is not one of numbers, so nothing in it is above or below a number")
    if all(getattr(value, bound) is None for bound in _BOUNDS):
        raise TaskError(f"{where}: the set has no bound; give it at least one of above, below, upto")


def _is_numeric(words: WordList) -> bool:
    return not words.is_every_token and not words.forms and all(word.isdecimal() for (word,) in words.rows)


def _check_tokens(where: str, pattern: Pattern, lists: Mapping[str, WordList]) -> None:
    """Ids and text do not mix: joined as text, ids would be tokenised again, to others."""
    if not is_of_tokens(pattern, lists):
        return
    of_answers = [t for answers in (pattern.answers, pattern.wrong_answers) if not isinstance(answers, NumberSet) for t in answers]
    for template in (pattern.clean, pattern.corrupted, *of_answers):
        for part in template.parts:
            if isinstance(part, str) or not lists[part.words].is_every_token:
                shown = repr(part) if isinstance(part, str) else f"{{{part.name}}}"
                raise TaskError(
                    f"{where}: {shown} in {template.text!r} is text among token slots; a prompt with a list '*' has token slots only"
                )
        if template in of_answers and len(template.parts) != 1:
            raise TaskError(f"{where}: the answer {template.text!r} is {len(template.parts)} tokens; expected one")


def is_of_tokens(pattern: Pattern, lists: Mapping[str, WordList]) -> bool:
    """Whether the prompt is made of token ids and never a text."""
    return any(lists[slot.words].is_every_token for slot in pattern.slots)


def _check_draws(where: str, pattern: Pattern, lists: Mapping[str, WordList]) -> None:
    for name, keys in pattern.keys.items():
        words = lists[name]
        if not words.is_every_token and len(words) < len(keys):
            shown = ", ".join(f"{{{name}.{key}}}" if key else f"{{{name}}}" for key in keys)
            raise TaskError(f"{where}: it draws {len(keys)} different words of {name!r} ({shown}), but the list has {len(words)}")
    if not pattern.clean.slots and not pattern.corrupted.slots and pattern.clean == pattern.corrupted:
        raise TaskError(f"{where}: the corrupted prompt equals the clean one, so nothing can be patched: {pattern.clean.text!r}")
