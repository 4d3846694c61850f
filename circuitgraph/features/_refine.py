"""`refine`: which features of a dictionary are active on a task's prompts, and the model with these as nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._dictionary import Dictionary, Neurons
from circuitgraph._engine import TracedModel
from circuitgraph._errors import CircuitGraphError, whole_number
from circuitgraph._names import Component
from circuitgraph._pairs import PromptPairs
from circuitgraph._refinement import Fold, Refinement, joined
from circuitgraph.evaluation._question import pose, warn

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    from circuitgraph._task import Task


def refine(
    model: Any,
    dictionaries: Mapping[str, Dictionary | Neurons],
    task: Task | PromptPairs | str | Path,
    *,
    top: int | None = 32,
    floor: float | None = None,
    prompts: int | None = None,
    seed: int = 0,
    backend: str = "torch",
) -> TracedModel:
    """The model with components in parts: for each of them (`m3`, `a3`, or `r3`, the stream before layer 3) the features of its dictionary.

    Only features that are active on the task's prompts, clean or corrupted, become nodes: the `top` ones by the sum of squares of what they
    say, or all whose largest activation is above `floor`, or both. The rest is part of the error, and the model's provenance says how much
    that is (`refined`, `fold`). `task`, `prompts`, `seed`, `backend` as in `discover`, which takes the result as its model.

    Of a cross-layer transcoder give all layers, or all from one on: a feature counts by what it says at all MLPs together, and a layer of
    whose features none is chosen is in parts where earlier ones write to it, else whole.
    Raises `CircuitGraphError` for a dictionary that does not fit, or that has no active feature.

    >>> refined = refine("zoo:tiny-english", {"m0": Neurons()}, "subject-verb-agreement", top=8)   # doctest: +SKIP
    """
    if top is None and floor is None:
        raise CircuitGraphError(
            "refine: give top, floor or both; a node for every feature that is ever active is more than anyone can look at"
        )
    top = None if top is None else whole_number("refine: top", top, 1)
    question = pose(model, task, prompts=prompts, seed=seed, backend=backend)
    by_component = {Component.parse(name): dictionary for name, dictionary in dictionaries.items()}
    chosen = [_chosen(question.traced, component, dictionary, question.pairs, top, floor) for component, dictionary in by_component.items()]
    crossing = _of_cross_layer(by_component)
    chosen = [_checked(one, floor) if one.component not in crossing else one for one in chosen]
    kept = [one for one in joined(chosen) if one.features or one.earlier]
    return question.traced.refined(kept if kept else [_checked(one, floor) for one in chosen])


def _of_cross_layer(dictionaries: Mapping[Component, Dictionary | Neurons]) -> set[Component]:
    """The components whose features write to later ones, and those that they write to."""
    writing = {component: d.n_later for component, d in dictionaries.items() if isinstance(d, Dictionary) and d.n_later}
    return {Component("m", component.layer + n) for component, n_later in writing.items() for n in range(n_later + 1)}


def _checked(refinement: Refinement, floor: float | None) -> Refinement:
    if not refinement.features:
        above = "" if floor is None else f" above {floor:g}"
        raise CircuitGraphError(
            f"refine {refinement.component}: no feature of {refinement.dictionary.name} is active{above} on these prompts"
        )
    return refinement


def _chosen(
    traced: TracedModel, component: Component, dictionary: Dictionary | Neurons, pairs: PromptPairs, top: int | None, floor: float | None
) -> Refinement:
    _warn_of_another_place(traced, component, dictionary)
    asked = Refinement(component, dictionary, (0,))
    traced.graph.refine(component, asked.parts)  # raises for a component that is not there
    energy, largest = _measured(traced, asked, pairs)
    if isinstance(dictionary, Neurons):
        dictionary = replace(dictionary, n_features=len(energy))
    order = np.argsort(-energy, kind="stable")
    wanted = order[: int((energy > 0).sum())]
    wanted = wanted if floor is None else wanted[largest[wanted] > floor]
    wanted = wanted[:top]
    share = 1 - float(energy[wanted].sum() / energy.sum()) if energy.any() else 0.0
    fold = Fold(int((energy > 0).sum()), len(wanted), share)
    return Refinement(component, dictionary, tuple(sorted(wanted.tolist())), fold)


def _measured(
    traced: TracedModel, asked: Refinement, pairs: PromptPairs
) -> tuple[Float[ndarray, " features"], Float[ndarray, " features"]]:
    """For every feature the sum of squares of what it says, and its largest activation. (A neuron counts by its activation alone.)"""
    dictionary, total, largest = asked.dictionary, np.zeros(1), np.full(1, -np.inf)
    for n, x in enumerate(traced.seen_by(asked, pairs)):
        if n == 0 and isinstance(dictionary, Dictionary):
            asked.check_width(x.shape[1], traced.architecture.d_model)
        f = np.abs(x) if isinstance(dictionary, Neurons) else dictionary.encode(x)
        total, largest = total + (f**2).sum(axis=0), np.maximum(largest, f.max(axis=0))
    if isinstance(dictionary, Dictionary):
        total = total * np.asarray(dictionary.loudness)
    return total, largest


def _warn_of_another_place(traced: TracedModel, component: Component, dictionary: Dictionary | Neurons) -> None:
    if dictionary.layer is not None and dictionary.layer != component.layer:
        warn(f"{dictionary.name} was trained on {component.kind}{dictionary.layer}, and is asked to divide {component}")
    if dictionary.model is not None and not _is_same_model(dictionary.model, traced.name):
        warn(f"{dictionary.name} was trained on {dictionary.model}, and the model is {traced.name}")


def _is_same_model(a: str, b: str) -> bool:
    """Whether one name is part of the other: `gpt2-small` and `openai-community/gpt2` are the same model."""
    a, b = (name.rpartition("/")[2].rpartition(":")[2].lower() for name in (a, b))
    return a in b or b in a
