"""The PyTorch engine: a traced model bound to prompt pairs, a metric and a source. See `circuitgraph._engine.Engine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from circuitgraph._engine import (
    EXACT,
    Rule,
    Source,
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
from circuitgraph._graph import Graph
from circuitgraph._memory import with_room
from circuitgraph._metrics import Metric, check_answers
from circuitgraph._pairs import Bucket, PromptPairs, check_vocabulary
from circuitgraph_torch._batch import Batch, Parts
from circuitgraph_torch._forward import SourceRun
from circuitgraph_torch._modes import wide_products, widened

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class TorchWriterValues:
    """Writer values on the device, batch by batch: `[writers, prompts, position, d_model]`."""

    batches: tuple[Tensor, ...]
    places: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, prompt: int) -> Float[ndarray, "writers position d_model"]:
        batch, row = self.places[prompt]
        values = self.batches[batch][:, row]
        said: Float[ndarray, "writers position d_model"] = widened(values).cpu().numpy()
        return said


class TorchEngine:
    """The queries of a traced PyTorch model. Made by `TracedModel.bind`."""

    def __init__(self, parts: Parts, pairs: PromptPairs, metric: Metric, source: Source, *, is_reversed: bool = False) -> None:
        check_answers(metric, pairs.wrong_answers)
        check_vocabulary(pairs, parts.architecture.vocabulary)
        if source.data is not None:
            check_vocabulary(source.data, parts.architecture.vocabulary)
        check_source(source, parts.sites.graph, parts.architecture.d_model)
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
        if self._parts.device.type == "cuda":
            torch.cuda.empty_cache()

    def is_out_of_memory(self, error: Exception) -> bool:
        # On a CPU the allocator says so by a RuntimeError like any other.
        return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)

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
    def activations(
        self, mask: Float[ndarray, "readers writers"] | None = None, *, source: WriterValues | None = None
    ) -> TorchWriterValues:
        checked = None if mask is None else self._masks(mask)
        values: list[Tensor] = []
        places: dict[int, tuple[int, int]] = {}
        with self._parts.modes.undisturbed():
            for number, batch in enumerate(self.batches):
                values.append(batch.values(checked, self._source_run(number, source)))
                places |= {int(prompt): (number, row) for row, prompt in enumerate(batch.index)}
                self._done(number)
        return TorchWriterValues(tuple(values), tuple(places[i] for i in range(self.n_prompts)))

    @with_room
    def source_values(self) -> TorchWriterValues:
        live, said = self.activations(), []
        with self._parts.modes.undisturbed():
            for number, values in enumerate(live.batches):
                said.append(self._source_run(number, None).values.expand_as(values))
                self._done(number)
        return TorchWriterValues(tuple(said), live.places)

    @with_room
    def evaluate(
        self, masks: Float[ndarray, "lanes readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "lanes prompts"]:
        checked = self._masks(masks, 1)
        out = np.empty((len(checked), self.n_prompts))
        with self._parts.modes.undisturbed():
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
        checked = self._masks(mask)
        check_gradient(self._metric, checked, self.graph, mix, rule)
        self._parts.budget.check_answer("scores by prompt, reader and writer", self.n_prompts, *checked.shape)
        mixes = [float(one) for one in np.ravel(mix)]
        out = np.empty((self.n_prompts, *checked.shape))
        with self._parts.modes.undisturbed(), wide_products(self._parts.model):
            for number, batch in enumerate(self.batches):
                out[batch.index] = batch.gradient(checked, self._source_run(number, source), mixes, rule)
                self._done(number)
        check_scores(out, self._parts.like.dtype)
        return out

    @with_room
    def source_gradient(
        self, mask: Float[ndarray, "readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "prompts writers d_model"]:
        checked = self._masks(mask)
        check_differentiable(self._metric)
        out = np.empty((self.n_prompts, len(self.graph.writers), self._parts.architecture.d_model))
        with self._parts.modes.undisturbed(), wide_products(self._parts.model):
            for number, batch in enumerate(self.batches):
                out[batch.index] = batch.source_gradient(checked, self._source_run(number, source))
                self._done(number)
        check_scores(out, self._parts.like.dtype)
        return out

    def reversed(self) -> TorchEngine:
        check_reversible(self._source)
        return TorchEngine(self._parts, self._pairs, self._metric, self._source, is_reversed=not self._is_reversed)

    def logits(self, mask: Float[ndarray, "readers writers"]) -> Iterator[tuple[Batch, Tensor]]:
        """All logits under a mask, `[prompts, position, vocabulary]`, batch by batch."""
        checked = self._masks(mask)
        for number, batch in enumerate(self.batches):
            with self._parts.modes.undisturbed():
                yield batch, batch.logits(checked, self._source_run(number, None))

    def _masks(self, masks: Float[ndarray, ...], *lanes: int) -> Float[ndarray, ...]:
        checked = checked_mask(masks, (*lanes, *self.graph.shape), self.spans)
        return checked.astype(np.float64 if self._parts.like.dtype == torch.float64 else np.float32)

    def _source_run(self, number: int, override: WriterValues | None) -> SourceRun:
        batch = self.batches[number]
        if override is not None:
            return batch.source_run(self._own_values(override, number))
        if number not in self._sources:
            self._sources[number] = self._own_source(batch)
        return self._sources[number]

    def _own_values(self, values: WriterValues, number: int) -> Tensor:
        """Somebody's writer values for one of our batches."""
        batch = self.batches[number]
        check_source_values(values, self.n_prompts)
        if isinstance(values, TorchWriterValues) and len(values.batches) == len(self.batches):
            if all(values.places[int(i)] == (number, row) for row, i in enumerate(batch.index)):
                return values.batches[number]
        stacked = np.stack([values[int(i)] for i in batch.index], axis=1)
        return torch.from_numpy(stacked).to(self._parts.like)

    def _own_source(self, batch: Batch) -> SourceRun:
        return batch.other_run() if self._source.kind == "corrupted" else batch.source_run(self._constants(batch))

    def _constants(self, batch: Batch) -> Tensor:
        """What each writer says in a source that knows no other prompts."""
        if self._source.kind == "zero":
            d_model = self._parts.architecture.d_model
            return self._parts.like.new_zeros(len(self.graph.writers), 1, 1, d_model)
        if self._source.constants is not None:
            return torch.from_numpy(self._source.constants.copy()).to(self._parts.like)[:, None, None]
        length = batch.live_ids.shape[1]
        return self._mean(length if self._source.kind == "mean-per-position" else None)

    def _mean(self, length: int | None) -> Tensor:
        """Mean writer values over the reference prompts: per position over those of this length, or over everything."""
        total, count, like = None, 0, self._parts.like
        wide = torch.promote_types(like.dtype, torch.float32)  # a sum is more than half precision holds
        for bucket in (self._source.data or self._pairs).buckets():
            if length is not None and bucket.clean.shape[1] != length:
                continue
            for part in bucket.cut(self._prompts_per_batch(bucket)):
                ids = part.clean if self._source.data is not None or self._is_reversed else part.corrupted
                values = Batch(self._parts, part, self._metric, ids, ids).live.values
                summed = values.sum(1 if length is not None else (1, 2), keepdim=True, dtype=wide)
                total = summed if total is None else total + summed
                count += values.shape[1] * (1 if length is not None else values.shape[2])
        if total is None:
            raise no_prompt_to_average(length)
        return (total / count).to(like)

    @property
    def _bytes_per_token(self) -> int:
        return len(self.graph.writers) * self._parts.architecture.d_model * self._parts.like.element_size()

    def _prompts_per_batch(self, bucket: Bucket) -> int:
        fitting: int = max(1, self._parts.budget.batch // (self._bytes_per_token * bucket.clean.shape[1]))
        return min(fitting, self._parts.largest or fitting)

    def _done(self, number: int) -> None:
        if not self._keeps_runs:
            self.batches[number].forget()
            self._sources.pop(number, None)
