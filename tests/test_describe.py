"""`describe` against the finder of the PyTorch backend, against the models' own logits, and against what it must refuse.

Neither the JAX engine nor jax is needed here: the reference below follows a description in plain numpy, and nothing else.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
import transformers as hf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from circuitgraph._architecture import Architecture, Attention, AttentionPattern, FeedForward, Norm, Rotary
from circuitgraph._errors import TraceError
from circuitgraph_jax._describe import describe
from circuitgraph_jax._rotary import rotary
from circuitgraph_torch import find_architecture

REFUSED = ("mixtral", "qwen3_moe", "bloom")
POSITIONS = 12

LLAMA: dict[str, Any] = {
    "vocab_size": families.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {"vocab_size": families.VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
FALCON = {name: LLAMA[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")} | {"ffn_hidden_size": 96}
OPT = {name: LLAMA[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.3}

# What real checkpoints do and `families.tiny` does not. The first word is the model_type, the rest of the key says what is special.
OPTIONS: dict[str, dict[str, Any]] = {
    "llama biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama wide heads, tied": {**LLAMA, "head_dim": 24, "tie_word_embeddings": True},
    "llama llama3": {**LLAMA, "rope_parameters": {"rope_theta": 100.0, **LLAMA3_ROPE}},
    "llama linear": {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
    "llama yarn": {**LLAMA, "rope_parameters": {"rope_theta": 100.0, **YARN_ROPE}},
    "llama no groups, one layer": {**LLAMA, "num_key_value_heads": 4, "num_hidden_layers": 1},
    "llama gelu": {**LLAMA, "hidden_act": "gelu"},
    "llama relu2": {**LLAMA, "hidden_act": "relu2"},
    "mistral wide heads": {**LLAMA, "head_dim": 24, "sliding_window": None},
    "qwen2 some windows": {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3 biases": {**LLAMA, "head_dim": 16, "attention_bias": True},
    "smollm3 no positions": {**LLAMA, "no_rope_layers": [1, 0, 1]},
    "smollm3 windows": {**LLAMA, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 3},
    "gpt2 narrow MLP": {**GPT2, "n_inner": 40, "activation_function": "relu"},
    "gpt2 scales by layer": {**GPT2, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    "gpt2 unscaled": {**GPT2, "scale_attn_weights": False},
    "gptj whole heads": {**GPT2, "rotary_dim": 16, "n_inner": 40},
    "gpt_neox no attention bias": {**LLAMA, "attention_bias": False, "rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 0.5}},
    "stablelm parallel, biases": {**LLAMA, "use_qkv_bias": True, "use_parallel_residual": True},
    "phi3 partial, window": {**LLAMA, "sliding_window": 4, "rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 0.5}},
    "phi norms of heads": {**LLAMA, "qk_layernorm": True},
    "cohere norms of heads": {**LLAMA, "use_qk_norm": True, "attention_bias": True},
    "gemma odd width": {**LLAMA, "hidden_size": 40, "head_dim": 16},
    "gemma2 no caps": {**LLAMA, "head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3_text both kinds of layer": {
        **LLAMA,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 3.0,
    },
    "starcoder2 no biases, window": {**LLAMA, "use_bias": False, "sliding_window": 5},
    "glm no biases": {**LLAMA, "head_dim": 16, "attention_bias": False},
    "granite biases": {**LLAMA, "attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.1, "logits_scaling": 7.0},
    "olmo biases": {**LLAMA, "attention_bias": True},
    "falcon sequential, biases": {**FALCON, "parallel_attn": False, "multi_query": False, "bias": True},
    "falcon one norm": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "opt no biases, no gains": {
        **OPT,
        "ffn_dim": 40,
        "word_embed_proj_dim": 64,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
    },
    # As in files that were written before rope_parameters:
    "llama old llama3": {**LLAMA, "rope_theta": 100.0, "rope_scaling": LLAMA3_ROPE},
    "llama old linear": {**LLAMA, "rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "gpt_neox old": {**LLAMA, "rotary_pct": 0.5, "rotary_emb_base": 100},
    "phi old": {**LLAMA, "partial_rotary_factor": 0.75, "rope_theta": 100.0},
    "stablelm old": {**LLAMA, "partial_rotary_factor": 0.5, "rope_theta": 100.0},
    "gemma old": {**LLAMA, "head_dim": 16, "hidden_act": "gelu", "hidden_activation": None},
    "gemma3_text old": {
        **LLAMA,
        "head_dim": 16,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "rope_theta": 200.0,
        "rope_local_base_freq": 20.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "falcon old": {**FALCON, "rope_theta": 100.0, "multi_query": True, "parallel_attn": True},
}

ROWS = [name for name in families.FAMILIES if name not in REFUSED] + list(OPTIONS)


@cache
def model_of(row: str) -> Any:
    """A family of `families`, or a model whose config.json holds the options; in float64, with weights that are anything but small."""
    if row not in OPTIONS:
        return families.tiny(row, dtype=torch.float64)
    model = hf.AutoModelForCausalLM.from_config(read_config({"model_type": row.split()[0], **OPTIONS[row]})).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.2 * noise if parameter.dim() == 1 else noise * 0.7 / parameter.shape[-1] ** 0.5
    return model.double().requires_grad_(False)


def read_config(values: Mapping[str, Any]) -> Any:
    """What transformers makes of a config.json."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(values))
        return hf.AutoConfig.from_pretrained(folder)


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@cache
def described(row: str) -> Architecture:
    model = model_of(row)
    return describe(model.config.to_dict(), shapes_of(model))


