"""Uniform gradient sampling: keep-probabilities of edges, trained on edges that are undecided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np

from circuitgraph._engine import Engine, Outcome, last_outcome
from circuitgraph._errors import CircuitGraphError, whole_number
from circuitgraph.algorithms._adam import Adam
from circuitgraph.algorithms._constant_values import ConstantValues, writer_means
from circuitgraph.algorithms._hard_concrete import sigmoid
from circuitgraph.algorithms._relaxed import gap, is_record_due, loss, loss_gradient, number, source_slope

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

Ablation = Literal["source", "optimal"]


@dataclass(frozen=True)
class UniformGradientSampling:
    """A keep-probability per edge, by gradient descent (UGS; Li & Janson 2024, arXiv:2409.09951).

        minimise over theta, with p = sigmoid(theta)   mean loss at m + penalty * G * sum over edges of p
        m[r, w] is uniform on (0, 1) with probability p (1 - p), and else 1 with probability p, so that its mean is p
        d loss / dp[r, w] = mean over the samples where m[r, w] is undecided of d loss / dm[r, w]

    The mean of the derivative over a uniform mask is what keeping the edge changes, so nothing is relaxed in the mean, unlike with
    hard-concrete masks. `G` is the loss of the source run over that of the model, so an edge is worth keeping where it keeps more than
    the share `penalty` of what sets the model apart. Loss: KL divergence to the clean run, unless another metric is given. Kept are the
    edges with p above 1/2, without those on no path from the input to the logits.

    `ablation`: "source", what the engine's source says in place of an edge; "optimal", one constant per writer, trained together with
    the probabilities from the mean over clean prompts and positions (the paper's circuits). What is found with them wants to be
    evaluated with them: take `source="optimal"`.

    Different from the paper's code: `n_samples` masks a step, each for all prompts (12 for each of 5 prompts there), no second penalty
    on nodes, dead edges go at the end and not from every sample, and tens of steps with a learning rate for that.

    Cost: `n_samples` gradients (a forward and a backward pass) per step, twice with "optimal", and 12 forward passes for the record.

    Scores are the probabilities. The record has `sparsity` (the expected share that is gone, after each step) and `loss` (step, value:
    of the circuit so far).

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "kl")
    >>> outcome = UniformGradientSampling(penalty=0.01, n_steps=20).run(engine)
    >>> [edge.name for edge in engine.graph.edges_of(outcome.mask)]
    ['input->a0.h1<v>', 'a0.h1->m0', 'a0.h1->logits', 'm0->logits']
    """

    default_metric: ClassVar[str] = "kl"

    penalty: float = 0.005
    n_steps: int = 50
    n_samples: int = 2
    learning_rate: float = 0.4
    initial: float = 1.0
    ablation: Ablation = "source"
    seed: int = 0

    def __post_init__(self) -> None:
        number("ugs: penalty", self.penalty, above=0)
        number("ugs: learning_rate", self.learning_rate, above=0)
        number("ugs: initial", self.initial)
        whole_number("ugs: n_steps", self.n_steps, 1)
        whole_number("ugs: n_samples", self.n_samples, 1)
        whole_number("ugs: seed", self.seed, 0)
        if self.ablation not in get_args(Ablation):
            raise CircuitGraphError(f"ugs: ablation is {self.ablation!r}; expected {' or '.join(map(repr, get_args(Ablation)))}")

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """An outcome after every step; the last one has the record."""
        graph, rng, adam = engine.graph, np.random.default_rng(self.seed), Adam(self.learning_rate)
        constants = _Constants(engine, self.learning_rate) if self.ablation == "optimal" else None
        price = self.penalty * gap(engine, source=constants.values if constants else None)
        theta = np.full(graph.shape, float(self.initial))
        sparsity, losses = [], []
        for step in range(1, self.n_steps + 1):
            p = sigmoid(theta)
            masks = [sampled(p, rng.uniform(size=p.shape)) for _ in range(self.n_samples)]
            source = constants.values if constants else None
            slopes = [loss_gradient(engine, graph.visible * mask, source=source) for mask in masks]
            if constants is not None:
                constants.go_down(masks)
            slope, is_known = mean_where_undecided(slopes, masks)
            theta = theta + adam.step(np.where(graph.visible & is_known, p * (1 - p) * (slope + price), 0.0))

            scores = np.where(graph.visible, sigmoid(theta), 0.0)
            kept = graph.prune_dead(scores > 0.5)
            sparsity.append(1 - float(scores.sum()) / graph.n_edges)
            if is_record_due(step, self.n_steps):
                losses.append([step, loss(engine, kept, source=constants.values if constants else None)])
            record = {"sparsity": sparsity, "loss": losses} if step == self.n_steps else {}
            yield Outcome(kept, scores, record, step / self.n_steps)


def sampled(p: Float[ndarray, "readers writers"], u: Float[ndarray, "readers writers"]) -> Float[ndarray, "readers writers"]:
    """A mask from uniform numbers: 1 where `u` is well below `p`, 0 where it is well above, and uniform in a window of `p (1 - p)`."""
    mask: Float[ndarray, "readers writers"] = np.clip((p - u) / (p * (1 - p)) + 0.5, 0, 1)
    return mask


def mean_where_undecided(
    slopes: list[Float[ndarray, "readers writers"]], masks: list[Float[ndarray, "readers writers"]]
) -> tuple[Float[ndarray, "readers writers"], Bool[ndarray, "readers writers"]]:
    """The mean of the slopes over the samples where an edge is neither kept nor removed, and whether there is such a sample."""
    undecided = (np.array(masks) > 0) & (np.array(masks) < 1)
    n = undecided.sum(axis=0)
    return (np.array(slopes) * undecided).sum(axis=0) / np.maximum(n, 1), n > 0


@dataclass
class _Constants:
    """One vector per writer, on its way down."""

    engine: Engine
    learning_rate: float
    values: ConstantValues = field(init=False)

    def __post_init__(self) -> None:
        means = writer_means(self.engine.activations())
        self.values = ConstantValues(means.mean, means.lengths)
        self._spread, self._adam = means.spread[:, None], Adam(self.learning_rate)

    def go_down(self, masks: list[Float[ndarray, "readers writers"]]) -> None:
        visible = self.engine.graph.visible
        slope = np.mean([source_slope(self.engine, visible * mask, self.values) for mask in masks], axis=0)
        step = self._spread * self._adam.step(slope * self._spread)
        self.values = ConstantValues(self.values.constants + step, self.values.lengths)
