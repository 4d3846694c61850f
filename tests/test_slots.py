"""The slot grammar: what it reads, what it remembers, what it refuses and how it says so."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitgraph._errors import TaskError
from circuitgraph._slots import Slot, literal, parse_template

LISTS = {"name": (), "place": (), "token": (), "noun": ("one", "many")}


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("no slot", []),
        ("{place}", [Slot("place")]),
        ("{name.a} and {name.b}, {name.a}", [Slot("name", "a"), Slot("name", "b"), Slot("name", "a")]),
        ("{noun.one}", [Slot("noun", "", "one")]),
        ("{noun.a.many}", [Slot("noun", "a", "many")]),
        ("{token.1:3}{token.2}", [Slot("token", "1"), Slot("token", "2"), Slot("token", "3"), Slot("token", "2")]),
        ("{{name}} {{{name}}}", [Slot("name")]),
    ],
)
def test_reads(text: str, slots: list[Slot]) -> None:
    assert list(parse_template(text, LISTS).slots) == slots


def test_braces_are_written_twice() -> None:
    template = parse_template("{{x}} {name} }}", LISTS)
    assert template.fill({Slot("name"): "Mary"}).text == "{x} Mary }"


def test_forms_of_one_key_share_a_draw() -> None:
    one, many = parse_template("{noun.a.one}{noun.a.many}", LISTS).slots
    assert one != many
    assert one.draw == many.draw == ("noun", "a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ab {name", r"'\{' is never closed at character 4"),
        ("ab } c", r"'\}' closes nothing at character 4"),
        ("{}", r"expected \{list\}"),
        ("{nam.a}", r"slot \{nam.a\} at character 1 of '\{nam.a\}': unknown list 'nam'; did you mean 'name'"),
        ("x {name.a.b}", "the list 'name' has no forms"),
        ("{noun}", r"has forms, so its slots end with one: \{noun.one\} or \{noun.many\}"),
        ("{noun.a}", r"\{noun.a.one\} or \{noun.a.many\}"),
        ("{noun.a.b.one}", "too many parts"),
        ("{name.}", "the key '' is not made of letters"),
        ("{name.a b}", "the key 'a b' is not made of letters"),
        ("{token.8:1}", "runs backwards"),
        ("{place:x}", r"expected \{list\}"),
    ],
)
def test_refuses_and_says_where(text: str, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        parse_template(text, LISTS)


def test_an_unknown_list_in_a_task_without_lists() -> None:
    with pytest.raises(TaskError, match="unknown list 'name'; known: none"):
        parse_template("{name}", {})


words = st.text(st.characters(exclude_characters="{}"), max_size=8)
pieces = st.lists(
    st.one_of(words, st.sampled_from([Slot("name", "a"), Slot("name", "b"), Slot("place"), Slot("noun", "k", "one")])), max_size=8
)


@settings(deadline=None, max_examples=50)  # a loaded machine is no failure
@given(pieces, words, words)
def test_a_filled_template_is_its_pieces_and_knows_where_they_stand(parts: list[str | Slot], a: str, b: str) -> None:
    fill = {Slot("name", "a"): a, Slot("name", "b"): b, Slot("place"): "here", Slot("noun", "k", "one"): "key"}
    text = "".join(f"{{{part.name}}}" if isinstance(part, Slot) else part for part in parts)
    filled = parse_template(text, LISTS).fill(fill)
    assert filled.text == "".join(fill[part] if isinstance(part, Slot) else part for part in parts)
    assert [span.slot for span in filled.spans] == [part for part in parts if isinstance(part, Slot)]
    assert all(filled.text[span.start : span.stop] == fill[span.slot] for span in filled.spans)


@settings(deadline=None, max_examples=50)  # a loaded machine is no failure
@given(st.text(max_size=20))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        template = parse_template(text, LISTS)
    except TaskError as error:
        assert "expected" in str(error) or "unknown list" in str(error) or "form" in str(error) or "key" in str(error)  # noqa: PT017
    else:
        assert template.text == text


@settings(deadline=None, max_examples=50)  # a loaded machine is no failure
@given(st.text(max_size=20))
def test_a_literal_has_no_slots(text: str) -> None:
    assert literal(text).text == text
    assert literal(text).spans == ()
