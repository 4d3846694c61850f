"""The edge-masked forward `F(m)`: the residual stream, replayed through the model's own joints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from circuitgraph._engine import EXACT, Rule
from circuitgraph._sites import LayerSites, Site, Sites
from circuitgraph_torch._bank import Bank, NoBank, Plan
from circuitgraph_torch._calls import AttentionCall
from circuitgraph_torch._joints import AttentionJoint, ModelJoints

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class SourceRun:
    """What the writers said in the source run: `values` broadcasts to `[writers, prompts, position, d_model]`.

    `before_attention`, `before_mlp` and `end` are the sums that readers would see there: before each layer's attention, before its MLP, at
    the end. They are added up when the first reader falls back to them, which none does at `m = 1`.
    """

    values: Tensor
    joints: ModelJoints
    sites: Sites

    def before_attention(self, layer: int) -> Tensor:
        return self._streams[0][layer]

    def before_mlp(self, layer: int) -> Tensor:
        return self._streams[1][layer]

    @property
    def end(self) -> Tensor:
        return self._streams[2]

    @cached_property
    def _streams(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        stream, before_attention, before_mlp = self.values[0], [], []
        for layer, joint in zip(self.sites.layers, self.joints.layers, strict=True):
            before_attention.append(stream)
            if layer.n_heads:
                stream = stream + self.values[layer.first_head : layer.first_head + layer.n_heads].sum(0)
            if joint.attention is not None and joint.attention.constant is not None:
                stream = stream + joint.attention.constant
            before_mlp.append(before_attention[-1] if joint.is_parallel else stream)
            if layer.mlp:
                stream = stream + self.values[layer.mlp_writer]
        return before_attention, before_mlp, stream


@dataclass(frozen=True, eq=False)
class LiveRun:
    """The model's own run: `values` `[writers, prompts, position, d_model]`, and the stream before each layer and at the end."""

    values: Tensor
    streams: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class AttentionStep:
    """One layer's attention on the tape: readers' inputs `x` `[distinct, prompts, position, d_model]`, projections `projected` (a leaf),
    and where the gradient of what was written starts, a tensor for each head or one for all; what it was is not held."""

    plan: Plan
    x: Tensor
    projected: Tensor
    written: GradientEdge
    n_written: int


@dataclass(frozen=True, eq=False)
class MLPStep:
    plan: Plan
    x: Tensor
    written: GradientEdge


@dataclass(eq=False)
class Tape:
    """What the backward pass needs, layer by layer, if it is to go by a rule."""

    rule: Rule = EXACT
    attention: dict[int, AttentionStep] = field(default_factory=dict)
    mlp: dict[int, MLPStep] = field(default_factory=dict)
    logits: Plan | None = None


