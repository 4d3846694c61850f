"""Rows of token ids for training, from texts, token ids or a task's prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._engine import TracedModel
from circuitgraph._errors import CircuitGraphError, TaskError
from circuitgraph._pairs import PromptPairs
from circuitgraph._training import SAETraining

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

    from circuitgraph._task import Task

TrainingData = Any  # Task | PromptPairs | str | Path | Sequence[str] | rows of token ids
_HELD = 0  # what a random stream is for; a backend has its own numbers


def token_rows(
    traced: TracedModel, data: TrainingData, *, context: int, prompts: int | None = None, seed: int = 0
) -> list[Int[ndarray, " position"]]:
    """What `train` takes, as pieces of 1 to `context` token ids. Raises `CircuitGraphError` for no data, or what is none."""
    rows = [np.asarray(row) for row in _rows(traced, data, prompts, seed)]
    vocabulary = traced.architecture.vocabulary
    for at, row in enumerate(rows):
        if row.ndim != 1 or (len(row) and not np.issubdtype(row.dtype, np.integer)):
            raise CircuitGraphError(f"data[{at}] is {_shown(row)}; expected texts, or rows of token ids")
        if len(row) and not 0 <= row.min() <= row.max() < vocabulary:
            raise CircuitGraphError(
                f"data[{at}] has token id {_beyond(row, vocabulary)}; the model's vocabulary is 0 to {vocabulary - 1:,}"
            )
    pieces = [row[start : start + context].astype(np.int64) for row in rows for start in range(0, len(row), context)]
    if not pieces:
        raise CircuitGraphError("data has no token; expected texts, token ids, a task or prompt pairs")
    return pieces


def held_out(
    rows: Sequence[Int[ndarray, " position"]], settings: SAETraining
) -> tuple[list[Int[ndarray, " position"]], list[Int[ndarray, " position"]]]:
    """The rows to train on, and those to measure on: a share of the different ones, so that no row is both."""
    different = sorted({row.tobytes() for row in rows})
    if len(different) < 2:
        raise CircuitGraphError("data has one prompt only, and one must be kept to measure on; give more, or a smaller context")
    n_held = min(len(different) - 1, max(1, round(settings.held_out * len(different))))
    chosen = np.random.default_rng([settings.seed, _HELD]).permutation(len(different))[:n_held]
    kept = {different[i] for i in chosen}
    held = [np.frombuffer(different[i], dtype=np.int64) for i in sorted(chosen)]
    return [row for row in rows if row.tobytes() not in kept], held


def digest(rows: Sequence[Int[ndarray, " position"]]) -> str:
    """A hash of the token ids."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(len(row).to_bytes(8, "little") + row.astype("<i8").tobytes())
    return sha.hexdigest()


def _rows(traced: TracedModel, data: TrainingData, prompts: int | None, seed: int) -> Sequence[Any]:
    from circuitgraph._task import Task

    if isinstance(data, (str, Path, Task)):
        data = _pairs(traced, data, prompts, seed)
    elif prompts is not None:
        raise CircuitGraphError(f"prompts is {prompts!r}, which says how many a task is to draw, and data is no task")
    if isinstance(data, PromptPairs):
        return [*data.clean, *data.corrupted]
    try:
        items = list(data)
    except TypeError:
        raise CircuitGraphError(f"data is {_shown(data)}; expected texts, rows of token ids, a task or prompt pairs") from None
    return _tokenised(traced, items) if any(isinstance(item, str) for item in items) else items


def _pairs(traced: TracedModel, task: Task | str | Path, prompts: int | None, seed: int) -> PromptPairs:
    from circuitgraph._task import load_task

    try:
        loaded = load_task(task)
    except CircuitGraphError as error:
        raise type(error)(f"data: {error} (texts to train on are given in a list)") from None
    return loaded.pairs(traced.tokenizer, prompts, seed, vocabulary=traced.architecture.vocabulary)


def _tokenised(traced: TracedModel, texts: Sequence[Any]) -> list[Any]:
    """With the special tokens that the tokenizer itself adds."""
    if traced.tokenizer is None:
        raise TaskError(f"{traced.name} came without a tokenizer; give token ids, or trace it with tokenizer=")
    if others := [item for item in texts if not isinstance(item, str)]:
        raise CircuitGraphError(f"data has texts and {_shown(others[0])}; expected texts alone, or rows of token ids alone")
    return [np.asarray(ids, dtype=np.int64) for ids in traced.tokenizer(list(texts))["input_ids"]]


def _beyond(row: Int[ndarray, " position"], vocabulary: int) -> int:
    return int(row[(row < 0) | (row >= vocabulary)][0])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
