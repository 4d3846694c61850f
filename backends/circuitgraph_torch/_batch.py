"""Prompts of one length, run together: the cached runs of the model and of the source, and `F`, `dF/dm` and writer values on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from circuitgraph._engine import Rule
from circuitgraph._incremental import Cost, Incremental, Part, Plan
from circuitgraph._memory import MemoryBudget
from circuitgraph._metrics import Metric, Target, log_softmax
from circuitgraph._pairs import Bucket, TokenSets
from circuitgraph._sites import Sites
from circuitgraph_torch._backward import Backward
from circuitgraph_torch._bank import Bank, NoBank
from circuitgraph_torch._calls import AttentionCall, attention_calls, block_input
from circuitgraph_torch._collect import Collector, EdgeScores, SourceGrads, Spans
from circuitgraph_torch._forward import Forward, LiveRun, SourceRun, Tape
from circuitgraph_torch._joints import ModelJoints
from circuitgraph_torch._kept import KeptRun
from circuitgraph_torch._modes import Modes, widened
from circuitgraph_torch._recomputed import Recomputed
from circuitgraph_torch._spare import Spare

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from circuitgraph._architecture import Architecture

_COST = Cost(node=1.05, other_row=4)  # many small steps; rows that are not those of the kept run are added up one by one
_IN_CACHE = 1 << 20
"""So many logits a metric gets at once on a CPU: it goes over them several times, and they should still be in the cache."""


@dataclass(frozen=True, eq=False)
class Parts:
    """A traced model in its parts. `largest`: how many prompts a batch may have at most, where memory said so. `looks_back`: no position
    hears of later ones. `spare`: for runs of all writers."""

    model: nn.Module
    architecture: Architecture
    joints: ModelJoints
    sites: Sites
    budget: MemoryBudget
    largest: int | None = None
    looks_back: bool = False
    spare: Spare = field(default_factory=Spare)
    _calls: dict[int, list[AttentionCall]] = field(default_factory=dict)

    @cached_property
    def modes(self) -> Modes:
        return Modes(self.model)

    def calls(self, length: int) -> list[AttentionCall]:
        """The arguments of every layer's attention on prompts of this length (a stand-in where a layer has none); seen once."""
        if length not in self._calls:
            self._calls[length] = self._observed_calls(length)
        return self._calls[length]

    def _observed_calls(self, length: int) -> list[AttentionCall]:
        paths = [b.attention.path for b in self.architecture.blocks if b.attention]
        mlps = [path for b in self.architecture.blocks if b.mlp for path in b.mlp.modules]
        found = iter(attention_calls(self.model, paths, length, self.device, silent=[*paths, *mlps]) if paths else [])
        nothing = AttentionCall((), {}, torch.empty(0))
        return [next(found) if b.attention else nothing for b in self.architecture.blocks]

    def embed(self, ids: Int[ndarray, "prompts position"]) -> Tensor:
        """What the first block receives."""
        return block_input(self.model, self.architecture.blocks[0].path, torch.from_numpy(ids).to(self.device))

    @property
    def longest(self) -> int:
        """How many tokens a prompt may have where positions are learned; else more than anyone will ask for."""
        if self.architecture.positions is None:
            return 1 << 20
        rows = len(next(self.model.get_submodule(self.architecture.positions).parameters()))
        config = getattr(self.model, "config", None)
        return min(rows, getattr(config, "max_position_embeddings", None) or rows)  # OPT's table has two rows more than positions

    @property
    def like(self) -> Tensor:
        """A tensor of the model's dtype, on its device."""
        return next(self.model.parameters()).detach()

    @property
    def device(self) -> torch.device:
        return self.like.device


