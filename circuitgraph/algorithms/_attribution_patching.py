"""Attribution patching of nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from circuitgraph._engine import EXACT, QK_FIX, Engine, Outcome, Rule, last_outcome
from circuitgraph._errors import CircuitGraphError, DegenerateError
from circuitgraph._graph import Graph
from circuitgraph.algorithms._eap import towards_better

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

Correction = Literal["qk-fix", "grad-drop"]


@dataclass(frozen=True)
class AttributionPatching:
    """The first-order estimate of what patching each node does, for all nodes at once (Nanda 2023).

        I[w] = s * sum over readers r of dF/dm[r, w] at m = 1,    score[w] = mean over prompts of I[w]

    with `s` 1 for a metric where higher is better and -1 where lower is. So a positive score supports the behaviour, and the scores
    estimate those of `ActivationPatching(level="node", direction="noising")`. As there, a writer's score stands on each of its outgoing
    edges, and `record["nodes"]` has it by the writer's name. (For edges, the same estimate is EAP.)

    `corrections`: AtP* (Kramar et al. 2024, arXiv:2403.00745) is `("qk-fix", "grad-drop")`.

    - "qk-fix": what goes through a query or a key is taken from the attention recomputed with that one edge patched, and is linear only
      after that. A saturated softmax has no gradient to speak of; the patched one may be quite different.
    - "grad-drop": a direct and an indirect effect that cancel to first order need not do so in truth. So nothing goes back through one
      layer at a time, and `|I|` is averaged over the layers dropped, a writer's own left out:

          score[w] = sign * mean over prompts of  1 / (L - 1) * sum over layers l other than w's of |I without layer l|[w]

      Dropping a node's own layer is dropping the node, which is why the paper divides by L - 1; the input has no layer, so its mean is
      over all L. The paper's value has no sign. Here it takes that of the plain estimate (positive where that is 0), and there are no
      scores per prompt: of absolute values they would say nothing about agreement.

    Cost: one forward pass of the source, one forward and one backward of the clean prompts; with "grad-drop" one more forward and backward
    per layer; "qk-fix" adds to each the attention of one head for every edge into its query or key. Raises `DegenerateError` for a metric
    whose gradient vanishes at the clean run (KL divergence) or that has none (accuracy), and for "grad-drop" in a model of one layer.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> list(AttributionPatching(corrections=("qk-fix",)).run(engine).record["nodes"])
    ['input', 'a0.h0', 'a0.h1', 'm0']
    """

    corrections: tuple[Correction, ...] = ()

    def __post_init__(self) -> None:
        known = get_args(Correction)
        given = self.corrections
        if not isinstance(given, tuple) or any(one not in known for one in given) or len(set(given)) < len(given):
            raise CircuitGraphError(
                f"attribution patching: corrections are {given!r}; expected a tuple of {' and '.join(map(repr, known))}"
            )

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """An outcome after every gradient; the last one has the scores."""
        visible = engine.graph.visible
        rule = QK_FIX if "qk-fix" in self.corrections else EXACT
        dropped = _dropped(engine.graph) if "grad-drop" in self.corrections else {}
        effects = _effects(engine, rule)
        nodes = effects.mean(axis=0)
        if not dropped:
            yield _outcome(engine.graph, nodes, np.where(visible, effects[:, None, :], 0.0).astype(np.float32))
            return
        sizes = np.zeros_like(effects)
        for number, (layer, is_other) in enumerate(dropped.items(), start=1):
            yield Outcome(visible.copy(), done=number / (len(dropped) + 1))
            sizes += is_other * np.abs(_effects(engine, replace(rule, dropped_layer=layer)))
        sizes /= np.sum([*dropped.values()], axis=0)
        yield _outcome(engine.graph, np.where(nodes < 0, -1, 1) * sizes.mean(axis=0), None)


def _effects(engine: Engine, rule: Rule) -> Float[ndarray, "prompts writers"]:
    """Of patching every node on every prompt, to first order."""
    visible = engine.graph.visible
    gradient = np.asarray(engine.gradient(visible.astype(np.float32), rule=rule))
    effects: Float[ndarray, "prompts writers"] = towards_better(engine) * np.where(visible, gradient, 0.0).sum(axis=1, dtype=np.float64)
    return effects


def _dropped(graph: Graph) -> dict[int, Bool[ndarray, " writers"]]:
    """The layers to drop, each with the writers that are not its own."""
    layers = sorted({reader.layer for reader in graph.readers if reader.kind != "logits"})
    if len(layers) < 2:
        raise DegenerateError(f"grad-drop leaves out one layer at a time, and the model has {len(layers)}; use it with two or more")
    return {layer: np.array([writer.layer != layer for writer in graph.writers]) for layer in layers}


def _outcome(graph: Graph, nodes: Float[ndarray, " writers"], prompt_scores: Float[ndarray, "prompts readers writers"] | None) -> Outcome:
    record = {"nodes": {writer.name: float(score) for writer, score in zip(graph.writers, nodes, strict=True)}}
    return Outcome(graph.visible.copy(), np.where(graph.visible, nodes, 0.0), record, prompt_scores=prompt_scores)
