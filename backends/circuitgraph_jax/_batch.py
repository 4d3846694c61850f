"""Prompts of one length, run together: the cached runs of the model and of the source, and `F`, `dF/dm` and writer values on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuitgraph._engine import Rule
from circuitgraph._incremental import Cost, Incremental, Part, Plan
from circuitgraph._memory import MemoryBudget
from circuitgraph._metrics import Metric
from circuitgraph._pairs import Bucket, TokenSets
from circuitgraph._sites import Sites
from circuitgraph_jax import _queries as queries
from circuitgraph_jax._changed import Changes, Kept, hears_the_stream
from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._devices import Devices
from circuitgraph_jax._resumed import Own
from circuitgraph_jax._rules import Way
from circuitgraph_jax._spans import Spans

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

_PROMPTS = 4  # batches of more than two prompts are filled up to a multiple of this
_COST = Cost(node=0.6, other_row=1)  # of two sums that a run from the input makes of all writers, unchanged rows need none


@dataclass(frozen=True, eq=False)
class Parts:
    """A model for JAX: the description's ids, its weights, and the devices that share its work. `largest`: how many prompts a batch may
    have at most, where memory said so."""

    sites: Sites
    decoder: Decoder
    devices: tuple[jax.Device, ...]
    budget: MemoryBudget
    largest: int | None = None

    @property
    def dtype(self) -> Any:
        """Of the weights."""
        return self.decoder.embedding.dtype

    @property
    def wide(self) -> Any:
        """The dtype, float32 at least."""
        return np.promote_types(self.dtype, np.float32)

    @property
    def d_model(self) -> int:
        return int(self.decoder.embedding.shape[1])


class SourceRun:
    """What the writers say in the source run, and what readers would see there; neither is computed before it is needed.

    Given are the values `[prompts, writers, span, d_model]`, or the tokens `[prompts, position]` whose own run it is.
    """

    def __init__(self, decoder: Decoder, *, values: Array | None = None, tokens: Array | None = None) -> None:
        self._decoder, self.tokens = decoder, tokens
        if values is not None:
            self.values = values

    @cached_property
    def values(self) -> Array:
        """`[prompts, writers, span, d_model]`."""
        assert self.tokens is not None
        return queries.live(self._decoder, self.tokens).values

    @property
    def is_known(self) -> bool:
        return "values" in self.__dict__

    @cached_property
    def whole(self) -> queries.Source:
        return queries.Source(self.values, queries.source_streams(self._decoder, self.values))


class Batch:
    """One batch of prompts of equal length, `live` the prompts that are run, `clean` those whose logits a metric may compare with.

    On the devices there may be more prompts than in the batch: copies of the last one, which nobody is told of.
    """

    def __init__(
        self, parts: Parts, bucket: Bucket, metric: Metric, live: Int[ndarray, "prompts position"], other: Int[ndarray, "prompts position"]
    ) -> None:
        self.index, self.live_ids = bucket.index, live
        self._parts, self._bucket, self._metric, self._other_ids = parts, bucket, metric, other
        self._devices = Devices.of(parts.devices, len(bucket.index))
        self.decoder: Decoder = self._devices.everywhere(parts.decoder)
        self._differences: tuple[SourceRun, Array] | None = None
        self._unmixed: tuple[SourceRun, bytes, Array] | None = None
        self._kept: tuple[SourceRun, Kept, Incremental] | None = None
        self._by_stream = False  # of the lanes last asked about that changed what somebody says

    def __len__(self) -> int:
        return len(self.index)

    @property
    def n_rows(self) -> int:
        """How many prompts are on the devices."""
        return int(self._tokens.shape[0])

    @cached_property
    def live(self) -> queries.Live:
        """The model's own run."""
        run: queries.Live = queries.live(self.decoder, self._tokens)
        return run

    def others(self) -> SourceRun:
        """The run on the pairs' other prompts."""
        return SourceRun(self.decoder, tokens=self.by_prompt(self._other_ids.astype(np.int32)))

    def source_run(self, values: Array) -> SourceRun:
        return SourceRun(self.decoder, values=values)

    def by_prompt(self, rows: Float[ndarray, "prompts ..."] | Int[ndarray, "prompts ..."]) -> Array:
        """Rows on the devices, filled up with copies of the last: to an even share for each device, and to few different numbers, since
        every number of prompts is compiled for."""
        short = -len(rows) % math.lcm(self._devices.n_prompts, _PROMPTS if len(rows) > 2 else 1)
        whole = np.concatenate([rows, np.repeat(rows[-1:], short, axis=0)]) if short else np.asarray(rows)
        return self._devices.by_prompt(whole)  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Drop the cached runs."""
        self._differences = self._unmixed = self._kept = None
        self.__dict__.pop("live", None)

    def evaluate(self, masks: Float[ndarray, "lanes readers writers ..."], source: SourceRun) -> Float[ndarray, "lanes prompts"]:
        """From a run that is kept, where that is less work. (In half precision never: it would be rounded with every move. Nor is a run
        with refined components kept yet.)"""
        if len(masks) == 0 or masks.ndim == 4 or self._parts.dtype.itemsize < 4 or self._parts.sites.is_refined:
            return self._fresh(masks, source)
        kept, kept_mask, plan = self._planned(masks, source)
        if not plan.parts:
            return self._fresh(masks, source)
        out = np.empty((len(masks), len(self)))
        for part in plan.parts:
            if part.changed.writers.any():  # else it is all the same, and what is compiled will do
                self._by_stream = hears_the_stream(self._parts.sites, part, masks[part.lanes])
            for lot in self._lots(len(part.lanes), self._devices.n_lanes):
                lanes = part.lanes[lot]
                run = (self._start(part), kept, kept_mask, source.whole, self._changes(part, masks[lanes]))
                ends = queries.ends_from(self.decoder, self._by_lane(masks[lanes]), *run, self._by_stream)
                out[lanes] = self._measured(ends, len(lanes))
        return out

    def _planned(self, masks: Float[ndarray, "lanes readers writers"], source: SourceRun) -> tuple[Kept, Array, Plan]:
        """The kept run, moved to where these masks want it, its mask, and what to run from there."""
        if self._kept is None or self._kept[0] is not source:
            self._kept = (source, self._live_kept(source), Incremental(self._parts.sites, self.live_ids.shape[1], _COST))
        (_, kept, incremental), self._kept = self._kept, None  # whoever interrupts a move leaves no plan without its run behind
        before = incremental.mask
        plan = incremental.plan(masks)
        if plan.anew:
            kept, before = self._live_kept(source), self._parts.sites.graph.visible
        if plan.move is not None:
            changes = self._changes(plan.move, incremental.mask[None])
            run = (self._start(plan.move), kept, self._mask(before), source.whole, changes)
            kept = queries.moved(self.decoder, self._mask(incremental.mask), *run)
        self._kept = (source, kept, incremental)
        return kept, self._mask(incremental.mask), plan

    def _fresh(self, masks: Float[ndarray, "lanes readers writers ..."], source: SourceRun) -> Float[ndarray, "lanes prompts"]:
        """Of each lane from the first layer in which it differs from the model's own run."""
        starts = self._parts.sites.first_difference(masks if masks.ndim == 3 else (masks == 1).all(axis=3))
        order = np.argsort(starts, kind="stable")
        out, own = np.empty((len(masks), len(self))), Own(self.live.streams, self._live_differences(source), self.live.active)
        for lot in self._lots(len(masks), self._devices.n_lanes):
            lanes = order[lot]
            run = (jnp.asarray(starts[lanes[0]], jnp.int32), own, source.whole, self._spans(masks[0]))
            out[lanes] = self._measured(queries.ends(self.decoder, self._by_lane(masks[lanes]), *run), len(lanes))
        return out

    def _measured(self, ends: Float[Array, "lanes prompts d_model"], n_lanes: int) -> Float[ndarray, "lanes prompts"]:
        """`F` of the lanes and prompts that were asked about, from the logits' inputs."""
        return np.asarray(queries.measured(self.decoder, self._metric, ends, self._question))[:n_lanes, : len(self)]

    def _by_lane(self, masks: Float[ndarray, "lanes readers writers ..."]) -> Array:
        """On the devices, filled up with copies of the first lane."""
        short = -len(masks) % self._devices.n_lanes
        lanes: Array = self._devices.by_lane(masks[np.append(np.arange(len(masks)), np.zeros(short, dtype=int))])
        return lanes

    def _mask(self, mask: Float[ndarray, "readers writers"] | Bool[ndarray, "readers writers"]) -> Array:
        return jnp.asarray(mask.astype(self._parts.dtype))

    def _live_kept(self, source: SourceRun) -> Kept:
        run: Kept = queries.kept(self.decoder, self.live.values, self._live_differences(source))
        return run

    def _start(self, part: Part) -> Array:
        """The layer of the first reader that hears something else."""
        layer = self._parts.sites.layer_of_row[part.readers[0]] if len(part.readers) else len(self._parts.sites.layers)
        return jnp.asarray(layer, jnp.int32)

    def _changes(self, part: Part, masks: Float[ndarray, "lanes readers writers"]) -> Changes:
        return Changes.of(self.decoder, self._parts.sites, part, masks)

    def _lots(self, n: int, smallest: int = 1) -> Iterator[slice]:
        """Runs by 1, 4, 16, ... times the smallest number, as memory allows: few shapes to compile for, and no run twice."""
        per_run = len(self._parts.sites.graph.writers) * self.live_ids.size * self._parts.d_model * self._parts.dtype.itemsize
        at = 0
        while at < n:
            size = smallest
            while 4 * size <= n - at and 4 * size * per_run <= smallest * self._parts.budget.lanes:
                size *= 4
            yield slice(at, at + size)
            at += size

    def gradient(
        self, mask: Float[ndarray, "readers writers ..."], source: SourceRun, mixes: Float[ndarray, " mixes"], rule: Rule
    ) -> Float[ndarray, "prompts readers writers ..."]:
        """The mean over mixes."""
        is_live = bool(np.all(mask[self._parts.sites.graph.visible] == 1))
        is_unmixed = bool(np.all(mixes == 1))
        model, asked = (self.decoder, self._metric, self._tokens), (self._question, Way.of(rule), self._spans(mask))
        if is_live and is_unmixed and source.tokens is not None and not source.is_known:
            return self._rows(queries.gradient_beside(*model, source.tokens, *asked))
        mixes = mixes[:1] if is_unmixed else mixes
        along = None if is_unmixed else self._unmixed_differences(mask, source, is_live=is_live)
        total = np.zeros((len(self), *mask.shape))
        for lot in self._lots(len(mixes)):
            some = jnp.asarray(mixes[lot], self._parts.dtype)
            if is_live:
                total += self._rows(queries.live_gradient(*model, some, source.values, along, *asked))
            else:
                total += self._rows(queries.masked_gradient(*model, some, jnp.asarray(mask), source.whole, along, *asked))
        return total / len(mixes)

    def source_gradient(self, mask: Float[ndarray, "readers writers ..."], source: SourceRun) -> Float[ndarray, "prompts writers d_model"]:
        model, asked = (self.decoder, self._metric, self._tokens), (self._question, self._spans(mask))
        return self._rows(queries.source_gradient(*model, jnp.asarray(mask), source.whole, *asked))

    def values(self, mask: Float[ndarray, "readers writers ..."] | None, source: SourceRun) -> Array:
        """What every writer says under a mask, `[prompts, writers, position, d_model]`."""
        return self.live.values if mask is None else self._masked_run(mask, source)[0] + source.values

    def logits(self, mask: Float[ndarray, "readers writers ..."], source: SourceRun) -> Float[ndarray, "prompts position vocabulary"]:
        """All logits of a run under a mask."""
        _, ends = self._masked_run(mask, source)
        return np.asarray(queries.logits_of(self.decoder, ends))[: len(self)]

    def _rows(self, values: Array) -> Float[ndarray, "prompts ..."]:
        """Those of the batch."""
        return np.asarray(values, dtype=np.float64)[: len(self)]

    def _masked_run(self, mask: Float[ndarray, "readers writers ..."], source: SourceRun) -> tuple[Array, Array]:
        """What the writers say under a mask beyond the source, and the logits' inputs."""
        run: tuple[Array, Array] = queries.masked_run(self.decoder, jnp.asarray(mask), self._tokens, source.whole, self._spans(mask))
        return run

    def _spans(self, mask: Float[ndarray, "readers writers ..."]) -> Spans | None:
        """Which span each position is in, for a mask that asks."""
        return None if mask.ndim == 2 else Spans(self._span_of_positions, mask.shape[-1])

    @cached_property
    def _span_of_positions(self) -> Int[Array, "prompts position"]:
        return self.by_prompt(self._bucket.spans.astype(np.int32))

    @cached_property
    def _tokens(self) -> Int[Array, "prompts position"]:
        return self.by_prompt(self.live_ids.astype(np.int32))

    def _live_differences(self, source: SourceRun) -> Array:
        if self._differences is None or self._differences[0] is not source:
            self._differences = (source, queries.differences(self.live.values, source.values))
        return self._differences[1]

    def _unmixed_differences(self, mask: Float[ndarray, "readers writers ..."], source: SourceRun, *, is_live: bool) -> Array:
        if is_live:
            return self._live_differences(source)
        if self._unmixed is None or self._unmixed[0] is not source or self._unmixed[1] != mask.tobytes():
            self._unmixed = (source, mask.tobytes(), self._masked_run(mask, source)[0])
        return self._unmixed[2]

    @cached_property
    def _question(self) -> queries.Question:
        """The tokens whose logits the metric needs, and what it compares with."""
        answers, wrong = self._bucket.answers, self._bucket.wrong_answers
        tokens = None
        if not self._metric.full_vocabulary:
            tokens = self.by_prompt(np.concatenate([answers.ids, wrong.ids], axis=1).astype(np.int32))
        clean = None
        if self._metric.flat_at_clean:
            clean = queries.last_log_probs(self.decoder, self.by_prompt(self._bucket.clean.astype(np.int32)))

        def columns(sets: TokenSets, first: int) -> Array:
            places = np.broadcast_to(np.arange(first, first + sets.ids.shape[1]), sets.ids.shape) if tokens is not None else sets.ids
            return self.by_prompt(places.astype(np.int32))

        def weights(sets: TokenSets) -> Array:
            return self.by_prompt(sets.weights.astype(self._parts.wide))

        return queries.Question(tokens, columns(answers, 0), weights(answers), columns(wrong, answers.ids.shape[1]), weights(wrong), clean)
