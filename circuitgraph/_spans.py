"""Spans: the parts of a prompt that a position-aware circuit tells apart, named after the slots of the clean prompts (Haklay et al. 2025).

    When {name.io} and {name.s} went to the {place}, {name.s} gave a {object} to
    BEGIN  IO      IO+  S1      S1+          PLACE PLACE+ S2    S2+  OBJECT   END

A slot's span is its key in capitals, or its list's name where it has no key; numbered where it stands more than once (with a dot after a
digit), with the list in front (`NAME.A`) where two would be called alike. The tokens behind it, up to the next slot, are its name with `+`.
Those before the first slot are `BEGIN`, a BOS among them; the last token is `END` whatever it is.

A token belongs to the slot that has a part of it, to the earlier one of two. Names without a token in any prompt are left out.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from circuitgraph._slots import Filled, Template
from circuitgraph._tokens import Encoder

BEGIN, END = "BEGIN", "END"

Cut = Callable[[int], tuple[int, bool]]  # of a place in the text: how many tokens end before it, and whether it is inside the next one


def slot_spans(templates: Sequence[Template]) -> tuple[tuple[str, ...], ...]:
    """The names of the slots of each template, in order.

    >>> from circuitgraph._slots import parse_template
    >>> slot_spans([parse_template("{name.io}, {name.s}: {name.s} {place}", {"name": (), "place": ()})])
    (('IO', 'S1', 'S2', 'PLACE'),)
    """
    counts = [Counter(slot.draw for slot in template.slots) for template in templates]
    draws = list(dict.fromkeys(slot.draw for template in templates for slot in template.slots))
    repeated = {draw for draw in draws if any(count[draw] > 1 for count in counts)}
    short = Counter([_capitals(key or words) for words, key in draws] + [BEGIN, END])
    names: dict[tuple[tuple[str, str], int], str] = {}
    for draw in draws:
        words, key = draw
        base = _capitals(key or words)
        if short[base] > 1:
            base = _capitals(f"{words}.{key}" if key else words)
        for number in range(1, max(count[draw] for count in counts) + 1):
            dot = "." if base[-1].isdigit() else ""
            name = f"{base}{dot}{number}" if draw in repeated else base
            while name in (BEGIN, END, *names.values()):
                name += "_"
            names[draw, number] = name
    return tuple(tuple(_each(template, names)) for template in templates)


def _each(template: Template, names: Mapping[tuple[tuple[str, str], int], str]) -> Iterator[str]:
    seen: Counter[tuple[str, str]] = Counter()
    for slot in template.slots:
        seen[slot.draw] += 1
        yield names[slot.draw, seen[slot.draw]]


def _capitals(text: str) -> str:
    """With nothing in it that the notation `a5.h1@S1+` has another use for."""
    return re.sub(r"[^\w.]+", "_", text.upper())


def token_spans(
    slots: Sequence[tuple[str, ...]], prompts: Sequence[Filled], ids: Sequence[Sequence[int]], encoder: Encoder, *, is_text: Sequence[bool]
) -> tuple[list[list[int]], tuple[str, ...]]:
    """The span of every token of every prompt, as numbers, and the spans' names.

    `slots`: the names of each prompt's slots; `ids`: its tokens, without a BOS. A prompt that is no text has a token for each slot.
    """
    texts = [filled for filled, asked in zip(prompts, is_text, strict=True) if asked]
    cuts = iter(_cuts(texts, [row for row, asked in zip(ids, is_text, strict=True) if asked], encoder))
    named = []
    for filled, row, names, asked in zip(prompts, ids, slots, is_text, strict=True):
        spans = _named(filled, len(row), names, next(cuts)) if asked else list(names)
        named.append([*[BEGIN] * len(encoder.prefix), *spans[:-1], END])
    order = _in_order(slots, {name for row in named for name in row})
    number = {name: i for i, name in enumerate(order)}
    return [[number[name] for name in row] for row in named], order


def _in_order(slots: Iterable[tuple[str, ...]], there: set[str]) -> tuple[str, ...]:
    every = [BEGIN, *(part for names in dict.fromkeys(slots) for name in names for part in (name, f"{name}+")), END]
    return tuple(name for name in dict.fromkeys(every) if name in there)


def _named(filled: Filled, n_tokens: int, names: Sequence[str], cut: Cut) -> list[str]:
    """The span of every token of a text; a space belongs to the word behind it."""
    spans, free = [BEGIN] * n_tokens, 0
    for span, name in zip(filled.spans, names, strict=True):
        start, _ = cut(len(filled.text[: span.start].rstrip()))
        stop, is_inside = cut(span.stop)
        start = max(start, free)
        free = max(start, stop + is_inside)
        spans[start:] = [name] * (free - start) + [f"{name}+"] * (n_tokens - free)
    return spans


def _cuts(texts: Sequence[Filled], ids: Sequence[Sequence[int]], encoder: Encoder) -> Iterator[Cut]:
    """By the characters of each token where the tokenizer can tell; else by how the text up to a place is tokenised."""
    offsets = encoder.offsets([filled.text for filled in texts])
    if offsets is not None:
        yield from (_by_offsets(found) for found in offsets)
        return
    places = [[p for s in filled.spans for p in (len(filled.text[: s.start].rstrip()), s.stop)] for filled in texts]
    fronts = iter(encoder.encode([filled.text[:place] for filled, row in zip(texts, places, strict=True) for place in row]))
    for row, found in zip(places, ids, strict=True):
        yield _by_fronts(dict(zip(row, islice(fronts, len(row)), strict=True)), found)


def _by_offsets(offsets: Sequence[tuple[int, int]]) -> Cut:
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]

    def cut(place: int) -> tuple[int, bool]:
        before = bisect_right(ends, place)
        return before, before < len(starts) and starts[before] < place

    return cut


def _by_fronts(fronts: Mapping[int, Sequence[int]], ids: Sequence[int]) -> Cut:
    def cut(place: int) -> tuple[int, bool]:
        front = fronts[place]
        same = next((i for i, (a, b) in enumerate(zip(front, ids, strict=False)) if a != b), min(len(front), len(ids)))
        return same, same < len(front)

    return cut
