"""The one place that knows the notation of EAP-IG and MIB: `input`, `a5.h1`, `m3`, `logits`, `a5.h1->a9.h6<q>`.

A model whose token and position embeddings are two writers has `tok` and `pos` in place of `input`.
With grouped-query attention a reader shared by the heads of group 2 is written `a9.g2<k>`. What a writer says in one span of the prompt
only is written `a5.h1@S2`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Literal

from circuitgraph._errors import UnknownNameError, near_names

WriterKind = Literal["input", "head", "mlp"]
HeadInput = Literal["q", "k", "v"]
ReaderKind = HeadInput | Literal["mlp", "logits"]

INPUTS = ("input", "tok", "pos")
"""What the embeddings are called: both together, or those of tokens and those of positions apart."""

_HEAD = re.compile(r"a?(\d+)\.(h|g)?(\d+)", re.IGNORECASE)
_MLP = re.compile(r"m(?:lp)?(\d+)", re.IGNORECASE)
_SPAN = re.compile(r"[^\s@<>-]+")
_HEAD_INPUT = re.compile(r"(a?\d+\.[hg]?\d+)(?:<([qkv])>|\.([qkv]))", re.IGNORECASE)
_EXPECTED_WRITER = "expected 'input', a head such as 'a5.h1' or an MLP such as 'm3'"
_EXPECTED_READER = "expected a head's input such as 'a9.h6<q>', an MLP such as 'm3' or 'logits'"


@total_ordering
@dataclass(frozen=True, slots=True)
class Writer:
    """Something that adds a vector to the residual stream: the embeddings, an attention head, an MLP.

    Where the embeddings are two writers, `tok` has index 0 and `pos` index 1.
    `span`: only what it adds at the positions of this part of the prompt; all of them if empty.
    """

    kind: WriterKind
    layer: int = -1
    index: int = -1
    span: str = ""

    @property
    def name(self) -> str:
        return f"{self.node}@{self.span}" if self.span else self.node

    @property
    def node(self) -> str:
        """The name without the span."""
        if self.kind == "head":
            return f"a{self.layer}.h{self.index}"
        return f"m{self.layer}" if self.kind == "mlp" else INPUTS[self.index + 1]

    @property
    def depth(self) -> int:
        """Its place along the stream: the input 0, the heads of layer `l` at `2l + 1`, its MLP at `2l + 2`."""
        return 0 if self.kind == "input" else 2 * self.layer + (1 if self.kind == "head" else 2)

    def __lt__(self, other: Writer) -> bool:
        return (self.depth, self.index) < (other.depth, other.index)

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
        raise UnknownNameError(f"{text!r} is not the name of a writer; {_meant(text, 'input') or _EXPECTED_WRITER}")


@total_ordering
@dataclass(frozen=True, slots=True)
class Reader:
    """Something that takes the residual stream in: a head's `q`, `k` or `v` input, an MLP's input, the logits.

    `is_grouped`: the reader serves all heads of a group of grouped-query attention, and `index` is the group's.
    """

    kind: ReaderKind
    layer: int = -1
    index: int = -1
    is_grouped: bool = False

    @property
    def name(self) -> str:
        if self.kind == "logits":
            return "logits"
        return f"m{self.layer}" if self.kind == "mlp" else f"{self.node}<{self.kind}>"

    @property
    def node(self) -> str:
        """The name without `<q>`, `<k>` or `<v>`."""
        if self.kind in ("q", "k", "v"):
            return f"a{self.layer}.{'g' if self.is_grouped else 'h'}{self.index}"
        return self.name

    @property
    def depth(self) -> float:
        """Its place along the stream, just before the writers computed from it; the logits come last."""
        if self.kind == "logits":
            return float("inf")
        return 2 * self.layer + (2 if self.kind == "mlp" else 1) - 0.5

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
