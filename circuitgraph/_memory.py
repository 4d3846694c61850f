"""How much memory an engine's runs may take: what it cuts its batches by, and what it does when that was too much after all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

from circuitgraph._errors import CircuitGraphError

_PLENTY = 1 << 32  # on a CPU more than this makes nothing faster


@dataclass(frozen=True)
class MemoryBudget:
    """`total` bytes for what an engine computes (the weights are beside it), and `host` for the answers that it hands over.

    >>> MemoryBudget.of("2 GB", free=None).lanes
    250000000
    """

    total: int
    host: int

    @classmethod
    def of(cls, wanted: int | str, free: int | None) -> MemoryBudget:
        """From what a user asked for: bytes, a text such as "8GB", or "auto", which is half of what is `free` on an accelerator, and on a
        CPU (`None`) a quarter of the machine's memory or 4 GiB. Raises `CircuitGraphError`."""
        if wanted == "auto":
            return cls(free // 2 if free is not None else min(_PLENTY, _physical() // 4), _physical() // 2)
        total = _parsed(wanted)
        return cls(total, total)

    @classmethod
    def unlimited(cls) -> MemoryBudget:
        """For what is small anyway and must stay in one piece."""
        return cls(1 << 62, 1 << 62)

    @property
    def batch(self) -> int:
        """What the writers of one batch of prompts may take; larger ones are cut."""
        return self.total // 16

    @property
    def lanes(self) -> int:
        """What the lanes of one run may keep of their writers."""
        return self.total // 8

    @property
    def runs(self) -> int:
        """What the kept runs of all batches may take together; above this they are made anew."""
        return self.total

    def halved(self) -> MemoryBudget:
        return MemoryBudget(self.total // 2, self.host)

    def check_answer(self, what: str, *shape: int) -> None:
        """Raises `CircuitGraphError` for an array of float64 numbers that would not fit, before anything is computed for it."""
        size = 8
        for n in shape:
            size *= n
        if size > self.host:
            raise CircuitGraphError(
                f"{what} {' x '.join(map(str, shape))} take {size / 1e9:.3g} GB, and there are {self.host / 1e9:.3g} GB for them; "
                f"ask with fewer prompts, or trace with a larger memory_budget"
            )


Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


def with_room(query: Callable[Asked, Answer]) -> Callable[Asked, Answer]:
    """A query of an engine that is asked once more, by halves, if there was no memory for it.

    The engine says `is_out_of_memory(error)`, and can `take_less()`: forget everything, and cut what is to come into halves.
    """

    @wraps(query)
    def asked(*args: Asked.args, **kwargs: Asked.kwargs) -> Answer:
        engine: Any = args[0]
        try:
            return query(*args, **kwargs)
        except Exception as error:
            if not engine.is_out_of_memory(error):
                raise
        engine.take_less()  # out here, where the failed call holds nothing any more
        try:
            return query(*args, **kwargs)
        except Exception as error:
            if not engine.is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise CircuitGraphError(
                f"out of memory, with batches half as large too ({reason}); ask with fewer prompts, or trace with a smaller memory_budget"
            ) from error

    return asked


def _parsed(wanted: Any) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    if isinstance(wanted, str | Integral) and not isinstance(wanted, bool):
        try:
            size = int(TypeAdapter(ByteSize).validate_python(wanted if isinstance(wanted, str) else int(wanted)))
        except ValidationError:
            size = 0
        if size > 0:
            return size
    raise CircuitGraphError(f"memory_budget: {wanted!r}; expected a number of bytes, a text such as '8GB', or 'auto'")


def _physical() -> int:
    """Bytes of memory of this machine; 16 GiB where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 34
