"""`ReferenceEngine`: the queries of the protocol in numpy, float64, straight from the equation

    x_r = const_r + sum over visible writers w of  m[r, w] * live_w + (1 - m[r, w]) * source_w

One reader at a time, the whole model for every mask. The oracle for every other engine; slow on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
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
    no_prompt_to_average,
)
from circuitgraph._graph import Graph
from circuitgraph._metrics import Metric, Target, log_softmax
from circuitgraph._names import HeadInput, Reader, ReaderKind, Writer
from circuitgraph._pairs import PromptPairs
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceAttention, ReferenceLayer
from circuitgraph.testing._reference_rules import LIVE, Memory, copies

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    Mask = Float[ndarray, "readers writers"] | Float[ndarray, "readers writers spans"]
    Masks = Float[ndarray, "copies readers writers"] | Float[ndarray, "copies readers writers spans"]  # one for each prompt, or one for all
    Tokens = Int[ndarray, "prompts position"]
    Stream = Float[ndarray, "prompts position d_model"]
    Values = Float[ndarray, "prompts writers position d_model"]
    Nudge = Mapping[Reader | Writer, Stream]  # what is added to the input of a reader, or to what a head says before a post-norm

NOTHING: Nudge = {}
STEP = 1e-5  # of central differences, in units of the nudge
_LANE_NUMBERS = 1 << 19  # what writers say in the lanes that are run together, in numbers: two megabytes


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
        many, n = batch.times(len(masks)), len(batch.index)
        run = self._run(many, np.repeat(masks, n, axis=0), copies(source, len(masks)))
        values: Float[ndarray, " prompts"] = self.metric(run.logits, many.target)
        return values.reshape(len(masks), n)

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
            for one_mix in np.atleast_1d(mix):
                slopes = _Slopes(self, batch, mask, source_values, float(one_mix), rule)
                for r in range(len(self.graph.readers)):
                    seen = np.flatnonzero(self.graph.visible[r])
                    nudges = np.stack([there * direction[:, w] for w in seen for there in self._places(batch, mask)])
                    found = np.moveaxis(slopes.of_edges(r, nudges), 0, -1).reshape(len(batch.index), len(seen), *mask.shape[2:])
                    out[batch.index[:, None], r, seen] += found / np.size(mix)
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

    def of_edges(self, r: int, directions: Float[ndarray, "edges prompts position d_model"]) -> Float[ndarray, "edges prompts"]:
        """Along edges into one reader; a direction is `live_w - source_w` at the positions in question."""
        reader = self.engine.graph.readers[r]
        if self.rule.patterns == "recomputed" and reader.kind in ("q", "k"):
            if reader.layer == self.rule.dropped_layer:
                return np.zeros(directions.shape[:2])
            patched = [dict(self._patched(reader, direction)) for direction in directions]
            return -self._along({head: np.stack([change[head] for change in patched]) for head in patched[0]}, len(directions))
        return self._along({reader: directions}, len(directions))

    def _along(self, nudge: Nudge, n: int) -> Float[ndarray, "nudges prompts"]:
        """Along `n` nudges, each on its own copy of the prompts."""
        batch, source = self.batch.times(n), copies(self.source, n)
        up, down = (
            self.engine._run(
                batch,
                self.mask[None],
                source,
                self.mix,
                {end: step * np.concatenate(by) for end, by in nudge.items()},
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


@dataclass
class Run:
    """A run under a mask, while it is being computed and after."""

    graph: Graph
    mask: Masks
    source: Values
    values: Values
    constant: Stream  # what has been added to the stream so far by nobody: output biases
    spans: Tokens | None  # of a mask with spans, which one every position is in
    nudge: Nudge
    memory: Memory
    heard: dict[Reader, Stream] = field(default_factory=dict)
    logits: Float[ndarray, "prompts vocabulary"] | None = None

    def read(self, kind: ReaderKind, layer: int = -1, index: int = -1) -> Stream:
        """The input of a reader, or of a head's reader: the equation at the top of this file."""
        r = self.graph.reader_id(Reader(kind, layer, index))
        is_seen = np.trim_zeros(self.graph.visible[r], "b")  # writers are sorted: those that a reader sees come first
        m = self._coefficients(r, len(is_seen))
        x = _weighted(m * is_seen[:, None], self.values)
        x += _weighted((1 - m) * is_seen[:, None], self.source)
        x += self.constant
        x += self.nudge.get(self.graph.readers[r], 0.0)
        is_dropped = kind != "logits" and layer == self.memory.rule.dropped_layer
        heard: Stream = self.memory.held(is_dropped, x)
        self.heard[Reader(kind, layer, index)] = heard
        return heard

    def _coefficients(self, r: int, n: int) -> Float[ndarray, "copies some position"]:
        """Of the first writers; of every prompt, or one for all; of every position, or one for all."""
        of_edges = self.mask[:, r, :n]
        if self.spans is None:
            return of_edges[..., None]
        where = np.broadcast_to(self.spans[:, None], (len(self.spans), n, self.spans.shape[1]))
        return np.take_along_axis(np.broadcast_to(of_edges, (len(where), *of_edges.shape[1:])), where, axis=2)

    def write(self, writer: Writer, value: Stream) -> None:
        self.values[:, self.graph.writer_id(writer)] = value


