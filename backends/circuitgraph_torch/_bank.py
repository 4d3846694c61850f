"""What the writers said: differences `live - source`, and reading them through a mask.

A reader's input is written in one of two forms that are equal: from the live stream, `stream + (m - 1) @ differences`, or from the source
run, `source_stream + m @ differences`. The one with fewer non-zero columns is computed: nothing at all at `m = 1` and at `m = 0`.

A mask may differ from span to span of the prompts; then every position of every prompt has a matrix of coefficients, that of its span.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from circuitgraph_torch._spare import fresh

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    Rows = Float[ndarray, "lanes distinct writers"] | Float[ndarray, "lanes distinct writers spans"]


@dataclass(frozen=True, eq=False)
class Plan:
    """How the readers of one site mix the writers.

    `rows` holds the distinct rows of coefficients, `[lanes, distinct, writers]`, or `[lanes, distinct, writers, spans]` where they differ
    from span to span; `row_of[i]` says which of them reader `readers[i]` of the site has.
    """

    rows: Rows
    row_of: Int[ndarray, " chosen"]
    readers: Int[ndarray, " chosen"]
    from_live: bool

    @classmethod
    def of(
        cls,
        mask: Float[ndarray, "lanes readers visible"] | Float[ndarray, "lanes readers visible spans"],
        readers: Int[ndarray, " chosen"],
        computed: Bool[ndarray, " visible"],
    ) -> Plan:
        """`mask` of the site, the readers needed, and the writers that were computed (the others stand at their source value)."""
        if mask.ndim == 4 and bool((mask == mask[..., :1]).all()):
            mask = mask[..., 0]
        computed = computed if mask.ndim == 3 else computed[:, None]
        kept = mask[:, readers] * computed
        removed = np.where(computed, kept - 1, 0)
        from_live = bool(len(_columns(removed)) <= len(_columns(kept)))
        coefficients = removed if from_live else kept
        place: dict[bytes, int] = {}
        by_reader = np.ascontiguousarray(coefficients.swapaxes(0, 1))
        row_of = np.array([place.setdefault(row.tobytes(), len(place)) for row in by_reader], dtype=np.int64)
        firsts = [int(np.argmax(row_of == u)) for u in range(len(place))]
        return cls(coefficients[:, firsts], row_of, readers, from_live)

    @property
    def n_distinct(self) -> int:
        return int(self.rows.shape[1])

    def groups(self) -> list[tuple[int, Int[ndarray, " members"]]]:
        """Each distinct row with the readers of the site that have it."""
        return [(u, self.readers[self.row_of == u]) for u in range(self.n_distinct)]


class Bank:
    """The differences of all writers computed so far.

    `shared` `[n_shared, prompts, position, d_model]` comes from a cached run and is the same in every lane; later writers are kept per
    lane, and only those in `computed`, in what `allocate` gives. `spans` `[prompts, position]` says where masks with spans have which
    coefficients.
    """

    keeps = True

    def __init__(
        self,
        shared: Tensor,
        n_lanes: int,
        computed: Bool[ndarray, " writers"],
        like: Tensor,
        spans: Tensor | None = None,
        allocate: Callable[..., Tensor] = fresh,
    ) -> None:
        self._shared, self._spans = shared, spans
        n_shared = len(shared)
        self.computed = computed.copy()
        self.computed[:n_shared] = True
        own = np.flatnonzero(computed[n_shared:]) + n_shared
        self._slot = np.full(len(computed), -1)
        self._slot[own] = np.arange(len(own))
        self.own = allocate(like, n_lanes, len(own), *like.shape[-3:])

    def write(self, writers: Int[ndarray, " some"], said: Tensor, source: Tensor) -> None:
        """Keep the difference of two `[some, lanes, prompts, position, d_model]`."""
        slots = self._slot[writers]
        torch.sub(said.transpose(0, 1), source.transpose(0, 1), out=self.own[:, slots[0] : slots[-1] + 1])

    def mix(self, plan: Plan) -> Tensor | None:
        """`rows @ differences`, `[lanes, distinct, prompts, position, d_model]`; None where every coefficient is zero."""
        n_shared = min(len(self._shared), plan.rows.shape[2])
        shared = self._mix_shared(plan.rows[:, :, :n_shared])
        own = self._mix_own(plan.rows[:, :, n_shared:], self._slot[n_shared : plan.rows.shape[2]])
        if shared is None or own is None:
            return own if shared is None else shared
        return shared.add_(own)

    def _mix_shared(self, rows: Rows) -> Tensor | None:
        columns = _columns(rows)
        if len(columns) == 0:
            return None
        if len(columns) * 2 > rows.shape[2]:
            chosen, columns = self._shared[: rows.shape[2]], np.arange(rows.shape[2])
        else:
            chosen = self._shared[torch.from_numpy(columns).to(self._shared.device)]
        if rows.ndim == 4:
            folded = rows[:, :, columns].reshape(1, -1, len(columns), rows.shape[3])
            return self._mix_by_span(folded, chosen[None]).view(*rows.shape[:2], *chosen.shape[1:])
        weights = to_tensor(rows[:, :, columns], chosen)
        mixed = weights.flatten(0, 1) @ chosen.reshape(len(columns), -1)
        return mixed.view(*weights.shape[:2], *chosen.shape[1:])

    def _mix_own(self, rows: Rows, slots: Int[ndarray, " writers"]) -> Tensor | None:
        columns = _columns(rows)
        if len(columns) == 0:
            return None
        stop = int(slots[columns].max()) + 1
        weights = np.zeros((*rows.shape[:2], stop, *rows.shape[3:]), dtype=rows.dtype)
        weights[:, :, slots[columns]] = rows[:, :, columns]
        if rows.ndim == 4:
            return self._mix_by_span(weights, self.own[:, :stop])
        mixed = to_tensor(weights, self.own) @ self.own[:, :stop].flatten(2)
        return mixed.view(*rows.shape[:2], *self.own.shape[2:])

    def _mix_by_span(self, rows: Float[ndarray, "lanes distinct writers spans"], differences: Tensor) -> Tensor:
        """The same with coefficients that differ from span to span; lane by lane, so that no lane of `differences` is copied."""
        assert self._spans is not None
        mixed = differences.new_empty(rows.shape[0], rows.shape[1], *differences.shape[2:])
        for lane, said in enumerate(differences):
            coefficients = by_position(rows[lane], self._spans, said)
            products = torch.bmm(coefficients, said.flatten(1, 2).transpose(0, 1))
            mixed[lane].flatten(1, 2).copy_(products.transpose(0, 1))
        return mixed


class NoBank:
    """In place of a bank where nobody asks what single writers said: at `m = 1` every reader reads the stream."""

    keeps = False

    def __init__(self, n_writers: int) -> None:
        self.computed = np.ones(n_writers, dtype=bool)

    def write(self, writers: Int[ndarray, " some"], said: Tensor, source: Tensor) -> None:
        """Nothing is kept."""

    def mix(self, plan: Plan) -> None:
        """Nothing is read but the stream."""
        assert plan.from_live
        assert not plan.rows.any()


def _columns(rows: Rows) -> Int[ndarray, " writers"]:
    """The writers that have a coefficient."""
    return np.flatnonzero(rows.any(axis=(0, 1) if rows.ndim == 3 else (0, 1, 3)))


def by_position(rows: Float[ndarray, "distinct writers spans"], spans: Tensor, like: Tensor) -> Tensor:
    """`[prompts * position, distinct, writers]`: every position has the coefficients of its span."""
    return to_tensor(np.moveaxis(rows, -1, 0), like)[spans.flatten()]


def to_tensor(values: Float[ndarray, ...], like: Tensor) -> Tensor:
    """A numpy array with the dtype and device of a tensor."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(like)
