"""Subnetwork probing: masks over nodes, optimised together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from circuitgraph._engine import Engine, Outcome, last_outcome
from circuitgraph._errors import whole_number
from circuitgraph.algorithms import _hard_concrete as hc
from circuitgraph.algorithms._adam import Adam
from circuitgraph.algorithms._relaxed import gap, is_record_due, loss, loss_gradient, number

INITIAL = hc.log_alpha_of(0.9)  # masks begin at 0.9, as in the papers' code


@dataclass(frozen=True)
class SubnetworkProbing:
    """Heads and MLPs at once, by gradient descent in a relaxed mask with a price per node (Cao, Sanh & Rush 2021, arXiv:2104.03514, as
    Conmy et al. 2023 put it to circuits).

        minimise over the log alphas   mean loss at m[r, w] = z[w]   + penalty * G * sum over writers of P(z[w] > 0)

    `z` are hard-concrete samples (Louizos et al. 2018), one per writer, on all its outgoing edges; one mask is sampled a step. The input
    is never masked, as in Conmy et al. `G` is the loss of the source run over that of the model, so a node is worth keeping where it keeps
    more than the share `penalty` of what sets the model apart; the papers' code has a price on the mean over nodes, in the loss's own
    units: penalty * G * their number. Loss: KL divergence to the clean run, unless another metric is given.

    Kept are all edges from writers whose mask without chance is above 1/2, without those on no path from the input to the logits.
    Conmy et al. mask the `q`, `k` and `v` of a head apart; here a head is one writer.

    Cost: one gradient (a forward and a backward pass) per step, and 12 forward passes for the record.

    A writer's score, the probability that its mask is not 0, stands on each of its outgoing edges; `record["nodes"]` has it by the
    writer's name, `record["sparsity"]` the expected share of nodes that is gone after each step, and `record["loss"]` (step, value) the
    loss of the circuit so far.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "kl")
    >>> outcome = SubnetworkProbing(penalty=0.02, n_steps=20, learning_rate=0.3).run(engine)
    >>> [name for name, score in outcome.record["nodes"].items() if score > 0.5]
    ['input', 'a0.h1', 'm0']
    """

    default_metric: ClassVar[str] = "kl"

    penalty: float = 0.05
    n_steps: int = 60
    learning_rate: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        number("subnetwork probing: penalty", self.penalty, above=0)
        whole_number("subnetwork probing: n_steps", self.n_steps, 1)
        number("subnetwork probing: learning_rate", self.learning_rate, above=0)
        whole_number("subnetwork probing: seed", self.seed, 0)

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """An outcome after every step; the last one has the record."""
        graph, rng, adam = engine.graph, np.random.default_rng(self.seed), Adam(self.learning_rate)
        is_masked = np.array([writer.kind != "input" for writer in graph.writers])
        log_alpha, price = np.full(len(graph.writers), INITIAL), self.penalty * gap(engine)
        sparsity, losses = [], []
        for step in range(1, self.n_steps + 1):
            z, z_slope = hc.sample(log_alpha, hc.uniform(rng, log_alpha.shape))
            slope = loss_gradient(engine, graph.visible * np.where(is_masked, z, 1.0)).sum(axis=0)
            down = slope * z_slope + price * hc.expected_l0(log_alpha)[1]
            log_alpha = log_alpha + adam.step(np.where(is_masked, down, 0.0))

            nodes = np.where(is_masked, hc.expected_l0(log_alpha)[0], 1.0)
            kept = graph.prune_dead(graph.visible & (~is_masked | (hc.settled(log_alpha) > 0.5)))
            sparsity.append(1 - float(nodes[is_masked].mean()) if is_masked.any() else 0.0)
            if is_record_due(step, self.n_steps):
                losses.append([step, loss(engine, kept)])
            record = {
                "nodes": {writer.name: float(score) for writer, score in zip(graph.writers, nodes, strict=True)},
                "sparsity": sparsity,
                "loss": losses,
            }
            yield Outcome(kept, graph.visible * nodes, record if step == self.n_steps else {}, step / self.n_steps)
