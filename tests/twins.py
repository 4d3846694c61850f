"""Hugging Face models and their numpy twins: the same weights in `circuitgraph.testing.ReferenceModel`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from circuitgraph.testing import ReferenceAttention, ReferenceLayer, ReferenceMLP, ReferenceModel, ReferenceNorm


def small_model(family: str, seed: int = 0, n_layers: int = 2) -> Any:
    """A float64 Hugging Face GPT-2 or Llama with random weights, small enough for the naive engine."""
    import torch
    import transformers as hub

    torch.manual_seed(seed)
    if family == "gpt2":
        hf = hub.GPT2LMHeadModel(hub.GPT2Config(n_layer=n_layers, n_head=2, n_embd=16, vocab_size=30, n_positions=16))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes["num_hidden_layers"] = n_layers
        hf = hub.LlamaForCausalLM(hub.LlamaConfig(vocab_size=30, max_position_embeddings=16, **sizes))
    hf.double().eval()
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return hf


def twin(hf: Any, name: str = "reference") -> ReferenceModel:
    """The same weights in the numpy reference model."""
    return replace(from_gpt2(hf) if hf.config.model_type == "gpt2" else from_llama(hf), name=name)


def from_gpt2(hf: Any) -> ReferenceModel:
    """The weights of a Hugging Face GPT-2."""
    state = {name: tensor.double().numpy() for name, tensor in hf.state_dict().items()}
    heads, d = hf.config.n_head, hf.config.n_embd

    def norm(name: str) -> ReferenceNorm:
        return ReferenceNorm(state[f"{name}.weight"], state[f"{name}.bias"], "layer", hf.config.layer_norm_epsilon)

    def layer(p: str) -> ReferenceLayer:
        q, k, v = state[f"{p}.attn.c_attn.weight"].T.reshape(3, heads, d // heads, d)
        bias = state[f"{p}.attn.c_attn.bias"].reshape(3, heads, d // heads)
        o = state[f"{p}.attn.c_proj.weight"].T.reshape(d, heads, d // heads).swapaxes(0, 1)
        o_bias = state[f"{p}.attn.c_proj.bias"]
        attention = ReferenceAttention(q, k, v, o, bias[0], bias[1], bias[2], o_bias, norm(f"{p}.ln_1"))
        up, down = state[f"{p}.mlp.c_fc.weight"].T, state[f"{p}.mlp.c_proj.weight"].T
        biases = {"up_bias": state[f"{p}.mlp.c_fc.bias"], "down_bias": state[f"{p}.mlp.c_proj.bias"]}
        return ReferenceLayer(attention, ReferenceMLP(up, down, "gelu_tanh", norm=norm(f"{p}.ln_2"), **biases))

    layers = tuple(layer(f"transformer.h.{i}") for i in range(hf.config.n_layer))
    wte, wpe = state["transformer.wte.weight"], state["transformer.wpe.weight"]
    return ReferenceModel(wte, layers, wte, wpe, norm("transformer.ln_f"))


def from_llama(hf: Any) -> ReferenceModel:
    """The weights of a Hugging Face Llama."""
    state = {name: tensor.double().numpy() for name, tensor in hf.state_dict().items()}
    c = hf.config
    d_head = c.hidden_size // c.num_attention_heads

    def norm(name: str) -> ReferenceNorm:
        return ReferenceNorm(state[f"{name}.weight"], eps=c.rms_norm_eps)

    def layer(p: str) -> ReferenceLayer:
        q, k, v = (state[f"{p}.self_attn.{x}_proj.weight"].reshape(-1, d_head, c.hidden_size) for x in "qkv")
        o = state[f"{p}.self_attn.o_proj.weight"].reshape(c.hidden_size, -1, d_head).swapaxes(0, 1)
        attention = ReferenceAttention(q, k, v, o, norm=norm(f"{p}.input_layernorm"), rotary_base=c.rope_parameters["rope_theta"])
        if c.intermediate_size == 0:
            return ReferenceLayer(attention)
        up, gate, down = (state[f"{p}.mlp.{x}_proj.weight"] for x in ("up", "gate", "down"))
        return ReferenceLayer(attention, ReferenceMLP(up, down, "silu", gate, norm=norm(f"{p}.post_attention_layernorm")))

    layers = tuple(layer(f"model.layers.{i}") for i in range(c.num_hidden_layers))
    return ReferenceModel(state["model.embed_tokens.weight"], layers, state["lm_head.weight"], None, norm("model.norm"))
