"""A run that is linear but for MLPs, in numpy: what each writer says at each position goes down the model by itself. The oracle for the
backends, which go up from the targets instead.

What is held is found once, in the model's own run. After that a head, a norm, a skip and the unembedding are linear maps plus constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._dictionary import Dictionary
from circuitgraph._graph import Graph
from circuitgraph._linear import HELD, FeatureTarget, LinearPrompt, LogitTarget
from circuitgraph._names import Reader, Writer
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceAttention, ReferenceMLP
from circuitgraph.testing._reference_refined import seen_by
from circuitgraph.testing._reference_rules import Memory
from circuitgraph.testing._reference_run import Run, masked_run

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    Stream = Float[ndarray, "copies position d_model"]

_SPEAKERS = ("input", "mlp", "feature", "error")  # heads and skips say nothing of their own


@dataclass(frozen=True, eq=False)
class ReferenceLinearRun:
    """One prompt of a reference model. See `circuitgraph._linear.LinearRun`."""

    model: ReferenceModel
    graph: Graph
    prompt: LinearPrompt

    @property
    def said(self) -> Float[ndarray, "writers position d_model"]:
        values: Float[ndarray, "writers position d_model"] = self._own.values[0]
        return values

    @property
    def logits(self) -> Float[ndarray, " vocabulary"]:
        assert self._own.logits is not None
        found: Float[ndarray, " vocabulary"] = self._own.logits[0]
        return found

    def features(self, layer: int) -> Float[ndarray, "position features"]:
        dictionary, chosen = self.prompt.dictionary(layer), [*self.prompt.features(layer)]
        seen = seen_by(self.model, self.prompt.transcoders[layer], self.prompt.tokens[None])
        found: Float[ndarray, "position features"] = dictionary.encode(seen, chosen)[0]
        return found

    def attributions(self, targets: Sequence[FeatureTarget | LogitTarget]) -> Float[ndarray, "targets writers position"]:
        self.prompt.check_targets(targets)
        out = np.zeros((len(targets), *self.said.shape[:2]))
        for w, writer in enumerate(self.graph.writers):
            if writer.kind in _SPEAKERS:
                heard = self._held.heard(writer, self.said[w])
                for t, target in enumerate(targets):
                    out[t, w] = self._target(heard, target)
        return out

    def _target(self, heard: _Heard, target: FeatureTarget | LogitTarget) -> Float[ndarray, " copies"]:
        """What a target is of each copy of the prompt."""
        if isinstance(target, LogitTarget):
            logits = heard.logits * self._logit_slopes
            less_mean: Float[ndarray, " copies"] = logits[:, target.token] - logits.mean(axis=1)
            return less_mean
        encoder = self.prompt.dictionary(target.layer).encoder
        before: Float[ndarray, " copies"] = heard.by_transcoders[target.layer][:, target.position] @ encoder[:, target.feature]
        return before

    @cached_property
    def _own(self) -> Run:
        """The model's own run."""
        said = self.model.inputs(self.prompt.tokens[None])
        nothing = np.zeros((1, len(self.graph.writers), *said.shape[2:]))
        return masked_run(self.model, self.graph, said, np.ones((1, *self.graph.shape)), nothing)

    @cached_property
    def _held(self) -> _HeldModel:
        return _HeldModel.of(self.model, self._own, {layer: self.prompt.dictionary(layer) for layer in self.prompt.transcoders})

    @property
    def _logit_slopes(self) -> Float[ndarray, " vocabulary"] | float:
        """Of soft-capping, which is no map of a norm or a head: its derivative at the model's own logits."""
        cap = self.model.logit_softcap
        return 1.0 if cap is None else 1 - (self.logits / cap) ** 2


class _Held:
    """What is linear in a function of the stream, with its patterns and scales as they are at one stream."""

    def __init__(self, function: Callable[[Stream, Memory], Stream], at: Stream) -> None:
        self._function, self._memory = function, Memory(HELD)
        function(at, self._memory)  # writes them down

    def __call__(self, x: Stream) -> Stream:
        without_constants: Stream = self._at(x) - self._at(np.zeros_like(x[:1]))
        return without_constants

    def _at(self, x: Stream) -> Stream:
        return self._function(x, self._memory.again(len(x)))


@dataclass(frozen=True, eq=False)
class _Heard:
    """What comes of what one writer says: copy `p` of the prompt is of what it says at position `p`."""

    by_transcoders: Mapping[int, Stream]
    logits: Float[ndarray, "copies vocabulary"]


@dataclass(frozen=True, eq=False)
class _HeldModel:
    """A model whose MLPs say nothing but what a skip makes of the stream. By layer: attentions, and what transcoders read."""

    is_parallel: Sequence[bool]
    attentions: Mapping[int, _Held]
    readers: Mapping[int, _Held]
    skips: Mapping[int, Float[ndarray, "d_model d_model"]]
    unembed: _Held

    @classmethod
    def of(cls, model: ReferenceModel, run: Run, dictionaries: Mapping[int, Dictionary]) -> _HeldModel:
        attentions, readers = {}, {}
        for number, layer in enumerate(model.layers):
            if layer.attention is not None:
                attentions[number] = _Held(_said_by(layer.attention), run.heard[Reader("q", number, 0)])
            if layer.mlp is not None and number in dictionaries:
                readers[number] = _Held(_read_by(dictionaries[number], layer.mlp), run.heard[Reader("mlp", number)])
        skips = {number: one.skip for number, one in dictionaries.items() if one.skip is not None}
        unembed = _Held(replace(model, logit_softcap=None).unembed, run.heard[Reader("logits")][:, -1:])
        return cls([layer.is_parallel for layer in model.layers], attentions, readers, skips, unembed)

    def heard(self, writer: Writer, said: Float[ndarray, "position d_model"]) -> _Heard:
        """Where a writer says this, one position at a time, and nobody else says anything."""
        alone: Stream = np.eye(len(said))[:, :, None] * said
        stream = alone if writer.kind == "input" else np.zeros_like(alone)
        by_transcoders = {}
        for number, is_parallel in enumerate(self.is_parallel):
            before = stream
            if number in self.attentions:
                stream = stream + self.attentions[number](before)
            if number in self.readers:
                by_transcoders[number] = self.readers[number](before if is_parallel else stream)
            if number in self.skips:
                stream = stream + by_transcoders[number] @ self.skips[number].T
            if writer.layer == number:
                stream = stream + alone
        return _Heard(by_transcoders, self.unembed(stream[:, -1:])[:, 0])


def _said_by(attention: ReferenceAttention) -> Callable[[Stream, Memory], Stream]:
    """All heads together."""

    def said(x: Stream, memory: Memory) -> Stream:
        parts, rest = attention.parts([attention.head(h, x, x, x, memory=memory) for h in range(attention.n_heads)], memory)
        return sum(parts, rest)

    return said


def _read_by(dictionary: Dictionary, mlp: ReferenceMLP) -> Callable[[Stream, Memory], Stream]:
    """What a transcoder reads of what the MLP hears."""
    if dictionary.reads == "mlp_stream" or mlp.norm is None:
        return lambda x, memory: x
    return mlp.norm if dictionary.reads == "mlp_in" else replace(mlp.norm, gain=np.ones_like(mlp.norm.gain))
