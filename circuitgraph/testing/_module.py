"""A reference model, or a bundled one, as a Hugging Face module of PyTorch, so that what is traced is what everybody traces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from circuitgraph._architecture import Architecture, AttentionPattern, FeedForward, Projection
from circuitgraph._errors import CircuitGraphError
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import Activation, ReferenceAttention, ReferenceLayer, ReferenceMLP, ReferenceNorm

_ACTS: dict[Activation, Any] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "identity": lambda x: x,
}


def module_of(model: ReferenceModel) -> ReferenceForCausalLM:
    """The same weights as a module in float64. Raises `CircuitGraphError` for what it has no module for."""
    if model.embedding_scale != 1.0 or model.logit_scale != 1.0 or model.logit_softcap is not None:
        raise CircuitGraphError(f"{model.name}: scaled embeddings and logits have no module yet")
    if model.splits_input:
        raise CircuitGraphError(f"{model.name}: a module has one input, tokens and positions together; give it splits_input=False")
    if any(layer.attention is not None and layer.attention.rotary_base is not None for layer in model.layers):
        raise CircuitGraphError(f"{model.name}: rotary positions have no module yet")
    sizes = {"vocab_size": model.vocabulary, "hidden_size": model.embedding.shape[1], "num_hidden_layers": len(model.layers)}
    with torch.random.fork_rng(devices=[]):
        module = ReferenceForCausalLM(ReferenceConfig.from_dict(sizes), model).double()
    module.train(False)
    return module


def module_in(folder: Path) -> Any:
    """The model of a folder in Hugging Face format, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def architecture_of(model: ReferenceModel) -> Architecture:
    """The wiring of the module, with what a backend that builds it anew needs to know."""
    plain = model.traced().architecture
    blocks = []
    for number, (block, layer) in enumerate(zip(plain.blocks, model.layers, strict=True)):
        attention, mlp = block.attention, block.mlp
        if attention is not None and layer.attention is not None:
            attention = replace(attention, pattern=AttentionPattern(scale=layer.attention.q.shape[1] ** -0.5))
        if mlp is not None and layer.mlp is not None:
            mlp = replace(mlp, feed_forward=_feed_forward(layer.mlp, f"layers.{number}.mlp"))
        blocks.append(replace(block, attention=attention, mlp=mlp))
    return replace(plain, blocks=tuple(blocks))


def _feed_forward(mlp: ReferenceMLP, path: str) -> FeedForward:
    def whole(name: str) -> Projection:
        return Projection(f"{path}.{name}", len(mlp.up), (0,))

    return FeedForward(whole("up"), f"{path}.down", mlp.act, None if mlp.gate is None else whole("gate"))


class ReferenceConfig(PretrainedConfig):
    model_type = "circuitgraph_reference"


class ReferenceForCausalLM(PreTrainedModel):
    """`ReferenceModel` in PyTorch, with the parts' names of the reference."""

    config_class = ReferenceConfig

    def __init__(self, config: ReferenceConfig, model: ReferenceModel) -> None:
        super().__init__(config)
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(_tensor(model.embedding), freeze=False)
        self.positions = None if model.positions is None else nn.Embedding.from_pretrained(_tensor(model.positions), freeze=False)
        self.layers = nn.ModuleList(_Layer(layer) for layer in model.layers)
        self.final_norm = _norm(model.final_norm)
        self.unembedding = _linear(model.unembedding, None)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.unembedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        x = self.embedding(input_ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.unembedding(_normed(self.final_norm, x)))


class _Layer(nn.Module):
    """Norms belong to the layer: what an attention or an MLP computes has none inside."""

    def __init__(self, layer: ReferenceLayer) -> None:
        super().__init__()
        self.is_parallel = layer.is_parallel
        attention, mlp = layer.attention, layer.mlp
        self.attention = None if attention is None else _Attention(attention)
        self.attention_norm, self.attention_post_norm = _norms(attention)
        self.attention_scale = 1.0 if attention is None else attention.scale
        self.mlp = None if mlp is None else _MLP(mlp)
        self.mlp_norm, self.mlp_post_norm = _norms(mlp)
        self.mlp_scale = 1.0 if mlp is None else mlp.scale

    def forward(self, x: Tensor) -> Tensor:
        after = x
        if self.attention is not None:
            said = self.attention(_normed(self.attention_norm, x))
            after = x + self.attention_scale * _normed(self.attention_post_norm, said)
        if self.mlp is None:
            return after
        said = self.mlp(_normed(self.mlp_norm, x if self.is_parallel else after))
        return after + self.mlp_scale * _normed(self.mlp_post_norm, said)


class _Attention(nn.Module):
    def __init__(self, attention: ReferenceAttention) -> None:
        super().__init__()
        self.q = _linear(*_heads(attention.q, attention.q_bias))
        self.k = _linear(*_heads(attention.k, attention.k_bias))
        self.v = _linear(*_heads(attention.v, attention.v_bias))
        self.o = _linear(np.concatenate([*attention.o], axis=1), attention.o_bias)
        self.head_dim, self.n_shared = attention.q.shape[1], attention.n_heads // attention.n_kv_heads
        self._hidden = attention.hidden

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(self.n_shared, 1), v.repeat_interleave(self.n_shared, 1)
        is_seen = torch.from_numpy(~self._hidden(x.shape[1])).to(x.device)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=is_seen).transpose(1, 2).flatten(2)
        said: Tensor = self.o(mixed)
        return said


class _MLP(nn.Module):
    def __init__(self, mlp: ReferenceMLP) -> None:
        super().__init__()
        self.up, self.down = _linear(mlp.up, mlp.up_bias), _linear(mlp.down, mlp.down_bias)
        self.gate = None if mlp.gate is None else _linear(mlp.gate, mlp.gate_bias)
        self.act = _ACTS[mlp.act]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        said: Tensor = self.down(hidden)
        return said


class _RMSNorm(nn.Module):
    def __init__(self, norm: ReferenceNorm) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(_tensor(norm.gain)), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def _norm(norm: ReferenceNorm | None) -> nn.Module | None:
    if norm is None:
        return None
    if norm.kind == "rms":
        return _RMSNorm(norm)
    layer = nn.LayerNorm(len(norm.gain), eps=norm.eps)
    layer.weight, layer.bias = (
        nn.Parameter(_tensor(part)) for part in (norm.gain, np.zeros_like(norm.gain) if norm.bias is None else norm.bias)
    )
    return layer


def _norms(part: ReferenceAttention | ReferenceMLP | None) -> tuple[nn.Module | None, nn.Module | None]:
    """Before a part and after it."""
    return (None, None) if part is None else (_norm(part.norm), _norm(part.post_norm))


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _heads(weight: Any, bias: Any) -> tuple[Any, Any]:
    """`[heads, d_head, d_model]` as one matrix."""
    return np.concatenate([*weight]), None if bias is None else np.concatenate([*bias])


def _linear(weight: Any, bias: Any) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(_tensor(weight))
    if bias is not None:
        linear.bias = nn.Parameter(_tensor(bias))
    return linear


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
