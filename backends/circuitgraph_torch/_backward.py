"""`dF/dm` by one backward pass over the tape of a forward one, from the logits down. Weights get no gradient.

For each edge, `dF/dm[r, w] = <dF/dx_r, live_w - source_w>`: per layer, one matrix product of the readers' gradients and the writers'
differences. The writers' gradients follow the two forms of a read (see `_bank`): a running gradient of the stream, plus corrections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from circuitgraph._sites import Site, Sites
from circuitgraph_torch._bank import Plan, to_tensor
from circuitgraph_torch._forward import AttentionStep, MLPStep, Tape
from circuitgraph_torch._joints import AttentionJoint, ModelJoints

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


class Backward:
    """Walks a tape backwards. `differences` `[writers, prompts, position, d_model]` are those that score the edges."""

    def __init__(self, joints: ModelJoints, sites: Sites, differences: Tensor) -> None:
        self._joints, self._sites, self._differences = joints, sites, differences
        n_prompts = differences.shape[1]
        self.scores: Float[ndarray, "prompts readers writers"] = np.zeros((n_prompts, *sites.graph.shape))
        self._stream = torch.zeros_like(differences[0])
        self._corrections: Tensor | None = None

    def run(self, tape: Tape, grad_logits_input: Tensor) -> Float[ndarray, "prompts readers writers"]:
        """From the gradient of the logits' input at the last position, `[prompts, 1, d_model]`."""
        assert tape.logits is not None
        self._score(self._sites.logits, tape.logits, grad_logits_input[None], last_only=True)
        spread = torch.zeros_like(self._stream)
        spread[:, -1:] = grad_logits_input
        self._propagate(tape.logits, spread[None])
        for number in range(len(self._sites.layers) - 1, -1, -1):
            self._layer(number, tape.attention.get(number), tape.mlp.get(number))
        return self.scores

    def _layer(self, number: int, attention: AttentionStep | None, mlp: MLPStep | None) -> None:
        joint, layer = self._joints.layers[number], self._sites.layers[number]
        heads = range(layer.first_head, layer.first_head + layer.n_heads)
        grad_heads = self._writer_grads(heads) if joint.is_parallel and attention else None
        if mlp is not None and layer.mlp is not None:
            (grad,) = torch.autograd.grad(mlp.written, mlp.x, self._writer_grads([layer.mlp_writer])[0])
            self._score(layer.mlp, mlp.plan, grad[None])
            self._propagate(mlp.plan, grad[None])
        if attention is not None and joint.attention is not None and layer.attention is not None:
            grad_heads = self._writer_grads(heads) if grad_heads is None else grad_heads
            grads = self._reader_grads(joint.attention, attention, grad_heads)
            self._score(layer.attention, attention.plan, grads)
            self._propagate(attention.plan, _sum_by_row(attention.plan, grads))

    def _reader_grads(self, joint: AttentionJoint, step: AttentionStep, grad_heads: Tensor) -> Tensor:
        """`[needed readers, prompts, position, d_model]`."""
        (grad,) = torch.autograd.grad(step.written, step.projected, grad_heads)
        n, length = grad.shape[1:3]
        readers = torch.from_numpy(step.plan.readers).to(grad.device)
        weights = joint.weights if len(readers) == joint.n_readers else joint.weights[readers]
        projected = grad.view(n * length, joint.n_readers, joint.head_dim).transpose(0, 1)
        grads = torch.bmm(projected if len(readers) == joint.n_readers else projected[readers], weights)
        grads = grads.view(len(readers), n, length, -1)
        if joint.norm is None:
            return grads
        if step.plan.n_distinct == 1:
            return joint.norm.backward_(grads, step.x)
        for u in range(step.plan.n_distinct):
            members = torch.from_numpy(np.flatnonzero(step.plan.row_of == u)).to(grad.device)
            grads[members] = joint.norm.backward_(grads[members], step.x[u])
        return grads

    def _score(self, site: Site, plan: Plan, grads: Tensor, *, last_only: bool = False) -> None:
        differences = self._differences[: site.n_visible]
        differences = differences[:, :, -1:] if last_only else differences
        products = torch.bmm(grads.flatten(2).transpose(0, 1), differences.flatten(2).permute(1, 2, 0))
        self.scores[:, site.first + plan.readers, : site.n_visible] = products.double().cpu().numpy()

    def _propagate(self, plan: Plan, grads: Tensor) -> None:
        """Hand the gradients of a site's distinct inputs `[distinct, prompts, position, d_model]` on to the writers it read."""
        if plan.from_live:
            self._stream = self._stream + grads.sum(0)  # not in place: a parallel block still holds the old one
        rows = plan.rows[0]
        if rows.any():
            if self._corrections is None:
                self._corrections = torch.zeros_like(self._differences)
            seen = self._corrections[: rows.shape[1]]
            seen.view(len(seen), -1).addmm_(to_tensor(rows.T, grads), grads.reshape(len(rows), -1))

    def _writer_grads(self, writers: range | list[int]) -> Tensor:
        """`[some, prompts, position, d_model]`."""
        grads = self._stream.expand(len(writers), *self._stream.shape)
        return grads if self._corrections is None else grads + self._corrections[writers[0] : writers[-1] + 1]


def _sum_by_row(plan: Plan, grads: Tensor) -> Tensor:
    if plan.n_distinct == 1:
        return grads.sum(0, keepdim=True)
    row_of = torch.from_numpy(plan.row_of).to(grads.device)
    return grads.new_zeros(plan.n_distinct, *grads.shape[1:]).index_add_(0, row_of, grads)
