"""Runs in which some writers say what they said in other runs: lanes that need the same source values go together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np

from circuitgraph._engine import Engine, WriterValues
from circuitgraph._errors import CircuitGraphError, whole_number
from circuitgraph.algorithms._activation_patching import Direction

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class Spliced:
    """The writer values of one run, with some columns from another."""

    values: WriterValues
    other: WriterValues
    from_other: Bool[ndarray, " writers"]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, prompt: int) -> Float[ndarray, "writers position d_model"]:
        spliced: Float[ndarray, "writers position d_model"] = np.array(self.values[prompt])
        spliced[self.from_other] = self.other[prompt][self.from_other]
        return spliced


@dataclass(frozen=True, eq=False)
class Lane:
    """A run to make. Where `mask` is 0, the sender says what it says in the source run, and the `frozen` writers what they say in the
    engine's own run, `F(1)`."""

    mask: Float[ndarray, "readers writers"]
    sender: int
    frozen: Bool[ndarray, " writers"]


def evaluate_lanes(engine: Engine, lanes: Iterable[Lane], max_lanes: int) -> Iterator[Float[ndarray, "lanes prompts"]]:
    """`F` of the lanes in their order, as many at a time as can share a source. Nothing is spliced for lanes that freeze nobody."""
    own: tuple[WriterValues, WriterValues] | None = None
    for batch, frozen in _batches(lanes, max_lanes):
        source = None
        if frozen.any():
            own = own or (engine.source_values(), engine.activations())
            source = Spliced(*own, frozen)
        yield np.asarray(engine.evaluate(np.stack([lane.mask for lane in batch]), source=source), dtype=np.float64)


def _batches(lanes: Iterable[Lane], max_lanes: int) -> Iterator[tuple[list[Lane], Bool[ndarray, " writers"]]]:
    """Neighbours none of which freezes another's sender, with all that they freeze."""
    batch: list[Lane] = []
    frozen = np.zeros(0, dtype=bool)
    for lane in lanes:
        together = frozen | lane.frozen if batch else lane.frozen
        if batch and (len(batch) == max_lanes or together[[lane.sender, *(other.sender for other in batch)]].any()):
            yield batch, frozen
            batch, together = [], lane.frozen
        batch, frozen = [*batch, lane], together
    if batch:
        yield batch, frozen


def check_runs(what: str, direction: Direction, max_lanes: int) -> None:
    """Raises `CircuitGraphError` for settings that no patching has."""
    if direction not in get_args(Direction):
        raise CircuitGraphError(f"{what}: direction is {direction!r}; expected {' or '.join(map(repr, get_args(Direction)))}")
    whole_number(f"{what}: max_lanes", max_lanes, 1)


def asked_of(engine: Engine, direction: Direction) -> tuple[Engine, float]:
    """The engine to ask, and the sign that makes a rise of its metric a score."""
    if direction == "noising":
        return engine, -1.0 if engine.metric.higher_is_better else 1.0
    return engine.reversed(), 1.0 if engine.metric.higher_is_better else -1.0