def masked_run(
    model: ReferenceModel,
    graph: Graph,
    said: Values,
    mask: Masks,
    source: Values,
    *,
    spans: Tokens | None = None,
    nudge: Nudge = NOTHING,
    memory: Memory = LIVE,
) -> Run:
    """Run the model under a mask, or one for every prompt; `said` is what its inputs say."""
    run = Run(graph, mask, source, np.zeros_like(source), np.zeros_like(said[:, 0]), spans, nudge, memory)
    run.values[:, : said.shape[1]] = said
    for number, layer in enumerate(model.layers):
        _run_layer(run, number, layer)
    run.logits = model.unembed(run.read("logits")[:, -1], memory)
    return run


def _run_layer(run: Run, number: int, layer: ReferenceLayer) -> None:
    constant = run.constant
    if layer.attention is not None:
        constant = run.constant + _run_attention(run, number, layer.attention)
    if not layer.is_parallel:
        run.constant = constant
    if layer.mlp is not None:
        run.write(Writer("mlp", number), layer.mlp(run.read("mlp", number), run.memory))
    run.constant = constant


def _run_attention(run: Run, number: int, attention: ReferenceAttention) -> Stream:
    """Runs the heads; what the attention adds to the stream that is no head's."""
    names = [Writer("head", number, h) for h in range(attention.n_heads)]
    heads = [
        attention.head(h, *(run.read(kind, number, h) for kind in get_args(HeadInput)), memory=run.memory) + run.nudge.get(name, 0.0)
        for h, name in enumerate(names)
    ]
    parts, rest = attention.parts(heads, run.memory)
    for name, part in zip(names, parts, strict=True):
        run.write(name, part)
    return rest


def _weighted(m: Float[ndarray, "copies some position"], said: Values) -> Stream:
    """The sum over the first writers of `m` times what they say."""
    some = said[:, : m.shape[1]]
    if m.shape[2] > 1:
        by_position: Stream = (m[..., None] * some).sum(axis=1)
        return by_position
    vectors = some.reshape(*some.shape[:2], math.prod(some.shape[2:]))
    weighted: Stream = (m.swapaxes(1, 2) @ vectors).reshape(len(some), *some.shape[2:])
    return weighted


def source_values(model: ReferenceModel, graph: Graph, pairs: PromptPairs, source: Source) -> ReferenceValues:
    """What patched writers say, for each prompt."""
    corrupted = _plain_values(model, graph, pairs.corrupted)
    if source.kind == "corrupted":
        return ReferenceValues(tuple(corrupted))
    if source.kind == "zero":
        return ReferenceValues(tuple(np.zeros_like(values) for values in corrupted))
    if source.constants is not None:
        return ReferenceValues(tuple(np.broadcast_to(source.constants[:, None], values.shape).copy() for values in corrupted))
    pool = corrupted if source.data is None else _plain_values(model, graph, source.data.clean)
    if source.kind == "mean":
        mean = np.concatenate(pool, axis=1).mean(axis=1, keepdims=True)
        return ReferenceValues(tuple(np.broadcast_to(mean, values.shape).copy() for values in corrupted))
    return ReferenceValues(tuple(_mean_of_length(pool, values.shape[1]) for values in corrupted))


def _plain_values(model: ReferenceModel, graph: Graph, prompts: Any) -> list[Float[ndarray, "writers position d_model"]]:
    return [values for tokens in prompts for values in _plain_run(model, graph, tokens[None])]


def _plain_run(model: ReferenceModel, graph: Graph, tokens: Tokens) -> Iterator[Float[ndarray, "writers position d_model"]]:
    said = model.inputs(tokens)
    nothing = np.zeros((len(tokens), len(graph.writers), *said.shape[2:]))
    yield from masked_run(model, graph, said, np.ones((1, *graph.shape)), nothing).values


def _mean_of_length(pool: list[Any], length: int) -> Float[ndarray, "writers position d_model"]:
    same = [values for values in pool if values.shape[1] == length]
    if not same:
        raise no_prompt_to_average(length)
    mean: Float[ndarray, "writers position d_model"] = np.mean(same, axis=0)
    return mean
