"""The parts of the numpy decoder: norms, attention heads, MLPs. Float64, one formula a function, nothing shared or cached.

Arrays of activations are `[prompts, position, d_model]` everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import special

from circuitgraph._errors import unknown_name
from circuitgraph.testing._reference_rules import LIVE, Memory

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

    Stream = Float[ndarray, "prompts position d_model"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "identity"]


@dataclass(frozen=True, eq=False)
class ReferenceNorm:
    """`x / rms(x)` or `(x - mean(x)) / std(x)`, times the gain, plus the bias if there is one."""

    gain: Float[ndarray, " d_model"]
    bias: Float[ndarray, " d_model"] | None = None
    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5

    def __call__(self, x: Stream, memory: Memory = LIVE) -> Stream:
        shared = self.share(x, x, memory)
        return shared if self.bias is None else shared + self.bias

    def share(self, part: Stream, total: Stream, memory: Memory = LIVE) -> Stream:
        """A part of a sum, normalised by the scale of the whole sum: the shares of all parts add up to the normed sum, less the bias."""
        if self.kind == "layer":
            part, total = part - part.mean(-1, keepdims=True), total - total.mean(-1, keepdims=True)
        scale = np.sqrt((total**2).mean(-1, keepdims=True) + self.eps)
        share: Stream = part / memory.held(memory.rule.norms == "frozen", scale) * self.gain
        return share


@dataclass(frozen=True, eq=False)
class ReferenceAttention:
    """Attention, to the past only if `is_causal`. `q`, `k`, `v` are `[heads, d_head, d_model]`, `o` is `[heads, d_model, d_head]`; head
    `h` of `n` uses the keys and values `h * n_kv // n`. `rotary_base`: rotary positions that turn the two halves of a head, as Llama's.
    `n_padding`: the first positions are padding, which only itself looks at.
    """

    q: Float[ndarray, "heads d_head d_model"]
    k: Float[ndarray, "kv_heads d_head d_model"]
    v: Float[ndarray, "kv_heads d_head d_model"]
    o: Float[ndarray, "heads d_model d_head"]
    q_bias: Float[ndarray, "heads d_head"] | None = None
    k_bias: Float[ndarray, "kv_heads d_head"] | None = None
    v_bias: Float[ndarray, "kv_heads d_head"] | None = None
    o_bias: Float[ndarray, " d_model"] | None = None
    norm: ReferenceNorm | None = None
    post_norm: ReferenceNorm | None = None
    scale: float = 1.0
    rotary_base: float | None = None
    is_causal: bool = True
    n_padding: int = 0

    @property
    def n_heads(self) -> int:
        return len(self.q)

    @property
    def n_kv_heads(self) -> int:
        return len(self.k)

    def __call__(self, x: Stream) -> Stream:
        """What the attention adds to the stream, as any decoder computes it."""
        whole = np.sum([self.head(h, x, x, x) for h in range(self.n_heads)], axis=0) + (0.0 if self.o_bias is None else self.o_bias)
        said: Stream = self.scale * _normed(self.post_norm, whole)
        return said

    def head(self, h: int, q_input: Stream, k_input: Stream, v_input: Stream, *, memory: Memory = LIVE) -> Stream:
        """What head `h` says, before the post-norm, when its three inputs read three different streams."""
        said: Stream = self.mixed(h, q_input, k_input, v_input, memory=memory) @ self.o[h].T
        return said

    def mixed(
        self, h: int, q_input: Stream, k_input: Stream, v_input: Stream, *, memory: Memory = LIVE
    ) -> Float[ndarray, "prompts position d_head"]:
        """The values that it mixes, before its output projection."""
        group = h * self.n_kv_heads // self.n_heads
        q = _linear(_normed(self.norm, q_input, memory), self.q[h], None if self.q_bias is None else self.q_bias[h])
        k = _linear(_normed(self.norm, k_input, memory), self.k[group], None if self.k_bias is None else self.k_bias[group])
        v = _linear(_normed(self.norm, v_input, memory), self.v[group], None if self.v_bias is None else self.v_bias[group])
        if self.rotary_base is not None:
            q, k = _rotate(q, self.rotary_base), _rotate(k, self.rotary_base)
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        is_hidden = self.hidden(scores.shape[-1])
        pattern = memory.held(memory.rule.patterns == "frozen", softmax(np.where(is_hidden, -np.inf, scores)))
        mixed: Float[ndarray, "prompts position d_head"] = pattern @ v
        return mixed

    def hidden(self, length: int) -> Bool[ndarray, "query key"]:
        """Where nobody looks: ahead, and at padding but for one's own position."""
        ahead = np.triu(np.full((length, length), self.is_causal), k=1)
        is_padding = np.arange(length) < self.n_padding
        hidden: Bool[ndarray, "query key"] = ahead | (is_padding & ~np.eye(length, dtype=bool))
        return hidden

    def parts(self, heads: list[Stream], memory: Memory = LIVE) -> tuple[list[Stream], Stream]:
        """What each head adds to the stream, and what the attention adds that is no head's: the output bias.

        A post-norm's scale is that of all heads together, so the parts add up to the normed whole.
        """
        rest = np.zeros_like(heads[0]) + (0.0 if self.o_bias is None else self.o_bias)
        if self.post_norm is not None:
            whole = sum(heads, rest)
            heads = [self.post_norm.share(head, whole, memory) for head in heads]
            rest = self.post_norm.share(rest, whole, memory) + (0.0 if self.post_norm.bias is None else self.post_norm.bias)
        return [self.scale * head for head in heads], self.scale * rest


