"""`ReferenceEngine`: the queries of the protocol in numpy, float64, straight from the equation

    x_r = const_r + sum over visible writers w of  m[r, w] * live_w + (1 - m[r, w]) * source_w

One reader at a time, the whole model for every mask, but for first layers in which masks agree. The oracle for every other engine; slow on
purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from circuitgraph._engine import (
    EXACT,
    Rule,
    Source,
    WriterValues,
    check_differentiable,
    check_gradient,
    check_reversible,
    check_source_values,
    checked_mask,
)
from circuitgraph._graph import Graph
from circuitgraph._metrics import Metric, Target, log_softmax
from circuitgraph._names import HeadInput, Reader, Writer
from circuitgraph._pairs import PromptPairs
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_rules import LIVE, Memory, copies
from circuitgraph.testing._reference_run import NOTHING, ReferenceValues, Run, masked_run, masked_runs, source_values

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from circuitgraph.testing._reference_run import Nudge

    Mask = Float[ndarray, "readers writers"] | Float[ndarray, "readers writers spans"]
    Masks = Float[ndarray, "copies readers writers"] | Float[ndarray, "copies readers writers spans"]  # one for each prompt, or one for all
    Tokens = Int[ndarray, "prompts position"]
    Stream = Float[ndarray, "prompts position d_model"]
    Values = Float[ndarray, "prompts writers position d_model"]
    Directions = Float[ndarray, "edges prompts position d_model"]

STEP = 1e-5  # of central differences, in units of the nudge
_LANE_NUMBERS = 1 << 19  # what writers say in the lanes that are run together, in numbers: four megabytes


@dataclass(frozen=True, eq=False)
class _Batch:
    """Prompts of one length."""

    index: Int[ndarray, " prompts"]
    tokens: Tokens
    spans: Tokens
    target: Target

    def times(self, n: int) -> _Batch:
        """Each prompt `n` times: first all of them once, then all of them again."""
        target = Target(*(copies(getattr(self.target, part.name), n) for part in fields(Target)))
        return _Batch(copies(self.index, n), copies(self.tokens, n), copies(self.spans, n), target)


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

    @property
    def spans(self) -> tuple[str, ...]:
        return self.pairs.span_names

    def activations(self, mask: Mask | None = None, *, source: WriterValues | None = None) -> ReferenceValues:
        chosen = np.ones(self.graph.shape) if mask is None else checked_mask(mask, self.graph.shape, self.spans).astype(float)
        return self._collect(lambda batch: self._run(batch, chosen[None], self._source_of(batch, source)).values)

    def source_values(self) -> ReferenceValues:
        return self._own_source

    def evaluate(
        self, masks: Float[ndarray, "lanes readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "lanes prompts"]:
        checked = checked_mask(masks, (1, *self.graph.shape), self.spans).astype(float)
        out = np.zeros((len(checked), self.n_prompts))
        for batch in self._batches:
            own = self._source_of(batch, source)
            size = max(1, _LANE_NUMBERS // own.size)
            for at in range(0, len(checked), size):
                out[at : at + size, batch.index] = self._lanes(batch, checked[at : at + size], own)
        return out

    def _lanes(self, batch: _Batch, masks: Float[ndarray, "lanes readers writers"], source: Values) -> Float[ndarray, "lanes prompts"]:
        """Each lane on its own copy of the prompts."""
        spans = batch.spans if masks.ndim == 4 else None
        logits = masked_runs(self.model, self.graph, self.model.inputs(batch.tokens), masks, source, spans=spans)
        values: Float[ndarray, " prompts"] = self.metric(np.concatenate(logits), batch.times(len(masks)).target)
        return values.reshape(len(masks), len(batch.index))

    def gradient(
        self, mask: Mask, *, source: WriterValues | None = None, mix: float | Sequence[float] = 1.0, rule: Rule = EXACT
    ) -> Float[ndarray, "prompts readers writers"]:
        """Central differences: each reader's input in the mixed run is pushed along `live_w - source_w` of the unmixed run."""
        mask = checked_mask(mask, self.graph.shape, self.spans).astype(float)
        check_gradient(self.metric, mask, self.graph, mix, rule)
        out = np.zeros((self.n_prompts, *mask.shape))
        for batch in self._batches:
            source_values = self._source_of(batch, source)
            direction = self._run(batch, mask[None], source_values).values - source_values
            edges = [np.flatnonzero(seen) for seen in self.graph.visible]
            places = self._places(batch, mask)
            nudges = [np.stack([there * direction[:, w] for w in seen for there in places]) for seen in edges]
            for one_mix in np.atleast_1d(mix):
                slopes = _Slopes(self, batch, mask, source_values, float(one_mix), rule).of_edges(nudges)
                for r, (seen, found) in enumerate(zip(edges, slopes, strict=True)):
                    by_prompt = np.moveaxis(found, 0, -1).reshape(len(batch.index), len(seen), *mask.shape[2:])
                    out[batch.index[:, None], r, seen] += by_prompt / np.size(mix)
        return out

    def _places(self, batch: _Batch, mask: Mask) -> list[Any]:
        """1 where an edge of the mask is, at all positions or at those of each span."""
        return [1.0] if mask.ndim == 2 else [np.where(batch.spans == span, 1.0, 0.0)[..., None] for span in range(len(self.spans))]

    def source_gradient(self, mask: Mask, *, source: WriterValues | None = None) -> Float[ndarray, "prompts writers d_model"]:
        """Central differences: one number of one vector at a time."""
        mask = checked_mask(mask, self.graph.shape, self.spans).astype(float)
        check_differentiable(self.metric)
        width = self.model.embedding.shape[1]
        out = np.zeros((self.n_prompts, len(self.graph.writers), width))
        for batch in self._batches:
            many, n = batch.times(width), len(batch.index)
            source_values = copies(self._source_of(batch, source), width)
            for w in range(len(self.graph.writers)):
                shift = np.zeros_like(source_values)
                shift[:, w] = STEP * np.repeat(np.eye(width), n, axis=0)[:, None]
                up, down = (self.metric(self._run(many, mask[None], source_values + s).logits, many.target) for s in (shift, -shift))
                out[batch.index, w] = ((up - down) / (2 * STEP)).reshape(width, n).T
        return out

    def reversed(self) -> ReferenceEngine:
        """Refused where there is nothing to restore."""
        check_reversible(self.source)
        pairs = replace(self.pairs, clean=self.pairs.corrupted, corrupted=self.pairs.clean)
        return replace(self, pairs=pairs, is_reversed=not self.is_reversed)

    def _run(self, batch: _Batch, mask: Masks, source: Values, mix: float = 1.0, nudge: Nudge = NOTHING, memory: Memory = LIVE) -> Run:
        said = self.model.inputs(batch.tokens)
        before = source[:, : said.shape[1]]
        said = before + mix * (said - before)
        spans = batch.spans if mask.ndim == 4 else None
        return masked_run(self.model, self.graph, said, mask, source, spans=spans, nudge=nudge, memory=memory)

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
            batches.append(_Batch(bucket.index, bucket.clean, bucket.spans, target))
        return tuple(batches)

    @cached_property
    def _own_source(self) -> ReferenceValues:
        return source_values(self.model, self.graph, self.pairs, self.source)


