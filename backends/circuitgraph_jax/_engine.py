"""The JAX engine: a traced model bound to prompt pairs, a metric and a source. See `circuitgraph._engine.Engine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import Array

from circuitgraph._engine import (
    EXACT,
    Rule,
    WriterValues,
    check_differentiable,
    check_gradient,
    check_reversible,
    check_scores,
    check_source,
    check_source_values,
    checked_mask,
    no_prompt_to_average,
)
from circuitgraph._engine import Source as SourceChoice
from circuitgraph._errors import TaskError
from circuitgraph._graph import Graph
from circuitgraph._memory import with_room
from circuitgraph._metrics import Metric, check_answers
from circuitgraph._pairs import Bucket, PromptPairs, check_vocabulary
from circuitgraph_jax._batch import Batch, Parts, SourceRun
from circuitgraph_jax._devices import precisely

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class JaxWriterValues:
    """Writer values on the devices, batch by batch: `[prompts, writers, position, d_model]`."""

    batches: tuple[Array, ...]
    places: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, prompt: int) -> Float[ndarray, "writers position d_model"]:
        batch, row = self.places[prompt]
        values = self.batches[batch]
        return np.asarray(values[row], dtype=np.promote_types(values.dtype, np.float32))


class JaxEngine:
    """`activations`, `evaluate` and `gradient` of a traced model. Made by `TracedModel.bind`."""

    def __init__(self, parts: Parts, pairs: PromptPairs, metric: Metric, source: SourceChoice, *, is_reversed: bool = False) -> None:
        check_answers(metric, pairs.wrong_answers)
        check_source(source, parts.sites.graph, parts.d_model)
        for asked in (pairs, source.data):
            if asked is not None:
                check_vocabulary(asked, parts.decoder.embedding.shape[0])
                check_lengths(asked, parts)
        self._parts, self._pairs, self._metric, self._source = parts, pairs, metric, source
        self._is_reversed = is_reversed
        self._cut()

    def _cut(self) -> None:
        """Prompts into batches, as memory allows."""
        self.batches = [
            Batch(self._parts, part, self._metric, *((part.corrupted, part.clean) if self._is_reversed else (part.clean, part.corrupted)))
            for bucket in self._pairs.buckets()
            for part in bucket.cut(self._prompts_per_batch(bucket))
        ]
        self._sources: dict[int, SourceRun] = {}
        total = sum(batch.live_ids.size for batch in self.batches) * self._bytes_per_token
        self._keeps_runs = len(self.batches) == 1 or 3 * total <= self._parts.budget.runs

    def take_less(self) -> None:
        self._parts = replace(self._parts, budget=self._parts.budget.halved(), largest=max(map(len, self.batches)) // 2 or 1)
        self._cut()

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)

    @property
    def graph(self) -> Graph:
        return self._parts.sites.graph

    @property
    def metric(self) -> Metric:
        return self._metric

    @property
    def n_prompts(self) -> int:
        return len(self._pairs)

    @property
    def spans(self) -> tuple[str, ...]:
        return self._pairs.span_names

    @with_room
    def activations(self, mask: Float[ndarray, "readers writers"] | None = None, *, source: WriterValues | None = None) -> JaxWriterValues:
        checked = None if mask is None else self._masks(mask)
        values: list[Array] = []
        places: dict[int, tuple[int, int]] = {}
        with precisely(self._parts.dtype):
            for number, batch in enumerate(self.batches):
                values.append(batch.values(checked, self._source_run(number, source)))
                places |= {int(prompt): (number, row) for row, prompt in enumerate(batch.index)}
                self._done(number)
        return JaxWriterValues(tuple(values), tuple(places[i] for i in range(self.n_prompts)))

    @with_room
    def source_values(self) -> JaxWriterValues:
        live, said = self.activations(), []
        with precisely(self._parts.dtype):
            for number, values in enumerate(live.batches):
                said.append(jnp.broadcast_to(self._source_run(number, None).values, values.shape))
                self._done(number)
        return JaxWriterValues(tuple(said), live.places)

    @with_room
    def evaluate(
        self, masks: Float[ndarray, "lanes readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "lanes prompts"]:
        checked = self._masks(masks, 1)
        out = np.empty((len(checked), self.n_prompts))
        with precisely(self._parts.dtype):
            for number, batch in enumerate(self.batches):
                out[:, batch.index] = batch.evaluate(checked, self._source_run(number, source))
                self._done(number)
        return out

    @with_room
    def gradient(
        self,
        mask: Float[ndarray, "readers writers"],
        *,
        source: WriterValues | None = None,
        mix: float | Sequence[float] = 1.0,
        rule: Rule = EXACT,
    ) -> Float[ndarray, "prompts readers writers"]:
        checked, mixes = self._masks(mask), np.atleast_1d(np.asarray(mix, dtype=float))
        self._parts.budget.check_answer("scores by prompt, reader and writer", self.n_prompts, *checked.shape)
        check_gradient(self._metric, checked, self.graph, mix, rule)
        out = np.empty((self.n_prompts, *checked.shape))
        with precisely(self._parts.dtype):
            for number, batch in enumerate(self.batches):
                out[batch.index] = batch.gradient(checked, self._source_run(number, source), mixes, rule)
                self._done(number)
        check_scores(out, self._parts.dtype)
        return out

    @with_room
    def source_gradient(
        self, mask: Float[ndarray, "readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "prompts writers d_model"]:
        checked = self._masks(mask)
        check_differentiable(self._metric)
        out = np.empty((self.n_prompts, len(self.graph.writers), self._parts.d_model))
        with precisely(self._parts.dtype):
            for number, batch in enumerate(self.batches):
                out[batch.index] = batch.source_gradient(checked, self._source_run(number, source))
                self._done(number)
        check_scores(out, self._parts.dtype)
        return out

    def reversed(self) -> JaxEngine:
        check_reversible(self._source)
        return JaxEngine(self._parts, self._pairs, self._metric, self._source, is_reversed=not self._is_reversed)

    def logits(self, mask: Float[ndarray, "readers writers"]) -> Iterator[tuple[Batch, Float[ndarray, "prompts position vocabulary"]]]:
        """All logits under a mask, batch by batch."""
        checked = self._masks(mask)
        for number, batch in enumerate(self.batches):
            with precisely(self._parts.dtype):
                yield batch, batch.logits(checked, self._source_run(number, None))

    def _masks(self, masks: Float[ndarray, ...], *lanes: int) -> Float[ndarray, ...]:
        return checked_mask(masks, (*lanes, *self.graph.shape), self.spans).astype(self._parts.dtype)

    def _source_run(self, number: int, override: WriterValues | None) -> SourceRun:
        batch = self.batches[number]
        if override is not None:
            return batch.source_run(self._own_values(override, number))
        if number not in self._sources:
            self._sources[number] = self._own_source(batch)
        return self._sources[number]

    def _own_values(self, values: WriterValues, number: int) -> Array:
        """Somebody's writer values for one of our batches."""
        batch = self.batches[number]
        check_source_values(values, self.n_prompts)
        if isinstance(values, JaxWriterValues) and len(values.batches) == len(self.batches):
            theirs = values.batches[number]
            is_ours = all(values.places[int(i)] == (number, row) for row, i in enumerate(batch.index)) and len(theirs) == batch.n_rows
            if is_ours and theirs.dtype == self._parts.dtype and theirs.devices() == {*self._parts.devices}:
                return theirs
        return batch.by_prompt(np.stack([values[int(i)] for i in batch.index]).astype(self._parts.dtype))

    def _own_source(self, batch: Batch) -> SourceRun:
        if self._source.kind == "corrupted":
            return batch.others()
        if self._source.kind in ("zero", "optimal"):
            shape = (len(batch), len(self.graph.writers), 1, self._parts.d_model)
            constants = np.zeros(shape[1:]) if self._source.constants is None else self._source.constants[:, None]
            return batch.source_run(batch.by_prompt(np.broadcast_to(constants, shape).astype(self._parts.dtype)))
        mean = self._mean(batch.live_ids.shape[1] if self._source.kind == "mean-per-position" else None)
        return batch.source_run(jnp.broadcast_to(mean, (batch.n_rows, *mean.shape[1:])))

    def _mean(self, length: int | None) -> Array:
        """Mean writer values over the reference prompts: per position over those of this length, or over everything."""
        total, count, wide = None, 0, np.promote_types(self._parts.dtype, np.float32)  # a sum is more than half precision holds
        for bucket in (self._source.data or self._pairs).buckets():
            if length is not None and bucket.clean.shape[1] != length:
                continue
            for part in bucket.cut(self._prompts_per_batch(bucket)):
                ids = part.clean if self._source.data is not None or self._is_reversed else part.corrupted
                values = Batch(self._parts, part, self._metric, ids, ids).live.values[: len(part.index)]
                summed = values.sum(0 if length is not None else (0, 2), keepdims=True, dtype=wide)
                total = summed if total is None else total + summed
                count += values.shape[0] * (1 if length is not None else values.shape[2])
        if total is None:
            raise no_prompt_to_average(length)
        return (total / count).astype(self._parts.dtype)

    @property
    def _bytes_per_token(self) -> int:
        return len(self.graph.writers) * self._parts.d_model * int(self._parts.dtype.itemsize)

    def _prompts_per_batch(self, bucket: Bucket) -> int:
        fitting: int = max(1, self._parts.budget.batch // (self._bytes_per_token * bucket.clean.shape[1]))
        return min(fitting, self._parts.largest or fitting)

    def _done(self, number: int) -> None:
        if not self._keeps_runs:
            self.batches[number].forget()
            self._sources.pop(number, None)


def check_lengths(pairs: PromptPairs, parts: Parts) -> None:
    """Raises `TaskError` for a prompt that has more tokens than the model has learned positions; JAX would not notice."""
    positions = parts.decoder.positions
    longest = max(len(ids) for ids in pairs.clean)
    if positions is not None and longest > len(positions):
        raise TaskError(f"the model does not take prompts of {longest} tokens: it has learned positions for {len(positions)}")
