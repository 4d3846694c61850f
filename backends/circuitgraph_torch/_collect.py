"""What is made of the gradients of readers' inputs, site by site: a score for every edge, or a gradient for what a writer says in the
source. Both may be by span.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from circuitgraph._sites import Site, Sites
from circuitgraph_torch._bank import to_tensor
from circuitgraph_torch._spare import Room, fresh

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

_WIDENED = 64  # how many writers are made float32 at once
_MOST_WAITING = 64  # readers


@dataclass(frozen=True, eq=False)
class Spans:
    """The span of every position, `[prompts, position]`, and how many spans there are."""

    index: Tensor
    count: int

    def sums(self, values: Tensor, *, last_only: bool = False) -> Tensor:
        """`[prompts, position, ...]` to `[prompts, spans, ...]`: summed over the positions of each span."""
        index = self.index[:, -1:] if last_only else self.index
        is_in = functional.one_hot(index, self.count).to(values)
        return torch.bmm(is_in.transpose(1, 2), values.flatten(2)).view(len(values), self.count, *values.shape[2:])


class Collector(Protocol):
    def room(self, n: int, like: Tensor) -> Tensor:
        """Where `n` readers' gradients, each like this one, may be written before they are added. The next ones take their place."""
        ...

    def add(self, site: Site, readers: Int[ndarray, " some"], grads: Tensor, *, last_only: bool = False) -> None:
        """Take the gradients of some readers of a site, `[some, prompts, position, d_model]`; `last_only`: at the last position."""
        ...


class EdgeScores:
    """`<dF/dx_r, live_w - source_w>` for every edge.

    `differences` are `[writers, prompts, position, d_model]`. There may be several times as many rows of gradients as prompts, from runs
    of the same prompts one after the other (see `mix`); these are added up before the product. A product reads all differences, so small
    sites wait for each other and share one; sites come from the logits down, and the first that waits sees the most writers.
    """

    def __init__(self, sites: Sites, differences: Tensor, spans: Spans | None = None) -> None:
        self._differences, self._spans = differences, spans
        by_span = () if spans is None else (spans.count,)
        self._scores: Float[ndarray, "prompts readers writers"] = np.zeros((differences.shape[1], *sites.graph.shape, *by_span))
        self._waiting: list[tuple[Site, Int[ndarray, " some"]]] = []
        self._room = Room()

    def scores(self) -> Float[ndarray, "prompts readers writers"]:
        """Of everything that was added."""
        self._settle()
        return self._scores

    def room(self, n: int, like: Tensor) -> Tensor:
        return self._next(n) if self._may_wait(n) and like.shape == self._differences.shape[1:] else self._room(n, like)

    def add(self, site: Site, readers: Int[ndarray, " some"], grads: Tensor, *, last_only: bool = False) -> None:
        differences = self._differences[: site.n_visible]
        differences = differences[:, :, -1:] if last_only else differences
        n_prompts = differences.shape[1]
        if grads.shape[1] != n_prompts:
            grads = grads.unflatten(1, (-1, n_prompts)).sum(1)
        if self._spans is not None:
            at_positions = _products(grads.flatten(1, 2).transpose(0, 1), differences.flatten(1, 2))
            products = self._spans.sums(at_positions.unflatten(0, (n_prompts, -1)), last_only=last_only)
            self._store(site, readers, products.permute(0, 2, 3, 1))
        elif last_only or not self._may_wait(len(readers)):
            self._store(site, readers, _products(grads.flatten(2).transpose(0, 1), differences.flatten(2)))
        else:
            self._wait(site, readers, grads)

    def put(self, site: Site, readers: Int[ndarray, " some"], products: Tensor) -> None:
        """Scores of some readers as they are, `[prompts, some, writers]`, by span if the others are, in place of what was added."""
        self._settle()
        self._store(site, readers, products)

    @cached_property
    def _grads(self) -> Tensor:
        """Of readers that wait, and room for more."""
        return fresh(self._differences, _MOST_WAITING, *self._differences.shape[1:])

    def _may_wait(self, n: int) -> bool:
        return self._spans is None and n <= _MOST_WAITING

    def _next(self, n: int) -> Tensor:
        """Where the next that wait have their place."""
        if self._n_waiting + n > _MOST_WAITING:
            self._settle()
        return self._grads[self._n_waiting :][:n]

    def _wait(self, site: Site, readers: Int[ndarray, " some"], grads: Tensor) -> None:
        place = self._next(len(readers))
        if place.data_ptr() != grads.data_ptr():  # not written there in the first place
            place.copy_(grads)
        self._waiting.append((site, readers))

    @property
    def _n_waiting(self) -> int:
        return sum(len(readers) for _, readers in self._waiting)

    def _settle(self) -> None:
        if not self._waiting:
            return
        grads, differences = self._grads[: self._n_waiting], self._differences[: self._waiting[0][0].n_visible]
        products = _products(grads.flatten(2).transpose(0, 1), differences.flatten(2))
        for (site, readers), some in zip(self._waiting, products.split([len(readers) for _, readers in self._waiting], 1), strict=True):
            self._store(site, readers, some[..., : site.n_visible])
        self._waiting = []

    def _store(self, site: Site, readers: Int[ndarray, " some"], products: Tensor) -> None:
        self._scores[:, site.first + readers, : site.n_visible] = products.double().cpu().numpy()


class SourceGrads:
    """The sum over readers and positions of `(1 - m[r, w]) * dF/dx_r` for every writer."""

    def __init__(self, sites: Sites, mask: Float[ndarray, "readers writers"], like: Tensor, spans: Spans | None = None) -> None:
        self._mask, self._spans, self.room = mask, spans, Room()
        self.grads: Float[ndarray, "prompts writers d_model"] = np.zeros((len(like), len(sites.graph.writers), like.shape[-1]))

    def add(self, site: Site, readers: Int[ndarray, " some"], grads: Tensor, *, last_only: bool = False) -> None:
        removed = to_tensor(1 - self._mask[site.first + readers, : site.n_visible], grads)
        if self._spans is None:
            parts = torch.einsum("rw,rnd->nwd", removed, grads.sum(2))
        else:
            sums = self._spans.sums(grads.permute(1, 2, 0, 3), last_only=last_only)
            parts = torch.einsum("rws,nsrd->nwd", removed, sums)
        self.grads[:, : site.n_visible] += parts.double().cpu().numpy()


def _products(grads: Tensor, differences: Tensor) -> Tensor:
    """`[rows, readers, d] @ [writers, rows, d]` to `[rows, readers, writers]`; of numbers in half precision in float32, or the sums
    would be rounded to three digits: as a GPU adds them up anyway, else widened, some writers at a time."""
    if grads.element_size() >= 4 and len(differences) > grads.shape[1]:  # faster with the many as rows
        return torch.bmm(differences.transpose(0, 1), grads.transpose(1, 2)).transpose(1, 2)
    if grads.element_size() >= 4:
        return torch.bmm(grads, differences.permute(1, 2, 0))
    if _leaves_sums_wide(grads):
        return torch.bmm(grads, differences.permute(1, 2, 0), out_dtype=torch.float32)
    wide = grads.float()
    return torch.cat([torch.bmm(wide, some.float().permute(1, 2, 0)) for some in differences.split(_WIDENED)], dim=-1)


def _leaves_sums_wide(like: Tensor) -> bool:
    """Whether products of half-precision numbers can be had in float32: by NVIDIA's kernels, from PyTorch 2.8 on."""
    return like.device.type == "cuda" and torch.version.hip is None and hasattr(torch.ops.aten.bmm, "dtype")
