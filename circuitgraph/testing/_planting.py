"""Weights in which exactly a given circuit carries signal.

The stream has a room of `SYMBOLS` numbers for every planted edge, into which its writer alone writes and which its reader alone reads; a
few numbers of noise, which all that is not planted reads and writes; a few that only tokens outside the task write; and, under norms, two
large constants, so that what an edge says hardly moves the scale. A code is a one-hot vector less its mean, of the same length for every
symbol, so that a patched edge changes no norm; and the mean of the stream is that of the noise, which has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from circuitgraph._names import Reader, Writer
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import Activation, ReferenceAttention, ReferenceLayer, ReferenceMLP, ReferenceNorm, activate
from circuitgraph.testing._wiring import INPUT, LOGITS, Link, Part, Wiring

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    Vectors = Float[ndarray, "some d_model"]

SYMBOLS = 3
"""Tags, and classes. A token is an item (its tag, then its class), a tag to look up, an answer, or none of the task's."""

CODES: Float[ndarray, "symbols numbers"] = np.eye(SYMBOLS) - 1 / SYMBOLS
ITEMS, LOOK_UPS, ANSWERS = 0, SYMBOLS**2, SYMBOLS**2 + SYMBOLS  # the first token of each kind
OTHERS = ANSWERS + SYMBOLS
VOCABULARY = OTHERS + 9

_NOISE = 8  # numbers of the stream
_BALLAST = 64.0
_FOCUS = 5.0  # by how much the score of the right item is above that of any other, in nats
_LOGIT = 4.0  # of the answer, above that of another class
_AGAINST = -0.4  # what a head that works against the others says, where they say 1 together
_STEEP, _SHARP = 2.0, 40.0  # slopes of MLPs: of one that says on, and of one that decides

Feed = Literal["gelu", "relu", "linear", "gated"]
_ACTS: dict[Feed, Activation] = {"gelu": "gelu", "relu": "relu", "linear": "identity", "gated": "silu"}


