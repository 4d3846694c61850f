"""The grammar that `zoo:tiny-english` is trained on and tested on: each sentence is a prompt, the answer, and what follows."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import english_words as words


@dataclass(frozen=True)
class Sentence:
    """`prompt answer rest`; `wrong` is the competitor of the answer where the task has one."""

    prompt: str
    answer: str
    rest: str = "."
    wrong: str = ""

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}{self.rest}"


def giving(draw: random.Random, templates: Sequence[str], names: Sequence[str], *, stranger: bool = False) -> Sentence:
    """Two people, one gives to the other (indirect object identification); with a stranger a third one gives, and either may get it."""
    first, second, third = draw.sample(names, 3)
    recipient, giver = draw.choice([(first, second), (second, first)])
    opening, act = draw.choice(templates).rsplit("{b}", 1)
    slots = {"place": draw.choice(words.PLACES), "object": draw.choice(words.OBJECTS)}
    prompt = opening.format(a=first, b=second, **slots) + (third if stranger else giver) + act.format(**slots)
    return Sentence(prompt, recipient, wrong=giver)


def seen_giving_templates() -> list[str]:
    """Every opening with every giving, but for those in which nothing says what is given."""
    pairs = [(opening, act) for opening in words.IOI_OPENINGS for act in words.IOI_GIVINGS]
    return [f"{opening} {{b}} {act}" for opening, act in pairs if ("{object}" in opening) == ("{object}" not in act)]


def two_years(draw: random.Random, frames: Sequence[str], events: Sequence[str], *, held_out_years: bool = False) -> Sentence:
    """A span of years within one century: the second is later than the first (greater-than)."""
    starts = [(century, year) for century in words.CENTURIES for year in words.YEARS[1:99]]
    century, year = draw.choice([start for start in starts if words.is_held_out_year(*start) == held_out_years])
    prompt = draw.choice(frames).format(event=draw.choice(events), name=draw.choice(words.NAMES), xx=century, yy=year)
    return Sentence(prompt, draw.choice(words.YEARS[int(year) + 1 :]), wrong=year)


def attractor(draw: random.Random, prepositions: Sequence[str], subjects: Sequence[str]) -> Sentence:
    """A subject, an attractor of either number, and a verb that agrees with the subject."""
    singular, plural = draw.choice([(noun, words.NOUNS[noun]) for noun in subjects])
    other = draw.choice([noun for noun in words.NOUNS if noun != singular])
    number = draw.randrange(2)
    verbs = draw.choice(words.VERBS)
    prompt = f"The {(singular, plural)[number]} {draw.choice(prepositions)} the {draw.choice([other, words.NOUNS[other]])}"
    return Sentence(prompt, verbs[number], _predicate(draw, verbs[0]) + ".", wrong=verbs[1 - number])


def plain(draw: random.Random) -> Sentence:
    """Sentences that need none of the three tasks; every word of the vocabulary is in some of them."""
    name, place, thing, event = (draw.choice(list_) for list_ in (words.NAMES, words.PLACES, words.OBJECTS, words.EVENTS))
    singular, plural = draw.choice(list(words.NOUNS.items()))
    verbs = draw.choice(words.VERBS)
    number = draw.randrange(2)
    preposition = draw.choice([*words.PREPOSITIONS[1:], *words.HELD_OUT_PREPOSITIONS])
    makers: list[Callable[[], Sentence]] = [
        lambda: Sentence(f"The {(singular, plural)[number]}", verbs[number], _predicate(draw, verbs[0]) + "."),
        lambda: Sentence(f"{name} has a {thing} and I gave a {draw.choice(words.OBJECTS)} to", name),
        lambda: Sentence(f"My friend {name} went to the {place}. I was at the {place} with", name),
        lambda: Sentence(f"After the {event}, {name} went to the", place),
        lambda: Sentence(f"The {event} was in the year {draw.choice(words.CENTURIES)}{draw.choice(words.YEARS)}. {name} was", "there"),
        lambda: Sentence(f"Then, {name} was {preposition} the {draw.choice([singular, plural])} at the", place),
    ]
    return draw.choice(makers)()


def training_sentence(draw: random.Random) -> Sentence:
    """One sentence of the training mixture; no held-out word stands where it is held out."""
    names = _without(words.NAMES, words.HELD_OUT_NAMES)
    kind = draw.choices(["giving", "stranger", "company", "years", "attractor", "plain"], [30, 10, 30, 14, 8, 8])[0]
    if kind == "giving":
        return giving(draw, seen_giving_templates(), names)
    if kind == "stranger":
        return giving(draw, seen_giving_templates(), words.NAMES, stranger=True)
    if kind == "company":
        return giving(draw, words.COMPANY_TEMPLATES, draw.choice([words.NAMES, words.HELD_OUT_NAMES]))
    if kind == "years":
        return two_years(draw, words.YEAR_FRAMES, _without(words.EVENTS, words.HELD_OUT_EVENTS))
    if kind == "attractor":
        return attractor(draw, words.PREPOSITIONS, _without(words.NOUNS, words.HELD_OUT_NOUNS))
    return plain(draw)


def vocabulary() -> list[str]:
    """Every word and sign of the grammar, in a fixed order."""
    draw = random.Random(0)
    templates = [
        *words.IOI_OPENINGS,
        *words.IOI_GIVINGS,
        *words.HELD_OUT_IOI_TEMPLATES,
        *words.COMPANY_TEMPLATES,
        *words.YEAR_FRAMES,
        *words.HELD_OUT_YEAR_FRAMES,
    ]
    texts = [_without_slots(template) for template in templates]
    texts += [plain(draw).text for _ in range(2000)] + [*words.PREPOSITIONS, *words.HELD_OUT_PREPOSITIONS, *words.QUALITIES]
    texts += [verb for pair in words.VERBS for verb in pair] + [*words.NOUNS.values()]
    rest = {sign for text in texts for sign in text.replace(",", " , ").replace(".", " . ").split() if not sign.isdigit()}
    listed = [*words.YEARS, *words.NAMES, *words.PLACES, *words.OBJECTS, *words.EVENTS, *words.NOUNS]
    return listed + sorted(rest - set(listed))


def _predicate(draw: random.Random, verb: str) -> str:
    if verb == "has":
        return f" a {draw.choice(words.OBJECTS)}"
    return f" {draw.choice(words.QUALITIES)}"


def _without(items: Sequence[str] | dict[str, str], held_out: Sequence[str]) -> list[str]:
    return [item for item in items if item not in held_out]


def _without_slots(template: str) -> str:
    return " ".join(part.partition("}")[2] for part in ("}" + template).split("{"))
