"""Which words of a task's lists a tokenizer can use: those of the answers, and those that change between the clean and the corrupted
prompt, must be one token where they stand; no word may be unknown to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from circuitgraph._errors import TaskError
from circuitgraph._prompts import NumberSet, Pattern, answer_slots, is_of_tokens
from circuitgraph._slots import Slot, Template
from circuitgraph._tokens import Encoder
from circuitgraph._words import WordList

Dropped = Mapping[str, Mapping[str, str]]  # per list: the word, and how the tokenizer writes it


@dataclass(frozen=True)
class _Place:
    """A list's form in a context: the text before it, of which the tokens must not change when a word follows."""

    words: str
    form: str
    before: str
    space: str


def fitted(
    lists: Mapping[str, WordList], patterns: Sequence[Pattern], encoder: Encoder, vocabulary: int | None
) -> tuple[dict[str, WordList], Dropped]:
    """The lists without the words that do not fit, and those words. Raises `TaskError` where too few are left."""
    of_texts = [pattern for pattern in patterns if not is_of_tokens(pattern, lists)]
    if of_texts and encoder.tokenizer is None:
        raise TaskError("its prompts are texts, so it needs a tokenizer; without one, give PromptPairs of token ids")
    fitting = {name: _tokens_to_draw(words, encoder, vocabulary) if words.is_every_token else words for name, words in lists.items()}
    dropped: dict[str, dict[str, str]] = {}
    single = {name for pattern in of_texts for name in _lists_of_single_tokens(pattern)}
    places = dict.fromkeys(place for pattern in of_texts for place in _places(pattern, lists))
    misfits: dict[str, set[int]] = {}
    for place in places:
        words = lists[place.words]
        for row, shown in _misfits(place, words, encoder, place.words in single):
            misfits.setdefault(place.words, set()).add(row)
            dropped.setdefault(place.words, {}).setdefault(words.word(row, place.form), shown)
    for name, rows in misfits.items():
        fitting[name] = lists[name].without(rows)
    for pattern in patterns:
        _check_enough(pattern, lists, fitting, dropped)
    return fitting, dropped


def _tokens_to_draw(words: WordList, encoder: Encoder, vocabulary: int | None) -> WordList:
    known = [size for size in (vocabulary, len(encoder.tokenizer) if encoder.tokenizer is not None else None) if size is not None]
    if not known:
        raise TaskError("it draws token ids, so it needs a tokenizer or vocabulary=, the number of ids there are")
    # a model's embedding may have more rows than its tokenizer has tokens
    return replace(words, rows=tuple((str(i),) for i in range(min(known)) if i not in encoder.special))


def _lists_of_single_tokens(pattern: Pattern) -> Iterator[str]:
    """Lists whose words are answers, or do not stand in the same places of both prompts."""
    for answers in (pattern.answers, pattern.wrong_answers):
        if isinstance(answers, NumberSet):
            yield answers.words
        else:
            yield from (slot.words for slot in answer_slots(answers))
    for name in pattern.keys:
        clean, corrupted = ([slot for slot in template.slots if slot.words == name] for template in (pattern.clean, pattern.corrupted))
        if clean != corrupted:
            yield name


def _places(pattern: Pattern, lists: Mapping[str, WordList]) -> Iterator[_Place]:
    """Where each list's words stand, with the first words of all lists in front of them."""
    sample = {slot: lists[slot.words].word(pattern.keys[slot.words].index(slot.key), slot.form) for slot in pattern.slots}
    for template in (pattern.clean, pattern.corrupted):
        yield from _places_in(template, sample, "")
    prompt = pattern.clean.fill(sample).text
    for answers in (pattern.answers, pattern.wrong_answers):
        if isinstance(answers, NumberSet):
            yield _Place(answers.words, "", prompt, "")
        else:
            for template in answers:
                yield from _places_in(template, sample, prompt)


def _places_in(template: Template, sample: Mapping[Slot, str], before: str) -> Iterator[_Place]:
    pieces = template.fill(sample).pieces
    for i, part in enumerate(template.parts):
        if isinstance(part, Slot):
            front = before + "".join(pieces[:i])
            stem = front.rstrip()
            yield _Place(part.words, part.form, stem, front[len(stem) :])


def _misfits(place: _Place, words: WordList, encoder: Encoder, is_single: bool) -> Iterator[tuple[int, str]]:
    """The rows whose word does not fit in this place, with how it is tokenised there."""
    start = encoder.encode([place.before])[0] if place.before else []
    texts = [place.before + place.space + words.word(row, place.form) for row in range(len(words))]
    for row, ids in enumerate(encoder.encode(texts)):
        is_apart = ids[: len(start)] == start
        rest = ids[len(start) :] if is_apart else ids[-1:]
        if encoder.unknown is not None and encoder.unknown in rest:
            yield row, "unknown"
        elif is_single and (not is_apart or len(rest) != 1):
            yield row, encoder.shown(rest) if is_apart else f"merged into {encoder.shown(rest)}"


def _check_enough(pattern: Pattern, lists: Mapping[str, WordList], fitting: Mapping[str, WordList], dropped: Dropped) -> None:
    needed = {name: len(keys) for name, keys in pattern.keys.items()}
    for answers in (pattern.answers, pattern.wrong_answers):
        if isinstance(answers, NumberSet):
            needed.setdefault(answers.words, 1)
    for name, count in needed.items():
        if len(fitting[name]) >= count:
            continue
        lost = dropped.get(name, {})
        reason = f"; {left_out(name, lost, len(lists[name]))}" if lost else ""
        raise TaskError(f"prompt {pattern.name} draws {count} of {name!r}, of which {len(fitting[name])} are left{reason}")


def left_out(name: str, words: Mapping[str, str], total: int) -> str:
    """How many words of a list were dropped, and the first few with their tokens."""
    shown = ", ".join(f"{word!r} is {how}" for word, how in list(words.items())[:3])
    more = ", ..." if len(words) > 3 else ""
    are_split = all(word.isdecimal() and how.startswith("'") for word, how in words.items())
    digits = "; this tokenizer splits numbers, so ask it about single digits (see the task greater-than-digits)" if are_split else ""
    return f"{len(words)} of {total} words of {name!r} were dropped, not being one known token here ({shown}{more}){digits}"
