"""The parts of a prompt, where edges are told apart by position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Spans(eqx.Module):
    """Which of `n` spans each position of a prompt is in."""

    of_positions: Int[Array, " position"]
    n: int = eqx.field(static=True)

    @property
    def parts(self) -> Bool[Array, "spans position"]:
        """The positions of each span."""
        return jax.nn.one_hot(self.of_positions, self.n, axis=0, dtype=bool)

    def at_positions(self, values: Float[Array, "... spans"]) -> Float[Array, "... position"]:
        """To each position what its span has."""
        return jnp.take(values, self.of_positions, axis=-1)

    def sums(self, values: Float[Array, "position ..."]) -> Float[Array, "spans ..."]:
        """Over the positions of each span: a matrix product, which is faster than a scattered sum."""
        summed = self.parts.astype(values.dtype) @ values.reshape(len(values), -1)
        return summed.reshape(self.n, *values.shape[1:])
