"""`ReferenceEngine`: the three queries of the protocol in numpy, float64, straight from the equation

    x_r = const_r + sum over visible writers w of  m[r, w] * live_w + (1 - m[r, w]) * source_w

One reader at a time, one writer at a time. The oracle for every other engine; slow on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._engine import (
    Source,
    WriterValues,
    check_gradient,
    check_reversible,
    check_source_values,
    checked_mask,
    no_prompt_to_average,
)
from circuitgraph._graph import Graph
from circuitgraph._metrics import Metric, Target, log_softmax
from circuitgraph._names import Reader, Writer
from circuitgraph._pairs import PromptPairs
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceLayer

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    Mask = Float[ndarray, "readers writers"]
    Tokens = Int[ndarray, "prompts position"]
    Stream = Float[ndarray, "prompts position d_model"]
    Values = Float[ndarray, "prompts writers position d_model"]
    Nudge = tuple[int, Stream]  # a reader, and what is added to its input

STEP = 1e-5  # of central differences, along live - source


@dataclass(frozen=True, eq=False)
class ReferenceValues:
    """What every writer says, one array per prompt."""

    prompts: tuple[Float[ndarray, "writers position d_model"], ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, prompt: int) -> Float[ndarray, "writers position d_model"]:
        return self.prompts[prompt]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Prompts of one length."""

    index: Int[ndarray, " prompts"]
    tokens: Tokens
    target: Target


