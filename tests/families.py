"""Tiny random-weight models of every family that the finder must read, and of some that it must refuse.

Every weight, gain and bias is random and large, so that nothing is nearly linear and no norm is nearly the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

import circuitgraph_torch

VOCABULARY = 97
_SIZE: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
_NEOX: dict[str, Any] = {**_SIZE, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
_LLAMA: dict[str, Any] = {**_NEOX, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_OPT: dict[str, Any] = {**_SIZE, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "dropout": 0.0}
_FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
}
_GRANITE: dict[str, Any] = {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 3.0, "attention_multiplier": 0.2}
_GEMMA2: dict[str, Any] = {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}
_SEQ2SEQ: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32}


def _gpt_neo() -> Any:
    config = hf.GPTNeoConfig(
        **_SIZE, hidden_size=64, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], intermediate_size=96, window_size=4
    )
    return hf.GPTNeoForCausalLM(config)


def _gemma3_multimodal() -> Any:
    text = hf.Gemma3TextConfig(head_dim=24, sliding_window=5, **_LLAMA)
    vision = hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


_MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT)),
    "gpt_neo": _gpt_neo,
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_NEOX)),
    "gpt_neox_sequential": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(use_parallel_residual=False, **_NEOX)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(rotary_dim=8, **_GPT)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(sliding_window=5, **_LLAMA)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=24, **_LLAMA)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(head_dim=16, **_LLAMA)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(head_dim=16, sliding_window=5, **_GEMMA2, **_LLAMA)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(head_dim=24, sliding_window=5, **_LLAMA)),
    "olmo": lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**_LLAMA)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_LLAMA)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_LLAMA)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_LLAMA)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**_LLAMA)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_GRANITE, **_LLAMA)),
    "starcoder2": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**_LLAMA)),
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**_LLAMA)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(logit_scale=0.3, **_LLAMA)),
    "glm": lambda: hf.GlmForCausalLM(hf.GlmConfig(head_dim=16, **_LLAMA)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(word_embed_proj_dim=64, **_OPT)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_FALCON)),
    "falcon_grouped": lambda: hf.FalconForCausalLM(hf.FalconConfig(new_decoder_architecture=True, num_kv_heads=2, **_FALCON)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **_LLAMA)),
    "attention_only": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**_LLAMA, "intermediate_size": 0})),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=3, n_head=4)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, **{**_LLAMA, "head_dim": 24})
    ),
    "gemma3_multimodal": _gemma3_multimodal,
    # Refused:
    "opt_postln": lambda: hf.OPTForCausalLM(hf.OPTConfig(word_embed_proj_dim=64, do_layer_norm_before=False, **_OPT)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_kv=16, d_ff=32, num_layers=2, num_heads=2, **_SEQ2SEQ)),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, **_SEQ2SEQ)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**{**_NEOX, "num_hidden_layers": 2})),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8)),
}

REFUSED = ("opt_postln", "t5", "bart", "bert", "mamba")
FAMILIES = tuple(name for name in _MODELS if name not in REFUSED)


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of a family in evaluation mode, the same for the same seed; the global random state is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MODELS[name]().eval()
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data += 0.2 * noise
        else:
            is_embedding = "embed" in path or "wte" in path or "wpe" in path
            parameter.data = noise * (0.5 if is_embedding else 0.6 / max(parameter.shape[-1], 1) ** 0.5)
    return model.to(dtype).requires_grad_(False)


@cache
def traced(name: str) -> circuitgraph_torch.TorchModel:
    """A tiny model in PyTorch, traced once for all tests that only ask it."""
    return circuitgraph_torch.trace(tiny(name))
