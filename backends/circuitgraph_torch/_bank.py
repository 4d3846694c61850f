"""What the writers said: differences `live - source`, and reading them through a mask.

A reader's input is written in one of two forms that are equal: from the live stream, `stream + (m - 1) @ differences`, or from the source
run, `source_stream + m @ differences`. The one with fewer non-zero columns is computed: nothing at all at `m = 1` and at `m = 0`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class Plan:
    """How the readers of one site mix the writers.

    `rows` holds the distinct rows of coefficients, `[lanes, distinct, writers]`; `row_of[i]` says which of them reader `readers[i]` of
    the site has.
    """

    rows: Float[ndarray, "lanes distinct writers"]
    row_of: Int[ndarray, " chosen"]
    readers: Int[ndarray, " chosen"]
    from_live: bool

    @classmethod
    def of(
        cls,
        mask: Float[ndarray, "lanes readers visible"],
        readers: Int[ndarray, " chosen"],
        computed: Bool[ndarray, " visible"],
    ) -> Plan:
        """`mask` of the site, the readers needed, and the writers that were computed (the others stand at their source value)."""
        kept = mask[:, readers] * computed
        removed = np.where(computed, kept - 1, 0)
        from_live = bool(np.count_nonzero(removed.any(axis=(0, 1))) <= np.count_nonzero(kept.any(axis=(0, 1))))
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
    lane, and only those in `computed`.
    """

    def __init__(self, shared: Tensor, n_lanes: int, computed: Bool[ndarray, " writers"], like: Tensor) -> None:
        self._shared = shared
        n_shared = len(shared)
        self.computed = computed.copy()
        self.computed[:n_shared] = True
        own = np.flatnonzero(computed[n_shared:]) + n_shared
        self._slot = np.full(len(computed), -1)
        self._slot[own] = np.arange(len(own))
        self.own = torch.empty(n_lanes, len(own), *like.shape[-3:], dtype=like.dtype, device=like.device)

    def write(self, writers: Int[ndarray, " some"], differences: Tensor) -> None:
        """Keep `[some, lanes, prompts, position, d_model]`."""
        slots = self._slot[writers]
        self.own[:, slots[0] : slots[-1] + 1] = differences.transpose(0, 1)

    def mix(self, plan: Plan) -> Tensor | None:
        """`rows @ differences`, `[lanes, distinct, prompts, position, d_model]`; None where every coefficient is zero."""
        n_shared = min(len(self._shared), plan.rows.shape[2])
        shared = _mix_shared(plan.rows[:, :, :n_shared], self._shared)
        own = _mix_own(plan.rows[:, :, n_shared:], self._slot[n_shared : plan.rows.shape[2]], self.own)
        if shared is None or own is None:
            return own if shared is None else shared
        return shared.add_(own)


def _mix_shared(rows: Float[ndarray, "lanes distinct writers"], differences: Tensor) -> Tensor | None:
    columns = np.flatnonzero(rows.any(axis=(0, 1)))
    if len(columns) == 0:
        return None
    if len(columns) * 2 > rows.shape[2]:
        chosen, columns = differences[: rows.shape[2]], np.arange(rows.shape[2])
    else:
        chosen = differences[torch.from_numpy(columns).to(differences.device)]
    weights = to_tensor(rows[:, :, columns], differences)
    mixed = weights.flatten(0, 1) @ chosen.reshape(len(columns), -1)
    return mixed.view(*weights.shape[:2], *differences.shape[1:])


def _mix_own(rows: Float[ndarray, "lanes distinct writers"], slots: Int[ndarray, " writers"], differences: Tensor) -> Tensor | None:
    columns = np.flatnonzero(rows.any(axis=(0, 1)))
    if len(columns) == 0:
        return None
    stop = int(slots[columns].max()) + 1
    weights = np.zeros((*rows.shape[:2], stop), dtype=rows.dtype)
    weights[:, :, slots[columns]] = rows[:, :, columns]
    mixed = to_tensor(weights, differences) @ differences[:, :stop].flatten(2)
    return mixed.view(*rows.shape[:2], *differences.shape[2:])


def to_tensor(values: Float[ndarray, ...], like: Tensor) -> Tensor:
    """A numpy array with the dtype and device of a tensor."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(like)
