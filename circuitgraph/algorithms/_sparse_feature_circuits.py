"""Sparse feature circuits: nodes by their indirect effect, then the edges between them by theirs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from circuitgraph._engine import Algorithm, Engine, Outcome, checked_algorithm, last_outcome, outcomes
from circuitgraph._errors import CircuitGraphError
from circuitgraph.algorithms._eap_ig import EAPIG
from circuitgraph.algorithms._relaxed import number


@dataclass(frozen=True)
class SparseFeatureCircuits:
    """The nodes, and the edges between them, whose estimated effects are above two thresholds (Marks et al. 2024, arXiv:2403.19647).

        IE[w]      = sum over readers of  score[r, w]        of a writer: a feature, an error, a head, an MLP
        IE[r, w]   = score[r, w]                             of an edge
        keep w       if |IE[w]| >= node_threshold
        keep r, w    if |IE[r, w]| >= edge_threshold, w is kept, and r is the logits or feeds a writer that is kept

    `estimator` scores edges: integrated gradients along what the writers of one depth say (the paper's IE_ig, 10 steps), or EAP (its
    IE_atp). Effects are in units of the metric, summed over positions and averaged over prompts, as the paper's for templates; its
    thresholds are 0.1 and 0.01 of a logit difference. Meant for a model whose components are in parts. There an edge into an SAE's feature
    is one into what its component reads, where the paper tells the features of a component apart.

    Kept edges without a path from the input to the logits go. Cost: that of the estimator. `record["nodes"]` has IE by the writer's name.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> [edge.name for edge in engine.graph.edges_of(SparseFeatureCircuits(0.5, 0.2).run(engine).mask)]
    ['input->a0.h1<v>', 'a0.h1->m0', 'a0.h1->logits', 'm0->logits']
    """

    node_threshold: float = 0.1
    edge_threshold: float = 0.01
    estimator: Algorithm = field(default_factory=lambda: EAPIG("activations", points=10))

    def __post_init__(self) -> None:
        number("sparse feature circuits: node_threshold", self.node_threshold, above=-1e-300)
        number("sparse feature circuits: edge_threshold", self.edge_threshold, above=-1e-300)
        checked_algorithm("sparse feature circuits: estimator", self.estimator)

    def run(self, engine: Engine) -> Outcome:
        graph, found = engine.graph, last_outcome(outcomes(self.estimator, engine))
        if found.scores is None or found.graph is not None:
            raise CircuitGraphError(
                f"sparse feature circuits: {type(self.estimator).__name__} scores no edges of the graph; take EAPIG or EAP"
            )
        scores = np.where(graph.visible, np.nan_to_num(np.asarray(found.scores, dtype=np.float64)), 0.0)
        effects = scores.sum(axis=0)
        writers = np.abs(effects) >= self.node_threshold
        readers = np.array([reader.kind == "logits" for reader in graph.readers]) | (graph.feeds & writers).any(axis=1)
        kept = graph.visible & (np.abs(scores) >= self.edge_threshold) & writers & readers[:, None]
        nodes = {writer.name: float(effect) for writer, effect in zip(graph.writers, effects, strict=True)}
        return Outcome(graph.prune_dead(kept), scores, {"nodes": nodes}, prompt_scores=found.prompt_scores)
