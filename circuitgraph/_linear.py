"""The protocol of a run that is linear but for MLPs, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


@dataclass(frozen=True)
class FeatureTarget:
    """A transcoder's feature, before its activation, at one position."""

    layer: int
    feature: int
    position: int


@dataclass(frozen=True)
class LogitTarget:
    """A token's logit at the last position, less the mean of all logits."""

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
        any attention and any skip in between, which have no entry of their own. The sum, and what constants add, is the target."""
        ...
