"""The task of the trained model, and the high-level model that it was trained to be: what its steps make of prompts and of interchanges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._errors import unknown_name, whole_number
from circuitgraph._pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

    Tokens = Int[ndarray, "prompts position"]

STEPS = ("tag", "value", "answer")


@dataclass(frozen=True)
class TaggedValues:
    """`tag value tag value ... tag`: the answer is the successor of the value that stands after the first mention of the last tag.

    Every tag stands once in a prompt, in any order, then the one asked for; no value stands twice. The successor of value `i` is
    `5 * i + 3` modulo their number, a permutation. Three steps: at every value, the `tag` before it; at the end, the `value` with the tag
    asked for; the `answer`, its successor.

    >>> task = TaggedValues()
    >>> [task.vocabulary[token] for token in task.prompts(1, seed=0)[0, -3:]]
    ['tag 5', 'value 12', 'tag 1']
    """

    tags: int = 6
    values: int = 18

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """What each token id stands for."""
        return (*(f"tag {i}" for i in range(self.tags)), *(f"value {i}" for i in range(self.values)))

    def prompts(self, n: int, seed: int) -> Tokens:
        """Random prompts, `[n, 2 * tags + 1]`."""
        return self.draw(whole_number("tagged values: prompts", n, 1), np.random.default_rng(seed))

    def draw(self, n: int, rng: np.random.Generator) -> Tokens:
        """Random prompts of a generator in use."""
        tokens = np.zeros((n, 2 * self.tags + 1), dtype=np.int64)
        tokens[:, :-1:2] = rng.random((n, self.tags)).argsort(axis=1)
        tokens[:, 1::2] = self.tags + rng.random((n, self.values)).argsort(axis=1)[:, : self.tags]
        tokens[:, -1] = rng.integers(self.tags, size=n)
        return tokens

    def pairs(self, n: int, seed: int) -> PromptPairs:
        """Prompts, and corrupted ones with another token of the same kind at every position; the wrong answer is that of the latter."""
        rng, sides, wanted = np.random.default_rng(seed), list[Any](), whole_number("tagged values: prompts", n, 1)
        while sum(len(side) for side in sides) < wanted:
            both = np.stack([self.draw(256, rng), self.draw(256, rng)], axis=1)
            answers = np.stack([self.answers(both[:, 0]), self.answers(both[:, 1])])
            sides.append(both[(both[:, 0] != both[:, 1]).all(axis=1) & (answers[0] != answers[1])])
        clean, corrupted = np.concatenate(sides)[:wanted].swapaxes(0, 1)
        return PromptPairs(clean, corrupted, self.answers(clean), self.answers(corrupted))

    def answers(self, tokens: Tokens, swapped: Mapping[str, Tokens] | None = None) -> Int[ndarray, " prompts"]:
        """The answers where the result of a step is that of other prompts: `swapped["tag"]` are those that `tag` is taken from.

        Raises `UnknownNameError` for a step that there is not.
        """
        source = dict(swapped or {})
        if unknown := [name for name in source if name not in STEPS]:
            raise unknown_name("step of tagged values", unknown[0], STEPS)
        for last in ("answer", "value"):  # of whose prompts all that comes before is, too
            if last in source:
                return self.answers(source[last])
        at = (source.get("tag", tokens)[:, :-1:2] == tokens[:, -1:]).argmax(axis=1)
        value: Int[ndarray, " prompts"] = tokens[np.arange(len(tokens)), 1 + 2 * at] - self.tags
        return self.tags + (5 * value + 3) % self.values
