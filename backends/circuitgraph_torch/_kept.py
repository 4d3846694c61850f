"""A run that is kept with all that was said and heard in it, so that one under a similar mask recomputes only what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from circuitgraph._incremental import Part
from circuitgraph._liveness import ALL, LAST
from circuitgraph._sites import LayerSites, Site, Sites
from circuitgraph_torch._bank import to_tensor
from circuitgraph_torch._calls import AttentionCall
from circuitgraph_torch._changes import Changes
from circuitgraph_torch._forward import LiveRun, SourceRun
from circuitgraph_torch._joints import AttentionJoint, ModelJoints
from circuitgraph_torch._mlp import MLPJoint
from circuitgraph_torch._modes import widened

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

_FEW = 8  # writers


class KeptRun:
    """At first the model's own run. Of models whose components are not refined.

    `heard`: each reader's input, `[prompts, position, d_model]`, one tensor for readers that hear the same. `said`: what each writer said,
    `[writers, prompts, position, d_model]`, and `differences` the same less the source. Of a model in half precision they are in float32:
    its modules compute in half precision (`narrowed`), and what is added up is not rounded with every difference.
    """

    def __init__(
        self, joints: ModelJoints, sites: Sites, calls: Sequence[AttentionCall], live: LiveRun, source: SourceRun, differences: Tensor
    ) -> None:
        self.joints, self.sites, self.calls = joints, sites, calls
        self.mask = sites.graph.visible.astype(np.float32)
        self._dtype = live.values.dtype
        self.said = widened(live.values)
        self.differences = differences if self.said is live.values else self.said - source.values
        self.heard = _all_wide(_heard(joints, sites, live))
        self._source = source
        self.first = _first_difference(differences)
        self._projected: dict[int, Tensor] = {}
        self._aside: tuple[int, slice, Float[ndarray, " visible"], Tensor] | None = None
        self._is_own = False  # what was said: the live run's tensors must stay as they are

    def ends(self, masks: Float[ndarray, "lanes readers writers"], part: Part) -> Tensor:
        """The inputs of the logits at the last position, `[lanes, prompts, d_model]`."""
        return self.narrowed(_Lanes(self, masks, part).run()[:, :, -1])

    def narrowed(self, x: Tensor) -> Tensor:
        """What a module of the model is given."""
        return x.to(self._dtype)

    def move(self, mask: Float[ndarray, "readers writers"], part: Part) -> None:
        """Be the run under this mask, wherever it is needed there."""
        lane = _Lanes(self, mask[None], part)
        lane.run()
        if not self._is_own:
            self.said, self.differences, self._is_own = self.said.clone(), self.differences.clone(), True
        for readers, where, x in lane.heard:
            self._hear(readers, where, x[0])
        for writers, where, changes in lane.said:
            for writer, change in zip(writers.tolist(), changes[:, 0], strict=True):
                self.said[writer, :, where] += change
                self.differences[writer, :, where] += change
        self._projected.update({number: projected[0] for number, projected in lane.projected.items()})
        self.mask, self._aside = mask.copy(), None

    def _hear(self, readers: Int[ndarray, " some"], where: slice, x: Tensor) -> None:
        heard = self.heard[int(readers[0])].clone()
        heard[:, where] = x
        for reader in readers.tolist():
            self.heard[reader] = heard

    @cached_property
    def sourced(self) -> list[Tensor]:
        """What every reader hears in the source run."""
        sites = [site for layer in self.sites.layers for site in (layer.attention, layer.mlp) if site is not None]
        return _all_wide([self._source.heard(site) for site in (*sites, self.sites.logits) for _ in range(site.first, site.stop)])

    def projected(self, number: int) -> Tensor:
        """What the readers of a layer's attention say to it, `[prompts, position, readers * head_dim]`."""
        if number not in self._projected:
            joint, site = self.joints.layers[number].attention, self.sites.layers[number].attention
            assert joint is not None
            assert site is not None
            projected = joint.weights.new_empty(*self.said.shape[1:3], joint.n_readers, joint.head_dim)
            for readers in _same(range(site.first, site.stop), lambda reader: id(self.heard[reader])):
                projected[:, :, readers - site.first] = _project(joint, self.narrowed(self.heard[int(readers[0])]), readers - site.first)
            self._projected[number] = projected.flatten(2)
        return self._projected[number]

    def aside(self, reader: int, row: Float[ndarray, " visible"], where: slice) -> Tensor:
        """What a reader would hear through another row, `[prompts, position, d_model]`; remembered, since the next row is mostly near."""
        if self._aside is None or self._aside[:2] != (reader, where):
            self._aside = (reader, where, self.mask[reader, : len(row)], self.heard[reader][:, where])
        *_, known, x = self._aside
        further = self.mixed((row - known)[None], where)
        self._aside = (reader, where, row.copy(), x if further is None else x + further[0])
        return self._aside[3]

    def mixed(self, coefficients: Float[ndarray, "rows visible"], where: slice) -> Tensor | None:
        """Sums of differences, `[rows, prompts, position, d_model]`; None where every coefficient is zero."""
        writers = np.flatnonzero(coefficients.any(axis=0))
        if len(writers) == 0:
            return None
        if 2 * len(writers) >= writers[-1] + 1 - writers[0]:
            chosen = slice(int(writers[0]), int(writers[-1]) + 1)
            differences, weights = self.differences[chosen, :, where], coefficients[:, chosen]
        else:
            differences, weights = self.differences[torch.from_numpy(writers).to(self.said.device)][:, :, where], coefficients[:, writers]
        return (to_tensor(weights, differences) @ differences.flatten(1)).view(len(weights), *differences.shape[1:])

    def positions(self, level: int) -> slice:
        """Those in question. Before the first at which the source differs, no mask changes anything: attention looks back only."""
        length = self.said.shape[2]
        return slice(length - 1 if level == LAST else self.first, length)


