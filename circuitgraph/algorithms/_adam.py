"""Adam, for the algorithms that optimise a mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


@dataclass
class Adam:
    """The optimiser of Kingma & Ba (2015, arXiv:1412.6980), for one array of parameters. It remembers two running means of the gradient.

        mean = b1 * mean + (1 - b1) * g      square = b2 * square + (1 - b2) * g^2
        step = -learning_rate * (mean / (1 - b1^t)) / (sqrt(square / (1 - b2^t)) + epsilon)

    A parameter whose gradient was always 0 does not move. `b2` is below the paper's 0.999: the second mean must follow tens of steps.

    >>> Adam(learning_rate=0.1).step(np.array([2.0, 0.0, -0.01])).round(3) + 0.0
    array([-0.1,  0. ,  0.1])
    """

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.99
    epsilon: float = 1e-12  # the gradient of one mask among thousands is small
    mean: Float[ndarray, ...] | float = field(default=0.0, init=False)
    square: Float[ndarray, ...] | float = field(default=0.0, init=False)
    steps: int = field(default=0, init=False)

    def step(self, gradient: Float[ndarray, ...], rate: float = 1.0) -> Float[ndarray, ...]:
        """What to add to the parameters to go down; `rate` is the share of the learning rate that a schedule leaves."""
        self.steps += 1
        self.mean = self.b1 * self.mean + (1 - self.b1) * gradient
        self.square = self.b2 * self.square + (1 - self.b2) * gradient**2
        slope = self.mean / (1 - self.b1**self.steps)
        size = np.sqrt(self.square / (1 - self.b2**self.steps))
        step: Float[ndarray, ...] = -self.learning_rate * rate * slope / (size + self.epsilon)
        return step