@dataclass(frozen=True, eq=False)
class ReferenceMLP:
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` with a gate. The output bias is part of what the MLP says."""

    up: Float[ndarray, "d_mlp d_model"]
    down: Float[ndarray, "d_model d_mlp"]
    act: Activation = "gelu"
    gate: Float[ndarray, "d_mlp d_model"] | None = None
    up_bias: Float[ndarray, " d_mlp"] | None = None
    gate_bias: Float[ndarray, " d_mlp"] | None = None
    down_bias: Float[ndarray, " d_model"] | None = None
    norm: ReferenceNorm | None = None
    post_norm: ReferenceNorm | None = None
    scale: float = 1.0

    def __call__(self, x: Stream, memory: Memory = LIVE) -> Stream:
        return self.out(self.hidden(x, memory), memory)

    def hidden(self, x: Stream, memory: Memory = LIVE) -> Float[ndarray, "prompts position d_mlp"]:
        """The activations of its neurons."""
        x = _normed(self.norm, x, memory)
        up = _linear(x, self.up, self.up_bias)
        if self.gate is None:
            return activate(self.act, up, memory)
        hidden: Stream = memory.product(activate(self.act, _linear(x, self.gate, self.gate_bias), memory), up)
        return hidden

    def out(self, hidden: Float[ndarray, "prompts position d_mlp"], memory: Memory = LIVE) -> Stream:
        """What it says, of its neurons' activations."""
        said: Stream = self.scale * _normed(self.post_norm, _linear(hidden, self.down, self.down_bias), memory)
        return said


@dataclass(frozen=True, eq=False)
class ReferenceLayer:
    """One block. `is_parallel`: the MLP reads what the attention reads (GPT-J, GPT-NeoX)."""

    attention: ReferenceAttention | None = None
    mlp: ReferenceMLP | None = None
    is_parallel: bool = False

    def __call__(self, stream: Stream) -> Stream:
        """The stream after the layer."""
        after = stream if self.attention is None else stream + self.attention(stream)
        if self.mlp is not None:
            after = after + self.mlp(stream if self.is_parallel else after)
        return after


_ACTIVATIONS: dict[Activation, Callable[[Any], Any]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + special.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "identity": lambda x: x,
}


def activate(act: Activation, x: Stream, memory: Memory = LIVE) -> Stream:
    """An activation function by name. `identity` makes an MLP linear, for tests with exact answers."""
    if act not in _ACTIVATIONS:
        raise unknown_name("activation", act, _ACTIVATIONS)
    y: Stream = _ACTIVATIONS[act](x)
    if memory.rule.activations == "ratio":
        y = x * memory.held(True, np.divide(y, x, out=np.zeros_like(y), where=x != 0))
    return y


def softmax(x: Float[ndarray, "... n"]) -> Float[ndarray, "... n"]:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    p: Float[ndarray, "... n"] = e / e.sum(-1, keepdims=True)
    return p


def _linear(
    x: Stream, weight: Float[ndarray, "out d_model"], bias: Float[ndarray, " out"] | None
) -> Float[ndarray, "prompts position out"]:
    y: Float[ndarray, "prompts position out"] = x @ weight.T
    return y if bias is None else y + bias


def _normed(norm: ReferenceNorm | None, x: Stream, memory: Memory = LIVE) -> Stream:
    return x if norm is None else norm(x, memory)


def _rotate(x: Float[ndarray, "prompts position d_head"], base: float) -> Float[ndarray, "prompts position d_head"]:
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[-2])[:, None] * base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    turned = (first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle))
    return np.concatenate(turned, axis=-1)