def wiring(architecture: Architecture) -> Architecture:
    """Without what only `describe` fills in, and without the finder's notes."""
    blocks = tuple(
        replace(b, attention=b.attention and replace(b.attention, pattern=None), mlp=b.mlp and replace(b.mlp, feed_forward=None))
        for b in architecture.blocks
    )
    scale = float(f"{architecture.embedding_scale:.12g}")  # the finder measures it
    return replace(architecture, blocks=blocks, embedding_scale=scale, notes=(), first_position=0, is_transposed=False)


@pytest.mark.parametrize("row", ROWS)
def test_the_wiring_is_what_the_finder_finds(row: str) -> None:
    assert wiring(described(row)) == wiring(find_architecture(model_of(row)))


@pytest.mark.parametrize("row", ROWS)
def test_a_forward_that_follows_the_description_gives_the_models_logits(row: str) -> None:
    assert error_of(row, described(row)) < 1e-5


def error_of(row: str, architecture: Architecture) -> float:
    """How far the reference's logits are from the model's own, relative to the largest."""
    model = model_of(row)
    ids = torch.randperm(families.VOCABULARY - 3, generator=torch.Generator().manual_seed(1))[:POSITIONS] + 3
    expected = model(input_ids=ids[None]).logits[0].numpy()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = Reference(architecture, weights).logits(ids.numpy())
    return float(np.abs(found - expected).max() / np.abs(expected).max())


MISTAKES: list[tuple[str, Callable[[AttentionPattern], AttentionPattern]]] = [
    ("mistral", lambda pattern: replace(pattern, window=(pattern.window or 0) + 1)),
    ("gpt_neo", lambda pattern: replace(pattern, window=pattern.window and pattern.window - 1)),
    ("qwen2 some windows", lambda pattern: replace(pattern, window=None)),
    ("smollm3 windows", lambda pattern: replace(pattern, window=None)),
    ("phi3 partial, window", lambda pattern: replace(pattern, window=None)),
    ("gemma2", lambda pattern: replace(pattern, softcap=None)),
    ("granite", lambda pattern: replace(pattern, scale=1.01 * pattern.scale)),
    ("qwen3", lambda pattern: replace(pattern, q_norm=None)),
    ("smollm3 no positions", lambda pattern: replace(pattern, rotary=None)),
    ("cohere", lambda pattern: replace(pattern, rotary=replace(pattern.rotary, pairs="halves"))),
    ("llama yarn", lambda pattern: replace(pattern, rotary=replace(pattern.rotary, scale=1.0))),
    ("llama llama3", lambda pattern: replace(pattern, rotary=replace(pattern.rotary, frequencies=pattern.rotary.frequencies[::-1]))),
]


@pytest.mark.parametrize(("row", "mistake"), MISTAKES, ids=[row for row, _ in MISTAKES])
def test_the_logits_would_show_a_mistake(row: str, mistake: Callable[[AttentionPattern], AttentionPattern]) -> None:
    blocks = [replace(b, attention=replace(b.attention, pattern=mistake(b.attention.pattern))) for b in described(row).blocks]
    assert error_of(row, replace(described(row), blocks=tuple(blocks))) > 1e-4


@pytest.mark.parametrize("row", ["llama", "gpt2", "gemma3"])
def test_a_description_survives_json(row: str) -> None:
    assert Architecture.from_json(described(row).to_json()) == described(row)


