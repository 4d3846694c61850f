"""From a task to prompt pairs: draw words, tokenise, and let through only pairs that line up token by token."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._errors import TaskError, whole_number
from circuitgraph._fit import Dropped, fitted, left_out
from circuitgraph._pairs import PromptPairs
from circuitgraph._prompts import Answers, NumberSet, Pattern, is_of_tokens
from circuitgraph._slots import Filled, Slot, literal
from circuitgraph._spans import slot_spans, token_spans
from circuitgraph._tokens import Encoder, Tokenizer
from circuitgraph._words import WordList

if TYPE_CHECKING:
    from circuitgraph._task import Task

logger = logging.getLogger(__name__)

DEFAULT_PAIRS = 32
MOST_PAIRS = 100_000
_CHUNK = 1024  # pairs that are tokenised together
_TRIES = 32  # this many failures in a row are no bad luck


@dataclass(frozen=True)
class Drawn:
    """A pair before it is tokenised. `clean` and `corrupted` know where each slot stands."""

    template: str
    clean: Filled
    corrupted: Filled
    answers: tuple[str, ...]
    wrong_answers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Preparation:
    """Prompt pairs and how they came about.

    `drawn`: the texts, one per pair. `dropped`: per list the words that are not one known token, with how they are tokenised.
    `redrawn`: draws thrown away because the pair did not line up. `notes`: what a user should know, one sentence each.
    """

    pairs: PromptPairs
    drawn: tuple[Drawn, ...]
    encoder: Encoder
    dropped: Dropped
    redrawn: int
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Encoded:
    drawn: Drawn
    clean: Sequence[int]
    corrupted: Sequence[int]
    answers: Sequence[int]
    wrong_answers: Sequence[int]


class _MisfitError(TaskError):
    """A pair that does not line up."""


def prepared(task: Task, tokenizer: Tokenizer | None, n: int | None, seed: int, *, vocabulary: int | None, bos: bool) -> Preparation:
    """See `Task.prepare`."""
    whole_number("seed", seed, 0)
    if n is not None and whole_number(f"task {task.name}: prompt pairs", n, 1) > MOST_PAIRS:
        raise TaskError(f"task {task.name}: {n:,} prompt pairs were asked for; expected at most {MOST_PAIRS:,}")
    dropped: Dropped = {}
    redrawn = 0
    try:
        encoder = Encoder(tokenizer, bos)
        if task.row:
            found = _of_rows(task, encoder, n, seed)
        else:
            lists, dropped = fitted(task.lists, task.patterns, encoder, vocabulary)
            found, redrawn = _of_patterns(task.patterns, lists, encoder, n or DEFAULT_PAIRS, seed)
    except TaskError as error:
        reasons = "".join(f"; {left_out(name, words, len(task.lists[name]))}" for name, words in dropped.items())
        raise TaskError(f"task {task.name}: {error}{reasons}") from None
    pairs = PromptPairs(
        clean=[item.clean for item in found],
        corrupted=[item.corrupted for item in found],
        answers=[item.answers for item in found],
        wrong_answers=[item.wrong_answers for item in found],
        templates=tuple(item.drawn.template for item in found),
        **_spans(task, found, encoder),
    )
    notes = tuple(_notes(task, encoder, dropped, redrawn, [item.drawn for item in found]))
    for note in notes:
        logger.warning("task %s: %s", task.name, note)
    return Preparation(pairs, tuple(item.drawn for item in found), encoder, dropped, redrawn, notes)


def _spans(task: Task, found: Sequence[_Encoded], encoder: Encoder) -> dict[str, Any]:
    """Which part of its prompt every token is in, where the clean prompts have slots to name the parts."""
    patterns = {pattern.name: pattern for pattern in task.patterns}
    if not any(pattern.clean.slots for pattern in patterns.values()):
        return {}
    names = dict(zip(patterns, slot_spans([pattern.clean for pattern in patterns.values()]), strict=True))
    lists = task.lists
    is_text = {name: not is_of_tokens(pattern, lists) for name, pattern in patterns.items()}
    drawn = [item.drawn for item in found]
    spans, span_names = token_spans(
        [names[d.template] for d in drawn],
        [d.clean for d in drawn],
        [item.clean[len(encoder.prefix) :] for item in found],
        encoder,
        is_text=[is_text[d.template] for d in drawn],
    )
    return {"spans": spans, "span_names": span_names}


def _of_rows(task: Task, encoder: Encoder, n: int | None, seed: int) -> list[_Encoded]:
    """Some of the rows, in random order; all of them, in their own order, unless `n` says how many."""
    if n is not None and n > len(task.row):
        raise TaskError(f"it has {len(task.row)} rows, {n} were asked for")
    if encoder.tokenizer is None:
        raise TaskError("its rows are texts, so it needs a tokenizer; without one, give PromptPairs of token ids")
    chosen = range(len(task.row)) if n is None else [int(i) for i in np.random.default_rng(seed).permutation(len(task.row))[:n]]
    rows = [task.row[i] for i in chosen]
    drawn = [Drawn(r.template, literal(r.clean), literal(r.corrupted), _several(r.answer), _several(r.wrong_answer)) for r in rows]
    found = []
    for number, item in zip(chosen, _encoded(drawn, encoder, is_text=True), strict=True):
        if isinstance(item, _MisfitError):
            raise TaskError(f"row {number + 1}: {item}")
        found.append(item)
    return found


def _several(answers: str | Sequence[str]) -> tuple[str, ...]:
    return (answers,) if isinstance(answers, str) else tuple(answers)


def _of_patterns(
    patterns: Sequence[Pattern], lists: Mapping[str, WordList], encoder: Encoder, n: int, seed: int
) -> tuple[list[_Encoded], int]:
    """`n` pairs, the templates taking turns. Each template has its own stream of random numbers, so more pairs begin with the fewer."""
    found, redrawn = [], 0
    for number, pattern in enumerate(patterns):
        share = len(range(number, n, len(patterns)))
        capacity = _capacity(pattern, lists)
        if capacity < share:
            raise TaskError(
                f"prompt {pattern.name} makes {capacity} different clean prompts, {share} were asked for; "
                f"ask for at most {capacity * len(patterns)} pairs, or give its lists more words"
            )
        kept, failed = _different(pattern, lists, encoder, share, np.random.default_rng([seed, number]), capacity)
        found.append(kept)
        redrawn += failed
    return [found[i % len(patterns)][i // len(patterns)] for i in range(n)], redrawn


def _capacity(pattern: Pattern, lists: Mapping[str, WordList]) -> int:
    """How many clean prompts there are."""
    keys: dict[str, set[str]] = {}
    for slot in pattern.clean.slots:
        keys.setdefault(slot.words, set()).add(slot.key)
    return math.prod(math.perm(len(lists[name]), len(found)) for name, found in keys.items())


def _different(
    pattern: Pattern, lists: Mapping[str, WordList], encoder: Encoder, share: int, rng: np.random.Generator, capacity: int
) -> tuple[list[_Encoded], int]:
    """`share` pairs with different clean prompts, and how many draws did not line up. Raises the last reason if all fail."""
    kept: dict[tuple[int, ...], _Encoded] = {}
    failed = failed_in_a_row = drawn = 0
    is_text = not is_of_tokens(pattern, lists)
    limit = 1000 + 50 * share  # enough to find the last of `share` prompts by chance, if there are that many
    draws = _draws(pattern, lists, rng)
    while len(kept) < share:
        for item in _encoded(list(islice(draws, min(_CHUNK, max(_TRIES, share - len(kept))))), encoder, is_text):
            drawn += 1
            if isinstance(item, _MisfitError):
                failed, failed_in_a_row = failed + 1, failed_in_a_row + 1
                if failed_in_a_row >= _TRIES:
                    raise TaskError(f"prompt {pattern.name}: {failed_in_a_row} draws in a row do not fit, for example:\n{item}")
                continue
            failed_in_a_row = 0
            kept.setdefault(tuple(item.clean), item)
            if len(kept) == share:
                break
        if drawn > limit and len(kept) < share:
            raise TaskError(f"prompt {pattern.name}: {drawn} draws gave {len(kept)} different pairs that fit, {share} were asked for")
    return list(kept.values()), failed


def _draws(pattern: Pattern, lists: Mapping[str, WordList], rng: np.random.Generator) -> Iterator[Drawn]:
    """Pairs without end."""
    while True:
        rows = {
            (name, key): int(row)
            for name, keys in pattern.keys.items()
            for key, row in zip(keys, rng.choice(len(lists[name]), size=len(keys), replace=False), strict=True)
        }
        words = {slot: lists[slot.words].word(rows[slot.draw], slot.form) for slot in pattern.slots}
        yield Drawn(
            pattern.name,
            pattern.clean.fill(words),
            pattern.corrupted.fill(words),
            _answers(pattern.answers, words, lists),
            _answers(pattern.wrong_answers, words, lists),
        )


def _answers(answers: Answers, words: Mapping[Slot, str], lists: Mapping[str, WordList]) -> tuple[str, ...]:
    if isinstance(answers, NumberSet):
        return answers.among(lists[answers.words], words)
    return tuple(template.fill(words).text for template in answers)


def _encoded(drawn: Sequence[Drawn], encoder: Encoder, is_text: bool) -> Iterator[_Encoded | _MisfitError]:
    """Each pair as ids, or why it cannot be used."""
    if not is_text:
        yield from (_judged(d, *_ids_of(d), encoder) for d in drawn)
        return
    cleans = encoder.encode([d.clean.text for d in drawn])
    corrupteds = encoder.encode([d.corrupted.text for d in drawn])
    followed = iter(encoder.encode([d.clean.text + answer for d in drawn for answer in (*d.answers, *d.wrong_answers)]))
    for d, clean, corrupted in zip(drawn, cleans, corrupteds, strict=True):
        ends = list(islice(followed, len(d.answers) + len(d.wrong_answers)))
        try:
            _check_known(d, clean, corrupted, encoder)
            answers = [_next_token(d, clean, end, word, encoder) for end, word in zip(ends, (*d.answers, *d.wrong_answers), strict=True)]
            yield _judged(d, clean, corrupted, answers, encoder)
        except _MisfitError as misfit:
            yield misfit


def _ids_of(d: Drawn) -> tuple[list[int], list[int], list[int]]:
    clean, corrupted = ([int(piece) for piece in filled.pieces] for filled in (d.clean, d.corrupted))
    return clean, corrupted, [int(word) for word in (*d.answers, *d.wrong_answers)]


def _check_known(d: Drawn, clean: Sequence[int], corrupted: Sequence[int], encoder: Encoder) -> None:
    if encoder.unknown is not None and encoder.unknown in (*clean, *corrupted):
        words = encoder.unknown_words(f"{d.clean.text} {d.corrupted.text}")
        raise _MisfitError(f"the tokenizer does not know {', '.join(map(repr, words)) or 'a part'} of {d.clean.text!r}")


def _next_token(d: Drawn, clean: Sequence[int], followed: Sequence[int], answer: str, encoder: Encoder) -> int:
    """The one token that the answer adds to the prompt."""
    rest = followed[len(clean) :]
    if list(followed[: len(clean)]) == list(clean) and len(rest) == 1 and rest[0] != encoder.unknown:
        return int(rest[0])
    if list(followed[: len(clean)]) != list(clean):
        what = f"it merges with the prompt: the prompt ends {encoder.shown(clean[-3:])}, with the answer {encoder.shown(followed[-3:])}"
    elif encoder.unknown in rest:
        what = "the tokenizer does not know it"
    else:
        what = f"it is {len(rest)} tokens, {encoder.shown(rest)}"
    raise _MisfitError(f"the answer {answer!r} is not one token after {d.clean.text!r}: {what}{_hint(d, answer, encoder)}")


def _hint(d: Drawn, answer: str, encoder: Encoder) -> str:
    if answer[:1].isspace() or d.clean.text[-1:].isspace():
        return ""
    clean, followed = encoder.encode([d.clean.text, f"{d.clean.text} {answer}"])
    fits = followed[: len(clean)] == clean and len(followed) == len(clean) + 1 and followed[-1] != encoder.unknown
    return f"; with a space in front, {' ' + answer!r}, it is" if fits else ""


def _judged(d: Drawn, clean: Sequence[int], corrupted: Sequence[int], answers: Sequence[int], encoder: Encoder) -> _Encoded | _MisfitError:
    right, wrong = list(dict.fromkeys(answers[: len(d.answers)])), list(dict.fromkeys(answers[len(d.answers) :]))
    if not clean or not right:
        return _MisfitError(f"the clean prompt {d.clean.text!r} has no {'token' if not clean else 'answer'}")
    if len(clean) != len(corrupted):
        return _MisfitError(
            f"the clean prompt has {len(clean)} tokens, the corrupted one {len(corrupted)}; they must line up one to one\n"
            f"  clean     {encoder.shown(clean)}\n  corrupted {encoder.shown(corrupted)}"
        )
    if list(clean) == list(corrupted):
        return _MisfitError(f"the corrupted prompt equals the clean one, so nothing can be patched: {encoder.shown(clean)}")
    if both := set(right) & set(wrong):
        return _MisfitError(f"{encoder.shown(sorted(both))} is both an answer and a wrong answer of {d.clean.text!r}")
    return _Encoded(d, [*encoder.prefix, *clean], [*encoder.prefix, *corrupted], right, wrong)


def _notes(task: Task, encoder: Encoder, dropped: Dropped, redrawn: int, drawn: Sequence[Drawn]) -> Iterator[str]:
    lists = task.lists
    for name, words in dropped.items():
        yield left_out(name, words, len(lists[name]))
    if redrawn:
        yield f"{redrawn} draws were thrown away because the pair did not line up token by token"
    if not encoder.bos and encoder.adds_bos_by_default():
        yield "the tokenizer begins every text with a BOS token, this task does not; if the model expects it, set bos = true"
    glued = [d for d in drawn if d.answers and d.clean.text[-1:].isascii() and d.clean.text[-1:].isalpha() and d.answers[0][:1].isalpha()]
    if glued:
        yield f"the answer {glued[0].answers[0]!r} is glued to the prompt's last word; did you mean {' ' + glued[0].answers[0]!r}?"
