"""Scores of edges into queries and keys by what attention says when the edge alone is patched (AtP*'s QK fix, Kramar et al. 2024).

    score(w -> r) = - sum over the heads h that r feeds of <dF/dmixed_h, mixed_h(x_r - (live_w - source_w)) - mixed_h>

`mixed_h` are a head's mixed values, `x_r` the reader's input; all other inputs of the attention stay. Writers come a few at a time, so that
memory does not grow with their number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from circuitgraph_jax._joints import Attention
from circuitgraph_jax._spans import Spans

if TYPE_CHECKING:
    from jaxtyping import Float

_WRITERS = 8  # together


class Heads(eqx.Module):
    """A layer's attention in a run at `m = 1`, and the gradient of its heads' mixed values; its readers are the layer's from `first` on."""

    attention: Attention
    x: Float[Array, "position d_model"]
    projected: Float[Array, "readers position head_dim"]
    grad: Float[Array, "heads position head_dim"]
    first: int = eqx.field(static=True, default=0)

    @property
    def askers(self) -> slice:
        """Those of the layer's readers that make patterns."""
        return slice(self.first, self.first + self.attention.n_askers)


def recomputed(
    heads: Heads, differences: Float[Array, "writers position d_model"], spans: Spans | None
) -> Float[Array, "writers askers ..."]:
    """The scores of a layer's `q` and `k` readers, by span if there are any."""
    attention, x, projected = heads.attention, heads.x, heads.projected
    n_heads, n_askers, mixed = attention.n_heads, attention.n_askers, attention.mix(projected)
    biases = None if attention.biases is None else attention.biases[:n_askers]
    askers = replace(attention, weights=attention.weights[:n_askers], biases=biases)
    parts = jnp.ones((1, len(x)), bool) if spans is None else spans.parts

    def change(patched: Array, where: Array) -> Float[Array, "heads position"]:
        """Of `F` to first order, where some queries and keys are patched."""
        asking = jnp.where(where[..., None], patched, projected[:n_askers])
        return (heads.grad * (attention.mix(jnp.concatenate([asking, projected[n_askers:]])) - mixed)).sum(-1)

    def one_by_one(patched: Array) -> Float[Array, "askers parts"]:
        each = jnp.eye(n_askers, dtype=bool)[:, None, :, None] & parts[:, None, :]
        return jax.vmap(jax.vmap(lambda where: change(patched, where).sum()))(each)

    def together(patched: Array) -> Float[Array, "askers parts"]:
        """All queries, since no head looks at another's, and no position at another's; all keys of each part."""
        is_query = jnp.arange(n_askers)[:, None] < n_heads
        by_query = change(patched, is_query) @ parts.astype(x.dtype).T
        by_head = jax.vmap(lambda part: change(patched, ~is_query & part).sum(-1))(parts)
        by_key = by_head.reshape(len(parts), n_askers - n_heads, -1).sum(-1)
        return jnp.concatenate([by_query, by_key.T])

    changes = one_by_one if attention.couples_heads else together
    scores: Array = lax.map(lambda difference: -changes(askers.project((x - difference)[None])), differences, batch_size=_WRITERS)
    return scores[..., 0] if spans is None else scores
