"""Optimal ablation: constants in place of what writers say that hurt least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._engine import Engine, Source
from circuitgraph._errors import whole_number
from circuitgraph.algorithms._adam import Adam
from circuitgraph.algorithms._constant_values import ConstantValues, writer_means
from circuitgraph.algorithms._relaxed import number, source_slope

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray


@dataclass(frozen=True)
class OptimalAblation:
    """Fits one vector per writer that hurts least in its place (Li & Janson 2024, arXiv:2409.09951). No algorithm, but a source for one.

        minimise over the constants c   mean loss at a mask m with source c,   another m at every step

    Each step keeps every edge with the same probability, drawn evenly from 0 to 1: one constant must do for few edges removed and for
    many. With a mask given to `fit`, that is the mask at every step: the constants of one circuit, which is what Li & Janson report for
    circuits. They begin at what writers say on average over the clean prompts and positions, as in the paper's code; steps are in units
    of how far writers are from that, and fall to 0 in a line.

    Fit it on an engine whose metric is the KL divergence to the clean run; its own source is not used.

    Cost: one backward and forward pass per step.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "kl")
    >>> OptimalAblation(n_steps=3).fit(engine).constants.shape
    (4, 8)
    """

    n_steps: int = 50
    learning_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("optimal ablation: n_steps", self.n_steps, 1)
        number("optimal ablation: learning_rate", self.learning_rate, above=0)
        whole_number("optimal ablation: seed", self.seed, 0)

    def fit(self, engine: Engine, mask: Bool[ndarray, "readers writers"] | None = None) -> Source:
        """The source for this engine's model and prompts, or for one circuit."""
        rng, adam = np.random.default_rng(self.seed), Adam(self.learning_rate)
        start = writer_means(engine.activations())
        constants = start.mean
        for step in range(self.n_steps):
            kept = rng.uniform(size=engine.graph.shape) < rng.uniform() if mask is None else mask
            values = ConstantValues(constants, start.lengths)
            down = source_slope(engine, kept.astype(np.float32), values) * start.spread[:, None]
            constants = constants + start.spread[:, None] * adam.step(down, rate=1 - step / self.n_steps)
        return Source("optimal", constants=constants)
