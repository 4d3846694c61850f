"""A finished run of one prompt, and the bank that it fills."""

from __future__ import annotations

from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
from jax import Array, lax

from circuitgraph_jax._decoder import Place
from circuitgraph_jax._splits import Active

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Tape(eqx.Module):
    """What the backward pass needs of each layer of a stack (`None` where the layer has no such joint, or has it in parts)."""

    before_stream: Float[Array, "position d_model"] | None
    before_attention: Float[Array, "position d_model"]
    projected: Float[Array, "readers position head_dim"] | None
    before_mlp: Float[Array, "position d_model"]
    hidden: tuple[Float[Array, "position width"], ...] | None

    @property
    def start(self) -> Float[Array, "position d_model"]:
        """The stream that came to the layer."""
        return self.before_attention if self.before_stream is None else self.before_stream


class Run(eqx.Module):
    """The logits' input, every writer's difference `live - source`, per stack the tape of its layers, and what features are that write to
    later layers."""

    end: Float[Array, "position d_model"]
    bank: Float[Array, "writers position d_model"]
    tapes: tuple[Tape, ...]
    active: Active


def grown(bank: Float[Array, "writers position d_model"], place: Place) -> Float[Array, "writers position d_model"]:
    """The bank, with room for a stack's writers."""
    return jnp.concatenate([bank, jnp.zeros((place.end_writer - place.writer, *bank.shape[1:]), bank.dtype)])


def keep(
    bank: Float[Array, "writers position d_model"], differences: Float[Array, "some position d_model"], at: Int[Array, ""]
) -> Float[Array, "writers position d_model"]:
    """The bank, with the differences of some writers from the one numbered `at`."""
    return lax.dynamic_update_slice_in_dim(bank, differences, at, 0)
