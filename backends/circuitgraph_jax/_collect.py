"""What is made of the gradients of readers' inputs, layer by layer: a score for every edge, or a gradient of what the source says.

For each edge, `dF/dm[r, w] = <dF/dx_r, live_w - source_w>`: per layer, one matrix product of the readers' gradients and the bank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from circuitgraph_jax._backward import Found, backward
from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._forward import Masking
from circuitgraph_jax._recomputed import recomputed
from circuitgraph_jax._rules import Way
from circuitgraph_jax._run import Run
from circuitgraph_jax._spans import Spans

if TYPE_CHECKING:
    from jaxtyping import Float


def edge_scores(
    decoder: Decoder,
    run: Run,
    masking: Masking | None,
    way: Way,
    grad_end: Float[Array, "position d_model"],
    directions: Float[Array, "writers position d_model"],
    spans: Spans | None,
) -> Float[Array, "readers writers ..."]:
    """`<dF/dx_r, directions_w>` for every reader and writer, by span if there are any, from the gradient of the logits' input."""

    def scored(found: Found, n_seen: int) -> Float[Array, "seen readers ..."]:
        along = directions[:n_seen]
        scores = _scored(found.of_readers, along, spans)
        if way.rule.patterns != "recomputed" or found.heads is None:
            return scores
        return scores.at[:, found.heads.askers].set(recomputed(found.heads, along, spans))

    *of_stacks, of_end = backward(decoder, run, masking, way, grad_end, scored)
    rows = []
    for scores in (*of_stacks, of_end[None]):
        by_reader = scores.swapaxes(1, 2)
        by_reader = by_reader.reshape(-1, *by_reader.shape[2:])
        unseen = len(directions) - by_reader.shape[1]
        rows.append(jnp.pad(by_reader, ((0, 0), (0, unseen), *((0, 0),) * (by_reader.ndim - 2))))
    visible = decoder.visible if spans is None else decoder.visible[..., None]
    return jnp.where(visible, jnp.concatenate(rows), 0)


def source_gradients(
    decoder: Decoder,
    run: Run,
    masking: Masking,
    way: Way,
    grad_end: Float[Array, "position d_model"],
    mask: Float[Array, "readers writers ..."],
    spans: Spans | None,
) -> Float[Array, "writers d_model"]:
    """The sum over readers and positions of `(1 - m[r, w]) * dF/dx_r`, from the gradient of the logits' input."""

    def summed(found: Found, n_seen: int) -> Float[Array, "readers spans d_model"]:
        by_position = found.of_readers.swapaxes(0, 1)
        of_spans = by_position.sum(0, keepdims=True) if spans is None else spans.sums(by_position)
        return of_spans.swapaxes(0, 1)

    *of_stacks, of_end = backward(decoder, run, masking, way, grad_end, summed)
    grads = jnp.concatenate([*(part.reshape(-1, *part.shape[2:]) for part in of_stacks), of_end])
    by_span = mask[..., None] if spans is None else mask
    return jnp.einsum("rwp,rpd->wd", jnp.where(decoder.visible[..., None], 1 - by_span, 0), grads)


def _scored(
    grads: Float[Array, "readers position d_model"], directions: Float[Array, "seen position d_model"], spans: Spans | None
) -> Float[Array, "seen readers ..."]:
    if spans is None:
        return directions.reshape(len(directions), -1) @ grads.reshape(len(grads), -1).T  # einsum would transpose the bank
    return jnp.moveaxis(spans.sums(jnp.einsum("wpd,rpd->pwr", directions, grads)), 0, -1)
