"""Llama, and the families that took over the names of its modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from circuitgraph._architecture import Norm, Rotary
from circuitgraph_jax._family import Family, Settings
from circuitgraph_jax._patterns import (
    ROTARY,
    Patterns,
    biases_if,
    layer_norm,
    patterns_of,
    rms,
    rope,
    turn_of,
    windows_by_type,
    windows_everywhere,
)

_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def _llama_like(config: Settings, norm: Norm, patterns: Patterns, activation: str = "hidden_act") -> Family:
    """Llama's names. `activation` is the key of the config that has it."""
    return Family(
        norm=norm,
        activation=config[activation],
        patterns=patterns,
        n_groups=config.get("num_key_value_heads"),
        biases=(*biases_if(config.get("attention_bias"), "qkv", "o"), *biases_if(config.get("mlp_bias"), "mlp")),
    )


def _llama(config: Settings) -> Family:
    return _llama_like(config, rms(config), patterns_of(config, rope(config)))


def _mistral(config: Settings) -> Family:
    family = _llama_like(config, rms(config), patterns_of(config, rope(config), windows_everywhere(config)))
    return replace(family, biases=())


def _qwen2(config: Settings) -> Family:
    family = _llama_like(config, rms(config), patterns_of(config, rope(config), windows_by_type(config)))
    return replace(family, biases=("qkv",))


def _qwen3(config: Settings) -> Family:
    family = _llama_like(config, rms(config), patterns_of(config, rope(config), windows_by_type(config)))
    return replace(family, qk_norms=_QK_NORMS)


def _smollm3(config: Settings) -> Family:
    """Some layers have no rotary embedding ("NoPE", Yang et al. 2025, arXiv:2501.18795)."""
    rotaries = [turn if has_rope else None for turn, has_rope in zip(rope(config), config.of_layers("no_rope_layers"), strict=True)]
    return _llama_like(config, rms(config), patterns_of(config, rotaries, windows_by_type(config)))


def _phi3(config: Settings) -> Family:
    family = _llama_like(config, rms(config), patterns_of(config, rope(config, is_partial=True), windows_everywhere(config)))
    fused = "mlp.gate_up_proj"
    return replace(family, qkv=("self_attn.qkv_proj",), layout="concatenated", up=fused, gate=fused, biases=())


def _glm(config: Settings) -> Family:
    family = _llama_like(config, rms(config), patterns_of(config, rope(config, is_partial=True, pairs="interleaved")))
    fused = "mlp.gate_up_proj"
    return replace(family, up=fused, gate=fused, biases=biases_if(config["attention_bias"], "qkv"))


def _granite(config: Settings) -> Family:
    """Scales everywhere, so that learning rates carry over between widths (Yang et al. 2022, arXiv:2203.03466)."""
    return replace(
        _llama_like(config, rms(config), patterns_of(config, rope(config), scale=config["attention_multiplier"])),
        residual_scale=config["residual_multiplier"],
        embedding_scale=config["embedding_multiplier"],
        logit_scale=1 / config["logits_scaling"],
    )


def _olmo2(config: Settings) -> Family:
    """Norms after attention and MLP, not before them (OLMo 2, arXiv:2501.00656)."""
    return replace(
        _llama(config),
        attention_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
        qk_norms=_QK_NORMS,
    )


# Gemma: norms multiply by 1 + weight, embeddings are sqrt(d_model) times their rows


def _gemma_like(config: Settings, patterns: Patterns, activation: str) -> Family:
    norm = replace(rms(config), gain_offset=1.0)
    scale = float(np.float32(config.d_model**0.5))  # the model keeps it in float32, whatever its own dtype
    return replace(_llama_like(config, norm, patterns, activation), embedding_scale=scale)


def _gemma(config: Settings) -> Family:
    return _gemma_like(config, patterns_of(config, rope(config)), "hidden_act")


def _gemma_with_post_norms(config: Settings, rotaries: list[Rotary | None], softcap: float | None) -> Family:
    scale = config["query_pre_attn_scalar"] ** -0.5
    patterns = patterns_of(config, rotaries, windows_by_type(config), scale=scale, softcap=softcap)
    return replace(
        _gemma_like(config, patterns, "hidden_activation"),
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        logit_softcap=config.get("final_logit_softcapping"),
    )


def _gemma2(config: Settings) -> Family:
    return _gemma_with_post_norms(config, rope(config), config.get("attn_logit_softcapping"))


def _gemma3_text(config: Settings) -> Family:
    """Layers with a window have a rotary embedding of their own. The code never reads `attn_logit_softcapping`."""
    rotaries: list[Rotary | None] = [
        turn_of(config, config["rope_parameters"].get(kind) or {}, f"{ROTARY} ({kind})") for kind in config.of_layers("layer_types")
    ]
    return replace(_gemma_with_post_norms(config, rotaries, None), qk_norms=_QK_NORMS)


def _gemma3(config: Settings) -> Family:
    """The text part of the multimodal model; `config` is the part's."""
    return replace(_gemma3_text(config), root="model.language_model", others=("model.vision_tower.", "model.multi_modal_projector."))


# Llama's names with LayerNorms


def _olmo(config: Settings) -> Family:
    """The norms have no parameters (OLMo, Groeneveld et al. 2024, arXiv:2402.00838)."""
    norm = Norm("", "layer", 1e-5, gain_offset=1.0)
    return replace(_llama_like(config, norm, patterns_of(config, rope(config))), norm_tensors=())


def _cohere(config: Settings) -> Family:
    patterns = patterns_of(config, rope(config, pairs="interleaved"))
    return replace(
        _llama_like(config, layer_norm(config), patterns),
        norm_tensors=("weight",),
        qk_norms=_QK_NORMS if config.get("use_qk_norm") else None,
        mlp_norm="input_layernorm",
        is_parallel=True,
        logit_scale=config["logit_scale"],
    )


def _stablelm(config: Settings) -> Family:
    config.refuse("qk_layernorm", "a norm module for every single head", "model.layers.0.self_attn.q_layernorm")
    family = _llama_like(config, layer_norm(config), patterns_of(config, rope(config, is_partial=True)))
    is_parallel = bool(config["use_parallel_residual"])
    mlp_norm = "input_layernorm" if is_parallel else "post_attention_layernorm"
    return replace(family, is_parallel=is_parallel, mlp_norm=mlp_norm, biases=biases_if(config["use_qkv_bias"], "qkv"))


def _phi(config: Settings) -> Family:
    return replace(
        _llama_like(config, layer_norm(config), patterns_of(config, rope(config, is_partial=True))),
        final_norm="final_layernorm",
        qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm") if config["qk_layernorm"] else None,
        o="self_attn.dense",
        up="mlp.fc1",
        gate=None,
        down="mlp.fc2",
        mlp_norm="input_layernorm",
        is_parallel=True,
        biases=("qkv", "o", "mlp", "unembedding"),
    )


def _starcoder2(config: Settings) -> Family:
    patterns = patterns_of(config, rope(config), windows_everywhere(config))
    family = _llama_like(config, layer_norm(config, "norm_epsilon"), patterns)
    return replace(family, up="mlp.c_fc", gate=None, down="mlp.c_proj", biases=biases_if(config["use_bias"], "qkv", "o", "mlp"))


LLAMA_FAMILIES: dict[str, Callable[[Settings], Family]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "phi3": _phi3,
    "glm": _glm,
    "granite": _granite,
    "olmo2": _olmo2,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gemma3": _gemma3,
    "olmo": _olmo,
    "cohere": _cohere,
    "stablelm": _stablelm,
    "phi": _phi,
    "starcoder2": _starcoder2,
}
