"""The one place that knows the notation of EAP-IG and MIB: `input`, `a5.h1`, `m3`, `logits`, `a5.h1->a9.h6<q>`.

A model whose token and position embeddings are two writers has `tok` and `pos` in place of `input`.
With grouped-query attention a reader shared by the heads of group 2 is written `a9.g2<k>`. What a writer says in one span of the prompt
only is written `a5.h1@S2`.

After a refinement (see `Graph.refine`) an MLP or an attention says `m3.f12`, `m3.f99` (features of a dictionary), `m3.n7` (a neuron),
`m3.skip` and `m3.err`; so does the residual stream before layer 5, `r5.f12`, whose reader is `r5`. What feature 12 of layer 3 of a
cross-layer transcoder says at the MLP of layer 5 is `m3.f12.m5`: a part of `m5`, computed from the reader `m3.f12`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Literal, get_args

from circuitgraph._errors import UnknownNameError, near_names

PartKind = Literal["feature", "neuron", "skip", "error"]
WriterKind = Literal["input", "head", "mlp"] | PartKind
HeadInput = Literal["q", "k", "v"]
ReaderKind = HeadInput | Literal["mlp", "feature", "stream", "logits"]
ComponentKind = Literal["r", "a", "m"]

_ORDER = get_args(Literal["input", "head", "mlp", "feature", "neuron", "skip", "error"])  # of writers at one depth

INPUTS = ("input", "tok", "pos")
"""What the embeddings are called: both together, or those of tokens and those of positions apart."""

_HEAD = re.compile(r"a?(\d+)\.(h|g)?(\d+)", re.IGNORECASE)
_MLP = re.compile(r"m(?:lp)?(\d+)", re.IGNORECASE)
_COMPONENT = re.compile(r"([ram])(\d+)", re.IGNORECASE)
_PART = re.compile(r"([ram])(\d+)\.(?:([fn])(\d+)|(skip|err))", re.IGNORECASE)
_LATER = re.compile(r"m(\d+)\.f(\d+)\.m(\d+)", re.IGNORECASE)
_LETTERS: dict[str, PartKind] = {"f": "feature", "n": "neuron", "skip": "skip", "err": "error"}
_SPELLED: dict[str, str] = {kind: letter for letter, kind in _LETTERS.items()}
_SPAN = re.compile(r"[^\s@<>-]+")
_HEAD_INPUT = re.compile(r"(a?\d+\.[hg]?\d+)(?:<([qkv])>|\.([qkv]))", re.IGNORECASE)
_EXPECTED_WRITER = "expected 'input', a head such as 'a5.h1' or an MLP such as 'm3'"
_EXPECTED_READER = "expected a head's input such as 'a9.h6<q>', an MLP such as 'm3' or 'logits'"


@dataclass(frozen=True, slots=True)
class Component:
    """What a refinement replaces by its parts: the MLP `m3`, the attention `a3`, or the residual stream before layer 3, `r3`."""

    kind: ComponentKind
    layer: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.layer}"

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, text: str) -> Component:
        """Read a name. Raises `UnknownNameError`."""
        if found := _COMPONENT.fullmatch(text.strip()):
            return cls(found[1].lower(), int(found[2]))  # type: ignore[arg-type]
        raise UnknownNameError(
            f"{text!r} is not the name of a component; expected an MLP 'm3', an attention 'a3', or the stream before layer 3, 'r3'"
        )


@total_ordering
@dataclass(frozen=True, slots=True)
class Writer:
    """Something that adds a vector to the residual stream: the embeddings, an attention head, an MLP, or a part of a refined component.

    Where the embeddings are two writers, `tok` has index 0 and `pos` index 1. `part_of`: of a part, what it is a part of.
    `span`: only what it adds at the positions of this part of the prompt; all of them if empty. `origin`: the layer that a feature of a
    cross-layer transcoder reads, where it is an earlier one than `layer`, whose MLP says it.
    """

    kind: WriterKind
    layer: int = -1
    index: int = -1
    span: str = ""
    part_of: ComponentKind | None = None
    origin: int = -1

    @property
    def name(self) -> str:
        return f"{self.node}@{self.span}" if self.span else self.node

    @property
    def node(self) -> str:
        """The name without the span."""
        if self.kind == "head":
            return f"a{self.layer}.h{self.index}"
        if self.origin >= 0:
            return f"m{self.origin}.f{self.index}.m{self.layer}"
        if self.part_of is not None:
            return f"{self.part_of}{self.layer}.{_SPELLED[self.kind]}{'' if self.index < 0 else self.index}"
        return f"m{self.layer}" if self.kind == "mlp" else INPUTS[self.index + 1]

    @property
    def component(self) -> Component | None:
        """Of a part, what was refined."""
        return None if self.part_of is None else Component(self.part_of, self.layer)

    @property
    def depth(self) -> float:
        """Its place along the stream: the input 0, the stream before layer `l` just after `2l`, heads at `2l + 1`, its MLP at `2l + 2`."""
        if self.kind == "input":
            return 0
        return 2 * self.layer + {"r": 0.3, "a": 1, "m": 2}[self.part_of or ("a" if self.kind == "head" else "m")]

    def _key(self) -> tuple[float, int, int, int]:
        return (self.depth, _ORDER.index(self.kind), self.origin, self.index)

    def __lt__(self, other: Writer) -> bool:
        return self._key() < other._key()

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, text: str) -> Writer:
        """Read a name; `a9.h9`, `A9.9` and `9.9` are the same head. Raises `UnknownNameError`.

        >>> print(Writer.parse("A9.9"), Writer.parse("m3@S2").span)
        a9.h9 S2
        """
        text = text.strip()
        node, at, span = text.partition("@")
        if not at or _SPAN.fullmatch(span):
            if node.lower() in INPUTS:
                return cls("input", index=INPUTS.index(node.lower()) - 1, span=span)
            if head := _HEAD.fullmatch(node):
                if (head[2] or "h").lower() == "h":
                    return cls("head", int(head[1]), int(head[3]), span)
            if mlp := _MLP.fullmatch(node):
                return cls("mlp", int(mlp[1]), span=span)
            if part := _PART.fullmatch(node):
                kind = _LETTERS[(part[3] or part[5]).lower()]
                return cls(kind, int(part[2]), int(part[4] or -1), span, part[1].lower())  # type: ignore[arg-type]
            if (later := _LATER.fullmatch(node)) and int(later[1]) < int(later[3]):
                return cls("feature", int(later[3]), int(later[2]), span, "m", int(later[1]))
        raise UnknownNameError(f"{text!r} is not the name of a writer; {_meant(text, 'input') or _EXPECTED_WRITER}")


@total_ordering
@dataclass(frozen=True, slots=True)
class Reader:
    """Something that takes the residual stream in: a head's `q`, `k` or `v` input, an MLP's input, the logits; after a refinement, a
    transcoder's feature (`m3.f12`) or the stream itself (`r5`).

    `is_grouped`: the reader serves all heads of a group of grouped-query attention, and `index` is the group's.
    """

    kind: ReaderKind
    layer: int = -1
    index: int = -1
    is_grouped: bool = False

    @property
    def name(self) -> str:
        return f"{self.node}<{self.kind}>" if self.kind in ("q", "k", "v") else self.node

    @property
    def node(self) -> str:
        """The name without `<q>`, `<k>` or `<v>`."""
        if self.kind in ("q", "k", "v"):
            return f"a{self.layer}.{'g' if self.is_grouped else 'h'}{self.index}"
        if self.kind == "feature":
            return f"m{self.layer}.f{self.index}"
        return "logits" if self.kind == "logits" else f"{'r' if self.kind == 'stream' else 'm'}{self.layer}"

    @property
    def depth(self) -> float:
        """Its place along the stream, just before the writers computed from it; the logits come last."""
        if self.kind == "logits":
            return float("inf")
        return 2 * self.layer + {"stream": 0.2, "mlp": 1.5, "feature": 1.5}.get(self.kind, 0.5)

    def _key(self) -> tuple[float, int, int]:
        return (self.depth, "qkv".find(self.kind), self.index)

    def __lt__(self, other: Reader) -> bool:
        return self._key() < other._key()

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, text: str) -> Reader:
        """Read a name; `a9.h9<q>` and `A9.9.Q` are the same reader. Raises `UnknownNameError`.

        >>> print(Reader.parse("A9.9.Q"))
        a9.h9<q>
        """
        text = text.strip()
        if text.lower() == "logits":
            return cls("logits")
        if mlp := _MLP.fullmatch(text):
            return cls("mlp", int(mlp[1]))
        if (found := _COMPONENT.fullmatch(text)) and found[1].lower() == "r":
            return cls("stream", int(found[2]))
        if (part := _PART.fullmatch(text)) and part[1].lower() == "m" and part[3] and part[3].lower() == "f":
            return cls("feature", int(part[2]), int(part[4]))
        if found := _HEAD_INPUT.fullmatch(text):
            head = _HEAD.fullmatch(found[1])
            assert head is not None  # the same pattern
            kind = (found[2] or found[3]).lower()
            return cls(kind, int(head[1]), int(head[3]), (head[2] or "h").lower() == "g")  # type: ignore[arg-type]
        raise UnknownNameError(f"{text!r} is not the name of a reader; {_meant(text, 'logits', text[-3:]) or _EXPECTED_READER}")


@dataclass(frozen=True, slots=True, order=True)
class Edge:
    """A writer seen by a later reader."""

    writer: Writer
    reader: Reader

    @property
    def name(self) -> str:
        return f"{self.writer}->{self.reader}"

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, text: str) -> Edge:
        """Read `a5.h1->a9.h6<q>`. Raises `UnknownNameError` that says which end does not read.

        >>> print(Edge.parse("5.1 -> 9.6.q"))
        a5.h1->a9.h6<q>
        """
        ends = text.split("->")
        if len(ends) != 2:
            raise UnknownNameError(f"{text!r} is not the name of an edge; expected writer->reader, such as 'a5.h1->a9.h6<q>'")
        return cls(Writer.parse(ends[0]), Reader.parse(ends[1]))


def _meant(text: str, end: str, head_input: str = "") -> str:
    """What a name that does not read may have meant: a head, or the `end` of the stream that has a name of its own."""
    numbers = re.findall(r"\d+", text)
    if len(numbers) != 2:
        return near_names(text, [end])
    kind = re.search("[qkv]", head_input.lower())
    suffix = f"<{kind[0] if kind else 'q'}>" if head_input else ""
    return f"did you mean 'a{numbers[0]}.h{numbers[1]}{suffix}'?"