class Forward:
    """One run under a stack of masks. Lanes and prompts share the batch: `[lanes, prompts, position, d_model]`.

    `start` and `stream`: the layer to begin at and the stream there, with the writers before it in `bank` already.
    """

    def __init__(
        self,
        joints: ModelJoints,
        sites: Sites,
        calls: Sequence[AttentionCall],
        masks: Float[ndarray, "lanes readers writers"],
        source: SourceRun,
        needed: Bool[ndarray, " readers"],
        tape: Tape | None = None,
    ) -> None:
        self._joints, self._sites, self._calls = joints, sites, calls
        self._masks, self._source, self._needed = masks, source, needed
        self._tape = tape
        self._streams: list[Tensor] = []

    def run(self, bank: Bank | NoBank, stream: Tensor, start: int) -> Tensor:
        """The inputs of the logits, `[lanes, prompts, position, d_model]`."""
        self._bank = bank
        for number in range(start, len(self._sites.layers)):
            self._streams.append(stream)
            stream = self._layer(number, stream)
        self._streams.append(stream)
        site = self._sites.logits
        plan = self._plan(site)
        if self._tape is not None:
            self._tape.logits = plan
        return self._read(plan, stream, lambda: self._source.end)[:, 0]

    @property
    def streams(self) -> tuple[Tensor, ...]:
        """The stream before each layer that was run, and at the end, `[prompts, position, d_model]` of the first lane."""
        return tuple(stream[0] for stream in self._streams)

    def _layer(self, number: int, before: Tensor) -> Tensor:
        joint, layer = self._joints.layers[number], self._sites.layers[number]
        after = before
        if joint.attention is not None:
            after = self._attention(number, layer, joint.attention, before)
        if joint.mlp is not None and layer.mlp is not None:
            after = self._mlp(number, layer.mlp, layer.mlp_writer, before if joint.is_parallel else after, after)
        return after

    def _attention(self, number: int, layer: LayerSites, joint: AttentionJoint, stream: Tensor) -> Tensor:
        assert layer.attention is not None
        heads = np.arange(layer.first_head, layer.first_head + layer.n_heads)
        alive = heads[self._bank.computed[heads]]
        plan = self._plan(layer.attention)
        if len(alive):
            x = self._read(plan, stream, lambda: self._source.before_attention(number))
            projected = self._project(joint, plan, x)
            with torch.set_grad_enabled(self._tape is not None):
                projected.requires_grad_(self._tape is not None)
                # One pass for all is enough to run, but not to tell apart the gradients of readers that say the same.
                shared = self._tape is None and plan.n_distinct == 1 and len(plan.readers) == joint.n_readers
                mixed = joint.attend(projected.flatten(0, 1), self._calls[number], rows_are_shared=shared)
                is_frozen = self._tape is not None and self._tape.rule.norms == "frozen"
                if self._tape is not None:
                    joint.check_rule(self._tape.rule)
                if self._bank.keeps:
                    written = joint.write(mixed, [*(alive - layer.first_head)], is_frozen=is_frozen)
                else:
                    written = joint.write_together(mixed, is_frozen=is_frozen)
            if self._tape is not None:
                self._tape.attention[number] = AttentionStep(plan, x[0], projected, get_gradient_edge(written), len(written))
            stream = self._add(stream, alive, written.detach())
        stream = self._add_sources(stream, np.setdiff1d(heads, alive))
        if joint.constant is not None:
            stream = stream + joint.constant
        return stream

    def _project(self, joint: AttentionJoint, plan: Plan, x: Tensor) -> Tensor:
        """`[lanes, distinct, prompts, position, d_model]` to `[lanes, prompts, position, readers * head_dim]`; zeros where not needed."""
        normed = x if joint.norm is None else joint.norm.module(x)
        if plan.n_distinct == 1 and len(plan.readers) == joint.n_readers:
            return functional.linear(normed[:, 0], joint.weights.flatten(0, 1), joint.biases.flatten())
        out = x.new_zeros(x.shape[0], *x.shape[2:-1], joint.n_readers, joint.head_dim)
        for u, members in plan.groups():
            index = torch.from_numpy(members).to(x.device)
            projected = functional.linear(normed[:, u], joint.weights[index].flatten(0, 1), joint.biases[index].flatten())
            out[..., index, :] = projected.unflatten(-1, (len(members), joint.head_dim))
        return out.flatten(-2)

    def _mlp(self, number: int, site: Site, writer: int, stream: Tensor, after: Tensor) -> Tensor:
        joint = self._joints.layers[number].mlp
        assert joint is not None
        if not self._bank.computed[writer]:
            return self._add_sources(after, np.array([writer]))
        plan = self._plan(site)
        x = self._read(plan, stream, lambda: self._source.before_mlp(number))[:, 0].flatten(0, 1)
        with torch.set_grad_enabled(self._tape is not None):
            x = x.detach().requires_grad_(self._tape is not None)
            written = joint(x) if self._tape is None else joint(x, self._tape.rule)
        if self._tape is not None:
            self._tape.mlp[number] = MLPStep(plan, x, get_gradient_edge(written))
        return self._add(after, np.array([writer]), written.detach()[None])

    def _plan(self, site: Site) -> Plan:
        readers = np.flatnonzero(self._needed[site.first : site.stop])
        mask = self._masks[:, site.first : site.stop, : site.n_visible]
        return Plan.of(mask, readers, self._bank.computed[: site.n_visible])

    def _read(self, plan: Plan, stream: Tensor, source: Callable[[], Tensor]) -> Tensor:
        mixed = self._bank.mix(plan)
        base = stream[:, None] if plan.from_live else source().expand(stream.shape[1:])[None, None]
        if mixed is not None:
            return mixed.add_(base)
        lanes = len(self._masks)
        return base.expand(lanes, plan.n_distinct, *base.shape[2:])

    def _add(self, stream: Tensor, writers: Int[ndarray, " some"], written: Tensor) -> Tensor:
        """Add `[some, lanes * prompts, position, d_model]` to the stream and keep the differences."""
        written = written.unflatten(1, (len(self._masks), -1))
        if not self._bank.keeps:
            return stream + written.sum(0)
        values = self._source.values[int(writers[0]) : int(writers[-1]) + 1]
        chosen = values if len(values) == len(writers) else values[torch.from_numpy(writers - writers[0]).to(values.device)]
        self._bank.write(writers, written, chosen[:, None])
        return stream + written.sum(0)

    def _add_sources(self, stream: Tensor, writers: Int[ndarray, " some"]) -> Tensor:
        """Writers that nobody needs stand at their source values."""
        for writer in writers:
            stream = stream + self._source.values[int(writer)]
        return stream
