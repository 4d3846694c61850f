"""Spans of prompts: how slots name them, which token is in which, whoever tokenises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tasks import NAMES, WORDS, Greedy, rows, simple

from circuitgraph import zoo
from circuitgraph._errors import TaskError
from circuitgraph._names import Edge, Writer
from circuitgraph._slots import parse_template
from circuitgraph._spans import slot_spans
from circuitgraph._task import Prompt, Row, Task, load_task

LISTS = {"name": (), "place": (), "end": (), "noun": ("one", "many"), "token": (), "odd-list +": ()}


@pytest.mark.parametrize(
    ("templates", "names"),
    [
        (["{name.io} and {name.s} to the {place}, {name.s}"], [("IO", "S1", "PLACE", "S2")]),
        (["{name.io} {name.s} {name.s}", "{name.s} {name.io}"], [("IO", "S1", "S2"), ("S1", "IO")]),  # one number for all templates
        (["{token.1:2}{token.1}"], [("1.1", "2", "1.2")]),
        (["{name.a} {place.a} {place}"], [("NAME.A", "PLACE.A", "PLACE")]),
        (["{name.place} {place}"], [("NAME.PLACE", "PLACE")]),
        (["{name.end} {name.begin} {end}"], [("NAME.END", "NAME.BEGIN", "END_")]),
        (["{noun.a.one} {noun.b.many} {noun.b.one}"], [("A", "B1", "B2")]),
        (["{name.s} {name.s} {name.s1}"], [("S1", "S2", "S1_")]),
        (["{odd-list +} {name.x-y}"], [("ODD_LIST_", "X_Y")]),
        (["no slot"], [()]),
    ],
)
def test_slots_name_spans(templates: list[str], names: list[tuple[str, ...]]) -> None:
    found = slot_spans([parse_template(text, LISTS) for text in templates])
    assert found == tuple(names)
    every = {part for row in found for name in row for part in (name, f"{name}+")} | {"BEGIN", "END"}
    assert len(every) == 2 * len({name for row in found for name in row}) + 2
    for name in every:  # each can be written and read
        assert Edge.parse(f"a0.h1@{name}->logits").writer == Writer("head", 0, 1, name)


def spans_of(task: Task, tokenizer: Any = WORDS, **options: Any) -> str:
    """The tokens and spans of the first pair."""
    prepared = task.prepare(tokenizer, 1, **options)
    tokens = prepared.encoder.tokens(prepared.pairs.clean[0].tolist())
    return " ".join(f"{token}:{prepared.pairs.span_names[i]}" for token, i in zip(tokens, prepared.pairs.spans[0], strict=True))


def task_of(clean: str, corrupted: str, answer: str = " to", wrong: str = " and", **words: Any) -> Task:
    return Task(name="t", words=words, prompt=[Prompt(clean=clean, corrupted=corrupted, answer=answer, wrong=wrong)])


def test_each_token_is_in_one_span() -> None:
    task = task_of("When {n.a}, {n.b} met {n.b} to", "Then {n.a}, {n.b} met {n.b} to", n=["Tom", "Tomtom"])
    tokenizer = Greedy("When", "Then", "Tom", " Tom", "tom", " met", " to", " and", ",")
    wanted = "'When':BEGIN ' Tom':A 'tom':A ',':A+ ' Tom':B1 ' met':B1+ ' Tom':B2 ' to':END"
    assert wanted in {spans_of(task, tokenizer, seed=seed) for seed in range(6)}
    assert spans_of(simple(bos=True), Greedy(*WORDS.vocabulary[2:], bos=True)).startswith("'<s>':BEGIN 'When':BEGIN ' ")
    assert "BEGIN" not in spans_of(task_of("{n.a} to", "{n.b} to", n=NAMES))


@pytest.mark.parametrize(
    ("clean", "tokens", "wanted"),
    [
        ("{n.a}'s to", ("Mary's",), "\"Mary's\":A ' to':END"),  # a token belongs to the slot that has a part of it
        ("the{n.a} to", ("theMary",), "'theMary':A ' to':END"),
        ("{m}{n.a}, to", ("Mr", "MrMary", ","), "'MrMary':M ',':A+ ' to':END"),  # to the earlier one of two
        ("{m}{n.a}x to", ("Mr", "MrMaryx"), "'MrMaryx':M ' to':END"),
        ("{m} {n.a}", ("Mr", "Mary", " Mary"), "'Mr':M ' Mary':END"),  # the last token is the end, whatever it is
        ("  {n.a} to", ("Mary", "  "), "'  ':A 'Mary':A ' to':END"),  # a space belongs to the word behind it
    ],
)
def test_tokens_that_are_in_two_parts(clean: str, tokens: tuple[str, ...], wanted: str) -> None:
    words = {"n": ["Mary"], **({"m": ["Mr"]} if "{m}" in clean else {})}
    assert spans_of(task_of(f"p{clean}", f"q{clean}", **words), Greedy(*tokens, " to", " and")) == f"'p':BEGIN {wanted}"


def test_templates_share_what_they_name_alike() -> None:
    assert simple().pairs(WORDS, 4).span_names == ("BEGIN", "A", "A+", "B1", "B1+", "B2", "B2+", "END")
    two = [
        Prompt(name="ab", clean="{n.a} met {n.b} to", corrupted="{n.c} met {n.d} to", answer=" to", wrong=" and"),
        Prompt(name="ba", clean="When {n.b} to", corrupted="When {n.c} to", answer=" to", wrong=" and"),
    ]
    task = Task(name="t", words={"n": NAMES}, prompt=two)
    assert task.pairs(WORDS, 4).span_names == ("BEGIN", "A", "A+", "B", "END")
    assert task.pairs(WORDS, 1).span_names == ("A", "A+", "B", "END")  # what no prompt has is left out


def test_token_tasks_have_a_span_for_each_slot() -> None:
    pairs = load_task("induction").pairs(vocabulary=50, n=3)
    assert pairs.span_names == (*(f"{i}.1" for i in range(1, 8)), "8", *(f"{i}.2" for i in range(1, 7)), "END")
    assert [row.tolist() for row in pairs.spans] == [[*range(15)]] * 3


def test_prompts_without_slots_have_no_spans() -> None:
    row = Task(name="row", row=[Row(clean="When Tom", corrupted="When Mary", answer=" to", wrong_answer=" and")])
    for task in (row, task_of("When Tom", "When Mary")):
        pairs = task.pairs(WORDS, 1)
        assert (pairs.spans, pairs.span_names) == ((), ())
        assert "span" not in task.describe(WORDS, 1)
    shown = simple().describe(WORDS, 1).splitlines()
    assert next(line for line in shown if "corrupted" in line).split() == ["clean", "corrupted", "span"]
    assert next(line for line in shown if line.startswith("    1*")).split()[-1] == "A"


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text("aby ,", min_size=1, max_size=3), max_size=8), st.integers(0, 2**16), st.booleans())
def test_spans_never_get_in_the_way(tokens: list[str], seed: int, bos: bool) -> None:
    """Whatever the tokenizer makes of a prompt: each token is in a span, the last in `END`, and they follow as the slots do."""
    words = ["aby", "bya", "yab", "ab y"]
    prompt = Prompt(clean="{w.a}{w.b}, by {w.a} ab!", corrupted="{w.c}{w.b}, by {w.c} ab!", answer="?", wrong=";")
    task = Task(name="t", words={"w": words}, prompt=[prompt], bos=bos)
    tokenizer = Greedy(*tokens, *words, *(f" {word}" for word in words), bos=True)
    try:
        pairs = task.pairs(tokenizer, 3, seed)
    except TaskError as error:
        if "prompt pairs" in str(error):
            raise
        return  # the prompts do not fit
    order = ["BEGIN", "A1", "A1+", "B", "B+", "A2", "A2+", "END"]
    for clean, spans in zip(pairs.clean, pairs.spans, strict=True):
        named = [pairs.span_names[i] for i in spans]
        assert len(named) == len(clean)
        assert named[-1] == "END"
        assert [order.index(name) for name in named] == sorted(order.index(name) for name in named)


class Slow:
    """A tokenizer that does not tell which characters a token stands for."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast

    def __getattr__(self, name: str) -> Any:
        if name in ("is_fast", "_fast"):
            raise AttributeError(name)
        return getattr(self._fast, name)

    def __len__(self) -> int:
        return len(self._fast)

    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._fast(text, add_special_tokens=add_special_tokens)
        return found


def bytes_of_words(texts: list[str], trim_offsets: bool) -> Any:
    """A byte-level tokenizer like GPT-2's, of the merges that these texts suggest."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trim_offsets)
    raw.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("kind", ["zoo", "trimmed offsets", "offsets with spaces"])
def test_offsets_and_prefixes_agree(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    task = load_task("ioi")
    if kind == "zoo":
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(zoo.zoo_path("tiny-english") / "tokenizer.json"))
    else:
        texts = [f" {word}" for words in task.words.values() for word in words] + [prompt.clean for prompt in task.prompt]
        fast = bytes_of_words(20 * texts, kind == "trimmed offsets")
    assert fast.is_fast
    by_offsets, by_prefixes = (task.pairs(tokenizer, 24) for tokenizer in (fast, Slow(fast)))
    assert rows(by_offsets) == rows(by_prefixes)
    assert by_offsets.span_names == by_prefixes.span_names
    assert " ".join(by_offsets.span_names) == "BEGIN IO IO+ S1 S1+ PLACE PLACE+ S2 S2+ OBJECT END"
    assert [row.tolist() for row in by_offsets.spans] == [row.tolist() for row in by_prefixes.spans]
