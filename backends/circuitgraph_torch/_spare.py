"""Memory for what writers say: of the system, or of a run that is over."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy import ndarray

_LEAST = 1 << 22  # bytes: what is smaller the allocator has at hand
_MOST = 2  # of a live run and of a source run


def fresh(like: Tensor, *shape: int) -> Tensor:
    """A tensor to be filled, of a dtype and device. On a CPU in numpy's memory, for which it asks the system for large pages."""
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size == 0:
        return like.new_empty(shape)
    return _tensor(np.empty(size, dtype=np.uint8), like, shape)


class Spare:
    """`fresh`, in the memory of a tensor of the same size that nobody holds any more, where there is one. New pages for what all writers
    of a model of 135M parameters say cost a tenth of EAP."""

    def __init__(self) -> None:
        self._free: list[UInt8[ndarray, " bytes"]] = []

    def __call__(self, like: Tensor, *shape: int) -> Tensor:
        size = math.prod(shape) * like.element_size()
        if like.device.type != "cpu" or size < _LEAST:
            return fresh(like, *shape)
        place = next((i for i, buffer in enumerate(self._free) if len(buffer) == size), None)
        buffer = np.empty(size, dtype=np.uint8) if place is None else self._free.pop(place)
        lent = buffer[:]  # an array of its own, which lives as long as a tensor in it does
        weakref.finalize(lent, self._take_back, buffer).atexit = False
        return _tensor(lent, like, shape)

    def _take_back(self, buffer: UInt8[ndarray, " bytes"]) -> None:
        self._free = [*self._free, buffer][-_MOST:]


class Room:
    """Memory for some things at a time: the next ones take their place."""

    def __init__(self) -> None:
        self._place: Tensor | None = None

    def __call__(self, n: int, like: Tensor) -> Tensor:
        """`[n, ...]`, each like this one, to be filled."""
        if self._place is None or len(self._place) < n or self._place.shape[1:] != like.shape:
            self._place = fresh(like, n, *like.shape)
        return self._place[:n]


def _tensor(buffer: UInt8[ndarray, " bytes"], like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(buffer).view(like.dtype).view(shape)