class Reference:
    """A forward of one prompt in float64 that knows a description and the tensors, and nothing of any family."""

    def __init__(self, architecture: Architecture, weights: Mapping[str, np.ndarray]) -> None:
        self.architecture, self.weights = architecture, weights

    def logits(self, ids: np.ndarray) -> np.ndarray:
        a = self.architecture
        stream = a.embedding_scale * self.weights[f"{a.embedding}.weight"][ids]
        if a.positions:
            stream = stream + self.weights[f"{a.positions}.weight"][a.first_position : a.first_position + len(ids)]
        for block in a.blocks:
            before = stream
            if block.attention:
                out = self.attend(block.attention, self.norm(block.attention.norm, stream))
                stream = stream + block.attention.scale * self.norm(block.attention.post_norm, out)
            if block.mlp and block.mlp.feed_forward:
                out = self.feed_forward(block.mlp.feed_forward, self.norm(block.mlp.norm, before if block.parallel else stream))
                stream = stream + block.mlp.scale * self.norm(block.mlp.post_norm, out)
        unembedding = self.weights.get(f"{a.unembedding}.weight", self.weights[f"{a.embedding}.weight"])
        logits = self.norm(a.final_norm, stream) @ unembedding.T + self.weights.get(f"{a.unembedding}.bias", 0.0)
        return capped(a.logit_scale * logits, a.logit_softcap)

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        weight = self.weights[f"{path}.weight"]
        return x @ (weight if self.architecture.is_transposed else weight.T) + self.weights.get(f"{path}.bias", 0.0)

    def norm(self, norm: Norm | None, x: np.ndarray) -> np.ndarray:
        if norm is None:
            return x
        centred = x - x.mean(-1, keepdims=True) if norm.kind == "layer" else x
        gain = norm.gain_offset + self.weights.get(f"{norm.path}.weight", 0.0)
        return gain * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps) + self.weights.get(f"{norm.path}.bias", 0.0)

    def norm_of_heads(self, norm: Norm | None, x: np.ndarray) -> np.ndarray:
        """`x` is `[position, head, feature]`."""
        is_over_all = norm is not None and self.weights[f"{norm.path}.weight"].shape[-1] != x.shape[-1]
        return self.norm(norm, x.reshape(len(x), -1)).reshape(x.shape) if is_over_all else self.norm(norm, x)

    def attend(self, attention: Attention, x: np.ndarray) -> np.ndarray:
        pattern = attention.pattern
        assert pattern is not None
        q, k, v = (
            np.stack([self.linear(part.path, x)[:, part.features(head)] for head in range(part.n_heads)], axis=1)
            for part in (attention.q, attention.k, attention.v)
        )
        q = turned(pattern.rotary, self.norm_of_heads(pattern.q_norm, q))
        k = turned(pattern.rotary, self.norm_of_heads(pattern.k_norm, k))
        k, v = (np.repeat(part, q.shape[1] // part.shape[1], axis=1) for part in (k, v))
        scores = capped(pattern.scale * np.einsum("qhd,khd->hqk", q, k), pattern.softcap)
        ago = np.arange(len(x))[:, None] - np.arange(len(x))
        scores = np.where((ago >= 0) & (ago < (pattern.window or len(x))), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        return self.linear(attention.o, mixed.reshape(len(x), -1))

    def feed_forward(self, mlp: FeedForward, x: np.ndarray) -> np.ndarray:
        up = self.linear(mlp.up.path, x)[:, mlp.up.features(0)]
        act = ACTIVATIONS[mlp.activation]
        hidden = act(self.linear(mlp.gate.path, x)[:, mlp.gate.features(0)]) * up if mlp.gate else act(up)
        return self.linear(mlp.down, hidden)


def turned(rotary: Rotary | None, x: np.ndarray) -> np.ndarray:
    """`x` is `[position, head, feature]`."""
    if rotary is None:
        return x
    n = len(rotary.frequencies)
    one, other = (slice(0, n), slice(n, 2 * n)) if rotary.pairs == "halves" else (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    turn = rotary.scale * np.exp(1j * np.outer(np.arange(len(x)), rotary.frequencies))[:, None] * (x[..., one] + 1j * x[..., other])
    out = x.copy()
    out[..., one], out[..., other] = turn.real, turn.imag
    return out


def capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": LLAMA3_ROPE,
    "llama3 as released": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": YARN_ROPE,
    "yarn as released": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn without rounding": {**YARN_ROPE, "truncate": False},
    "yarn mscale": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 0.3},
    "yarn attention factor": {**YARN_ROPE, "attention_factor": 1.5},
    "yarn no stretch": {**YARN_ROPE, "factor": 1.0},
    "yarn ramp of no width": {**YARN_ROPE, "beta_fast": 1e-9, "beta_slow": 1e-9},
}


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_are_those_of_transformers(kind: str, part: float, head_dim: int) -> None:
    parameters = {"rope_theta": 10000.0, "partial_rotary_factor": part, **ROPES[kind]}
    config = hf.StableLmConfig(**{**LLAMA, "num_attention_heads": 1, "hidden_size": head_dim, "rope_parameters": parameters})
    expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    found = rotary(config.rope_parameters, int(part * head_dim), joint="rotary")
    np.testing.assert_allclose(found.frequencies, expected, rtol=3e-6)
    assert found.scale == pytest.approx(scale, rel=1e-12)


def test_default_frequencies() -> None:
    found = rotary({"rope_theta": 10000.0}, 8, joint="rotary", pairs="interleaved")
    assert found == Rotary(tuple(10000.0 ** -(i / 4) for i in range(4)), "interleaved", 1.0)


def test_a_tied_unembedding_may_be_left_out() -> None:
    model = model_of("gemma")
    shapes = {name: shape for name, shape in shapes_of(model).items() if name != "lm_head.weight"}
    assert describe(model.config.to_dict(), shapes) == described("gemma")


def test_masks_and_frequencies_of_old_checkpoints_are_no_tensors_of_ours() -> None:
    old = {"transformer.h.0.attn.bias": (1, 1, 64, 64), "transformer.h.0.attn.masked_bias": ()}
    model = model_of("gpt2")
    assert describe(model.config.to_dict(), shapes_of(model) | old) == described("gpt2")
    model = model_of("llama")
    assert describe(model.config.to_dict(), shapes_of(model) | {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}) == described("llama")


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    model = model_of("llama")
    (tmp_path / "model.json").write_text(json.dumps([model.config.to_dict(), shapes_of(model)]))
    code = (
        "import json, sys\n"
        "sys.modules.update(torch=None, transformers=None)\n"
        "from circuitgraph_jax._describe import describe\n"
        "print(describe(*json.load(open(sys.argv[1]))).to_json())"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.json")],
        env={"PYTHONPATH": f"{root}:{root / 'backends'}", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Architecture.from_json(done.stdout) == described("llama")


# What is refused: a row, what its config says besides, what the error must say.
OTHER_CONFIGS = [
    ("llama", {"model_type": "lama"}, ["'lama'", "did you mean 'llama'", "qwen3", "backend='torch'", "architecture="]),
    ("llama", {"model_type": "rwkv7"}, ["'rwkv7'", "cohere, falcon", "backend='torch'"]),
    ("llama", {"is_encoder_decoder": True}, ["encoder-decoder", "decoder-only"]),
    ("llama", {"quantization_config": {"bits": 4}}, ["quantised", "load it unquantised"]),
    ("llama", {"hidden_act": "xielu"}, ["model.layers.0.mlp", "'xielu'", "silu", "backend='torch'"]),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ["model.rotary_emb", "'dynamic'", "length of the prompt"]),
    ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, ["model.rotary_emb", "'longrope'", "backend='torch'"]),
    ("llama", {"rope_parameters": {"rope_type": "yarm"}}, ["model.rotary_emb", "'yarm'"]),
    ("llama", {"rope_parameters": {"rope_type": "proportional"}}, ["model.rotary_emb", "'proportional'", "default, linear, llama3, yarn"]),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["model.rotary_emb", "expected 'factor' too"]),
    ("llama", {"rope_parameters": None, "rope_theta": 1e4}, ["model.rotary_emb", "expected 'rope_theta' too"]),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["model.rotary_emb", "0.5", "whole heads"]),
    ("llama", {"rms_norm_eps": None}, ["llama", "'rms_norm_eps'", "AutoConfig"]),
    ("olmo", {"clip_qkv": 8.0}, ["model.layers.0.self_attn", "clip_qkv=8.0", "backend='torch'"]),
    ("gemma", {"use_bidirectional_attention": True}, ["model.layers.0.self_attn", "looks ahead"]),
    ("falcon", {"alibi": True}, ["transformer.h.0.self_attention", "ALiBi"]),
    ("gpt2", {"add_cross_attention": True}, ["transformer.h.0.crossattention"]),
    ("stablelm", {"qk_layernorm": True}, ["model.layers.0.self_attn.q_layernorm"]),
    ("opt", {"do_layer_norm_before": False}, ["model.decoder.layers.0", "after each sum"]),
    (
        "qwen2",
        {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
        ["model.layers.1.self_attn", "'chunked_attention'"],
    ),
    ("qwen2", {"layer_types": ["full_attention"]}, ["1 layer_types for 3 layers"]),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, ["model.layers.0.self_attn", "sliding_window=None"]),
    ("llama", {"num_key_value_heads": 3}, ["model.layers.0.self_attn", "3 key heads", "4 heads"]),
    ("llama", {"num_key_value_heads": 4}, ["model.layers.0.self_attn.k_proj", "[32, 64]", "[64, 64]"]),
    ("llama", {"num_hidden_layers": 2}, ["model.layers.2.self_attn.q_proj", "no joint"]),
    ("llama", {"num_hidden_layers": 4}, ["model.layers.3.self_attn.q_proj", "no tensor"]),
    ("llama", {"attention_bias": True}, ["model.layers.0.self_attn.q_proj", "'model.layers.0.self_attn.q_proj.bias'"]),
    ("llama", {"vocab_size": 100}, ["model.embed_tokens", "[97, 64]", "[100, 64]"]),
    ("falcon_grouped", {"num_kv_heads": 4}, ["transformer.h.0.self_attention.query_key_value", "[128, 64]", "[192, 64]"]),
    ("gpt2", {"n_head": None}, ["'n_head'"]),
]


