"""`Architecture`: how a decoder is wired, as a small value that can be printed, corrected or written by hand.

Paths are those of `torch.nn.Module.get_submodule`. A block adds its attention and its MLP to the residual stream:

    stream += attention.scale * post_norm(o(attend(q, k, v of norm(stream))))
    stream += mlp.scale       * post_norm(modules(norm(stream)))

and the logits are `softcap(logit_scale * unembedding(final_norm(stream)))`.

A backend that runs the model's own code (PyTorch) needs this wiring only. One that builds the model anew (JAX) also needs to know what
happens inside an attention module, its `AttentionPattern`, and inside an MLP, its `FeedForward`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from circuitgraph._errors import TraceError
from circuitgraph._graph import Graph, Layer, transformer_graph


@dataclass(frozen=True)
class Norm:
    """A normalisation: `x / rms(x)` or `(x - mean) / std`, times `gain_offset + weight`, plus the bias if there is one.

    A norm without a weight counts as weight 0 and `gain_offset` 1.
    """

    path: str
    kind: Literal["rms", "layer"]
    eps: float
    gain_offset: float = 0.0


@dataclass(frozen=True)
class Projection:
    """Which outputs of the linear module at `path` are the queries (or keys, or values) of which head.

    Head `h` owns the features `starts[h]` to `starts[h] + head_dim`.
    """

    path: str
    head_dim: int
    starts: tuple[int, ...]

    @property
    def n_heads(self) -> int:
        return len(self.starts)

    def features(self, head: int) -> range:
        """The outputs of the module that belong to a head."""
        return range(self.starts[head], self.starts[head] + self.head_dim)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021) of the first `2 * len(frequencies)` features of a query or key.

    At position `p`, pair `i` is turned by `p * frequencies[i]` radians and stretched by `scale` (YaRN). Pair `i` holds the features `i` and
    `i + len(frequencies)` ("halves") or `2i` and `2i + 1` ("interleaved").
    """

    frequencies: tuple[float, ...]
    pairs: Literal["halves", "interleaved"] = "halves"
    scale: float = 1.0


@dataclass(frozen=True)
class AttentionPattern:
    """Where a head looks: `softmax(softcap(scale * q @ k))` over the last `window` positions, its own included (`None`: all of them).

    Before that, queries and keys pass `q_norm` and `k_norm`, then `rotary`. Such a norm is over one head if its weight is `[head_dim]` or
    `[heads, head_dim]`, over all heads at once if it is `[heads * head_dim]`.
    """

    scale: float
    rotary: Rotary | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Attention:
    """An attention module; `o` is its output projection. `couples_heads`: a norm over all heads' queries or keys."""

    path: str
    q: Projection
    k: Projection
    v: Projection
    o: str
    norm: Norm | None
    post_norm: Norm | None = None
    scale: float = 1.0
    couples_heads: bool = False
    pattern: AttentionPattern | None = None


@dataclass(frozen=True)
class FeedForward:
    """Inside an MLP: `down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate.

    `up` and `gate` have one "head", the whole width; they may be two parts of one module. `gelu` is the exact one, `gelu_tanh` its usual
    approximation (`gelu_new`, `gelu_pytorch_tanh`), `relu2` the square of `relu`; `identity` makes
    an MLP linear.
    """

    up: Projection
    down: str
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "identity"]
    gate: Projection | None = None


@dataclass(frozen=True)
class MLP:
    """An MLP: `modules` run one after the other (of a tuple, such as a mixture of experts may return, the first tensor counts)."""

    modules: tuple[str, ...]
    norm: Norm | None
    post_norm: Norm | None = None
    scale: float = 1.0
    feed_forward: FeedForward | None = None


@dataclass(frozen=True)
class Block:
    """One layer. `parallel`: attention and MLP read the same stream (GPT-J, GPT-NeoX). A missing part is `None`."""

    path: str
    attention: Attention | None
    mlp: MLP | None
    parallel: bool = False


@dataclass(frozen=True)
class Architecture:
    """The wiring of a decoder-only transformer.

    `embedding` is the token embedding; `embedding_scale` multiplies the rows of its weight (a module that scales by itself, as Gemma's, is
    not to be scaled again); `positions` is the module of learned absolute positions, if any; `embedding_norm` normalises their sum (Bloom).
    `notes` records what the finder had to decide on the way. For backends that build the model anew: `first_position` is the row of the
    first token's position (2 in OPT), `is_transposed` says that the weights of linear modules lie `[in, out]`, as in GPT-2.
    """

    family: str
    d_model: int
    vocabulary: int
    embedding: str
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    unembedding: str
    embedding_scale: float = 1.0
    positions: str | None = None
    embedding_norm: Norm | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    notes: tuple[str, ...] = ()
    first_position: int = 0
    is_transposed: bool = False

    def graph(self, *, per_head_kv: bool = False) -> Graph:
        """The writers and readers of this wiring. `per_head_kv` gives every head its own `k` and `v` reader."""
        return transformer_graph([_layer(block) for block in self.blocks], per_head_kv=per_head_kv)

    def to_json(self) -> str:
        """This description as JSON text; `from_json` reads it back."""
        import json

        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Read a description. Raises `TraceError` that names the first field that does not fit."""
        import pydantic

        try:
            return pydantic.TypeAdapter(cls, config=None).validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise TraceError(f"architecture description: {where or 'the text'}: {first['msg']}") from None


def _layer(block: Block) -> Layer:
    attention = block.attention
    return Layer(
        n_heads=attention.q.n_heads if attention else 0,
        n_kv_heads=attention.k.n_heads if attention else 0,
        has_mlp=block.mlp is not None,
        is_parallel=block.parallel,
        heads_are_coupled=bool(attention and (attention.post_norm or attention.couples_heads)),
    )