@dataclass(frozen=True, eq=False)
class ReferenceEngine:
    """A reference model bound to prompt pairs, a metric and a source.

    `is_reversed`: clean and corrupted prompts have changed places in `pairs`; the metric still compares with the true clean run.
    """

    model: ReferenceModel
    graph: Graph
    pairs: PromptPairs
    metric: Metric
    source: Source
    is_reversed: bool = False

    @property
    def n_prompts(self) -> int:
        return len(self.pairs)

    def activations(self, mask: Mask | None = None, *, source: WriterValues | None = None) -> ReferenceValues:
        chosen = np.ones(self.graph.shape) if mask is None else checked_mask(mask, self.graph.shape).astype(float)
        return self._collect(lambda batch: self._run(batch, chosen, source).values)

    def source_values(self) -> ReferenceValues:
        return self._own_source

    def evaluate(
        self, masks: Float[ndarray, "lanes readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "lanes prompts"]:
        checked = checked_mask(masks, (1, *self.graph.shape))
        out = np.zeros((len(checked), self.n_prompts))
        for lane, mask in enumerate(checked.astype(float)):
            for batch in self._batches:
                out[lane, batch.index] = self.metric(self._run(batch, mask, source).logits, batch.target)
        return out

    def gradient(self, mask: Mask, *, source: WriterValues | None = None, mix: float = 1.0) -> Float[ndarray, "prompts readers writers"]:
        """Central differences: each reader's input in the mixed run is pushed along `live_w - source_w` of the unmixed run."""
        mask = checked_mask(mask, self.graph.shape).astype(float)
        check_gradient(self.metric, mask, self.graph, mix)
        out = np.zeros((self.n_prompts, *self.graph.shape))
        for batch in self._batches:
            direction = self._run(batch, mask, source).values - self._source_of(batch, source)
            for r, w in np.argwhere(self.graph.visible):
                up = self._run(batch, mask, source, mix, (r, STEP * direction[:, w]))
                down = self._run(batch, mask, source, mix, (r, -STEP * direction[:, w]))
                difference = self.metric(up.logits, batch.target) - self.metric(down.logits, batch.target)
                out[batch.index, r, w] = difference / (2 * STEP)
        return out

    def reversed(self) -> ReferenceEngine:
        """Refused for zero ablation, where there is nothing to restore."""
        check_reversible(self.source)
        pairs = replace(self.pairs, clean=self.pairs.corrupted, corrupted=self.pairs.clean)
        return replace(self, pairs=pairs, is_reversed=not self.is_reversed)

    def _run(self, batch: _Batch, mask: Mask, source: WriterValues | None, mix: float = 1.0, nudge: Nudge | None = None) -> Run:
        source_values = self._source_of(batch, source)
        said = source_values[:, 0] + mix * (self.model.embed(batch.tokens) - source_values[:, 0])
        return masked_run(self.model, self.graph, said, mask, source_values, nudge)

    def _source_of(self, batch: _Batch, source: WriterValues | None) -> Values:
        values = self._own_source if source is None else source
        check_source_values(values, self.n_prompts)
        return np.stack([np.asarray(values[int(i)], dtype=float) for i in batch.index])

    def _collect(self, values_of: Callable[[_Batch], Values]) -> ReferenceValues:
        prompts: dict[int, Any] = {}
        for batch in self._batches:
            prompts.update(zip(batch.index.tolist(), values_of(batch), strict=True))
        return ReferenceValues(tuple(prompts[i] for i in range(self.n_prompts)))

    @cached_property
    def _batches(self) -> tuple[_Batch, ...]:
        batches = []
        for bucket in self.pairs.buckets():
            true_clean = bucket.corrupted if self.is_reversed else bucket.clean
            target = Target(
                answers=bucket.answers.ids,
                answer_weights=bucket.answers.weights.astype(float),
                wrong_answers=bucket.wrong_answers.ids,
                wrong_weights=bucket.wrong_answers.weights.astype(float),
                clean_log_probs=log_softmax(self.model.forward(true_clean)[:, -1]),
            )
            batches.append(_Batch(bucket.index, bucket.clean, target))
        return tuple(batches)

    @cached_property
    def _own_source(self) -> ReferenceValues:
        return source_values(self.model, self.graph, self.pairs, self.source)


@dataclass
class Run:
    """A run under a mask, while it is being computed and after."""

    graph: Graph
    mask: Mask
    source: Values
    values: Values
    constant: Stream  # what has been added to the stream so far by nobody: output biases
    nudge: Nudge | None = None
    logits: Float[ndarray, "prompts vocabulary"] | None = None

    def read(self, reader: Reader) -> Stream:
        """The input of a reader: the equation at the top of this file."""
        r = self.graph.reader_id(reader)
        x = self.constant.copy()
        for w in np.flatnonzero(self.graph.visible[r]):
            x += self.mask[r, w] * self.values[:, w] + (1 - self.mask[r, w]) * self.source[:, w]
        return x if self.nudge is None or self.nudge[0] != r else x + self.nudge[1]

    def write(self, writer: Writer, value: Stream) -> None:
        self.values[:, self.graph.writer_id(writer)] = value


def masked_run(model: ReferenceModel, graph: Graph, said: Stream, mask: Mask, source: Values, nudge: Nudge | None = None) -> Run:
    """Run the model under a mask; `said` is what the input says."""
    run = Run(graph, mask, source, np.zeros_like(source), np.zeros_like(said), nudge)
    run.write(Writer("input"), said)
    for number, layer in enumerate(model.layers):
        _run_layer(run, number, layer)
    run.logits = model.unembed(run.read(Reader("logits"))[:, -1])
    return run


def _run_layer(run: Run, number: int, layer: ReferenceLayer) -> None:
    constant = run.constant
    if layer.attention is not None:
        heads = [
            layer.attention.head(h, *(run.read(Reader(kind, number, h)) for kind in ("q", "k", "v")))
            for h in range(layer.attention.n_heads)
        ]
        parts, rest = layer.attention.parts(heads)
        for h, part in enumerate(parts):
            run.write(Writer("head", number, h), part)
        constant = run.constant + rest
    if not layer.is_parallel:
        run.constant = constant
    if layer.mlp is not None:
        run.write(Writer("mlp", number), layer.mlp(run.read(Reader("mlp", number))))
    run.constant = constant


def source_values(model: ReferenceModel, graph: Graph, pairs: PromptPairs, source: Source) -> ReferenceValues:
    """What patched writers say, for each prompt."""
    corrupted = _plain_values(model, graph, pairs.corrupted)
    if source.kind == "corrupted":
        return ReferenceValues(tuple(corrupted))
    if source.kind == "zero":
        return ReferenceValues(tuple(np.zeros_like(values) for values in corrupted))
    pool = corrupted if source.data is None else _plain_values(model, graph, source.data.clean)
    if source.kind == "mean":
        mean = np.concatenate(pool, axis=1).mean(axis=1, keepdims=True)
        return ReferenceValues(tuple(np.broadcast_to(mean, values.shape).copy() for values in corrupted))
    return ReferenceValues(tuple(_mean_of_length(pool, values.shape[1]) for values in corrupted))


def _plain_values(model: ReferenceModel, graph: Graph, prompts: Any) -> list[Float[ndarray, "writers position d_model"]]:
    return [values for tokens in prompts for values in _plain_run(model, graph, tokens[None])]


def _plain_run(model: ReferenceModel, graph: Graph, tokens: Tokens) -> Iterator[Float[ndarray, "writers position d_model"]]:
    said = model.embed(tokens)
    nothing = np.zeros((len(tokens), len(graph.writers), *said.shape[1:]))
    yield from masked_run(model, graph, said, np.ones(graph.shape), nothing).values


def _mean_of_length(pool: list[Any], length: int) -> Float[ndarray, "writers position d_model"]:
    same = [values for values in pool if values.shape[1] == length]
    if not same:
        raise no_prompt_to_average(length)
    mean: Float[ndarray, "writers position d_model"] = np.mean(same, axis=0)
    return mean
