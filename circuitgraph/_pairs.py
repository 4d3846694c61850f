"""`PromptPairs`: tokenised prompts, each with its corrupted twin and its answers. Never padded; bucketed by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._errors import TaskError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray


Rows = Any  # what numpy makes rows of token ids from: an array, or one row per prompt


@dataclass(frozen=True, eq=False, init=False)
class PromptPairs:
    """Clean and corrupted prompts as token ids, with the answers to tell apart after the last token.

    `clean`, `corrupted`: `[prompts, position]`, or one array per prompt when lengths differ; a pair's two prompts have equal length.
    `answers`, `wrong_answers`: `[prompts]`, or one array of token ids per prompt. `templates` names the template of each prompt.
    `spans`: for each prompt, which of `span_names` every position belongs to. Raises `TaskError` that prints the first pair that does not
    fit.

    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> len(pairs)
    1
    """

    clean: tuple[Int[ndarray, " position"], ...]
    corrupted: tuple[Int[ndarray, " position"], ...]
    answers: tuple[Int[ndarray, " answers"], ...]
    wrong_answers: tuple[Int[ndarray, " answers"], ...]
    templates: tuple[str, ...]
    spans: tuple[Int[ndarray, " position"], ...]
    span_names: tuple[str, ...]

    def __init__(
        self,
        clean: Rows,
        corrupted: Rows,
        answers: Rows,
        wrong_answers: Rows | None = None,
        *,
        templates: Sequence[str] = (),
        spans: Rows = (),
        span_names: Sequence[str] = (),
    ) -> None:
        n = len(_rows(clean, "clean"))
        if n == 0:
            raise TaskError("prompt pairs: there is no prompt")
        wrong = (None if wrong_answers is None else _rows(wrong_answers, "wrong_answers")) or [()] * n
        for name, rows in (("clean", clean), ("corrupted", corrupted), ("answers", answers), ("wrong_answers", wrong)):
            value = _rows(rows, name)
            if len(value) != n:
                raise TaskError(f"prompt pairs: {len(value)} {name} for {n} clean prompts; expected one each")
            object.__setattr__(self, name, tuple(_ids(item, f"{name}[{i}]") for i, item in enumerate(value)))
        if templates and len(templates) != n:
            raise TaskError(f"prompt pairs: {len(templates)} templates for {n} prompts; expected one each")
        object.__setattr__(self, "templates", tuple(templates))
        object.__setattr__(self, "spans", tuple(_ids(row, f"spans[{i}]") for i, row in enumerate(_rows(spans, "spans"))))
        object.__setattr__(self, "span_names", tuple(span_names))
        for i in range(n):
            self._check(i)
        self._check_spans()

    def _check(self, i: int) -> None:
        clean, corrupted = self.clean[i], self.corrupted[i]
        if len(clean) != len(corrupted):
            raise TaskError(
                f"prompt pair {i}: {len(clean)} clean and {len(corrupted)} corrupted tokens; expected equal lengths\n"
                f"  clean     {clean.tolist()}\n  corrupted {corrupted.tolist()}"
            )
        if len(clean) == 0 or len(self.answers[i]) == 0:
            raise TaskError(f"prompt pair {i}: no {'token' if len(clean) == 0 else 'answer'}")
        if np.array_equal(clean, corrupted):
            raise TaskError(f"prompt pair {i}: the corrupted prompt equals the clean one, so nothing can be patched: {clean.tolist()}")
        answers, wrong = self.answers[i].tolist(), self.wrong_answers[i].tolist()
        for name, ids in (("answers", answers), ("wrong_answers", wrong)):
            if len(set(ids)) < len(ids):
                raise TaskError(f"prompt pair {i}: {name} {ids} has a token twice, which would count twice")
        if both := sorted(set(answers) & set(wrong)):
            raise TaskError(f"prompt pair {i}: token {both[0]} is both an answer and a wrong answer")

    def _check_spans(self) -> None:
        names = self.span_names
        if bool(names) != bool(self.spans) or len(set(names)) < len(names):
            raise TaskError(f"prompt pairs: spans named {[*names]} for {len(self.spans)} prompts; expected both or none, each name once")
        if self.spans and [len(row) for row in self.spans] != [len(ids) for ids in self.clean]:
            raise TaskError("prompt pairs: spans do not fit the prompts; expected one number for every position of every prompt")
        if self.spans and max(int(row.max()) for row in self.spans) >= len(names):
            raise TaskError(f"prompt pairs: a span has no name; expected numbers below {len(names)}")

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def largest_token(self) -> int:
        """The largest token id in any prompt or answer."""
        everything = (*self.clean, *self.corrupted, *self.answers, *self.wrong_answers)
        return max(int(ids.max()) for ids in everything if len(ids))

    def select(self, index: Sequence[int] | Int[ndarray, " chosen"]) -> PromptPairs:
        """Some of the pairs, in the order asked for."""

        def pick(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[int(i)] for i in index)

        return replace(
            self,
            clean=pick(self.clean),
            corrupted=pick(self.corrupted),
            answers=pick(self.answers),
            wrong_answers=pick(self.wrong_answers),
            templates=pick(self.templates) if self.templates else (),
            spans=pick(self.spans) if self.spans else (),
        )

    def buckets(self) -> Iterator[Bucket]:
        """The pairs grouped by length, shortest first."""
        lengths = np.array([len(ids) for ids in self.clean])
        for length in np.unique(lengths):
            index = np.flatnonzero(lengths == length)
            yield Bucket(
                index=index,
                clean=np.stack([self.clean[i] for i in index]),
                corrupted=np.stack([self.corrupted[i] for i in index]),
                answers=_padded([self.answers[i] for i in index]),
                wrong_answers=_padded([self.wrong_answers[i] for i in index]),
                spans=np.stack([self.spans[i] for i in index]) if self.spans else np.zeros((len(index), int(length)), dtype=np.int64),
            )


def check_vocabulary(pairs: PromptPairs, vocabulary: int) -> None:
    """Raises `TaskError` when a token of the pairs is beyond the model's vocabulary."""
    if pairs.largest_token >= vocabulary:
        raise TaskError(f"prompt pairs: token id {pairs.largest_token} is not in the model's vocabulary of {vocabulary}")


