"""`Refinement`: a component, the dictionary that divides it, and which of its features become nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from circuitgraph._dictionary import Dictionary, Neurons
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph, Parts
from circuitgraph._memory import MemoryBudget
from circuitgraph._names import Component


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

    Raises `CircuitGraphError` for a dictionary of another kind of component, or features that it does not have.
    """

    component: Component
    dictionary: Dictionary | Neurons
    features: tuple[int, ...]
    fold: Fold | None = None

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
        return self.dictionary.parts(self.features)

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
            **({} if self.fold is None else {"fold": dataclasses.asdict(self.fold)}),
        }


def refinements_record(refinements: Sequence[Refinement]) -> dict[str, Any]:
    """For a model's provenance; nothing where nothing is refined."""
    return {"refined": [refinement.record() for refinement in refinements]} if refinements else {}


def refined(graph: Graph, refinements: Sequence[Refinement]) -> Graph:
    """A graph with all of these components replaced by their parts."""
    for refinement in refinements:
        graph = graph.refine(refinement.component, refinement.parts)
    return graph


def check_size(graph: Graph, refinements: Sequence[Refinement], d_model: int, budget: MemoryBudget) -> None:
    """Raises `CircuitGraphError` for more nodes than there is memory for: a score for every edge, and what writers say at one token."""
    parts = [refinement.parts for refinement in refinements]
    n_writers = len(graph.writers) + sum(len(one.numbers) for one in parts)
    n_readers = len(graph.readers) + sum(len(one.numbers) for one in parts if one.has_readers)
    budget.check_answer(
        f"refine {', '.join(one.component.name for one in refinements)}: scores by reader and writer,", n_readers, n_writers
    )
    budget.check_answer(f"refine {', '.join(one.component.name for one in refinements)}: what every writer says,", n_writers, d_model)


def of_component(refinements: Sequence[Refinement], kind: str, layer: int) -> Refinement | None:
    """The refinement of one component, if there is one."""
    return next((one for one in refinements if (one.component.kind, one.component.layer) == (kind, layer)), None)
