"""`dF/dm` by one backward pass over the tape of a forward one, from the logits down. Weights get no gradient.

For each edge, `dF/dm[r, w] = <dF/dx_r, live_w - source_w>`: per layer, one matrix product of the readers' gradients and the bank. Left to
itself, JAX would keep the whole bank once per layer; here it is kept once. The writers' gradients follow the two forms of a read (see
`_forward`): a running gradient of the stream, plus corrections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._forward import Edges, LayerMasking, Masking, forward
from circuitgraph_jax._joints import Attention, Layer
from circuitgraph_jax._live import live_run, run_beside
from circuitgraph_jax._run import Run, Tape

if TYPE_CHECKING:
    from jaxtyping import Float


class MaskedRun(eqx.Module):
    """A run to be differentiated: under a mask."""

    embedding: Float[Array, "position d_model"]
    source: Float[Array, "writers span d_model"]
    masking: Masking

    def forward(self, decoder: Decoder) -> Run:
        return forward(decoder, self.embedding, self.source, self.masking)


class LiveRun(eqx.Module):
    """A run to be differentiated: the model's own."""

    embedding: Float[Array, "position d_model"]
    source: Float[Array, "writers span d_model"]
    masking: None = None

    def forward(self, decoder: Decoder) -> Run:
        return live_run(decoder, self.embedding, self.source)


class RunBeside(eqx.Module):
    """A run to be differentiated: the model's own, the source being its run on another prompt."""

    embedding: Float[Array, "position d_model"]
    other: Float[Array, "position d_model"]
    masking: None = None

    def forward(self, decoder: Decoder) -> Run:
        return run_beside(decoder, self.embedding, self.other)


@eqx.filter_custom_vjp
def end_of_run(
    nudges: Float[Array, "readers writers"],
    decoder: Decoder,
    planned: MaskedRun | LiveRun | RunBeside,
    directions: Float[Array, "writers position d_model"] | None,
) -> Float[Array, "position d_model"]:
    """The logits' input of a run, differentiable in `nudges`: `nudges[r, w]` adds that much of `directions[w]` to the input of reader `r`.

    Nudges are zero; only their derivative is asked for. Along the writers' own differences (`directions` is `None`) it is `dF/dm`.
    """
    return planned.forward(decoder).end


@end_of_run.def_fwd  # type: ignore[untyped-decorator]
def _forward_rule(perturbed: Any, nudges: Any, decoder: Decoder, planned: Any, directions: Any) -> tuple[Array, Run]:
    run: Run = planned.forward(decoder)
    return run.end, run


@end_of_run.def_bwd  # type: ignore[untyped-decorator]
def _backward_rule(run: Run, grad: Array, perturbed: Any, nudges: Any, decoder: Decoder, planned: Any, directions: Any) -> Array:
    return backward(decoder, run, planned.masking, grad, run.bank if directions is None else directions)


def backward(
    decoder: Decoder,
    run: Run,
    masking: Masking | None,
    grad_end: Float[Array, "position d_model"],
    directions: Float[Array, "writers position d_model"],
) -> Float[Array, "readers writers"]:
    """`<dF/dx_r, directions_w>` for every reader and writer, from the gradient of the logits' input."""
    grads = WriterGrads(jnp.zeros_like(run.end), None if masking is None else jnp.zeros_like(run.bank))
    grads = grads.add(None if masking is None else masking.end, grad_end[None])
    scores = [_score(grad_end[None], directions).T]
    for number, place in reversed([*enumerate(decoder.places)]):
        bank, along = run.bank[: place.end_writer], directions[: place.end_writer]

        def step(grads: WriterGrads, xs: Any, bank: Array = bank, along: Array = along) -> tuple[WriterGrads, Array]:
            grads, of_readers = _layer(grads, bank, *xs)
            return grads, _score(of_readers, along)

        masked = None if masking is None else masking.steps(decoder, number)
        xs = decoder.stacks[number], place.first_writers, masked, run.tapes[number]
        grads, columns = lax.scan(step, grads.up_to(place.end_writer), xs, reverse=True)
        rows = columns.swapaxes(1, 2).reshape(-1, len(along))
        scores.append(jnp.pad(rows, ((0, 0), (0, len(directions) - len(along)))))
    return jnp.where(decoder.visible, jnp.concatenate(scores[::-1]), 0)