@dataclass(frozen=True, eq=False)
class _Slopes:
    """Derivatives of the metric in one mixed run, by a rule."""

    engine: ReferenceEngine
    batch: _Batch
    mask: Mask
    source: Values
    mix: float
    rule: Rule

    def of_edges(self, directions: Sequence[Directions]) -> Iterator[Float[ndarray, "edges prompts"]]:
        """By reader, along edges into it; a direction is `live_w - source_w` at the positions in question. Readers are run together, as
        many as there is room for."""
        first, n = 0, 0
        for r, more in enumerate(directions):
            if n > 0 and (n + len(more)) * self.source.size > _LANE_NUMBERS:
                yield from self._of_readers(range(first, r), directions)
                first, n = r, 0
            n += len(more)
        yield from self._of_readers(range(first, len(directions)), directions)

    def _of_readers(self, readers: range, directions: Sequence[Directions]) -> list[Float[ndarray, "edges prompts"]]:
        """Each nudge on its own copy of the prompts."""
        nudge: dict[Reader | Writer, list[tuple[slice, Stream]]] = {}
        ends, n_prompts = np.cumsum([0, *(len(directions[r]) for r in readers)]), len(self.batch.index)
        for r, start, end in zip(readers, ends, ends[1:], strict=False):
            for where, by in self._nudges(self.engine.graph.readers[r], directions[r]).items():
                nudge.setdefault(where, []).append((slice(start * n_prompts, end * n_prompts), np.concatenate(by)))
        return np.split(self._along(nudge, int(ends[-1])), ends[1:-1])

    def _nudges(self, reader: Reader, directions: Directions) -> Mapping[Reader | Writer, Directions]:
        """What moves with the edges into a reader: its input, or what its heads say."""
        if self.rule.patterns != "recomputed" or reader.kind not in ("q", "k"):
            return {reader: directions}
        if reader.layer == self.rule.dropped_layer:
            return {}
        patched = [dict(self._patched(reader, direction)) for direction in directions]
        return {head: -np.stack([change[head] for change in patched]) for head in patched[0]}

    def _along(self, nudge: Nudge, n: int) -> Float[ndarray, "nudges prompts"]:
        """Along nudges, on `n` copies of the prompts."""
        batch, source = self.batch.times(n), copies(self.source, n)
        up, down = (
            self.engine._run(
                batch,
                self.mask[None],
                source,
                self.mix,
                {end: [(rows, step * by) for rows, by in nudges] for end, nudges in nudge.items()},
                self._first.memory.again(n),
            )
            for step in (STEP, -STEP)
        )
        difference: Float[ndarray, " prompts"] = self.engine.metric(up.logits, batch.target) - self.engine.metric(down.logits, batch.target)
        return difference.reshape(n, -1) / (2 * STEP)

    def _patched(self, reader: Reader, direction: Stream) -> Iterator[tuple[Writer, Stream]]:
        """The heads that take their queries, or keys, from a reader, with how what each says changes where an edge alone is patched."""
        attention = self.engine.model.layers[reader.layer].attention
        assert attention is not None  # it has a reader
        changed = "qkv".index(reader.kind)
        for h in range(attention.n_heads):
            ends = [Reader(kind, reader.layer, h) for kind in get_args(HeadInput)]
            if self.engine.graph.reader_id(ends[changed]) == self.engine.graph.reader_id(reader):
                heard = [self._first.heard[end] for end in ends]
                before = attention.head(h, *heard)
                heard[changed] = heard[changed] - direction
                yield Writer("head", reader.layer, h), attention.head(h, *heard) - before

    @cached_property
    def _first(self) -> Run:
        """The mixed run itself, which writes down what the rule freezes."""
        return self.engine._run(self.batch, self.mask[None], self.source, self.mix, memory=Memory(self.rule))
