"""Tasks and a tokenizer that are small enough to know what comes out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from circuitgraph._pairs import PromptPairs
from circuitgraph._task import Prompt, Task, WordSet, load_task

BUILT_IN = ("greater-than", "greater-than-digits", "induction", "ioi", "ioi-s2", "subject-verb-agreement")


class Greedy:
    """A tokenizer whose tokens are the longest that match; a letter it has no token for is a token, or unknown."""

    def __init__(self, *tokens: str, unk: bool = False, bos: bool = False, adds_bos: bool = False) -> None:
        self.vocabulary = ["<unk>", "<s>", *(chr(i) for i in range(32, 127) if not unk), *tokens]
        self.unk_token_id = 0 if unk else None
        self.bos_token_id = 1 if bos or adds_bos else None
        self.eos_token_id = None
        self.all_special_ids = [0, 1]
        self.adds_bos = adds_bos
        self._ids = {token: i for i, token in enumerate(self.vocabulary)}
        self._lengths = sorted({len(token) for token in self.vocabulary[2:]}, reverse=True)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        start = [1] if self.adds_bos and add_special_tokens else []
        return {"input_ids": [start + self._encode(item) for item in text]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.vocabulary[i] for i in ids]

    def _encode(self, text: str) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            length = next((k for k in self._lengths if text[at : at + k] in self._ids), 0)
            ids.append(self._ids[text[at : at + length]] if length else 0)
            at += length or 1
        return ids


NAMES = ["Mary", "John", "Tom", "Anna", "Paul", "Kate"]
WORDS = Greedy(*NAMES, *(f" {name}" for name in NAMES), " met", " and", " gave", " to", "When", ",")


def simple(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "name": "simple",
        "words": {"name": NAMES},
        "prompt": [
            Prompt(
                clean="When {name.a} met {name.b}, {name.b} gave to",
                corrupted="When {name.c} met {name.d}, {name.e} gave to",
                answer=" {name.a}",
                wrong=" {name.b}",
            )
        ],
    }
    return Task(**(fields | changes))


def digits_task() -> Task:
    year = {"from": 2, "to": 98, "digits": 2}
    end = {"from": 0, "to": 99, "digits": 2}
    prompt = Prompt(
        clean="from 17{year} to 17",
        corrupted="from 1701 to 17",
        answer=WordSet(words="end", above="{year}"),
        wrong=WordSet(words="end", upto="{year}"),
    )
    return Task(name="years", metric="prob_diff", words={"year": year, "end": end}, prompt=[prompt])


def rows(pairs: PromptPairs) -> list[list[list[int]]]:
    return [[a.tolist() for a in ids] for ids in (pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong_answers)]


def words_of(task: Task) -> set[str]:
    listed = {word for words in task.lists.values() for row in words.rows for word in row}
    texts = [text for p in task.prompt for text in (p.clean, p.corrupted, *((p.answer,) if isinstance(p.answer, str) else ()))]
    texts += [text for p in task.prompt for a in (p.answer, p.wrong) if isinstance(a, tuple) for text in a]
    return listed | {word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"\{[^{}]*\}", "", text))}


def tokenizer_of(task: Task) -> Greedy:
    words = sorted(words_of(task))
    if task.name == "greater-than-digits":
        words = [word for word in words if not word.isdecimal()]
    return Greedy(*words, *(f" {word}" for word in words))


BUILT_IN_TOKENIZERS = {name: tokenizer_of(load_task(name)) for name in BUILT_IN}
