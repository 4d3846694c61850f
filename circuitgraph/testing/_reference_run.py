"""One run of the reference under a mask, straight from the equation, and what the writers say in the source run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from circuitgraph._engine import Source, no_prompt_to_average
from circuitgraph._graph import Graph
from circuitgraph._names import HeadInput, Reader, ReaderKind, Writer
from circuitgraph._pairs import PromptPairs
from circuitgraph._refinement import Refinement, of_component
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceAttention, ReferenceLayer, ReferenceMLP
from circuitgraph.testing._reference_refined import attention_parts, mlp_parts, stream_parts
from circuitgraph.testing._reference_rules import LIVE, Memory, copies

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from circuitgraph.testing._reference_refined import Active

    Masks = Float[ndarray, "copies readers writers"] | Float[ndarray, "copies readers writers spans"]  # one for each prompt, or one for all
    Tokens = Int[ndarray, "prompts position"]
    Stream = Float[ndarray, "prompts position d_model"]
    Values = Float[ndarray, "prompts writers position d_model"]
    # What is added, in some rows of the prompts, to the input of a reader, or to what a head says before a post-norm.
    Nudge = Mapping[Reader | Writer, Sequence[tuple[slice, Stream]]]

NOTHING: Nudge = {}


@dataclass(frozen=True, eq=False)
class ReferenceValues:
    """What every writer says, one array per prompt."""

    prompts: tuple[Float[ndarray, "writers position d_model"], ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, prompt: int) -> Float[ndarray, "writers position d_model"]:
        return self.prompts[prompt]


@dataclass
class Run:
    """A run under a mask, while it is being computed and after."""

    graph: Graph
    mask: Masks
    source: Values  # of all copies of the prompts, or once for all
    values: Values
    constant: Stream  # what has been added to the stream so far by nobody: output biases
    spans: Tokens | None  # of a mask with spans, which one every position is in
    nudge: Nudge
    memory: Memory
    heard: dict[Reader, Stream] = field(default_factory=dict)
    active: dict[int, Active] = field(default_factory=dict)  # a transcoder's features, by layer
    logits: Float[ndarray, "prompts vocabulary"] | None = None

    def read(self, kind: ReaderKind, layer: int = -1, index: int = -1) -> Stream:
        """The input of a reader, or of a head's reader: the equation at the top of this file."""
        r = self.graph.reader_id(Reader(kind, layer, index))
        n = 1 + max(np.flatnonzero(self.graph.visible[r]).tolist(), default=-1)  # writers are sorted: those that a reader sees come first
        is_seen, m = self.graph.visible[r, :n, None], self._coefficients(r, n)
        x = _weighted(m * is_seen, self.values)
        patched = np.flatnonzero(np.broadcast_to((m != 1).any(axis=(1, 2)), len(x)))  # few, where every run patches one edge
        x[patched] += _weighted((1 - m if len(m) == 1 else 1 - m[patched]) * is_seen, self.source[patched % len(self.source)])
        x += self.constant
        x = self.nudged(self.graph.readers[r], x)
        is_dropped = kind != "logits" and layer == self.memory.rule.dropped_layer
        heard: Stream = self.memory.held(is_dropped, x)
        self.heard[Reader(kind, layer, index)] = heard
        return heard

    def nudged(self, end: Reader | Writer, x: Stream) -> Stream:
        """In place."""
        for rows, by in self.nudge.get(end, ()):
            x[rows] += by
        return x

    def _coefficients(self, r: int, n: int) -> Float[ndarray, "copies some position"]:
        """Of the first writers; of every prompt, or one for all; of every position, or one for all."""
        of_edges = self.mask[:, r, :n]
        if self.spans is None:
            return of_edges[..., None]
        where = np.broadcast_to(self.spans[:, None], (len(self.spans), n, self.spans.shape[1]))
        return np.take_along_axis(np.broadcast_to(of_edges, (len(where), *of_edges.shape[1:])), where, axis=2)

    def write(self, writer: Writer, value: Stream) -> None:
        self.values[:, self.graph.writer_id(writer)] = value

    def write_parts(self, refinement: Refinement, divided: tuple[list[Stream], Stream | float]) -> Stream:
        """What the parts of a component say; the constant beside them, at every position."""
        parts, constant = divided
        for writer, part in zip(refinement.parts.writers(refinement.component), parts, strict=True):
            self.write(writer, part)
        everywhere: Stream = np.zeros_like(self.constant) + constant
        return everywhere


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
    return _run_from(run, model, 0)


