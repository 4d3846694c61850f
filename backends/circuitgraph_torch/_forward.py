"""The edge-masked forward `F(m)`: the residual stream, replayed through the model's own joints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from circuitgraph._engine import EXACT, Rule
from circuitgraph._sites import Site, Sites
from circuitgraph_torch._bank import Bank, NoBank, Plan
from circuitgraph_torch._calls import AttentionCall
from circuitgraph_torch._joints import AttentionJoint, LayerJoints, ModelJoints
from circuitgraph_torch._mlp import MLPJoint
from circuitgraph_torch._splits import CrossLayerSplit, OutputSplit, Split

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class SourceRun:
    """What the writers said in the source run: `values` broadcasts to `[writers, prompts, position, d_model]`.

    `heard(site)` is the sum that readers of a site would see there. The sums are made when the first reader falls back to them, which none
    does at `m = 1`. `stream(layer)` is that before a layer, and the stream after the last one.

    `later`: the same run from the first position at which it may differ from the model's own, if that is known. It, and whatever is run
    against it, leaves the `n_before` positions before out, but for what attention hears of them: `before`, by layer,
    `[prompts, position, readers * head_dim]`.
    """

    values: Tensor
    joints: ModelJoints
    sites: Sites
    later: SourceRun | None = None
    n_before: int = 0
    before: Mapping[int, Tensor] = field(default_factory=dict)

    def heard(self, site: Site) -> Tensor:
        return self._streams[0][site.first]

    def stream(self, layer: int) -> Tensor:
        return self._streams[1][layer]

    @cached_property
    def _streams(self) -> tuple[dict[int, Tensor], list[Tensor]]:
        heard: dict[int, Tensor] = {}
        stream, streams = self.values[0], []
        for layer, joint in zip(self.sites.layers, self.joints.layers, strict=True):
            streams.append(stream)
            stream = self._split(stream, layer.stream, layer.stream_writers, joint.splits.stream, heard)
            entering = stream
            if layer.attention is not None:
                heard[layer.attention.first] = stream
                stream = _added(stream, self.values[_slice(layer.attention_writers)].sum(0), joint.attention_constant)
            if layer.mlp is not None:
                heard[layer.mlp.first] = entering if joint.is_parallel else stream
                stream = _added(stream, self.values[_slice(layer.mlp_writers)].sum(0), joint.mlp_constant)
        streams.append(stream)
        stream = self._split(stream, self.sites.stream, self.sites.stream_writers, self.joints.stream, heard)
        heard[self.sites.logits.first] = stream
        return heard, streams

    def _split(self, stream: Tensor, site: Site | None, writers: range, split: OutputSplit | None, heard: dict[int, Tensor]) -> Tensor:
        """The stream that goes on where it is refined."""
        if site is None or split is None:
            return stream
        heard[site.first] = stream
        return _added(self.values[_slice(writers)].sum(0), split.constant)


@dataclass(frozen=True, eq=False)
class LiveRun:
    """The model's own run: `values` `[writers, prompts, position, d_model]`, the stream before each layer and at the end, and what features
    are that write to later layers, `[2, prompts, position, features]` by layer (see `CrossLayerSplit`). `noted`: see `Forward`."""

    values: Tensor
    streams: tuple[Tensor, ...]
    active: Mapping[int, Tensor]
    noted: Mapping[int, Tensor]


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
class InputStep:
    """An MLP, or a split of the stream, on the tape: its input `x` (a leaf), `[prompts, position, d_model]`, or where each reader has one
    of its own `[readers, prompts, position, d_model]`; and where the gradient of what was written starts, `[written, ...]`.

    Of a layer of a cross-layer transcoder also what the features of earlier layers are (`earlier`, a leaf), and where the gradient of what
    its own are starts (`active`), if they write to later layers."""

    plan: Plan
    x: Tensor
    written: GradientEdge
    n_written: int
    earlier: Tensor | None = None
    active: GradientEdge | None = None


@dataclass(eq=False)
class Tape:
    """What the backward pass needs, layer by layer, if it is to go by a rule."""

    rule: Rule = EXACT
    attention: dict[int, AttentionStep] = field(default_factory=dict)
    mlp: dict[int, InputStep] = field(default_factory=dict)
    stream: dict[int, InputStep] = field(default_factory=dict)
    logits: Plan | None = None


class Forward:
    """One run under a stack of masks. Lanes and prompts share the batch: `[lanes, prompts, position, d_model]`.

    `start` and `stream`: the layer to begin at and the stream there, with the writers before it in `bank` already, and in `active` what
    features are that write to later layers, `[2, prompts, position, features]`. `n_noted`: at how many first positions what is projected
    is kept in `noted`, by layer, `[lanes * prompts, n_noted, readers * head_dim]`.
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
        n_noted: int = 0,
    ) -> None:
        self._joints, self._sites, self._calls = joints, sites, calls
        self.noted: dict[int, Tensor] = {}
        self._n_noted = n_noted
        self._masks, self._source, self._needed = masks, source, needed
        self._tape = tape
        self._streams: list[Tensor] = []
        self._active: dict[int, Tensor] = {}

    def run(self, bank: Bank | NoBank, stream: Tensor, start: int, active: Mapping[int, Tensor] = MappingProxyType({})) -> Tensor:
        """The inputs of the logits, `[lanes, prompts, position, d_model]`."""
        self._bank = bank
        lanes = len(self._masks)
        self._active = {layer: f[:, None].expand(2, lanes, *f.shape[1:]).flatten(1, 2) for layer, f in active.items() if layer < start}
        n_layers = len(self._sites.layers)
        for number in range(start, n_layers):
            self._streams.append(stream)
            stream = self._layer(number, stream)
        self._streams.append(stream)
        stream = self._split_stream(n_layers, self._joints.stream, self._sites.stream, self._sites.stream_writers, stream)
        site = self._sites.logits
        plan = self._plan(site)
        if self._tape is not None:
            self._tape.logits = plan
        return self._read(plan, stream, site)[:, 0]

    @property
    def streams(self) -> tuple[Tensor, ...]:
        """The stream before each layer that was run, and at the end, `[prompts, position, d_model]` of the first lane."""
        return tuple(stream[0] for stream in self._streams)

    @property
    def active(self) -> dict[int, Tensor]:
        """What features are that write to later layers, by layer, of all lanes: `[2, lanes * prompts, position, features]`."""
        return self._active

    def _layer(self, number: int, before: Tensor) -> Tensor:
        joint, layer = self._joints.layers[number], self._sites.layers[number]
        before = self._split_stream(number, joint.splits.stream, layer.stream, layer.stream_writers, before)
        after = before
        if joint.attention is not None and layer.attention is not None:
            after = self._attention(number, layer.attention, layer.attention_writers, joint, before)
        if joint.mlp is not None and layer.mlp is not None:
            after = self._mlp(number, layer.mlp, layer.mlp_writers, joint, before if joint.is_parallel else after, after)
        return after

    def _attention(self, number: int, site: Site, ids: range, joints: LayerJoints, stream: Tensor) -> Tensor:
        joint, split = joints.attention, joints.splits.attention
        assert joint is not None
        writers, alive = self._alive(ids)
        if len(alive):
            plan = self._plan(site)
            x = self._read(plan, stream, site)
            projected = self._project(joint, plan, x)
            with torch.set_grad_enabled(self._tape is not None):
                projected.requires_grad_(self._tape is not None)
                # One pass for all is enough to run, but not to tell apart the gradients of readers that say the same.
                shared = self._tape is None and plan.n_distinct == 1 and len(plan.readers) == joint.n_readers
                before = self._source.before.get(number)
                mixed = joint.attend(projected.flatten(0, 1), self._calls[number], rows_are_shared=shared, before=before)
                is_frozen = self._tape is not None and self._tape.rule.norms == "frozen"
                if self._tape is not None:
                    joint.check_rule(self._tape.rule)
                if not self._bank.keeps and split is None:
                    written = joint.write_together(mixed, is_frozen=is_frozen)
                elif split is None:
                    written = joint.write(mixed, [*(alive - ids.start)], is_frozen=is_frozen)
                else:
                    written = self._kept(split(joint, mixed, is_frozen=is_frozen), alive - ids.start)
            if self._tape is not None:
                self._tape.attention[number] = AttentionStep(plan, x[0], projected, get_gradient_edge(written), len(written))
            if self._n_noted:
                self.noted[number] = projected.detach().flatten(0, 1)[:, : self._n_noted].clone()
            stream = self._add(stream, alive, written.detach())
        stream = self._add_sources(stream, np.setdiff1d(writers, alive))
        return _added(stream, joints.attention_constant)

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

    def _mlp(self, number: int, site: Site, ids: range, joints: LayerJoints, stream: Tensor, after: Tensor) -> Tensor:
        joint, split = joints.mlp, joints.splits.mlp
        assert joint is not None
        writers, alive = self._alive(ids)
        if len(alive) or self._needed[site.first : site.stop].any():
            plan = self._plan(site)
            x = self._read(plan, stream, site).transpose(0, 1).flatten(1, 2)  # [distinct, lanes * prompts, position, d_model]
            has_own = split is not None and split.has_readers and self._tape is not None
            x = x[torch.from_numpy(plan.row_of).to(x.device)] if has_own else x if split is not None else x[0]
            with torch.set_grad_enabled(self._tape is not None):
                x = x.detach().requires_grad_(self._tape is not None)
                written, earlier, active = self._mlp_writes(joint, split, x, plan, alive - ids.start)
            if self._tape is not None:
                starts = get_gradient_edge(written), len(written), earlier, None if active is None else get_gradient_edge(active)
                self._tape.mlp[number] = InputStep(plan, x, *starts)
            if active is not None:
                self._active[number] = active.detach()
            after = self._add(after, alive, written.detach())
        after = self._add_sources(after, np.setdiff1d(writers, alive))
        return _added(after, joints.mlp_constant)

    def _mlp_writes(
        self, joint: MLPJoint, split: Split | None, x: Tensor, plan: Plan, chosen: Int[ndarray, " some"]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What an MLP, or chosen parts of it, writes. Of a layer of a cross-layer transcoder also what it was given of earlier features,
        and what its own are, if they write later."""
        rule = EXACT if self._tape is None else self._tape.rule
        if split is None:
            return joint(x, rule)[None], None, None
        if not isinstance(split, CrossLayerSplit):
            return self._kept(split(joint, x, plan, rule), chosen), None, None
        earlier = split.gathered(self._active, x).detach().requires_grad_(self._tape is not None)
        parts, active = split(joint, x, earlier, plan, rule)
        return self._kept(parts, chosen), earlier, active

    def _split_stream(self, number: int, split: OutputSplit | None, site: Site | None, ids: range, stream: Tensor) -> Tensor:
        """The stream that goes on where it is refined: its parts and a constant."""
        if split is None or site is None:
            return stream
        writers, alive = self._alive(ids)
        after = torch.zeros_like(stream)
        if len(alive):
            plan = self._plan(site)
            x = self._read(plan, stream, site)[:, 0].flatten(0, 1)
            with torch.set_grad_enabled(self._tape is not None):
                x = x.detach().requires_grad_(self._tape is not None)
                written = self._kept(split(x, x), alive - ids.start)
            if self._tape is not None:
                self._tape.stream[number] = InputStep(plan, x, get_gradient_edge(written), len(written))
            after = self._add(after, alive, written.detach())
        after = self._add_sources(after, np.setdiff1d(writers, alive))
        return _added(after, split.constant)

    def _alive(self, ids: range) -> tuple[Int[ndarray, " some"], Int[ndarray, " some"]]:
        """Some writers, and those of them that are needed."""
        writers = np.arange(ids.start, ids.stop)
        return writers, writers[self._bank.computed[writers]]

    def _kept(self, written: Tensor, chosen: Int[ndarray, " some"]) -> Tensor:
        """What the chosen parts write, or all together where nobody asks for one of them."""
        if not self._bank.keeps:
            return written.sum(0, keepdim=True)
        return written if len(chosen) == len(written) else written[torch.from_numpy(chosen).to(written.device)]

    def _plan(self, site: Site) -> Plan:
        readers = np.flatnonzero(self._needed[site.first : site.stop])
        mask = self._masks[:, site.first : site.stop, : site.n_visible]
        computed = self._bank.computed[: site.n_visible].copy()
        computed[: site.first_visible] = False
        return Plan.of(mask, readers, computed)

    def _read(self, plan: Plan, stream: Tensor, site: Site) -> Tensor:
        mixed = self._bank.mix(plan)
        base = stream[:, None] if plan.from_live else self._source.heard(site).expand(stream.shape[1:])[None, None]
        if mixed is not None:
            return mixed.add_(base)
        lanes = len(self._masks)
        return base.expand(lanes, plan.n_distinct, *base.shape[2:])

    def _add(self, stream: Tensor, writers: Int[ndarray, " some"], written: Tensor) -> Tensor:
        """Add `[some, lanes * prompts, position, d_model]` to the stream and keep the differences."""
        if len(written) == 0:
            return stream
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


def _added(stream: Tensor, *further: Tensor | None) -> Tensor:
    """The stream with what is there added."""
    for vectors in further:
        stream = stream if vectors is None else stream + vectors
    return stream


def _slice(ids: range) -> slice:
    return slice(ids.start, ids.stop)