class WriterGrads(eqx.Module):
    """The gradient of what a writer says: that of the live `stream`, plus a writer's own correction where edges are not all live."""

    stream: Float[Array, "position d_model"]
    corrections: Float[Array, "writers position d_model"] | None

    def up_to(self, writer: int) -> WriterGrads:
        """Without the later writers, which are done with."""
        return WriterGrads(self.stream, None if self.corrections is None else self.corrections[:writer])

    def of(self, first: Array, n: int) -> Float[Array, "some position d_model"]:
        """Of `n` writers, or the one that all writers share."""
        return self.stream[None] if self.corrections is None else self.stream + lax.dynamic_slice_in_dim(self.corrections, first, n)

    def add(self, edges: Edges | None, grads: Float[Array, "readers position d_model"]) -> WriterGrads:
        """Hand the gradients of readers' inputs on to the writers they read."""
        if edges is None or self.corrections is None:
            return WriterGrads(self.stream + _sum(grads), None)
        stream = self.stream + _sum(jnp.where(edges.from_live[:, None, None], grads, 0))
        mixed = edges.coefficients.T @ grads.reshape(len(grads), -1)
        return WriterGrads(stream, self.corrections + mixed.reshape(self.corrections.shape))


def _layer(
    grads: WriterGrads, bank: Array, layer: Layer, writer: Array, masking: LayerMasking | None, tape: Tape
) -> tuple[WriterGrads, Float[Array, "readers position d_model"]]:
    """One layer backwards, with the gradients of its readers' inputs."""
    after, of_readers = grads, []
    if layer.mlp is not None:
        x = tape.before_mlp if masking is None else masking.read_mlp(layer, tape.before_mlp, bank)
        grad = _pull(layer.mlp.contract, tape.hidden, grads.of(writer + layer.n_heads, 1)[0])
        grad = _pull(layer.mlp.expand, x, grad)[None]
        of_readers.append(grad)
        grads = grads.add(None if masking is None else masking.of_mlp(layer), grad)
    if layer.attention is not None:
        x = tape.before_attention[None] if masking is None else masking.read_attention(layer, tape.before_attention, bank)
        of_heads = (after if layer.is_parallel else grads).of(writer, layer.n_heads)
        grad = _through_heads(layer.attention, tape.projected, of_heads)
        grad = _pull(layer.attention.project, jnp.broadcast_to(x, (layer.n_attention_readers, *x.shape[1:])), grad)
        of_readers.insert(0, grad)
        grads = grads.add(None if masking is None else masking.of_attention(layer), grad)
    return grads, jnp.concatenate(of_readers)


def _through_heads(attention: Attention, projected: Any, of_heads: Float[Array, "heads position d_model"]) -> Any:
    """The gradient of the projections, from that of the heads, or from the one that all heads share."""
    if len(of_heads) == 1:
        return _pull(lambda projected: attention.write(attention.mix(projected)), projected, of_heads[0])
    return _pull(lambda projected: attention.write_each(attention.mix(projected)), projected, of_heads)


def _pull(function: Any, at: Any, grad: Any) -> Any:
    return jax.vjp(function, at)[1](grad)[0]


def _score(
    grads: Float[Array, "readers position d_model"], directions: Float[Array, "seen position d_model"]
) -> Float[Array, "seen readers"]:
    return directions.reshape(len(directions), -1) @ grads.reshape(len(grads), -1).T  # einsum would transpose the bank


def _sum(grads: Float[Array, "readers position d_model"]) -> Float[Array, "position d_model"]:
    """Over the readers: a matrix product, which XLA does several times faster than a sum over the first axis."""
    return (jnp.ones((1, len(grads)), grads.dtype) @ grads.reshape(len(grads), -1)).reshape(grads.shape[1:])
