"""Which circuit is planted: the parts of a small transformer that do the job, and who hears what from whom.

The job is a lookup. A prompt is a few items, each a tag and a class, and a tag at the end; the answer is the class of the item with that
tag. Three kinds of codes travel through the stream: `class`, `query` (the tag, said at every position) and `key` (the tag, said at items
only). A head finds the item whose key is its query and says there what it hears as its value; an MLP says on what it hears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph
from circuitgraph._names import Reader, Writer

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray

Code = Literal["class", "query", "key"]
Role = Literal["copy", "vote", "and", "against"]

INPUT, LOGITS = Writer("input"), Reader("logits")
_WANTS = {"vote": "redundant paths need", "and": "an interaction needs"}
_CODES: tuple[Code, ...] = ("class", "query", "key")


@dataclass(frozen=True)
class Link:
    """A planted edge: what a writer says of a code to a reader, through a part of the stream that is theirs alone."""

    writer: Writer
    reader: Reader
    code: Code


@dataclass(frozen=True)
class Part:
    """A planted head or MLP and the code that it says.

    `role`: an MLP that says what it hears ("copy"), what two of three say ("vote") or only what two agree on ("and"); a head that speaks
    to the logits with the opposite sign ("against").
    """

    writer: Writer
    code: Code
    role: Role = "copy"


@dataclass(frozen=True)
class Wiring:
    """A planted circuit: its parts in the order of the stream, and its edges."""

    parts: tuple[Part, ...]
    links: tuple[Link, ...]

    def mask(self, graph: Graph) -> Bool[ndarray, "readers writers"]:
        """The edges, as a mask of the graph."""
        mask = np.zeros(graph.shape, dtype=bool)
        for link in self.links:
            mask[graph.reader_id(link.reader), graph.writer_id(link.writer)] = True
        return mask

    def into(self, reader: Reader) -> tuple[Link, ...]:
        return tuple(link for link in self.links if link.reader == reader)

    def out_of(self, writer: Writer) -> tuple[Link, ...]:
        return tuple(link for link in self.links if link.writer == writer)


@dataclass(frozen=True)
class Options:
    """What a planted circuit may have. `looks_up`: heads find their item; else everywhere alike, and no `q` or `k` edge is planted."""

    looks_up: bool = True
    redundant: bool = False
    interaction: bool = False
    inhibition: bool = False


def sampled(graph: Graph, options: Options, rng: np.random.Generator) -> Wiring:
    """A random circuit in this graph. Raises `CircuitGraphError` where the graph has no room for what is asked for."""
    draw = _Draw(graph, options, rng)
    draw.reserve()
    for part in _places(graph):
        draw.plant(part)
    draw.conclude()
    return Wiring(tuple(draw.parts), tuple(draw.links))


def _places(graph: Graph) -> list[Writer]:
    """One head for each `k` and `v` reader (heads that share them would hear each other's part), and every MLP."""
    places, taken = list[Writer](), set[int]()
    for writer in graph.writers[1:]:
        if writer.kind == "head":
            keys = graph.reader_id(Reader("k", writer.layer, writer.index))
            if keys in taken:
                continue
            taken.add(keys)
        places.append(writer)
    return places


@dataclass
class _Draw:
    """A circuit in the making. `resolved`: the class that a part says at the last position is the answer."""

    graph: Graph
    options: Options
    rng: np.random.Generator
    parts: list[Part] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    resolved: set[Writer] = field(default_factory=set)
    reserved: dict[Writer, Role] = field(default_factory=dict)
    fixed: dict[Writer, tuple[Writer, ...]] = field(default_factory=dict)  # the special MLPs, and whom alone they hear

    def reserve(self) -> None:
        """Places for what is asked for, before anything else takes them; the last MLPs first, since they hear the most heads."""
        options = self.options
        wanted: list[tuple[Role, int, bool]] = [("vote", 3, options.redundant), ("and", 2, options.interaction)]
        for role, n_heads, is_wanted in wanted:
            if is_wanted:
                self._reserve_mlp(role, n_heads)
        if options.inhibition:
            free = self._free_heads(Reader("logits"))
            if len(free) < 2:
                raise CircuitGraphError(
                    "planted model: inhibition needs two heads that are not otherwise taken; give it more heads or layers"
                )
            self.reserved[free[int(self.rng.integers(len(free)))]] = "against"

    def _reserve_mlp(self, role: Role, n_heads: int) -> None:
        for mlp in reversed([writer for writer in self.graph.writers if writer.kind == "mlp" and writer not in self.reserved]):
            free = self._free_heads(Reader("mlp", mlp.layer))
            if len(free) >= n_heads:
                heads = [free[i] for i in sorted(self.rng.choice(len(free), n_heads, replace=False))]
                self.reserved |= {mlp: role} | dict.fromkeys(heads, "copy")
                self.fixed[mlp] = tuple(heads)
                return
        raise CircuitGraphError(
            f"planted model: {_WANTS[role]} an MLP that sees {n_heads} heads not otherwise taken (heads that share keys count once); "
            "give it more heads or layers"
        )

    def _free_heads(self, reader: Reader) -> list[Writer]:
        seen = self.graph.visible[self.graph.reader_id(reader)]
        heads = [place for place in _places(self.graph) if place.kind == "head" and place not in self.reserved]
        return [head for head in heads if seen[self.graph.writer_id(head)]]

    def plant(self, writer: Writer) -> None:
        """Maybe a part at this place."""
        role = self.reserved.get(writer)
        if writer in self.fixed:
            self._special(writer, self.fixed[writer])
        elif writer.kind == "mlp":
            if self.rng.random() < 0.6:
                self._mlp(writer)
        elif role is not None or self.rng.random() < 0.5 or self._is_last_chance(writer):
            self._head(writer, role)

    def _is_last_chance(self, writer: Writer) -> bool:
        return not self.resolved and writer == [place for place in _places(self.graph) if place.kind == "head"][-1]

    def _special(self, writer: Writer, heads: Sequence[Writer]) -> None:
        self._add(Part(writer, "class", self.reserved[writer]), [(Reader("mlp", writer.layer), "class", heads)])
        self.resolved.add(writer)

    def _mlp(self, writer: Writer) -> None:
        code, reader = self._one_of(_CODES if self.options.looks_up else ("class",)), Reader("mlp", writer.layer)
        known = self._sayers(code, reader)
        if code == "class":  # either all say the answer at the last position or none does
            says = [source in self.resolved for source in known]
            choice = says[int(self.rng.integers(len(says)))]
            known = [source for source, does in zip(known, says, strict=True) if does == choice]
            if choice:
                self.resolved.add(writer)
        self._add(Part(writer, code), [(reader, code, self._some(known))])

    def _head(self, writer: Writer, role: Role | None) -> None:
        q, k, v = (Reader(kind, writer.layer, writer.index) for kind in ("q", "k", "v"))
        code: Code = "class"
        if role is None and self.options.looks_up and not self._is_last_chance(writer):
            code = self._one_of(("class", "class", "query"))
        value = [INPUT] if role is not None else self._some(self._sayers(code, v))
        ends: list[tuple[Reader, Code, Sequence[Writer]]] = [(v, code, value)]
        if self.options.looks_up:
            query = [INPUT] if role is not None else self._some(self._sayers("query", q))
            key = [INPUT] if role is not None else self._some(self._sayers("key", k))
            ends = [(q, "query", query), (k, "key", key), *ends]
        self._add(Part(writer, code, role or "copy"), ends)
        if code == "class":
            self.resolved.add(writer)

    def _add(self, part: Part, ends: Sequence[tuple[Reader, Code, Sequence[Writer]]]) -> None:
        self.parts.append(part)
        self.links += [Link(source, reader, code) for reader, code, sources in ends for source in sources]

    def _sayers(self, code: Code, reader: Reader) -> list[Writer]:
        """Who says a code where this reader hears it; heads that are taken by something else are not asked."""
        seen = self.graph.visible[self.graph.reader_id(reader)]
        said = [part.writer for part in self.parts if part.code == code and part.writer not in self.reserved]
        return [INPUT, *(writer for writer in said if seen[self.graph.writer_id(writer)])]

    def _some(self, known: Sequence[Writer]) -> list[Writer]:
        """One or two of them, rather those that nobody has heard yet."""
        heard = {link.writer for link in self.links}
        weights = np.array([1.0 if writer in heard or writer == INPUT else 3.0 for writer in known])
        n = min(len(known), 1 + int(self.rng.random() < 0.4))
        chosen = self.rng.choice(len(known), n, replace=False, p=weights / weights.sum())
        return [known[i] for i in sorted(chosen)]

    def _one_of(self, codes: Sequence[Code]) -> Code:
        return codes[int(self.rng.integers(len(codes)))]

    def conclude(self) -> None:
        """The logits hear every part that says the answer and that nobody else hears; what then leads nowhere goes."""
        heard = {link.writer for link in self.links}
        ends = [part.writer for part in self.parts if part.writer in self.resolved and part.writer not in heard]
        self.links += [Link(writer, LOGITS, "class") for writer in ends]
        while True:
            heard = {link.writer for link in self.links}
            lost = {part.writer for part in self.parts} - heard
            if not lost:
                return
            self.parts = [part for part in self.parts if part.writer not in lost]
            self.links = [link for link in self.links if _owner(link.reader) not in lost]


def _owner(reader: Reader) -> Writer | None:
    """The part that a planted reader belongs to; None for the logits."""
    if reader.kind == "logits":
        return None
    return Writer("mlp", reader.layer) if reader.kind == "mlp" else Writer("head", reader.layer, reader.index)