@dataclass(frozen=True)
class Size:
    """What the circuit is planted in. `mlp` None: attention only. `norm` None: no norms."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm: Literal["rms", "layer"] | None
    mlp: Feed | None
    is_parallel: bool


@dataclass(frozen=True, eq=False)
class Planter:
    """Makes the weights of one model."""

    size: Size
    wiring: Wiring
    looks_up: bool
    rng: np.random.Generator

    @property
    def n_rooms(self) -> int:
        return len(self.wiring.links)

    @property
    def d_model(self) -> int:
        return SYMBOLS * self.n_rooms + _NOISE + SYMBOLS + 2

    def model(self, name: str) -> ReferenceModel:
        layers = tuple(
            ReferenceLayer(self._attention(layer), self._mlp(layer) if self.size.mlp else None, self.size.is_parallel)
            for layer in range(self.size.n_layers)
        )
        unembedding = np.zeros((VOCABULARY, self.d_model))
        unembedding[ANSWERS:OTHERS] = _LOGIT * np.eye(SYMBOLS) @ self._hearing(LOGITS, self.wiring.into(LOGITS))
        return ReferenceModel(self._embedding(), layers, unembedding, final_norm=self._norm, name=name)

    @cached_property
    def _norm(self) -> ReferenceNorm | None:
        """Its gain undoes the scale that the two constants make."""
        if self.size.norm is None:
            return None
        return ReferenceNorm(np.full(self.d_model, _BALLAST * (2 / self.d_model) ** 0.5), None, self.size.norm)

    def _embedding(self) -> Float[ndarray, "vocabulary d_model"]:
        tokens = self._quiet(VOCABULARY)
        symbols = np.arange(SYMBOLS)
        codes = np.zeros((3, VOCABULARY, SYMBOLS))
        codes[0, ITEMS:LOOK_UPS] = np.tile(CODES[symbols], (SYMBOLS, 1))  # class
        codes[1, ITEMS:LOOK_UPS] = codes[2, ITEMS:LOOK_UPS] = np.repeat(CODES[symbols], SYMBOLS, axis=0)  # query, key
        codes[1, LOOK_UPS:ANSWERS] = CODES
        for link in self.wiring.out_of(INPUT):
            tokens += codes[("class", "query", "key").index(link.code)] @ self._room(link)
        tokens[OTHERS:] += self.rng.normal(size=(VOCABULARY - OTHERS, SYMBOLS)) @ self._spare
        if self.size.norm is not None:
            tokens[:, -2:] = _BALLAST, -_BALLAST
        return tokens

    def _attention(self, layer: int) -> ReferenceAttention:
        size, group = self.size, self.size.n_heads // self.size.n_kv_heads
        strength = (_FOCUS * SYMBOLS**0.5) ** 0.5
        q, o = 2 * self._noises(size.n_heads), self._noises(size.n_heads).swapaxes(1, 2)
        k, v = 2 * self._noises(size.n_kv_heads), self._noises(size.n_kv_heads)
        for part in self.wiring.parts:
            if part.writer.kind == "head" and part.writer.layer == layer:
                h = part.writer.index
                into = {kind: self._heard(Reader(kind, layer, h)) for kind in ("q", "k", "v")}
                if not self.looks_up:  # of the task's tokens these hear nothing
                    into |= {"q": self._spare, "k": self._spare}
                q[h], k[h // group], v[h // group] = strength * into["q"], strength * into["k"], into["v"]
                o[h] = self._saying(part).T
        return ReferenceAttention(q, k, v, o, norm=self._norm)

    def _mlp(self, layer: int) -> ReferenceMLP:
        part = next((part for part in self.wiring.parts if part.writer == Writer("mlp", layer)), None)
        hidden = self._random_hidden() if part is None else self._hidden(part)
        feed = self.size.mlp
        assert feed is not None
        act: Activation = _ACTS[feed]
        if feed != "gated":
            return ReferenceMLP(hidden.gate, hidden.down, act, up_bias=hidden.gate_bias, norm=self._norm)
        return ReferenceMLP(hidden.up, hidden.down, act, hidden.gate, hidden.up_bias, hidden.gate_bias, norm=self._norm)

    def _random_hidden(self) -> _Hidden:
        width = 2 * SYMBOLS
        return _Hidden(self._quiet(width), self.rng.normal(size=width), self._quiet(width), np.ones(width), self._quiet(width).T / 2)

    def _hidden(self, part: Part) -> _Hidden:
        """Units, one or two for each symbol, whose sum over symbols says a multiple of the code that was heard."""
        links = self.wiring.into(Reader("mlp", part.writer.layer))
        heard, saying = self._hearing(links[0].reader, links), self._saying(part)
        assert self.size.mlp is not None
        act = _ACTS[self.size.mlp]
        nothing, none = np.zeros((SYMBOLS, self.d_model)), np.zeros(SYMBOLS)
        if part.role == "copy":
            gate, biases, weights = [_STEEP * heard, nothing], [none, none], [1.0, 0.0]
        elif part.role == "and":  # both say it: 2/3; one of them: 1/6
            gate, biases, weights = [_SHARP * heard, nothing], [none - _SHARP * 5 / 12, none], [1.0, 0.0]
        else:  # from one vote of three (0) to two (1/3): a ramp
            gate, biases, weights = [_SHARP * heard] * 2, [none - _SHARP / 12, none - _SHARP / 4], [1.0, -1.0]
        up, up_bias = [nothing] * 2, [none + 1, none + 1]
        if part.role == "copy" and self.size.mlp == "gated":
            up, up_bias = [_STEEP * heard, nothing], [none, none]
        whole = _Hidden(
            np.concatenate(gate),
            np.concatenate(biases),
            np.concatenate(up),
            np.concatenate(up_bias),
            np.concatenate([w * saying for w in weights]).T,
        )
        return whole.normalised(act, self.size.mlp == "gated", heard)

    def _saying(self, part: Part) -> Vectors:
        """`[symbols, d_model]`: what the code `i` adds to the stream, in the rooms of all edges out of a part."""
        gain = _AGAINST if part.role == "against" else 1.0
        saying: Vectors = gain * np.sum([CODES @ self._room(link) for link in self.wiring.out_of(part.writer)], axis=0)
        return saying

    def _heard(self, reader: Reader) -> Vectors:
        links = self.wiring.into(reader)
        return self._hearing(reader, links) if links else np.zeros((SYMBOLS, self.d_model))

    def _hearing(self, reader: Reader, links: Sequence[Link]) -> Vectors:
        """`[symbols, d_model]`: reads the mean of what is said into a reader, the code of a symbol by its numbers."""
        roles = {part.writer: part.role for part in self.wiring.parts}
        n = sum(roles.get(link.writer) != "against" for link in links)
        read: Vectors = np.sum([self._room(link) for link in links], axis=0) / max(n, 1)
        return read

    def _room(self, link: Link) -> Vectors:
        """`[symbols, d_model]`: where in the stream the numbers of a planted edge are."""
        return np.eye(SYMBOLS, self.d_model, SYMBOLS * self.wiring.links.index(link))

    @property
    def _spare(self) -> Vectors:
        """`[symbols, d_model]`: what tokens outside the task write, so that every head can be seen to look somewhere."""
        return np.eye(SYMBOLS, self.d_model, SYMBOLS * self.n_rooms + _NOISE)

    def _quiet(self, n: int) -> Vectors:
        """Random vectors in the noise, whose numbers add up to nothing."""
        numbers = self.rng.normal(scale=0.3, size=(n, _NOISE))
        vectors = np.zeros((n, self.d_model))
        vectors[:, SYMBOLS * self.n_rooms : SYMBOLS * self.n_rooms + _NOISE] = numbers - numbers.mean(axis=1, keepdims=True)
        return vectors

    def _noises(self, n: int) -> Float[ndarray, "n symbols d_model"]:
        return self._quiet(n * SYMBOLS).reshape(n, SYMBOLS, self.d_model)


@dataclass(frozen=True, eq=False)
class _Hidden:
    """An MLP `down(act(gate(x)) * up(x))`; one without a gate is `down(act(gate(x)))`."""

    gate: Vectors
    gate_bias: Float[ndarray, " width"]
    up: Vectors
    up_bias: Float[ndarray, " width"]
    down: Float[ndarray, "d_model width"]

    def normalised(self, act: Activation, is_gated: bool, heard: Vectors) -> _Hidden:
        """The same, so that it says a code as loudly as it hears it."""
        says = self._of(act, is_gated, np.linalg.pinv(heard) @ CODES[0]) @ self.down.T
        along = says @ self.down[:, 0]
        return _Hidden(self.gate, self.gate_bias, self.up, self.up_bias, self.down * (self.down[:, 0] @ self.down[:, 0]) / along)

    def _of(self, act: Activation, is_gated: bool, x: Float[ndarray, " d_model"]) -> Float[ndarray, " width"]:
        hidden: Float[ndarray, " width"] = activate(act, self.gate @ x + self.gate_bias)
        return hidden * (self.up @ x + self.up_bias) if is_gated else hidden
