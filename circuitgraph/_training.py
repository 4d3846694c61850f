"""What it takes to train a dictionary: `SAETraining` (settings), `Place`, what a backend offers for it, and `DictionaryMeasures`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from circuitgraph._dictionary import OF, Dictionary, Reads
from circuitgraph._errors import CircuitGraphError, unknown_name, whole_number
from circuitgraph._names import Component

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

    from circuitgraph._architecture import Architecture

TrainedActivation = Literal["topk", "jumprelu"]
TRAINED_READS: tuple[Reads, ...] = ("mlp_out", "attn_out", "attn_z", "stream", "mlp_in")
_BY_KIND: dict[str, Reads] = {"m": "mlp_out", "a": "attn_out", "r": "stream"}


@dataclass(frozen=True)
class SAETraining:
    """How a dictionary is trained. `seed` fixes first weights, held-out prompts and order: the same settings and data give the same result.

    `n_features`: how many. `k`: how many are active at a position; with `activation` "topk" exactly so, at most (Gao et al. 2024,
    arXiv:2406.04093), with "jumprelu" in the mean, by a penalty of `sparsity * (L0 / k - 1)^2` whose gradient passes the
    thresholds through a rectangle of width `bandwidth` (Rajamanoharan et al. 2024, arXiv:2407.14435).
    `steps` of `batch` positions each, with Adam at `learning_rate`, which rises over the first twentieth and falls to 0 over the last
    fifth.
    Losses, thresholds and `bandwidth` are in units in which what is reconstructed has variance 1 per dimension.

    A feature that was not active for `dead_after` positions is dead: it is trained to reconstruct what the others leave, by an auxiliary
    loss of weight `auxiliary` (Gao et al. 2024; 0 for none).

    `context`: longer prompts are cut into pieces of so many tokens. `first_position`: positions before it are neither trained on nor
    measured; 1 leaves out the first token, on which many models put an activation a hundred times as long as any other.
    `held_out`: the share of prompts that is kept for measuring. `buffer`: about how many positions' activations are in memory at once;
    batches mix the positions of one buffer. Raises `CircuitGraphError` for values out of range.
    """

    n_features: int
    k: int = 32
    activation: TrainedActivation = "topk"
    steps: int = 5000
    batch: int = 1024
    learning_rate: float = 1e-3
    seed: int = 0
    auxiliary: float = 1 / 32
    dead_after: int = 100_000
    sparsity: float = 0.1
    bandwidth: float = 1.0
    context: int = 128
    first_position: int = 0
    held_out: float = 0.1
    buffer: int = 1 << 18

    def __post_init__(self) -> None:
        if self.activation not in get_args(TrainedActivation):
            raise unknown_name("activation to train", self.activation, get_args(TrainedActivation))
        for name in ("n_features", "k", "steps", "batch", "dead_after", "buffer"):
            whole_number(f"SAETraining: {name}", getattr(self, name), 1)
        whole_number("SAETraining: seed", self.seed, 0)
        whole_number("SAETraining: context", self.context, 2)
        whole_number("SAETraining: first_position", self.first_position, 0)
        if self.k > self.n_features:
            raise CircuitGraphError(f"SAETraining: k is {self.k:,}, more than the {self.n_features:,} features; expected fewer")
        if self.first_position >= self.context:
            raise CircuitGraphError(
                f"SAETraining: first_position is {self.first_position}; expected less than the context of {self.context} tokens"
            )
        for name in ("learning_rate", "bandwidth"):
            _check_number(name, getattr(self, name), lowest=0, is_open=True)
        for name in ("auxiliary", "sparsity"):
            _check_number(name, getattr(self, name), lowest=0)
        if not isinstance(self.held_out, Real) or not 0 < self.held_out < 1:
            raise CircuitGraphError(f"SAETraining: held_out is {self.held_out!r}; expected a share between 0 and 1")


def _check_number(name: str, value: Any, *, lowest: float, is_open: bool = False) -> None:
    if not isinstance(value, Real) or not math.isfinite(value) or value < lowest or (is_open and value == lowest):
        raise CircuitGraphError(f"SAETraining: {name} is {value!r}; expected a number {'above' if is_open else 'of at least'} {lowest}")


@dataclass(frozen=True)
class Place:
    """Where a dictionary is: of what component, and what it reads there."""

    component: Component
    reads: Reads

    @classmethod
    def of(cls, component: str, reads: Reads | None, architecture: Architecture) -> Place:
        """`reads`: by default what the component says. Raises `CircuitGraphError` for a place that the model does not have."""
        found = Component.parse(component)
        wanted = _BY_KIND.get(found.kind, "") if reads is None else reads
        if wanted not in TRAINED_READS:
            raise unknown_name(f"place of a dictionary of {component}", wanted, TRAINED_READS)
        kind = OF.get(wanted, "m")
        if kind != found.kind:
            raise CircuitGraphError(f"{component} has no {wanted}; that is a place of a component such as {kind}{found.layer}")
        if found.name not in _components(architecture):
            known = [name for name in _components(architecture) if name[0] == found.kind]
            raise CircuitGraphError(f"the model has no {component}; there are {', '.join(known) or 'none of that kind'}")
        return cls(found, wanted)

    @property
    def is_transcoder(self) -> bool:
        return self.reads == "mlp_in"

    def __str__(self) -> str:
        return f"{self.component} {self.reads}"


def _components(architecture: Architecture) -> list[str]:
    found = [f"r{layer}" for layer in range(len(architecture.blocks) + 1)]
    for layer, block in enumerate(architecture.blocks):
        found += [f"a{layer}"] * (block.attention is not None) + [f"m{layer}"] * (block.mlp is not None)
    return found


@dataclass(frozen=True)
class DictionaryMeasures:
    """The numbers that people look at, of a dictionary on `positions` positions of text.

    `live`: the share of features that are active at one of these positions at least. `l0`: how many are active at a position, in the mean.
    `explained_variance`: `1 - sum |y - y_hat|^2 / sum |y - mean(y)|^2` over positions, with `y` what is reconstructed (a transcoder's: what
    the MLP says).
    `loss`, `spliced_loss`, `zero_loss`: the mean cross-entropy of the next token, in nats, of the model, of the model with `y_hat` in
    place of `y`, and with 0 in place of `y`. `loss_recovered`: `(zero_loss - spliced_loss) / (zero_loss - loss)`, the share of what the
    place does for the loss that the dictionary keeps; not a number where the place does nothing for it (under 1e-4 nats).
    """

    positions: int
    live: float
    l0: float
    explained_variance: float
    loss: float
    spliced_loss: float
    zero_loss: float

    @property
    def loss_recovered(self) -> float:
        gap = self.zero_loss - self.loss
        return (self.zero_loss - self.spliced_loss) / gap if abs(gap) > 1e-4 else math.nan

    def __str__(self) -> str:
        return (
            f"explained variance {self.explained_variance:.4f}, L0 {self.l0:.2f}, live {self.live:.1%}, loss recovered "
            f"{self.loss_recovered:.4f} ({self.loss:.4f} nats, spliced {self.spliced_loss:.4f}, zero {self.zero_loss:.4f}), "
            f"{self.positions:,} positions"
        )


@dataclass(frozen=True)
class StepNumbers:
    """Of one batch: the share of the variance that is not explained, the mean L0, and the share of features that are not dead."""

    unexplained: float
    l0: float
    live: float

    def __str__(self) -> str:
        return f"explained variance {1 - self.unexplained:.3f}, L0 {self.l0:.1f}, live {self.live:.1%}"


class DictionaryTrainer(Protocol):
    """A training under way. What it does next depends on `step` and `state()` alone."""

    @property
    def step(self) -> int:
        """How many steps are done."""
        ...

    def begin(self) -> None:
        """Settle the weights before the first step. This or `restore` comes before anything else."""
        ...

    def advance(self) -> StepNumbers:
        """One step. Raises `CircuitGraphError` where a loss is not a number any more."""
        ...

    def state(self) -> dict[str, ndarray]:
        """Everything that a step changes, and what was settled before the first: weights, moments of Adam, idle features, scales."""
        ...

    def restore(self, step: int, state: Mapping[str, ndarray]) -> None:
        """Go on from there."""
        ...

    def dictionary(self) -> Dictionary:
        """What was trained so far, in the units of the model; decoder rows have norm 1."""
        ...


@runtime_checkable
class TrainsDictionaries(Protocol):
    """A traced model whose backend can train dictionaries. Prompts are rows of token ids, of any lengths."""

    def trainer(self, place: Place, prompts: Sequence[Int[ndarray, " position"]], settings: SAETraining) -> DictionaryTrainer: ...

    def measured(
        self, place: Place, dictionary: Dictionary, prompts: Sequence[Int[ndarray, " position"]], *, first_position: int = 0
    ) -> DictionaryMeasures: ...