@pytest.mark.parametrize(("row", "changes", "expected"), OTHER_CONFIGS, ids=[f"{r} {' '.join(c)}" for r, c, _ in OTHER_CONFIGS])
def test_a_config_that_the_table_does_not_know_is_an_error(row: str, changes: dict[str, Any], expected: list[str]) -> None:
    model = model_of(row)
    with pytest.raises(TraceError) as caught:
        describe({**model.config.to_dict(), **changes}, shapes_of(model))
    message = str(caught.value)
    assert [part for part in expected if part not in message] == []
    assert "\n" not in message


OTHER_TENSORS: list[tuple[str, dict[str, tuple[int, ...] | None], str]] = [
    ("llama", {"model.layers.1.self_attn.q_norm.weight": (16,)}, "model.layers.1.self_attn.q_norm: .*no joint"),
    ("llama", {"model.layers.1.mlp.down_proj.weight": None}, "model.layers.1.mlp.down_proj: there is no tensor"),
    ("llama", {"model.layers.1.mlp.down_proj.weight": (64,)}, "model.layers.1.mlp.down_proj: .*shape"),
    ("llama", {"lm_head.weight": None}, "lm_head: there is no tensor"),
    ("llama", {"model.norm.weight": (32,)}, r"model.norm: .*\[32\].*\[64\]"),
    ("qwen3", {"model.layers.0.self_attn.q_norm.weight": (7,)}, r"self_attn.q_norm: .*\[7\].*\[24\]"),
    ("phi3", {"model.layers.0.mlp.gate_up_proj.weight": (96, 64)}, r"mlp.gate_up_proj: .*\[96, 64\].*\[192, 64\]"),
    ("gpt2", {"transformer.wpe.weight": None}, "transformer.wpe: there is no tensor"),
]


