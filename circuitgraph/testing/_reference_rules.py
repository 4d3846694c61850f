"""How the reference goes back through what is not linear: by a surrogate forward, whose derivative is the rule's gradient.

One run writes down what the rule freezes; the nudged runs after it read that back. At the point where it was written down the surrogate is
the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._engine import EXACT, Rule

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


@dataclass(eq=False)
class Memory:
    """What a rule freezes, in the order in which a run comes by it, which is the same in every run.

    >>> written = Memory(Rule(norms="frozen"))
    >>> written.held(True, [3.0]), written.again().held(False, [5.0])
    ([3.0], [5.0])
    >>> written.again(2).held(True, [5.0, 5.0])
    array([3., 3.])
    """

    rule: Rule = EXACT
    before: Iterator[Any] | None = None  # what an earlier run wrote down
    kept: list[Any] = field(default_factory=list)

    def held(self, is_frozen: bool, value: Any) -> Any:
        """The value; where it is frozen, what it was in the first run."""
        if not is_frozen:
            return value
        first = value if self.before is None else next(self.before)
        self.kept.append(first)
        return first

    def again(self, n: int = 1) -> Memory:
        """For another run, of `n` copies of the prompts, which reads back what this one wrote down."""
        return Memory(self.rule, iter([copies(value, n) for value in self.kept]))

    def product(self, a: Any, b: Any) -> Any:
        """`a * b`. By the half rule each of the two has half of its derivative, and the value is the same."""
        if self.rule.gates == "exact":
            return a * b
        first_a, first_b = self.held(True, a), self.held(True, b)
        return (first_a * b + a * first_b) / 2


LIVE = Memory()  # freezes nothing


def copies(values: Float[ndarray, "prompts ..."], n: int) -> Float[ndarray, "copies ..."]:
    """Something of every prompt, `n` times: all prompts once, then all of them again."""
    return np.concatenate([values] * n)
