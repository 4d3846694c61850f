"""`Protocol`: how a number came about. Two numbers that differ in it are answers to different questions.

What is called faithfulness has moved by more from one protocol to another than from one circuit to another (Miller et al. 2024), so a
protocol is part of every reported number, and numbers of different protocols are not compared.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from circuitgraph._engine import SourceKind
from circuitgraph._errors import CircuitGraphError, unknown_name, whole_number

Granularity = Literal["edge", "node"]
Positions = Literal["all", "spans"]
Direction = Literal["noising", "denoising"]
Ranking = Literal["signed", "absolute"]
Average = Literal["ratio of means", "mean of ratios"]
Axis = Literal["linear", "log"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "granularity": get_args(Granularity),
    "ablation": get_args(SourceKind),
    "positions": get_args(Positions),
    "direction": get_args(Direction),
    "ranking": (*get_args(Ranking), None),
    "average": get_args(Average),
    "axis": (*get_args(Axis), None),
}


@dataclass(frozen=True)
class Protocol:
    """Everything besides model and circuit that a number depends on.

    `granularity`: whether only a circuit's edges are live, or every edge between its nodes. `ablation`: the source of what is patched in;
    `ablation_data`: a hash of the data or constants behind it, where there are any. `positions`: whether an edge is live at every
    position or at chosen spans. `direction`: whether the rest is corrupted in a clean run or the circuit is restored in a corrupted one.
    `ranking` and `axis`: of the edges and of their number, for what is measured along sizes. `prompts`: how many, `prompts_digest` which,
    `seed` how drawn.

    >>> Protocol("logit_diff", prompts=32).differing(Protocol("logit_diff", prompts=32, ablation="zero"))
    ('ablation',)
    """

    metric: str
    prompts: int
    prompts_digest: str | None = None
    seed: int = 0
    granularity: Granularity = "edge"
    ablation: SourceKind = "corrupted"
    ablation_data: str | None = None
    positions: Positions = "all"
    direction: Direction = "noising"
    ranking: Ranking | None = None
    average: Average = "ratio of means"
    axis: Axis | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown_name(f"{name} of a protocol", getattr(self, name), [choice for choice in known if choice])
        whole_number("protocol: prompts", self.prompts, 1)
        whole_number("protocol: seed", self.seed, 0)

    def differing(self, other: Protocol) -> tuple[str, ...]:
        """The names of the fields in which two protocols differ."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def check_comparable(*protocols: Protocol) -> None:
    """Raises `CircuitGraphError` that names the fields in which numbers to be compared differ.

    >>> check_comparable(Protocol("kl", 8), Protocol("kl", 8))
    """
    for other in protocols[1:]:
        names = protocols[0].differing(other)
        if names:
            facts = ", ".join(f"{name} ({getattr(protocols[0], name)} and {getattr(other, name)})" for name in names)
            raise CircuitGraphError(
                f"numbers of different protocols cannot be compared; they differ in {facts}; evaluate both in the same way"
            )