@pytest.mark.parametrize(("row", "changes", "expected"), OTHER_TENSORS, ids=[f"{r} {' '.join(c)}" for r, c, _ in OTHER_TENSORS])
def test_tensors_that_do_not_fit_are_an_error(row: str, changes: dict[str, tuple[int, ...] | None], expected: str) -> None:
    model = model_of(row)
    shapes = {name: shape for name, shape in (shapes_of(model) | changes).items() if shape is not None}
    with pytest.raises(TraceError, match=expected):
        describe(model.config.to_dict(), shapes)


@pytest.mark.parametrize(("family", "joint"), [("mixtral", "model.layers.0.mlp.gate"), ("qwen3_moe", "model.layers.0.mlp.gate")])
def test_a_router_is_named(family: str, joint: str) -> None:
    with pytest.raises(TraceError, match=f"^{joint}: a mixture-of-experts router is a joint that the JAX backend does not have yet; use"):
        described(family)


def test_bloom_lacks_one_joint_only() -> None:
    with pytest.raises(TraceError, match=r"^transformer.h.0.self_attention: .*ALiBi"):
        described("bloom")


@pytest.mark.parametrize("family", families.REFUSED)
def test_what_the_finder_refuses_is_refused_here_too(family: str) -> None:
    with pytest.raises(TraceError):
        described(family)
