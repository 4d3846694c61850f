"""What was found of a model's wiring and what was not: the one error that the finder raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from circuitgraph._errors import TraceError


class MissingJointError(Exception):
    """A joint that could not be found, with its reason; `FoundJoints` collects these and makes one `TraceError` of them."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class FoundJoints:
    """A record of the search: the joints found so far, and those that are missing with their reasons."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._found: list[str] = []
        self._missing: list[str] = []

    def add(self, joint: str) -> None:
        """Note a joint that is known now."""
        self._found.append(joint)

    @contextmanager
    def look_for(self, joint: str) -> Iterator[None]:
        """Search inside this block; a `MissingJointError` is noted, and the search goes on with the next joint."""
        try:
            yield
        except MissingJointError as missing:
            self._missing.append(f"{joint}: {missing.reason}")

    def settle(self) -> None:
        """Raise the `TraceError` if anything is missing."""
        if self._missing:
            raise TraceError(
                f"cannot trace {self._model}. Not found: {'; '.join(self._missing)}. Found: {', '.join(self._found) or 'nothing'}. "
                f"If it is a decoder whose components add to one residual stream, describe it by hand: "
                f"trace(model, architecture=Architecture(...))"
            )