@dataclass(frozen=True, eq=False)
class TokenSets:
    """Sets of token ids, one per prompt, filled up with weight 0: `ids` and `weights` are `[prompts, tokens]`."""

    ids: Int[ndarray, "prompts tokens"]
    weights: Float[ndarray, "prompts tokens"]

    def __getitem__(self, rows: slice) -> TokenSets:
        return TokenSets(self.ids[rows], self.weights[rows])


@dataclass(frozen=True, eq=False)
class Bucket:
    """Pairs of one length; `index` says which prompts of the whole they are, `spans` the span of each position (0 where there are none)."""

    index: Int[ndarray, " bucket"]
    clean: Int[ndarray, "bucket position"]
    corrupted: Int[ndarray, "bucket position"]
    answers: TokenSets
    wrong_answers: TokenSets
    spans: Int[ndarray, "bucket position"]

    def cut(self, size: int) -> Iterator[Bucket]:
        """Parts of at most `size` prompts."""
        for at in range(0, len(self.index), size):
            rows = slice(at, at + size)
            prompts = (self.clean[rows], self.corrupted[rows], self.answers[rows], self.wrong_answers[rows])
            yield Bucket(self.index[rows], *prompts, self.spans[rows])


def _rows(value: Rows, name: str) -> list[Any]:
    try:
        return list(value)
    except TypeError:
        raise TaskError(f"prompt pairs: {name} is {value!r}; expected one row of token ids per prompt") from None


def _ids(value: Any, name: str) -> Int[ndarray, " tokens"]:
    ids = np.atleast_1d(np.asarray(value))
    if ids.size == 0:
        ids = ids.astype(np.int64)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or (ids < 0).any():
        raise TaskError(f"prompt pairs: {name} is {value!r}; expected a row of token ids (integers, none below 0)")
    ids = ids.astype(np.int64)
    ids.setflags(write=False)
    return ids


def _padded(sets: Sequence[Int[ndarray, " tokens"]]) -> TokenSets:
    width = max(len(s) for s in sets)
    ids = np.zeros((len(sets), width), dtype=np.int64)
    weights = np.zeros((len(sets), width), dtype=np.float32)
    for row, tokens in enumerate(sets):
        ids[row, : len(tokens)] = tokens
        weights[row, : len(tokens)] = 1.0
    return TokenSets(ids, weights)