class _Lanes:
    """One pass over what changes, from the first of the part's readers to the logits."""

    def __init__(self, kept: KeptRun, masks: Float[ndarray, "lanes readers writers"], part: Part) -> None:
        self._kept, self._masks, self._changed = kept, masks, part.changed
        self._is_given = np.isin(np.arange(masks.shape[1]), part.readers)
        self._changes = {
            level: Changes(np.flatnonzero(part.changed.writers >= level), len(masks), kept.said[0][:, kept.positions(level)])
            for level in (LAST, ALL)
        }
        self.heard: list[tuple[Int[ndarray, " some"], slice, Tensor]] = []
        self.said: list[tuple[Int[ndarray, " some"], slice, Tensor]] = []
        self.projected: dict[int, Tensor] = {}

    def run(self) -> Tensor:
        """The inputs of the logits, `[lanes, prompts, 1, d_model]`."""
        kept = self._kept
        for number, (joint, layer) in enumerate(zip(kept.joints.layers, kept.sites.layers, strict=True)):
            if joint.attention is not None and layer.attention is not None:
                self._attention(number, joint.attention, layer, layer.attention)
            if joint.mlp is not None and layer.mlp is not None:
                self._mlp(joint.mlp, layer.mlp, layer.mlp_writers.start)
        for _, x in self._read(kept.sites.logits, LAST):
            return x
        return kept.heard[-1][:, -1:].expand(len(self._masks), *(-1,) * 3)

    def _attention(self, number: int, joint: AttentionJoint, layer: LayerSites, site: Site) -> None:
        kept, heads = self._kept, slice(layer.attention_writers.start, layer.attention_writers.stop)
        if not self._changed.readers[site.first : site.stop].any():
            return
        projected = kept.projected(number).unflatten(-1, (joint.n_readers, -1)).repeat(len(self._masks), 1, 1, 1, 1)
        for level in (LAST, ALL):
            for readers, x in self._read(site, level):
                projected[:, :, kept.positions(level), readers - site.first] = _project(joint, kept.narrowed(x), readers - site.first)
        projected = projected.flatten(3)
        self.projected[number] = projected
        mixed = joint.attend(projected.flatten(0, 1), kept.calls[number], rows_are_shared=False)
        for level in (LAST, ALL):
            chosen = np.flatnonzero(self._changed.writers[heads] == level)
            if len(chosen):
                written = joint.write(mixed[:, kept.positions(level)], chosen.tolist())
                self._say(chosen + heads.start, level, written)

    def _mlp(self, joint: MLPJoint, site: Site, writer: int) -> None:
        level = int(self._changed.writers[writer])
        for _, x in self._read(site, level):
            self._say(np.array([writer]), level, joint(self._kept.narrowed(x).flatten(0, 1))[None])

    def _read(self, site: Site, level: int) -> Iterator[tuple[Int[ndarray, " some"], Tensor]]:
        """The readers of a site that change at these positions, those that hear the same together, with what they hear in each lane:
        `[lanes, prompts, position, d_model]`."""
        told = site.first + np.flatnonzero(self._changed.readers[site.first : site.stop] == level)
        if level == 0 or len(told) == 0:
            return
        groups = _same(told.tolist(), self._hears)
        firsts = np.array([readers[0] for readers in groups])
        where = self._kept.positions(level)
        mixed = self._changes[level].mix(self._masks[:, firsts, : site.n_visible])
        for number, readers in enumerate(groups):
            x = self._given(int(readers[0]), site, where)
            x = x if mixed is None else x + mixed[:, number]
            self.heard.append((readers, where, x))
            yield readers, x

    def _hears(self, reader: int) -> tuple[int, bytes]:
        """Equal for readers that hear the same: they did in the kept run, and have the same rows."""
        rows = self._masks[:, reader] if self._is_given[reader] else self._masks[0, reader]
        return id(self._kept.heard[reader]), rows.tobytes()

    def _given(self, reader: int, site: Site, where: slice) -> Tensor:
        """What a reader hears under the lanes' masks if every writer says what it said in the kept run.

        Where little is kept it is added up from the source: taken off what was heard, it would leave rounding, which a norm blows up.
        """
        if not self._is_given[reader]:
            return self._kept.heard[reader][:, where].expand(len(self._masks), *(-1,) * 3)
        rows = self._masks[:, reader, : site.n_visible]
        hears_little = np.count_nonzero(rows, axis=1) <= _FEW
        source = self._kept.sourced[reader].expand(self._kept.said.shape[1:])[:, where]
        if hears_little.all():
            x, further = source, self._kept.mixed(rows, where)
        else:
            near = rows[~hears_little][0]
            x = self._kept.aside(reader, near, where)
            if hears_little.any():
                x = torch.stack([source if little else x for little in hears_little])
            further = self._kept.mixed(np.where(hears_little[:, None], rows, rows - near), where)
        x = x.expand(len(rows), *source.shape)
        return x if further is None else x + further

    def _say(self, writers: Int[ndarray, " some"], level: int, written: Tensor) -> None:
        """What writers say now, `[some, lanes * prompts, position, d_model]`."""
        where = self._kept.positions(level)
        before = self._kept.said[int(writers[0]) : int(writers[-1]) + 1]
        before = before if len(before) == len(writers) else before[torch.from_numpy(writers - writers[0]).to(before.device)]
        changes = written.unflatten(1, (len(self._masks), -1)) - before[:, None, :, where]
        self.said.append((writers, where, changes))
        if level == ALL:
            self._changes[ALL].write(writers, changes)
        self._changes[LAST].write(writers, changes[:, :, :, -1:])


