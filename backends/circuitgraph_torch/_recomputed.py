"""Scores of edges into queries and keys by what attention says when the edge alone is patched (AtP*'s QK fix, Kramar et al. 2024).

    score(w -> r) = - sum over the heads h that r feeds of <dF/dmixed_h, mixed_h(x_r - (live_w - source_w)) - mixed_h>

`mixed_h` are a head's mixed values, `x_r` the reader's input; all other inputs of the attention stay. The model's own attention code runs
with writers as an extra batch: once for all queries of a layer, since no head looks at another's, and once for all keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from circuitgraph._sites import Sites
from circuitgraph_torch._calls import AttentionCall
from circuitgraph_torch._collect import EdgeScores, Spans
from circuitgraph_torch._joints import AttentionJoint, ModelJoints

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class Recomputed:
    """Puts the scores of the `q` and `k` readers of a run at `m = 1`, layer by layer, into `scores`.

    `before`: what is projected at positions that are left out (see `SourceRun`), by layer. `differences` are
    `[writers, prompts, position, d_model]`; the rows of a run may be several runs of the prompts, one after the other.
    `most_bytes` is what one call of the attention code may take.
    """

    joints: ModelJoints
    sites: Sites
    calls: Sequence[AttentionCall]
    before: Mapping[int, Tensor]
    scores: EdgeScores
    differences: Tensor
    spans: Spans | None
    most_bytes: int

    def layer(self, number: int, x: Tensor, projected: Tensor, grad_heads: Tensor, *, is_frozen: bool) -> None:
        """`x` `[rows, position, d_model]` and `projected` `[rows, position, readers * head_dim]` of the run, and the gradient of what the
        heads write, `[heads, ...]` or one for all. `is_frozen`: the scale of a post-norm is a constant."""
        site, joint = self.sites.layers[number].attention, self.joints.layers[number].attention
        assert site is not None
        assert joint is not None
        call, before = self.calls[number], self.before.get(number)
        mixed = joint.attend(projected, call, rows_are_shared=True, before=before)
        with torch.enable_grad():
            mixed.requires_grad_()
            written = joint.write(mixed, range(joint.n_heads), is_frozen=is_frozen)
        (grad,) = torch.autograd.grad(written, mixed, grad_heads.expand(written.shape))
        layer = _Layer(joint, call, before, x, projected, mixed.detach(), grad, self.differences[: site.n_visible], self.spans)
        for readers in _together(joint):
            self.scores.put(site, np.arange(readers.start, readers.stop), layer.scores(readers, self.most_bytes))


def _together(joint: AttentionJoint) -> Iterator[range]:
    """The queries and the keys of a layer, in ranges that can be patched in one go; one by one where a norm over all heads couples them."""
    if joint.couples_heads:
        yield from (range(reader, reader + 1) for reader in range(joint.first_value))
    else:
        yield range(joint.n_heads)
        yield range(joint.n_heads, joint.first_value)


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer's attention in the run, and the gradient of its mixed values `[rows, position, heads, head_dim]`."""

    joint: AttentionJoint
    call: AttentionCall
    before: Tensor | None
    x: Tensor
    projected: Tensor
    mixed: Tensor
    grad: Tensor
    differences: Tensor
    spans: Spans | None

    def scores(self, readers: range, most_bytes: int) -> Tensor:
        """Of the edges into these readers, `[prompts, readers, writers]`, by span if there are any."""
        size = max(1, most_bytes // self._bytes_per_writer)
        are_keys = readers.start >= self.joint.n_heads
        if self.spans is None or not are_keys:
            at_once: list[Tensor | None] = [None]
        else:  # a key moves what later positions say: its spans are patched one by one
            at_once = [(self.spans.index == span)[..., None] for span in range(self.spans.count)]
        by_span = [torch.cat([self._patched(readers, part, where) for part in self.differences.split(size)]) for where in at_once]
        if self.spans is not None and are_keys:
            summed = torch.stack([change.sum(2) for change in by_span], -1)
        elif self.spans is not None:  # a query moves its own position
            summed = torch.stack([self.spans.sums(change) for change in by_span[0]]).movedim(2, -1)
        else:
            summed = by_span[0].sum(2)
        fed = torch.from_numpy(self._fed(readers)).to(summed)  # [readers, heads]
        return -torch.einsum("wnh...,rh->nrw...", summed, fed)

    def _patched(self, readers: range, differences: Tensor, where: Tensor | None) -> Tensor:
        """What patching some writers changes, to first order in the heads, `[writers, prompts, position, heads]`, summed over runs."""
        joint, n_prompts = self.joint, differences.shape[1]
        differences = differences if where is None else differences * where
        x = self.x.unflatten(0, (-1, n_prompts)) - differences[:, None]  # [writers, runs, prompts, position, d_model]
        normed = x if joint.norm is None else joint.norm(x.flatten(0, 2)).view_as(x)
        chosen = slice(readers.start, readers.stop)
        projected = self.projected.expand(len(x), *self.projected.shape).clone()
        columns = projected[..., readers.start * joint.head_dim : readers.stop * joint.head_dim]
        columns.copy_(functional.linear(normed, joint.weights[chosen].flatten(0, 1), joint.biases[chosen].flatten()).flatten(1, 2))
        # All readers of a group that are patched say the same; where one is patched by itself, they do not.
        mixed = joint.attend(projected.flatten(0, 1), self.call, rows_are_shared=not joint.couples_heads, before=self.before)
        change = ((mixed.view(len(x), *self.mixed.shape) - self.mixed) * self.grad).sum(-1)
        return change.view(*x.shape[:3], *change.shape[2:]).sum(1)

    def _fed(self, readers: range) -> Bool[ndarray, "readers heads"]:
        """Which heads' mixed values a reader moves."""
        joint = self.joint
        if joint.couples_heads:
            return np.ones((len(readers), joint.n_heads), dtype=bool)
        size = joint.n_heads // len(readers)
        fed: Bool[ndarray, "readers heads"] = np.arange(joint.n_heads) // size == np.arange(len(readers))[:, None]
        return fed

    @property
    def _bytes_per_writer(self) -> int:
        positions = self.x.shape[0] * (self.x.shape[1] + (0 if self.before is None else self.before.shape[1]))
        joint = self.joint
        width = 3 * self.x.shape[-1] + (2 * joint.n_readers + 6 * joint.n_heads) * joint.head_dim + 2 * joint.n_heads * self.x.shape[1]
        return positions * width * self.x.element_size()
