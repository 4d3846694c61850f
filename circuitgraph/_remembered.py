"""An engine whose answers to `evaluate` are kept in a file, so that a search of hours goes on where it was interrupted.

The algorithm begins again and asks the same questions in the same order; what was answered before is read.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._around import Around
from circuitgraph._engine import WriterValues
from circuitgraph._errors import FileError
from circuitgraph.files import write_bytes

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

WRITTEN_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Spent:
    """Seconds, and the same in plain forward passes as they were at that time."""

    seconds: float = 0.0
    forwards: float = 0.0


class Answers:
    """What was answered so far, by a hash of the question, and what was spent on it. The file is written at most once a minute.

    `key` says what all of it depends on: answers under another one count for nothing. Raises `FileError` for a file that is none.
    """

    def __init__(self, file: Path, key: str) -> None:
        self._file, self._key = file, key
        self._known, self._before = _read(file, key)
        self.start(plain=1.0)

    def start(self, plain: float) -> None:
        """Begin to count; `plain` are the seconds of a plain forward pass, which today may be others than when the file was written."""
        self._plain = plain
        self._began = self._written = time.perf_counter()

    @property
    def spent(self) -> Spent:
        """On the whole search: since the start, and what came before the file was written."""
        seconds = time.perf_counter() - self._began
        return Spent(self._before.seconds + seconds, self._before.forwards + seconds / self._plain)

    def of(self, question: str) -> Float[ndarray, "lanes prompts"] | None:
        known = self._known.get(question)
        return None if known is None else known.copy()

    def keep(self, question: str, answer: Float[ndarray, "lanes prompts"]) -> None:
        self._known[question] = answer.copy()
        if time.perf_counter() - self._written >= WRITTEN_EVERY:
            self._write()
            self._written = time.perf_counter()

    def forget(self) -> None:
        """Nothing is left to go on with."""
        self._file.unlink(missing_ok=True)

    def _write(self) -> None:
        import safetensors.numpy

        self._file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"key": self._key} | {name: repr(value) for name, value in asdict(self.spent).items()}
        write_bytes(self._file, safetensors.numpy.save(self._known, metadata))


@dataclass(frozen=True, eq=False)
class RememberedEngine(Around):
    """An engine that is asked only what nobody has answered yet, of `evaluate` with its own source."""

    answers: Answers
    is_reversed: bool = False

    def evaluate(
        self, masks: Float[ndarray, "lanes readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "lanes prompts"]:
        if source is not None:
            return self.engine.evaluate(masks, source=source)
        asked = np.ascontiguousarray(masks)
        described = f"{self.is_reversed} {asked.dtype} {asked.shape} ".encode()
        question = hashlib.sha256(described + asked.tobytes()).hexdigest()
        answer = self.answers.of(question)
        if answer is None:
            answer = self.engine.evaluate(masks)
            self.answers.keep(question, answer)
        return answer

    def reversed(self) -> RememberedEngine:
        return replace(self, engine=self.engine.reversed(), is_reversed=not self.is_reversed)


def _read(file: Path, key: str) -> tuple[dict[str, Float[ndarray, "lanes prompts"]], Spent]:
    import safetensors

    if not file.exists():
        return {}, Spent()
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            said = opened.metadata() or {}
            if said.get("key") != key:
                return {}, Spent()
            known = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            return known, Spent(float(said["seconds"]), float(said["forwards"]))
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise FileError(f"{file} is not what an interrupted search leaves ({error}); remove it, and the search begins anew") from error