def _project(joint: AttentionJoint, x: Tensor, readers: Int[ndarray, " some"]) -> Tensor:
    """`[..., position, d_model]` to `[..., position, some, head_dim]`."""
    normed: Tensor = x if joint.norm is None else joint.norm.module(x)
    index = torch.from_numpy(readers).to(x.device)
    weights, biases = joint.weights[index], joint.biases[index]
    projected: Tensor = functional.linear(normed, weights.flatten(0, 1), biases.flatten())
    return projected.view(*projected.shape[:-1], len(readers), -1)


def _heard(joints: ModelJoints, sites: Sites, live: LiveRun) -> list[Tensor]:
    """What every reader hears in the model's own run."""
    heard: list[Tensor] = []
    for joint, layer, stream in zip(joints.layers, sites.layers, live.streams[:-1], strict=True):
        if layer.attention is not None:
            heard += [stream] * (layer.attention.stop - layer.attention.first)
        if layer.mlp is not None:
            after = stream
            if not joint.is_parallel and joint.attention is not None:
                after = stream + live.values[layer.attention_writers.start : layer.attention_writers.stop].sum(0)
                after = after if joint.attention.constant is None else after + joint.attention.constant
            heard.append(after)
    return [*heard, live.streams[-1]]


def _all_wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One for each that is the same."""
    wide = {id(x): widened(x) for x in tensors}
    return [wide[id(x)] for x in tensors]


def _first_difference(differences: Tensor) -> int:
    """The first position at which some writer differs from its source; the last one if there is none."""
    differs = (differences != 0).flatten(0, 1).any(-1).any(0).cpu().numpy()
    return int(np.argmax(differs)) if differs.any() else len(differs) - 1


def _same(readers: Sequence[int] | range, key: Callable[[int], object]) -> list[Int[ndarray, " some"]]:
    """The readers with the same key together."""
    lots: dict[object, list[int]] = {}
    for reader in readers:
        lots.setdefault(key(reader), []).append(reader)
    return [np.array(lot) for lot in lots.values()]
