"""The protocol of a run that is linear but for MLPs, what can be asked of it, and what every backend refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from circuitgraph._dictionary import Dictionary
from circuitgraph._engine import Rule
from circuitgraph._errors import CircuitGraphError
from circuitgraph._pairs import PromptPairs, check_vocabulary
from circuitgraph._refinement import Refinement

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

HELD = Rule(norms="frozen", patterns="frozen")


@dataclass(frozen=True)
class FeatureTarget:
    """A transcoder's feature, before its activation, at one position."""

    layer: int
    feature: int
    position: int


@dataclass(frozen=True)
class LogitTarget:
    """A token's logit at the last position, less the mean of all logits; to first order where logits are soft-capped."""

    token: int


class LinearRun(Protocol):
    """A model's own run on one prompt, with attention patterns, the scales of norms and what MLPs say held as they are."""

    @property
    def said(self) -> Float[ndarray, "writers position d_model"]:
        """What every writer says."""
        ...

    @property
    def logits(self) -> Float[ndarray, " vocabulary"]:
        """After the last token."""
        ...

    def features(self, layer: int) -> Float[ndarray, "position features"]:
        """The activations of the features that are nodes of this layer's MLP, in the graph's order."""
        ...

    def attributions(self, targets: Sequence[FeatureTarget | LogitTarget]) -> Float[ndarray, "targets writers position"]:
        """What each writer (the input, an MLP or a part of one) adds to a target by what it says at each position, through the values of
        any attention and any skip in between, which have no entry of their own. The sum, and what constants add, is the target.
        Raises `CircuitGraphError` for a target that is not there."""
        ...


@dataclass(frozen=True, eq=False)
class LinearPrompt:
    """One prompt of a model that a linear run can follow: `transcoders` are those of the MLPs that are in parts, by layer."""

    pairs: PromptPairs
    transcoders: Mapping[int, Refinement]
    vocabulary: int

    @classmethod
    def of(cls, tokens: Sequence[int] | Int[ndarray, " position"], refinements: Sequence[Refinement], vocabulary: int) -> LinearPrompt:
        """Raises `TaskError` for tokens that are none, `CircuitGraphError` for parts that are no transcoder's (attention must be whole, and
        what an SAE of an MLP's output makes of it is not linear in what the MLP hears), or a transcoder with a norm of its own."""
        ids = np.asarray(tokens, dtype=np.int64)
        pairs = PromptPairs([ids], [(ids + 1) % vocabulary], [0])
        check_vocabulary(pairs, vocabulary)
        for refinement in refinements:
            _check_followed(refinement)
        return cls(pairs, {one.component.layer: one for one in refinements}, vocabulary)

    @property
    def tokens(self) -> Int[ndarray, " position"]:
        return self.pairs.clean[0]

    def features(self, layer: int) -> tuple[int, ...]:
        """Those that are nodes of a layer's MLP. Raises `CircuitGraphError` for one that no transcoder divides."""
        return self._refinement(layer).features

    def dictionary(self, layer: int) -> Dictionary:
        """Raises `CircuitGraphError` as `features` does."""
        dictionary = self._refinement(layer).dictionary
        assert isinstance(dictionary, Dictionary)  # neurons are no transcoder
        return dictionary

    def check_targets(self, targets: Sequence[FeatureTarget | LogitTarget]) -> None:
        """Raises `CircuitGraphError` for a layer, a feature, a position or a token that is not there."""
        for target in targets:
            if isinstance(target, LogitTarget):
                if not 0 <= target.token < self.vocabulary:
                    raise CircuitGraphError(f"{target}: the model has {self.vocabulary:,} tokens, from 0")
                continue
            self.dictionary(target.layer).parts([target.feature])
            if not 0 <= target.position < len(self.tokens):
                raise CircuitGraphError(f"{target}: the prompt has {len(self.tokens)} positions, from 0")

    def _refinement(self, layer: int) -> Refinement:
        if layer not in self.transcoders:
            raise CircuitGraphError(f"m{layer} has no features that read the stream by themselves; refine it with a transcoder")
        return self.transcoders[layer]


def _check_followed(refinement: Refinement) -> None:
    dictionary = refinement.dictionary
    if not dictionary.is_transcoder:
        raise CircuitGraphError(
            f"a linear run needs MLPs in parts by transcoders, and all else whole; {refinement.component} is in parts by "
            f"{dictionary.name}, which reads {dictionary.reads}"
        )
    assert isinstance(dictionary, Dictionary)  # neurons are no transcoder
    if dictionary.input_norm is not None:
        raise CircuitGraphError(f"{dictionary.name}: a linear run cannot hold the scale of its own input norm")
