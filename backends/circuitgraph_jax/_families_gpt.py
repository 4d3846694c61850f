"""GPT-2, and the other families with names of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from circuitgraph._architecture import AttentionPattern, Norm
from circuitgraph_jax._family import Family, Settings
from circuitgraph_jax._patterns import Patterns, biases_if, layer_norm, patterns_of, rope
from circuitgraph_jax._rotary import rotary


def _gpt2_like(config: Settings, patterns: Patterns) -> Family:
    return Family(
        norm=layer_norm(config, "layer_norm_epsilon"),
        activation=config["activation_function"],
        patterns=patterns,
        root="transformer",
        embedding="wte",
        positions="wpe",
        final_norm="ln_f",
        blocks="h",
        attention="attn",
        attention_norm="ln_1",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        mlp_norm="ln_2",
    )


def _gpt2(config: Settings) -> Family:
    config.refuse("add_cross_attention", "cross-attention", "transformer.h.0.crossattention")
    whole = config.head_dim**-0.5 if config["scale_attn_weights"] else 1.0
    by_layer = bool(config.get("scale_attn_by_inverse_layer_idx"))
    patterns = tuple(AttentionPattern(whole / (layer + 1 if by_layer else 1)) for layer in range(config.n_layers))
    return replace(
        _gpt2_like(config, patterns),
        qkv=("attn.c_attn",),
        layout="concatenated",
        o="attn.c_proj",
        is_transposed=True,
        biases=("qkv", "o", "mlp"),
    )


def _gpt_neo(config: Settings) -> Family:
    """The attention is not scaled at all; "local" layers have a window."""
    windows = [config["window_size"] if kind == "local" else None for kind in config.of_layers("attention_layers")]
    inside = "attn.attention"
    return replace(
        _gpt2_like(config, patterns_of(config, None, windows, scale=1.0)),
        attention=inside,
        qkv=(f"{inside}.q_proj", f"{inside}.k_proj", f"{inside}.v_proj"),
        o=f"{inside}.out_proj",
        biases=("o", "mlp"),
    )


def _gptj(config: Settings) -> Family:
    """`rotary_dim` features of every head are turned, neighbours together."""
    turn = rotary({"rope_theta": 10000.0}, config["rotary_dim"], pairs="interleaved", joint="transformer.h.0.attn")
    return replace(
        _gpt2_like(config, patterns_of(config, [turn] * config.n_layers)),
        positions=None,
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        o="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
        mlp_norm="ln_1",
        is_parallel=True,
        biases=("mlp", "unembedding"),
    )


def _gpt_neox(config: Settings) -> Family:
    return Family(
        norm=layer_norm(config),
        activation=config["hidden_act"],
        patterns=patterns_of(config, rope(config, "gpt_neox.rotary_emb", is_partial=True)),
        root="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        attention="attention",
        qkv=("attention.query_key_value",),
        layout="grouped",
        o="attention.dense",
        up="mlp.dense_h_to_4h",
        gate=None,
        down="mlp.dense_4h_to_h",
        is_parallel=bool(config["use_parallel_residual"]),
        biases=(*biases_if(config["attention_bias"], "qkv", "o"), "mlp"),
    )


def _falcon(config: Settings) -> Family:
    """The first kind shares one key between all heads and one norm between attention and MLP, the second has groups and two norms."""
    config.refuse("alibi", "an attention biased by distance (ALiBi)", "transformer.h.0.self_attention")
    is_new, is_parallel = bool(config["new_decoder_architecture"]), bool(config["parallel_attn"])
    has_two_norms = is_new and config.get("num_ln_in_parallel_attn") == 2
    shared = "input_layernorm" if is_parallel else "post_attention_layernorm"
    return Family(
        norm=layer_norm(config, "layer_norm_epsilon"),
        activation=config["activation"],
        patterns=patterns_of(config, rope(config, "transformer.rotary_emb")),
        root="transformer",
        embedding="word_embeddings",
        final_norm="ln_f",
        blocks="h",
        attention="self_attention",
        qkv=("self_attention.query_key_value",),
        layout="grouped",
        n_groups=config["num_kv_heads"] if is_new or not config["multi_query"] else 1,
        o="self_attention.dense",
        attention_norm="ln_attn" if has_two_norms else "input_layernorm",
        up="mlp.dense_h_to_4h",
        gate=None,
        down="mlp.dense_4h_to_h",
        mlp_norm="ln_mlp" if has_two_norms else shared,
        is_parallel=is_new or is_parallel,
        biases=biases_if(config["bias"], "qkv", "o", "mlp"),
    )


def _opt(config: Settings) -> Family:
    """The MLP is no module of its own. The first token's position is row 2, a leftover of fairseq's padding."""
    config.refuse("do_layer_norm_before", "norms on the stream itself, after each sum", "model.decoder.layers.0", when=False)
    has_gains = config["layer_norm_elementwise_affine"]
    return Family(
        norm=Norm("", "layer", 1e-5, gain_offset=0.0 if has_gains else 1.0),
        norm_tensors=("weight", "bias") if has_gains else (),
        activation=config["activation_function"],
        patterns=patterns_of(config),
        root="model.decoder",
        positions="embed_positions",
        first_position=2,
        final_norm=None if config.get("_remove_final_layer_norm") else "final_layer_norm",
        o="self_attn.out_proj",
        attention_norm="self_attn_layer_norm",
        mlp=("fc1", "activation_fn", "fc2"),
        up="fc1",
        gate=None,
        down="fc2",
        mlp_norm="final_layer_norm",
        biases=biases_if(config["enable_bias"], "qkv", "o", "mlp"),
    )


GPT_FAMILIES: dict[str, Callable[[Settings], Family]] = {
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gptj": _gptj,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "opt": _opt,
}