class Batch:
    """One batch of prompts of equal length, `live` the prompts that are run, `clean` those whose logits a metric may compare with."""

    def __init__(
        self, parts: Parts, bucket: Bucket, metric: Metric, live: Int[ndarray, "prompts position"], other: Int[ndarray, "prompts position"]
    ) -> None:
        self.index = bucket.index
        self._parts, self._bucket, self._metric = parts, bucket, metric
        self.live_ids, self._other_ids = live, other
        self._differences: tuple[SourceRun, Tensor] | None = None
        self._unmixed: tuple[SourceRun, bytes, Tensor] | None = None
        self._kept: tuple[SourceRun, KeptRun, Incremental] | None = None

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def _calls(self) -> list[AttentionCall]:
        return self._parts.calls(self.live_ids.shape[1])

    @cached_property
    def _input(self) -> Tensor:
        return self._parts.embed(self.live_ids)

    @cached_property
    def live(self) -> LiveRun:
        """The model's own run."""
        return self._plain(self._input)

    def other_run(self) -> SourceRun:
        """The run of the pairs' other prompts."""
        first = self._first_difference
        run = self._plain(self._parts.embed(self._other_ids), n_noted=first)
        later = replace(self.source_run(run.values[:, :, first:]), n_before=first, before=run.noted) if first else None
        return replace(self.source_run(run.values), later=later)

    @property
    def _first_difference(self) -> int:
        """The first position at which something may be said that is not said on the other prompts; the last one if there is none."""
        if not self._parts.looks_back:
            return 0
        differs = np.append((self.live_ids != self._other_ids).any(axis=0)[:-1], True)
        return int(np.argmax(differs))

    def source_run(self, values: Tensor) -> SourceRun:
        return SourceRun(values, self._parts.joints, self._parts.sites)

    def forget(self) -> None:
        """Drop the cached runs."""
        self._differences = self._unmixed = self._kept = None
        self.__dict__.pop("live", None)
        self.__dict__.pop("_input", None)

    def evaluate(self, masks: Float[ndarray, "lanes readers writers"], source: SourceRun) -> Float[ndarray, "lanes prompts"]:
        """From a run that is kept, where that is less work. (A run with refined components is not kept yet.)"""
        if len(masks) == 0 or masks.ndim == 4 or self._parts.sites.is_refined:
            return self._fresh(masks, source)
        kept, plan = self._planned(masks, source)
        if not plan.parts:
            return self._fresh(masks, source)
        out = np.empty((len(masks), len(self)))
        for part in plan.parts:
            size = max(1, self._parts.budget.lanes // self._bytes_per_lane(part))
            for at in range(0, len(part.lanes), size):
                lanes = part.lanes[at : at + size]
                out[lanes] = self._measure(kept.ends(masks[lanes], part)).double().cpu().numpy()
        return out

    def _planned(self, masks: Float[ndarray, "lanes readers writers"], source: SourceRun) -> tuple[KeptRun, Plan]:
        """The kept run, moved to where these masks want it, and what to run from there."""
        if self._kept is None or self._kept[0] is not source:
            kept = self._new_kept(source)
            self._kept = (source, kept, Incremental(self._parts.sites, self.live_ids.shape[1], _COST, kept.first))
        (_, kept, incremental), self._kept = self._kept, None  # whoever interrupts a move leaves no half-moved run behind
        plan = incremental.plan(masks)
        if plan.anew:
            kept = self._new_kept(source)
        if plan.move is not None:
            kept.move(incremental.mask, plan.move)
        self._kept = (source, kept, incremental)
        return kept, plan

    def _new_kept(self, source: SourceRun) -> KeptRun:
        return KeptRun(self._parts.joints, self._parts.sites, self._calls, self.live, source, self._live_differences(source))

    def _bytes_per_lane(self, part: Part) -> int:
        vectors = int((part.changed.writers > 0).sum()) + 2 * self._widest  # what changes, one layer's readers and their norms
        return vectors * self._input.numel() * max(4, self._input.element_size())

    def _fresh(self, masks: Float[ndarray, "lanes readers writers"], source: SourceRun) -> Float[ndarray, "lanes prompts"]:
        """Of each lane from the first layer in which it differs from the model's own run."""
        starts = self._parts.sites.first_difference(masks if masks.ndim == 3 else (masks == 1).all(axis=-1))
        out = np.empty((len(masks), len(self)))
        order = np.argsort(starts, kind="stable")
        at = 0
        while at < len(order):
            start = int(starts[order[at]])
            chosen = order[at : at + self._lanes(start)]
            out[chosen] = self._lanes_from(start, masks[chosen], source)
            at += len(chosen)
        return out

    def _lanes(self, start: int) -> int:
        sites, x = self._parts.sites, self._input
        vectors = len(sites.graph.writers) - sites.writers_before(start) + 2 * self._widest  # writers, one layer's readers and norms
        return max(1, self._parts.budget.lanes // (vectors * x.numel() * x.element_size()))

    @property
    def _widest(self) -> int:
        """How many readers an attention, or a refined MLP, has at most."""
        sites = [site for layer in self._parts.sites.layers for site in (layer.attention, layer.mlp) if site]
        return max((site.stop - site.first for site in sites), default=1)

    def _lanes_from(self, start: int, masks: Float[ndarray, "lanes readers writers"], source: SourceRun) -> Float[ndarray, "lanes prompts"]:
        sites = self._parts.sites
        needed_readers, needed_writers = sites.graph.needed((masks != 0).any(axis=0 if masks.ndim == 3 else (0, 3)))
        shared = self._live_differences(source)[: sites.writers_before(start)]
        bank = Bank(shared, len(masks), needed_writers, self._input, self._spans)
        stream = self.live.streams[start].expand(len(masks), *self._input.shape)
        x = self._forward(masks, source, needed_readers).run(bank, stream, start, self.live.active)
        values: Float[ndarray, "lanes prompts"] = self._measure(x[:, :, -1]).double().cpu().numpy()
        return values

    def gradient(
        self, mask: Float[ndarray, "readers writers"], source: SourceRun, mixes: Sequence[float], rule: Rule
    ) -> Float[ndarray, "prompts readers writers"]:
        """The mean of the gradients at these mixes. At `m = 1` several runs of mixed prompts share a pass. Where the source is the same as
        the prompts nothing is scored, so nothing is run."""
        visible = self._parts.sites.graph.visible
        is_live = bool((mask[visible] == 1).all())
        source, differences = source.later or source, None
        if is_live and [*mixes] != [1.0]:
            differences = self._live_differences(source)
        elif any(mix != 1.0 for mix in mixes):
            differences = self._unmixed_differences(mask, source)
        total: Float[ndarray, "prompts readers writers"] = np.zeros(())
        size = self._mixes_at_once if is_live and differences is not None else 1
        for at in range(0, len(mixes), size):
            total = total + self._scores(mask, source, mixes[at : at + size], rule, differences, is_live=is_live)
        scores: Float[ndarray, "prompts readers writers"] = total * (visible if mask.ndim == 2 else visible[..., None]) / len(mixes)
        return scores

    def _scores(
        self,
        mask: Float[ndarray, "readers writers"],
        source: SourceRun,
        mixes: Sequence[float],
        rule: Rule,
        differences: Tensor | None,
        *,
        is_live: bool,
    ) -> Float[ndarray, "prompts readers writers"]:
        """The sum of the gradients at some mixes; without `differences`, those of this very run score the edges."""
        tape = Tape(rule)
        if is_live and differences is not None:
            x = self._together(mask, source, mixes, tape)
        else:
            x, bank = self._from_the_input(mask, source, self._mixed(source, mixes[0]), tape)
            differences = bank.own[0] if differences is None else differences
        spans = self._by_span(mask, source.n_before)
        scores = EdgeScores(self._parts.sites, differences, spans)
        recomputed = None
        if rule.patterns == "recomputed":
            recomputed = Recomputed(
                self._parts.joints, self._parts.sites, self._calls, source.before, scores, differences, spans, self._parts.budget.lanes
            )
        self._backward(tape, x[0], scores, spans, recomputed)
        return scores.scores()

    def source_gradient(self, mask: Float[ndarray, "readers writers"], source: SourceRun) -> Float[ndarray, "prompts writers d_model"]:
        """The gradient in a vector that is added to what each writer says in the source run."""
        tape, spans, visible = Tape(), self._by_span(mask), self._parts.sites.graph.visible
        x, _ = self._from_the_input(mask, source, self._input, tape)
        mask = np.where(visible if mask.ndim == 2 else visible[..., None], mask, 1)
        grads = SourceGrads(self._parts.sites, mask, self._input, spans)
        self._backward(tape, x[0], grads, spans, None)
        return grads.grads

    def _backward(self, tape: Tape, x: Tensor, collector: Collector, spans: Spans | None, recomputed: Recomputed | None) -> None:
        """`x`: the inputs of the logits, `[prompts, position, d_model]`, or those of several runs one after the other."""
        last = x[:, -1:].detach().requires_grad_()
        with torch.enable_grad():
            runs = last[:, 0].unflatten(0, (-1, len(self)))
            total = self._measure(runs, is_frozen=tape.rule.norms == "frozen").sum()
        (grad,) = torch.autograd.grad(total, last)
        Backward(self._parts.joints, self._parts.sites, collector, spans, recomputed).run(tape, grad, x.shape[1], len(runs))

    def _together(self, mask: Float[ndarray, "readers writers"], source: SourceRun, mixes: Sequence[float], tape: Tape) -> Tensor:
        """The logits' inputs at `m = 1` of the runs at some mixes, one after the other; nothing is kept of what single writers say."""
        start = torch.cat([self._mixed(source, mix) for mix in mixes])
        forward = self._forward(mask[None], source, np.ones(mask.shape[0], dtype=bool), tape)
        return forward.run(NoBank(mask.shape[1]), start[None], 0)

    @property
    def _mixes_at_once(self) -> int:
        """How many mixed runs fit in memory: autograd keeps some thirty vectors of the stream's size of a layer."""
        per_mix = 30 * len(self._parts.sites.layers) * self._input.numel() * self._input.element_size()
        return max(1, self._parts.budget.lanes // per_mix)

    def _mixed(self, source: SourceRun, mix: float) -> Tensor:
        """What the input says on the way from the source to the prompts."""
        x = self._input[:, source.n_before :]
        return x if mix == 1.0 else source.values[0] + mix * (x - source.values[0])

    @cached_property
    def _spans(self) -> Tensor:
        return torch.from_numpy(self._bucket.spans).to(self._parts.device)

    def _by_span(self, mask: Float[ndarray, "readers writers"], n_before: int = 0) -> Spans | None:
        return Spans(self._spans[:, n_before:], mask.shape[2]) if mask.ndim == 3 else None

    def values(self, mask: Float[ndarray, "readers writers"] | None, source: SourceRun) -> Tensor:
        """What every writer says under a mask, `[writers, prompts, position, d_model]`."""
        if mask is None:
            return self.live.values
        _, bank = self._from_the_input(mask, source, self._input, None)
        return bank.own[0] + source.values

    def logits(self, mask: Float[ndarray, "readers writers"], source: SourceRun) -> Tensor:
        """All logits of a run under a mask, `[prompts, position, vocabulary]`."""
        x, _ = self._from_the_input(mask, source, self._input, None)
        return self._parts.joints.logits(x[0])

    def _from_the_input(
        self, mask: Float[ndarray, "readers writers"], source: SourceRun, start: Tensor, tape: Tape | None
    ) -> tuple[Tensor, Bank]:
        everything = np.ones(len(self._parts.sites.graph.writers), dtype=bool)
        bank = Bank(start.new_empty(0, *start.shape), 1, everything, start, self._spans[:, source.n_before :], self._parts.spare)
        bank.write(np.array([0]), start[None, None], source.values[:1, None])
        forward = self._forward(mask[None], source, np.ones(mask.shape[0], dtype=bool), tape)
        return forward.run(bank, start[None], 0), bank

    def _plain(self, start: Tensor, *, n_noted: int = 0) -> LiveRun:
        sites = self._parts.sites
        ones = np.ones((1, *sites.graph.shape), dtype=np.float32)
        zero = self.source_run(start.new_zeros(len(sites.graph.writers), 1, 1, start.shape[-1]))
        bank = Bank(start.new_empty(0, *start.shape), 1, np.ones(ones.shape[2], dtype=bool), start, allocate=self._parts.spare)
        bank.write(np.array([0]), start[None, None], zero.values[:1, None])
        forward = self._forward(ones, zero, np.ones(ones.shape[1], dtype=bool), n_noted=n_noted)
        forward.run(bank, start[None], 0)
        return LiveRun(bank.own[0], forward.streams, forward.active, forward.noted)

    def _forward(
        self,
        masks: Float[ndarray, "lanes readers writers"],
        source: SourceRun,
        needed: Bool[ndarray, " readers"],
        tape: Tape | None = None,
        *,
        n_noted: int = 0,
    ) -> Forward:
        return Forward(self._parts.joints, self._parts.sites, self._calls, masks, source, needed, tape, n_noted)

    def _live_differences(self, source: SourceRun) -> Tensor:
        if self._differences is None or self._differences[0] is not source:
            self._differences = (source, self.live.values[:, :, source.n_before :] - source.values)
        return self._differences[1]

    def _unmixed_differences(self, mask: Float[ndarray, "readers writers"], source: SourceRun) -> Tensor:
        key = mask.tobytes()
        if self._unmixed is None or self._unmixed[0] is not source or self._unmixed[1] != key:
            _, bank = self._from_the_input(mask, source, self._mixed(source, 1.0), None)
            self._unmixed = (source, key, bank.own[0])
        return self._unmixed[2]

    def _measure(self, x: Tensor, *, is_frozen: bool = False) -> Tensor:
        """The metric, `[lanes, prompts]`, from the logits' inputs at the last position, `[lanes, prompts, d_model]`."""
        tokens, target = self._target
        logits = widened(self._parts.joints.logits(x, tokens, is_frozen=is_frozen))
        at_once = max(1, _IN_CACHE // logits[0].numel()) if logits.device.type == "cpu" else len(logits)
        return torch.cat([self._metric(some, target) for some in logits.split(at_once)])

    @cached_property
    def _target(self) -> tuple[Tensor | None, Target]:
        """The tokens whose logits the metric needs (None: all), and what it compares with."""
        answers, wrong = self._bucket.answers, self._bucket.wrong_answers
        tokens = None if self._metric.full_vocabulary else np.unique(np.concatenate([answers.ids.ravel(), wrong.ids.ravel()]))

        def columns(sets: TokenSets) -> Tensor:
            return torch.from_numpy(sets.ids if tokens is None else np.searchsorted(tokens, sets.ids)).to(self._parts.device)

        def weights(sets: TokenSets) -> Tensor:
            return torch.from_numpy(sets.weights).to(self._parts.device, self._weight_dtype)

        clean = self._clean_log_probs() if self._metric.flat_at_clean else None
        target = Target(columns(answers), weights(answers), columns(wrong), weights(wrong), clean)
        return None if tokens is None else torch.from_numpy(tokens).to(self._parts.device), target

    @property
    def _weight_dtype(self) -> torch.dtype:
        return self._input.dtype if self._input.element_size() >= 4 else torch.float32

    @torch.no_grad()
    def _clean_log_probs(self) -> Tensor:
        clean = self._bucket.clean
        run = self.live if clean is self.live_ids else self._plain(self._parts.embed(clean))
        logits = self._parts.joints.logits(run.streams[-1][:, -1])
        return log_softmax(logits.to(self._weight_dtype))  # type: ignore[no-any-return]
