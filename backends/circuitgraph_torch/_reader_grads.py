"""The gradients of the inputs of an attention's readers, from those of what they project."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitgraph_torch._forward import AttentionStep
from circuitgraph_torch._joints import AttentionJoint
from circuitgraph_torch._spare import Room

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class ReaderGrads:
    """`W' g - xhat along` for every reader, not written out: they are many, and what is asked is often a sum of them.

    Through the norm before the projections, by its formula: `scale * (W' g - xhat <g, W' xhat> / d_model)`, where `W'` are the weights
    with the norm's gain (and centred, for a layer norm) and `W' xhat` is what was projected, less what is of no input.

    `given` `[rows * position, readers, head_dim]` and `along` `[readers, rows * position, 1]` have the scale in them; `weights`
    `[readers, head_dim, d_model]`; `xhat` `[one or readers, rows * position, d_model]`. The rows are those of several runs of the same
    prompts, one after the other.
    """

    given: Tensor
    weights: Tensor
    along: Tensor | None
    xhat: Tensor
    rows: int

    @classmethod
    def of(
        cls, joint: AttentionJoint, step: AttentionStep, grad: Tensor, which: Int[ndarray, " some"], room: Room, *, is_frozen: bool
    ) -> ReaderGrads:
        """For some of the readers of a step. `grad`: of what is projected. `is_frozen`: the norm's scale is a constant."""
        readers = torch.from_numpy(step.plan.readers[which]).to(grad.device)
        whole, rows = len(which) == joint.n_readers, grad.shape[1]

        def of_readers(values: Tensor) -> Tensor:
            values = values.reshape(-1, joint.n_readers, joint.head_dim)
            return values if whole else values[:, readers]

        weights = joint.weights if joint.norm is None else joint.folded(room)
        weights = weights if whole else weights[readers]
        if joint.norm is None:
            return cls(of_readers(grad), weights, None, step.x[:1].flatten(1, 2), rows)
        xhat, scale = (part.flatten(1, 2) for part in joint.norm.standardised(step.x))
        if step.plan.n_distinct > 1:
            xhat, scale = xhat[step.plan.row_of[which]], scale[step.plan.row_of[which]]
        given = of_readers(grad) * scale.transpose(0, 1)
        if is_frozen:
            return cls(given, weights, None, xhat, rows)
        of_input = of_readers(step.projected.detach()) - joint.at_zero[readers]
        along = (given * of_input).sum(-1, keepdim=True).transpose(0, 1) / xhat.shape[-1]
        return cls(given, weights, along, xhat, rows)

    def over_runs(self, n_runs: int, room: Callable[[int, Tensor], Tensor]) -> Tensor:
        """One for each reader, those of all runs added up, `[readers, prompts, position, d_model]`, in memory that is given."""
        given, xhat = self.given.unflatten(0, (n_runs, -1)), self.xhat.unflatten(1, (n_runs, -1))
        grads = room(given.shape[2], xhat[0, 0].unflatten(0, (self.rows // n_runs, -1)))
        flat = grads.flatten(1, 2)
        torch.bmm((given[0] if n_runs == 1 else given.sum(0)).transpose(0, 1), self.weights, out=flat)
        if self.along is not None:
            for run, along in enumerate(self.along.unflatten(1, (n_runs, -1)).unbind(1)):
                flat.addcmul_(xhat[:, run], along, value=-1)
        return grads

    def added(self) -> Tensor:
        """The sum of all readers that hear the same, `[1, rows, position, d_model]`."""
        total = self.given.flatten(1) @ self.weights.flatten(0, 1)
        if self.along is not None:
            total.addcmul_(self.xhat[0], self.along.sum(0), value=-1)
        return total.view(1, self.rows, -1, total.shape[-1])
