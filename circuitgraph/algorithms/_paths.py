"""Paths through a graph, and expressions that many of them fit: `a*.h* -> a9.h6<q> -> logits`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._errors import CircuitGraphError, UnknownNameError, unknown_name
from circuitgraph._graph import Graph
from circuitgraph._names import Reader, Writer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

_NUMBERS = r"\*|\d+(?:-\d+)?"
_HEAD = re.compile(rf"a?({_NUMBERS})\.([hg]?)({_NUMBERS})(?:<([qkv*])>|\.([qkv]))?", re.IGNORECASE)
_MLP = re.compile(rf"m(?:lp)?({_NUMBERS})", re.IGNORECASE)
_EXPECTED = "expected 'input', 'a5.h1', 'a0-3.h*', 'a9.h6<q>', 'm2', 'm*', 'logits' or '*'"

Step = tuple[int, int]  # a reader, and a writer computed from it


@dataclass(frozen=True)
class Pattern:
    """One element of a path expression. `*` fits everything, `a0-3.h*` the heads of four layers, `a9.h6` any of that head's inputs."""

    text: str

    def __post_init__(self) -> None:
        if self._kind == "":
            raise UnknownNameError(f"{self.text!r} is no name and no pattern of names; {_EXPECTED}")

    @property
    def is_name(self) -> bool:
        return "*" not in self.text and not re.search(r"\d-\d", self.text)

    def writers(self, graph: Graph) -> list[int]:
        """The ids of the writers that fit. Raises `UnknownNameError` with near names where there are none."""
        if self._head is not None and (self._head[4] or self._head[5] or self._head[2].lower() == "g"):
            raise UnknownNameError(
                f"{self.text!r} is a reader, and a sender is a writer; expected {f'a{self._head[1]}.h{self._head[3]}'!r}"
            )
        fit = [w for w, writer in enumerate(graph.writers) if self._fits_writer(writer)]
        if not fit:
            raise unknown_name("writer", self.text, (writer.name for writer in graph.writers))
        return fit

    def readers(self, graph: Graph) -> list[int]:
        """The ids of the readers that fit; a reader that a group shares fits the name of each of its heads. Raises `UnknownNameError`."""
        fit = [r for r, reader in enumerate(graph.readers) if self._fits_reader(graph, reader)]
        if not fit:
            raise unknown_name("reader", self.text, (reader.name for reader in graph.readers))
        return fit

    def steps(self, graph: Graph) -> list[Step]:
        """Readers that fit, each with a writer computed from it that fits. Raises `UnknownNameError`."""
        if self._kind in ("input", "logits"):
            where = "begin" if self._kind == "input" else "end"
            raise UnknownNameError(f"{self.text!r} can only {where} a path")
        steps = [(r, int(w)) for r in self.readers(graph) for w in np.flatnonzero(graph.feeds[r]) if self._joins(graph, r, int(w))]
        if not steps:
            raise unknown_name("node", self.text, graph.nodes)
        return steps

    def _joins(self, graph: Graph, r: int, w: int) -> bool:
        """Whether a writer is the one that a reader belongs to (where heads are coupled, a reader feeds others too)."""
        reader, writer = graph.readers[r], graph.writers[w]
        is_group = self._head is not None and self._head[2].lower() == "g"
        return writer.node in graph.nodes_of(reader) and (is_group or self._fits_writer(writer))

    def _fits_writer(self, writer: Writer) -> bool:
        return self._kind in ("*", writer.kind) and (self._kind == "*" or self._fits_place(writer.layer, writer.index))

    def _fits_reader(self, graph: Graph, reader: Reader) -> bool:
        is_head = reader.kind in ("q", "k", "v")
        if self._kind == "*":
            return True
        if self._kind != ("head" if is_head else reader.kind):
            return False
        if self._head is None:
            return self._fits_place(reader.layer, -1)
        said = (self._head[4] or self._head[5] or "*").lower()
        if said not in ("*", reader.kind):
            return False
        if self._head[2].lower() == "g":
            return reader.is_grouped and self._fits_place(reader.layer, reader.index)
        return any(self._fits_place(reader.layer, Writer.parse(node).index) for node in graph.nodes_of(reader))

    def _fits_place(self, layer: int, index: int) -> bool:
        if self._head is not None:
            return _fits(self._head[1], layer) and _fits(self._head[3], index)
        return self._mlp is None or _fits(self._mlp[1], layer)

    @cached_property
    def _kind(self) -> str:
        """`*`, `input`, `logits`, `head`, `mlp`, or nothing."""
        if self.text.lower() in ("*", "input", "logits"):
            return self.text.lower()
        return "head" if self._head is not None else "mlp" if self._mlp is not None else ""

    @cached_property
    def _head(self) -> re.Match[str] | None:
        return _HEAD.fullmatch(self.text)

    @cached_property
    def _mlp(self) -> re.Match[str] | None:
        return _MLP.fullmatch(self.text)


