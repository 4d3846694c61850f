"""`dF/dm` by one backward pass over the tape of a forward one, from the logits down. Weights get no gradient.

The gradients of the readers' inputs go to a collector (see `_collect`), which makes scores of them, and to the writers that were read.
Those follow the two forms of a read (see `_bank`): a running gradient of the stream, plus corrections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from circuitgraph._engine import EXACT
from circuitgraph._sites import Site, Sites
from circuitgraph_torch._bank import Plan, by_position, to_tensor
from circuitgraph_torch._collect import Collector, Spans
from circuitgraph_torch._forward import AttentionStep, InputStep, Tape
from circuitgraph_torch._joints import AttentionJoint, ModelJoints
from circuitgraph_torch._reader_grads import ReaderGrads
from circuitgraph_torch._recomputed import Recomputed
from circuitgraph_torch._spare import Room
from circuitgraph_torch._splits import CrossLayerSplit

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray


class Backward:
    """Walks a tape backwards, by the tape's rule, and hands what it finds to a collector."""

    def __init__(
        self, joints: ModelJoints, sites: Sites, collector: Collector, spans: Spans | None = None, recomputed: Recomputed | None = None
    ) -> None:
        self._joints, self._sites, self._collector, self._spans = joints, sites, collector, spans
        self._recomputed = recomputed
        self._corrections: Tensor | None = None
        self._folded = Room()
        self._active: dict[int, Tensor] = {}  # the gradients of what features are that write to later layers
        self.rule = EXACT

    def run(self, tape: Tape, grad_logits_input: Tensor, length: int, n_runs: int = 1) -> None:
        """From the gradient of the logits' input at the last position, `[rows, 1, d_model]`, of prompts of this length.

        The rows may be those of several runs of the prompts, one after the other, in which all readers of a site hear the same.
        """
        assert tape.logits is not None
        self.rule, self._n_runs = tape.rule, n_runs
        self._collector.add(self._sites.logits, tape.logits.readers, grad_logits_input[None], last_only=True)
        spread = grad_logits_input.new_zeros(len(grad_logits_input), length, grad_logits_input.shape[-1])
        self._stream = torch.zeros_like(spread)
        spread[:, -1:] = grad_logits_input
        self._propagate(tape.logits, spread[None])
        n_layers = len(self._sites.layers)
        self._split_stream(tape.stream.get(n_layers), self._sites.stream, self._sites.stream_writers)
        for number in range(n_layers - 1, -1, -1):
            if number != tape.rule.dropped_layer:
                self._layer(number, tape)
                continue
            if (step := tape.mlp.get(number)) is not None and step.earlier is not None:
                writers = self._sites.layers[number].mlp_writers
                self._to_earlier(number, torch.autograd.grad(step.written, step.earlier, self._writer_grads(writers)[: step.n_written])[0])
            if number in tape.stream:
                self._stream = torch.zeros_like(self._stream)

    def _layer(self, number: int, tape: Tape) -> None:
        joint, layer, attention = self._joints.layers[number], self._sites.layers[number], tape.attention.get(number)
        grad_heads = self._writer_grads(layer.attention_writers) if joint.is_parallel and attention else None
        self._mlp(number, tape.mlp.get(number), layer.mlp, layer.mlp_writers)
        if attention is not None and joint.attention is not None and layer.attention is not None:
            grad_heads = self._writer_grads(layer.attention_writers) if grad_heads is None else grad_heads
            grad_heads = grad_heads[: attention.n_written]  # where the heads wrote together, they share one
            which = self._live_readers(joint.attention, attention.plan)
            found = self.reader_grads(joint.attention, attention, grad_heads, which)
            grads = found.over_runs(self._n_runs, self._collector.room)
            self._collector.add(layer.attention, attention.plan.readers[which], grads)
            self._propagate(attention.plan, _sum_by_row(attention.plan, grads, which) if self._n_runs == 1 else found.added())
            if self._recomputed is not None:
                projected = attention.projected.detach()[0]
                self._recomputed.layer(number, attention.x[0], projected, grad_heads, is_frozen=self.rule.norms == "frozen")
        self._split_stream(tape.stream.get(number), layer.stream, layer.stream_writers)

    def _mlp(self, number: int, step: InputStep | None, site: Site | None, writers: range) -> None:
        if step is None or site is None:
            return
        ends, given = [step.written], [self._writer_grads(writers)[: step.n_written]]
        if step.active is not None and number in self._active:
            ends, given = [*ends, step.active], [*given, self._active.pop(number)]
        grad, *of_earlier = torch.autograd.grad(ends, [step.x, *([] if step.earlier is None else [step.earlier])], given)
        for grads in of_earlier:
            self._to_earlier(number, grads)
        grads = grad if grad.dim() == 4 else grad[None]
        self._collector.add(site, step.plan.readers, grads)
        self._propagate(step.plan, _sum_by_row(step.plan, grads, np.arange(len(grads))))

    def _to_earlier(self, number: int, grads: Tensor) -> None:
        """What goes back from a layer to features of earlier ones that write there, `[2, prompts, position, features]`."""
        split = self._joints.layers[number].splits.mlp
        assert isinstance(split, CrossLayerSplit)
        for (layer, _), part in zip(split.earlier, grads.split([n for _, n in split.earlier], dim=-1), strict=True):
            self._active[layer] = self._active[layer] + part if layer in self._active else part

    def _split_stream(self, step: InputStep | None, site: Site | None, writers: range) -> None:
        """Where the stream was refined, what came before is heard by one reader only."""
        if step is None or site is None:
            return
        (grad,) = torch.autograd.grad(step.written, step.x, self._writer_grads(writers)[: step.n_written])
        self._stream = torch.zeros_like(self._stream)
        self._collector.add(site, step.plan.readers, grad[None])
        self._propagate(step.plan, grad[None])

    def _live_readers(self, joint: AttentionJoint, plan: Plan) -> Int[ndarray, " some"]:
        """Which of the plan's readers get a gradient: with frozen patterns only values do, on which no pattern depends."""
        if self.rule.patterns == "frozen":
            return np.flatnonzero(plan.readers >= joint.first_value)
        return np.arange(len(plan.readers))

    def reader_grads(self, joint: AttentionJoint, step: AttentionStep, grad_heads: Tensor, which: Int[ndarray, " some"]) -> ReaderGrads:
        """Of some of the readers of a step, from the gradient of what the heads write."""
        (grad,) = torch.autograd.grad(step.written, step.projected, grad_heads)
        return ReaderGrads.of(joint, step, grad, which, self._folded, is_frozen=self.rule.norms == "frozen")

    def _propagate(self, plan: Plan, grads: Tensor) -> None:
        """Hand the gradients of a site's distinct inputs `[distinct, prompts, position, d_model]` on to the writers it read."""
        if plan.from_live:
            self._stream = self._stream + grads.sum(0)  # not in place: a parallel block still holds the old one
        rows = plan.rows[0]
        if not rows.any():
            return
        if self._corrections is None:
            self._corrections = self._stream.new_zeros(len(self._sites.graph.writers), *self._stream.shape)
        seen = self._corrections[: rows.shape[1]]
        if rows.ndim == 2:
            seen.view(len(seen), -1).addmm_(to_tensor(rows.T, grads), grads.reshape(len(rows), -1))
        else:
            assert self._spans is not None
            coefficients = by_position(rows, self._spans.index, grads).transpose(1, 2)
            seen.flatten(1, 2).add_(torch.bmm(coefficients, grads.flatten(1, 2).transpose(0, 1)).transpose(0, 1))

    def _writer_grads(self, writers: range) -> Tensor:
        """`[some, prompts, position, d_model]`."""
        grads = self._stream.expand(len(writers), *self._stream.shape)
        return grads if self._corrections is None else grads + self._corrections[writers[0] : writers[-1] + 1]


def _sum_by_row(plan: Plan, grads: Tensor, which: Int[ndarray, " some"]) -> Tensor:
    """The gradients of a plan's distinct inputs from those of some of its readers."""
    if plan.n_distinct == 1:
        return grads.sum(0, keepdim=True)
    row_of = torch.from_numpy(plan.row_of[which]).to(grads.device)
    return grads.new_zeros(plan.n_distinct, *grads.shape[1:]).index_add_(0, row_of, grads)