def masked_runs(
    model: ReferenceModel, graph: Graph, said: Values, masks: Masks, source: Values, *, spans: Tokens | None = None
) -> Float[ndarray, "masks prompts vocabulary"]:
    """The logits of the prompts under each of some masks. Layers before the first in which the masks differ are run once."""
    differs = (masks != masks[0]).reshape(*masks.shape[:2], -1).any(axis=(0, 2))
    n_layers, n = len(model.layers), len(masks)
    first = min((reader.layer for reader, d in zip(graph.readers, differs, strict=True) if d and reader.kind != "logits"), default=n_layers)
    run = Run(graph, masks[:1], source, np.zeros_like(source), np.zeros_like(said[:, 0]), spans, NOTHING, LIVE)
    run.values[:, : said.shape[1]] = said
    for number in range(first):
        _run_layer(run, number, model.layers[number], model.refinements)
    of_all = replace(
        run,
        mask=np.repeat(masks, len(said), axis=0),
        values=copies(run.values, n),
        constant=copies(run.constant, n),
        spans=None if spans is None else copies(spans, n),
    )
    logits = _run_from(of_all, model, first).logits
    assert logits is not None
    return logits.reshape(n, len(said), -1)


def _run_from(run: Run, model: ReferenceModel, first: int) -> Run:
    """The layers from this one on, and the logits."""
    for number in range(first, len(model.layers)):
        _run_layer(run, number, model.layers[number], model.refinements)
    _split_stream(run, len(model.layers), model.refinements)
    run.logits = model.unembed(run.read("logits")[:, -1], run.memory)
    return run


def _run_layer(run: Run, number: int, layer: ReferenceLayer, refinements: Sequence[Refinement]) -> None:
    _split_stream(run, number, refinements)
    constant = run.constant
    if layer.attention is not None:
        constant = run.constant + _run_attention(run, number, layer.attention, of_component(refinements, "a", number))
    if not layer.is_parallel:
        run.constant = constant
    if layer.mlp is not None:
        constant = constant + _run_mlp(run, number, layer.mlp, of_component(refinements, "m", number))
    run.constant = constant


def _run_attention(run: Run, number: int, attention: ReferenceAttention, refinement: Refinement | None) -> Stream:
    """Runs the heads; what the attention adds to the stream that is no writer's."""
    names = [Writer("head", number, h) for h in range(attention.n_heads)]
    mixed = [
        attention.mixed(h, *(run.read(kind, number, h) for kind in get_args(HeadInput)), memory=run.memory)
        for h in range(attention.n_heads)
    ]
    heads = [run.nudged(name, z @ attention.o[h].T) for h, (z, name) in enumerate(zip(mixed, names, strict=True))]
    parts, rest = attention.parts(heads, run.memory)
    if refinement is not None:
        return run.write_parts(refinement, attention_parts(refinement, attention, np.concatenate(mixed, axis=-1), sum(parts, rest)))
    for name, part in zip(names, parts, strict=True):
        run.write(name, part)
    return rest


def _run_mlp(run: Run, number: int, mlp: ReferenceMLP, refinement: Refinement | None) -> Stream | float:
    """Runs the MLP; what it adds to the stream that is no writer's."""
    x = run.read("mlp", number)
    if refinement is None:
        run.write(Writer("mlp", number), mlp(x, run.memory))
        return 0.0
    own = [run.read("feature", number, feature) for feature in refinement.features] if refinement.parts.has_readers else []
    return run.write_parts(refinement, mlp_parts(refinement, mlp, x, own, run.memory, run.active))


def _split_stream(run: Run, number: int, refinements: Sequence[Refinement]) -> None:
    """Where the stream before a layer is refined: its parts take the place of all that was said before."""
    refinement = of_component(refinements, "r", number)
    if refinement is not None:
        run.constant = run.write_parts(refinement, stream_parts(refinement, run.read("stream", number)))


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
    """Prompts of one length are run together."""
    lengths, found = np.array([len(tokens) for tokens in prompts]), [np.empty(0)] * len(prompts)
    for length in np.unique(lengths):
        index = np.flatnonzero(lengths == length)
        for i, values in zip(index, _plain_run(model, graph, np.stack([prompts[i] for i in index])), strict=True):
            found[i] = values
    return found


def _plain_run(model: ReferenceModel, graph: Graph, tokens: Tokens) -> Values:
    said = model.inputs(tokens)
    nothing = np.zeros((len(tokens), len(graph.writers), *said.shape[2:]))
    return masked_run(model, graph, said, np.ones((1, *graph.shape)), nothing).values


def _mean_of_length(pool: list[Any], length: int) -> Float[ndarray, "writers position d_model"]:
    same = [values for values in pool if values.shape[1] == length]
    if not same:
        raise no_prompt_to_average(length)
    mean: Float[ndarray, "writers position d_model"] = np.mean(same, axis=0)
    return mean
