"""`Refinement`: a component, the dictionary that divides it, and which of its features become nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._dictionary import Dictionary, Neurons
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph, Parts
from circuitgraph._memory import MemoryBudget
from circuitgraph._names import Component

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


@dataclass(frozen=True)
class Fold:
    """What of a dictionary's features is part of the error, because it was not chosen: `active` of them were active on the prompts,
    `chosen` became nodes, and the others' `share` of the sum of squares of what all say."""

    active: int
    chosen: int
    share: float

    def __str__(self) -> str:
        return (
            f"{self.chosen:,} of {self.active:,} active features are nodes; the others, {self.share:.2%} of what they say, are in the error"
        )


@dataclass(frozen=True, eq=False)
class Refinement:
    """`component` by the parts that `dictionary` makes of it. `features` become writers; the rest of them is part of the error, and `fold`
    says how much that is, where prompts have told.

    A component that is divided by an output dictionary says, exactly, at every position

        sum over features of f * decoder row  +  skip, if there is one  +  error  +  constant (the decoder's bias, which is no writer's)

    `earlier`: the refinements of earlier MLPs by layers of the same cross-layer transcoder, whose features are then in that sum too; the
    traced model's `refined` finds them among those that are handed over together.

    Raises `CircuitGraphError` for a dictionary of another kind of component, or features that it does not have.
    """

    component: Component
    dictionary: Dictionary | Neurons
    features: tuple[int, ...]
    fold: Fold | None = None
    earlier: tuple[Refinement, ...] = ()

    def __post_init__(self) -> None:
        made_for = self.dictionary.component
        if made_for != self.component.kind:
            example = f"{made_for}{self.component.layer}"
            raise CircuitGraphError(
                f"refine {self.component}: {self.dictionary.name} reads {self.dictionary.reads}; it divides a component such as {example}"
            )
        object.__setattr__(self, "features", self.dictionary.parts(self.features).numbers)

    @property
    def parts(self) -> Parts:
        earlier = tuple((one.component.layer, one.features) for one in self.earlier)
        return replace(self.dictionary.parts(self.features), earlier=earlier)

    @property
    def n_later(self) -> int:
        """To how many MLPs after its own its features write."""
        return 0 if isinstance(self.dictionary, Neurons) else self.dictionary.n_later

    @property
    def is_cross_layer(self) -> bool:
        """Whether its features write to later MLPs, or those of earlier ones to this."""
        return self.n_later > 0 or len(self.earlier) > 0

    def rows_at(self, layer: int) -> Float[ndarray, "features d_model"]:
        """What its features add at activation 1 to the MLP of a later layer."""
        assert isinstance(self.dictionary, Dictionary)
        assert self.dictionary.later is not None
        of_layer = self.dictionary.later[layer - self.component.layer - 1]
        rows: Float[ndarray, "features d_model"] = np.asarray(of_layer[[*self.features]], dtype=np.float64)
        return rows

    def check_width(self, width: int, d_model: int) -> None:
        """`width`: how many numbers the dictionary's place has. Raises `CircuitGraphError` where it expects another number."""
        if isinstance(self.dictionary, Neurons):
            if beyond := [neuron for neuron in self.features if not 0 <= neuron < width]:
                raise CircuitGraphError(f"refine {self.component}: there is no neuron {beyond[0]}; the MLP has {width:,}, from 0")
            return
        d_out = width if self.dictionary.reads == "attn_z" else d_model
        got = self.dictionary.d_in, int(self.dictionary.decoder.shape[1])
        if got != (width, d_out):
            raise CircuitGraphError(
                f"refine {self.component}: {self.dictionary.name} maps {got[0]} numbers to {got[1]}, and {self.dictionary.reads} has "
                f"{width}, of which it must make {d_out}; take a dictionary that was trained on this component of this model"
            )

    def record(self) -> dict[str, Any]:
        """What identifies it, as plain values."""
        dictionary = self.dictionary
        hashed = {} if isinstance(dictionary, Neurons) else {"sha256": dictionary.sha256()}
        return {
            "component": self.component.name,
            "dictionary": dictionary.name,
            "reads": dictionary.reads,
            **hashed,
            "features": len(self.features),
            **({"also_writes_to": [f"m{self.component.layer + n}" for n in range(1, self.n_later + 1)]} if self.n_later else {}),
            **({} if self.fold is None else {"fold": dataclasses.asdict(self.fold)}),
        }


def refinements_record(refinements: Sequence[Refinement]) -> dict[str, Any]:
    """For a model's provenance; nothing where nothing is refined."""
    return {"refined": [refinement.record() for refinement in refinements]} if refinements else {}


def joined(refinements: Sequence[Refinement], before: Sequence[Refinement] = ()) -> tuple[Refinement, ...]:
    """The same, each with those whose features write to its MLP too; `before` are those of the model already.

    Raises `CircuitGraphError` where features write to an MLP that is not among them, or that another kind of dictionary divides.
    """
    for one in refinements:
        for layer in () if not one.features else range(one.component.layer + 1, one.component.layer + one.n_later + 1):
            _check_target(one, layer, of_component(refinements, "m", layer), of_component(before, "m", layer))
    by_layer = sorted(refinements, key=lambda one: one.component.layer)  # as the writers are
    return tuple(replace(one, earlier=tuple(other for other in by_layer if _writes_to(other, one))) for one in refinements)


def _writes_to(one: Refinement, later: Refinement) -> bool:
    distance = later.component.layer - one.component.layer
    return later.component.kind == "m" and 0 < distance <= one.n_later and len(one.features) > 0


def _check_target(one: Refinement, layer: int, target: Refinement | None, before: Refinement | None) -> None:
    what = f"refine {one.component}: features of {one.dictionary.name} write to m{layer} too"
    if target is None and before is not None:
        raise CircuitGraphError(f"{what}, which is in parts already; hand over all layers of a cross-layer transcoder in one call")
    if target is None:
        raise CircuitGraphError(
            f"{what}, which is not among the components to refine; hand over the later layers of the cross-layer transcoder as well, "
            f"without features if none of theirs are to be nodes"
        )
    if not target.dictionary.is_transcoder:
        raise CircuitGraphError(
            f"{what}, which {target.dictionary.name} divides by {target.dictionary.reads}; take the layer of that cross-layer transcoder"
        )


def refined(graph: Graph, refinements: Sequence[Refinement]) -> Graph:
    """A graph with all of these components replaced by their parts."""
    for refinement in sorted(refinements, key=lambda one: one.component.layer):  # readers that feed parts of later MLPs come first
        graph = graph.refine(refinement.component, refinement.parts)
    return graph


def check_size(graph: Graph, refinements: Sequence[Refinement], d_model: int, budget: MemoryBudget) -> None:
    """Raises `CircuitGraphError` for more nodes than there is memory for: a score for every edge, and what writers say at one token."""
    parts = [refinement.parts for refinement in refinements]
    n_writers = len(graph.writers) + sum(len(one.numbers) + sum(len(numbers) for _, numbers in one.earlier) for one in parts)
    n_readers = len(graph.readers) + sum(len(one.numbers) for one in parts if one.has_readers)
    budget.check_answer(
        f"refine {', '.join(one.component.name for one in refinements)}: scores by reader and writer,", n_readers, n_writers
    )
    budget.check_answer(f"refine {', '.join(one.component.name for one in refinements)}: what every writer says,", n_writers, d_model)


def of_component(refinements: Sequence[Refinement], kind: str, layer: int) -> Refinement | None:
    """The refinement of one component, if there is one."""
    return next((one for one in refinements if (one.component.kind, one.component.layer) == (kind, layer)), None)