@dataclass(frozen=True)
class Path:
    """What a writer says, to a reader, to what is computed from it, and so on to the receiver. Ids of one graph."""

    sender: int
    steps: tuple[Step, ...]
    receiver: int

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Places `(reader, writer)` in a mask, in order."""
        readers = (*(r for r, _ in self.steps), self.receiver)
        return tuple(zip(readers, (self.sender, *(w for _, w in self.steps)), strict=True))

    def name(self, graph: Graph) -> str:
        """The expression that this path alone fits."""
        middle = (_step_name(graph.readers[r], graph.writers[w]) for r, w in self.steps)
        return " -> ".join((graph.writers[self.sender].name, *middle, graph.readers[self.receiver].name))


@dataclass(frozen=True)
class Expression:
    """Patterns joined by `->`: a writer, any number of nodes on the way, a reader. Raises `CircuitGraphError` for less."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or len(self.patterns) < 2:
            raise CircuitGraphError(f"path: {self.text!r}; expected at least a sender and a receiver, such as 'a5.h1 -> logits'")

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(Pattern(part.strip()) for part in self.text.split("->"))

    def paths(self, graph: Graph, most: int) -> tuple[Path, ...]:
        """Every path that fits, those with the same middle together. Raises `CircuitGraphError` for none, or for more than `most`."""
        search = _Search(graph, self)
        if not search.total:
            raise self._no_path(graph, search)
        if search.total > most:
            raise CircuitGraphError(
                f"path: {search.total:,.0f} paths fit {self.text!r}, each a forward pass, and the limit is {most:,}; "
                "write a narrower expression, such as one layer in place of '*', or raise max_paths"
            )
        return tuple(sorted(search.paths(), key=lambda path: (path.steps, path.sender, path.receiver)))

    def _no_path(self, graph: Graph, search: _Search) -> CircuitGraphError:
        """The error that names the first place where nothing joins."""
        at = search.broken
        before, after = self.patterns[at], self.patterns[at + 1]
        if before.is_name and after.is_name:
            writer, reader = graph.writers[search.writers(at)[0]].name, graph.readers[search.readers(at + 1)[0]].name
            return UnknownNameError(f"path {self.text!r}: there is no edge {writer}->{reader}: {reader} does not come after {writer}")
        return UnknownNameError(f"no path fits {self.text!r}: no reader of {after.text!r} comes after a writer of {before.text!r}")


class _Search:
    """The paths of an expression through a graph: counted from the receivers back before any is made."""

    def __init__(self, graph: Graph, expression: Expression) -> None:
        first, *middle, last = expression.patterns
        self._graph = graph
        self._senders = first.writers(graph)
        self._middle = [pattern.steps(graph) for pattern in middle]
        self._receivers = last.readers(graph)

    def writers(self, at: int) -> list[int]:
        """What the element at a place says."""
        return self._senders if at == 0 else [w for _, w in self._middle[at - 1]]

    def readers(self, at: int) -> list[int]:
        """What the element at a place reads."""
        return self._receivers if at > len(self._middle) else [r for r, _ in self._middle[at - 1]]

    def _joined(self, at: int) -> Bool[ndarray, "readers writers"]:
        """Which writers of the element at a place are seen by which readers of the next."""
        joined: Bool[ndarray, "readers writers"] = self._graph.visible[np.ix_(self.readers(at + 1), self.writers(at))]
        return joined

    @cached_property
    def _ways(self) -> list[Float[ndarray, " writers"]]:
        """For each writer of each element, how many ways lead on to a receiver."""
        ways: list[Any] = [np.ones(len(self._receivers))]
        for at in range(len(self._middle), -1, -1):
            ways.insert(0, ways[0] @ self._joined(at))
        return ways

    @property
    def total(self) -> float:
        return float(self._ways[0].sum())

    @property
    def broken(self) -> int:
        """The first place after which nothing is seen by the next element that a path leads to."""
        ways, at = np.ones(len(self._senders)), 0
        while (ways := self._joined(at) @ ways).any():
            at += 1
        return at

    def paths(self) -> Iterator[Path]:
        for i, sender in enumerate(self._senders):
            for steps, receiver in self._onward(0, i):
                yield Path(sender, steps, receiver)

    def _onward(self, at: int, writer: int) -> Iterator[tuple[tuple[Step, ...], int]]:
        """The ways on from the writer with this number among those of the element at a place."""
        for i in np.flatnonzero(self._joined(at)[:, writer] & (self._ways[at + 1] > 0)):
            if at == len(self._middle):
                yield (), self._receivers[i]
            else:
                yield from (((self._middle[at][i], *steps), receiver) for steps, receiver in self._onward(at + 1, int(i)))


def patterns_of(what: str, value: str | Sequence[str]) -> tuple[Pattern, ...]:
    """One pattern or several. Raises `CircuitGraphError` for anything else."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise CircuitGraphError(f"{what}: {value!r}; expected a name, a pattern of names, or several in a tuple")
    return tuple(Pattern(text.strip()) for text in texts)


def _step_name(reader: Reader, writer: Writer) -> str:
    return writer.name if reader.kind == "mlp" else f"{writer.name}<{reader.kind}>"


def _fits(numbers: str, value: int) -> bool:
    if numbers == "*":
        return True
    first, _, last = numbers.partition("-")
    return int(first) <= value <= int(last or first)
