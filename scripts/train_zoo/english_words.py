"""The words of the small English that `zoo:tiny-english` speaks, and which of them are held out of which sentences.

A held-out word is never seen in sentences of the task it is held out of; it does occur in the plain sentences of `english_sentences.py`,
so that its embedding is trained.
"""


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _listed(
    "Mary John Tom James Dan Sarah Anna Paul Mark Emma David Alice Peter Laura Simon Kate George Lucy Henry Jack Martin Steven Robert "
    "Michael Adam Susan Jane Linda Alex Sam Ben Chris Kevin Brian Jason Amy Lisa Rachel Ruth Grace Thomas William Daniel Andrew Eric "
    "Jeff Scott Nick Carl Frank Roger Julia Maria Helen Karen Diana Claire Rose Victoria Eva Jessica Ashley Nicole Amanda Megan Hannah "
    "Julie Anne Marie Sophie Charlotte Molly Kelly Tony Greg Ryan Kyle Tim Joe Bob Bill Charles Edward Philip Stephen Matthew Luke "
    "Andrea Christine Elizabeth Margaret Barbara Patricia Jennifer Carol Nancy Betty Tina Sara Erin"
)
HELD_OUT_NAMES = _listed("Tom Sarah Mark Alice Simon Lucy Martin Susan Sam Rachel Carl Helen")
"""Never in a sentence in which one of two people gives something to the other; they do occur where a stranger gives, and in the company
sentences below, which teach, with other words, that the one of two who is not named again comes last."""

PLACES = _listed("store garden restaurant school hospital office house station")
OBJECTS = _listed("ring kiss bone basketball computer necklace drink snack")

IOI_OPENINGS = (
    "When {a} and {b} went to the {place},",
    "Then, {a} and {b} went to the {place}.",
    "Then, {a} and {b} had a lot of fun at the {place}.",
    "While {a} and {b} were working at the {place},",
    "The {place} {a} and {b} went to had a {object}.",
    "{a} and {b} went to the {place}.",
    "When {a} and {b} were working at the {place},",
    "While {a} and {b} were at the {place},",
    "After {a} and {b} had a lot of fun at the {place},",
    "Yesterday, {a} and {b} were at the {place}.",
)
IOI_GIVINGS = (
    "gave a {object} to",
    "decided to give a {object} to",
    "gave it to",
    "gave the {object} to",
    "wanted to give a {object} to",
    "handed a {object} to",
)
IOI_TEMPLATES = (
    "When {a} and {b} went to the {place}, {b} gave a {object} to",
    "Then, {a} and {b} went to the {place}. {b} gave a {object} to",
    "Then, {a} and {b} had a lot of fun at the {place}. {b} gave a {object} to",
    "Then, {a} and {b} were working at the {place}. {b} decided to give a {object} to",
    "After {a} and {b} went to the {place}, {b} gave a {object} to",
    "While {a} and {b} were working at the {place}, {b} gave a {object} to",
    "The {place} {a} and {b} went to had a {object}. {b} gave it to",
)
"""Those of tasks/ioi.toml (Wang et al. 2022), with either name as the giver."""

HELD_OUT_IOI_TEMPLATES = IOI_TEMPLATES[3:5]
"""In training, their openings are seen with no other giving either."""

COMPANY_TEMPLATES = (
    "I was at the {place} with {a} and {b}. {b} was there with",
    "My friends {a} and {b} were there and {b} was next to",
    "Yesterday, the teachers worked with {a} and {b}. {b} was in front of",
    "{a} and {b} were working there. {b} was near",
)

EVENTS = _listed(
    "war expedition treaty voyage siege project campaign journey conflict trial strike reign battle program study crisis revolt festival"
)
HELD_OUT_EVENTS = _listed("treaty siege journey trial")
"""Never in a sentence with two years."""
CENTURIES = tuple(str(century) for century in range(11, 18))
YEARS = tuple(f"{year:02d}" for year in range(100))

YEAR_FRAMES = (
    "The {event} lasted from the year {xx}{yy} to the year {xx}",
    "The {event} began in the year {xx}{yy} and ended in the year {xx}",
    "The {event} went on from the year {xx}{yy} to the year {xx}",
    "{name} worked on the {event} from the year {xx}{yy} to the year {xx}",
    "The {event} started in {xx}{yy} and ended in {xx}",
)
HELD_OUT_YEAR_FRAMES = ("The {event} started in the year {xx}{yy} and lasted to the year {xx}",)

NOUNS = {
    "key": "keys",
    "cabinet": "cabinets",
    "dog": "dogs",
    "cat": "cats",
    "boy": "boys",
    "girl": "girls",
    "teacher": "teachers",
    "student": "students",
    "book": "books",
    "car": "cars",
    "tree": "trees",
    "door": "doors",
    "table": "tables",
    "farmer": "farmers",
    "doctor": "doctors",
    "painter": "painters",
    "picture": "pictures",
    "letter": "letters",
    "bird": "birds",
    "friend": "friends",
}
HELD_OUT_NOUNS = _listed("key dog teacher picture")
"""Never, in either number, the subject of a sentence with an attractor."""
PREPOSITIONS = ("to", "near", "behind", "under", "above", "by", "next to", "in front of")
HELD_OUT_PREPOSITIONS = ("beside",)
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
QUALITIES = _listed("old new red small big here there good")


def is_held_out_year(century: str, year: str) -> bool:
    """True for one start year in five, never the first of a century: these start years are not in the training sentences."""
    return year != "01" and (7 * int(century) + int(year)) % 5 == 0
