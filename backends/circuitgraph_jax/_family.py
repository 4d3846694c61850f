"""`Settings` and `Family`: what a model's configuration says, and what its family adds to that. `_families` fills them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from circuitgraph._architecture import AttentionPattern, Norm
from circuitgraph._errors import TraceError
from circuitgraph_jax._rotary import WAY_OUT

Layout = Literal["separate", "concatenated", "grouped"]
Pairs = Literal["halves", "interleaved"]
Bias = Literal["qkv", "o", "mlp", "unembedding"]
Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""By their names in transformers."""


@dataclass(frozen=True)
class Settings:
    """A model's configuration, as `AutoConfig.from_pretrained(...).to_dict()` gives it, read with errors that name the key."""

    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.first(key)

    def get(self, key: str) -> Any:
        """The value, or None where the configuration has no such key."""
        return self.values.get(key)

    def first(self, *keys: str) -> Any:
        """The value of the first key that has one. Raises `TraceError` if none has."""
        for key in keys:
            if (value := self.values.get(key)) is not None:
                return value
        raise TraceError(
            f"the config of this {self.model_type} model has no {' or '.join(repr(key) for key in keys)}; expected what "
            f"transformers.AutoConfig.from_pretrained(...).to_dict() gives; read it that way, or {WAY_OUT}"
        )

    def of_layers(self, key: str) -> Sequence[Any]:
        """A list with one value a layer. Raises `TraceError` if it has another length."""
        values: Sequence[Any] = self[key]
        if len(values) != self.n_layers:
            raise TraceError(
                f"the config of this {self.model_type} model has {len(values)} {key} for {self.n_layers} layers; give one a layer"
            )
        return values

    def refuse(self, key: str, what: str, joint: str, *, when: bool = True) -> None:
        """Raises `TraceError` where the configuration turns on (or, with `when=False`, off) something that no description can say."""
        value = self.get(key)
        if (bool(value) is when) and value is not None:
            raise TraceError(f"{joint}: {what} ({key}={value!r}) is a joint that the JAX backend does not have yet; {WAY_OUT}")

    @property
    def model_type(self) -> str:
        return str(self.values.get("model_type"))

    @property
    def d_model(self) -> int:
        return int(self.first("hidden_size", "n_embd"))

    @property
    def n_layers(self) -> int:
        return int(self.first("num_hidden_layers", "n_layer", "num_layers"))

    @property
    def n_heads(self) -> int:
        return int(self.first("num_attention_heads", "n_head", "num_heads"))

    @property
    def head_dim(self) -> int:
        return int(self.get("head_dim") or self.d_model // self.n_heads)


@dataclass(frozen=True)
class Family:
    """What a family's modules are called and what is peculiar to their arithmetic; the defaults are Llama's.

    `embedding`, `positions`, `final_norm` and `blocks` are relative to `root`; the parts of a block are relative to the block.
    """

    norm: Norm
    """The norm of the whole family, its path empty."""
    activation: str
    patterns: tuple[AttentionPattern, ...]
    """One a layer, still without the paths of `qk_norms`."""

    root: str = "model"
    embedding: str = "embed_tokens"
    positions: str | None = None
    final_norm: str | None = "norm"
    blocks: str = "layers"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    layout: Layout = "separate"
    """How heads lie in the rows of one fused projection: all queries, all keys, all values ("concatenated"), or those of a group of heads
    that share a key, next to each other ("grouped")."""
    n_groups: int | None = None
    """How many heads have keys of their own; `None`: all."""
    qk_norms: tuple[str, str] | None = None
    o: str = "self_attn.o_proj"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    mlp: tuple[str, ...] = ("mlp",)
    """The modules that make up the MLP."""
    up: str = "mlp.up_proj"
    gate: str | None = "mlp.gate_proj"
    """The same as `up`: one module, its first half the gate."""
    down: str = "mlp.down_proj"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None

    norm_tensors: tuple[str, ...] | None = None
    """The parameters of a norm; `None`: a weight, and a bias if it is a LayerNorm."""
    biases: tuple[Bias, ...] = ()
    """Which linear modules have a bias."""
    is_parallel: bool = False
    is_transposed: bool = False
    first_position: int = 0
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    others: tuple[str, ...] = ()
    """Parts of the model beside the decoder, whose tensors are none of ours."""

    @property
    def parameters_of_norms(self) -> tuple[str, ...]:
        usual = ("weight", "bias") if self.norm.kind == "layer" else ("weight",)
        return usual if self.norm_tensors is None else self.norm_tensors
