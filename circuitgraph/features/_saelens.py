"""Dictionaries of SAELens: a folder with `cfg.json` and `sae_weights.safetensors`, of version 6 and of those before.

SAELens names places as TransformerLens does; which place of ours each is, stands in `_HOOKS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._dictionary import Dictionary, Reads
from circuitgraph._errors import CircuitGraphError, FileError, near_names
from circuitgraph._tensors import read_file
from circuitgraph.evaluation._question import warn
from circuitgraph.files import write_bytes
from circuitgraph.files._atomic import parse_json, read_bytes

if TYPE_CHECKING:
    from numpy import ndarray

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

_HOOKS: tuple[tuple[str, Reads, int], ...] = (  # the end of a hook's name, what it reads, and by how much our layer is more
    ("hook_resid_pre", "stream", 0),
    ("hook_resid_post", "stream", 1),
    ("hook_mlp_out", "mlp_out", 0),
    ("hook_attn_out", "attn_out", 0),
    ("attn.hook_z", "attn_z", 0),
    ("ln2.hook_normalized", "mlp_normalized", 0),
    ("mlp.hook_in", "mlp_in", 0),
    ("hook_mlp_in", "mlp_stream", 0),
    ("hook_resid_mid", "mlp_stream", 0),
)
_OURS = "topk_transcoder"  # `circuitgraph_torch.saelens` adds it to what SAELens knows
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder", _OURS)
_KNOWN = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk", *_TRANSCODERS)


def place_of_hook(hook: str) -> tuple[Reads, int]:
    """What a dictionary at this hook reads, and our layer: a hook of TransformerLens, or a block of a Hugging Face model, `model.layers.8`,
    whose output it reads. (A module within a block may have a norm behind it, of which its name says nothing.) Raises `CircuitGraphError`
    for a hook that is no place of ours."""
    if block := re.search(r"\.(\d+)$", hook):
        return "stream", int(block[1]) + 1
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", hook)
    for end, reads, more in _HOOKS:
        if found and found[2] == end:
            return reads, int(found[1]) + more
    known = ", ".join(end for end, *_ in _HOOKS)
    raise CircuitGraphError(f"hook {hook!r} is not a place where circuitgraph knows dictionaries; expected a block, or one of its {known}")


def read_saelens(folder: Path) -> Dictionary:
    """The dictionary in a folder. Raises `FileError` for files that are missing or broken, `CircuitGraphError` for what they say."""
    config = parse_json(read_bytes(folder / CONFIG, "configuration"), folder / CONFIG)
    try:
        tensors, _ = read_file(folder / WEIGHTS)
    except Exception as error:
        raise FileError(f"cannot read {folder / WEIGHTS}: {str(error).strip().splitlines()[0]}") from error
    return from_saelens(config, tensors, name=folder.name)


def from_saelens(config: Mapping[str, Any], tensors: Mapping[str, ndarray], *, name: str = "dictionary") -> Dictionary:
    """From SAELens's configuration and state, as in its files; `sae.cfg.to_dict()` and `sae.state_dict()` as numpy arrays are the same.

    Decoder norms by which activations are rescaled, and scaling factors, are worked into the weights, so that features have the values that
    SAELens gives them. Raises `CircuitGraphError` for an architecture that is not known, or a tensor that is missing.
    """
    config = {**config, **(config.get("metadata") or {})}
    architecture = _architecture(config)
    if architecture not in _KNOWN:
        hint = near_names(architecture, _KNOWN) or f"expected one of {', '.join(_KNOWN)}"
        raise CircuitGraphError(f"{name}: architecture {architecture!r} is not known; {hint}")
    weights = _Weights(name, tensors)
    hook = config.get("hook_name") or config.get("hook_point")
    if not hook:
        raise CircuitGraphError(f"{name}: its configuration has no hook_name, so nobody knows what it reads")
    reads, layer = place_of_hook(str(hook))
    normalises = _input_norm(config, name)
    made = Dictionary(
        encoder=weights["W_enc"],
        decoder=weights["W_dec"],
        encoder_bias=weights["b_gate" if architecture == "gated" else "b_enc"],
        decoder_bias=weights["b_dec"],
        reads=reads,
        is_centred=architecture not in _TRANSCODERS and bool(config.get("apply_b_dec_to_input", True)),
        input_norm=normalises,
        skip=weights["W_skip"] if "skip" in architecture else None,
        layer=layer,
        model=config.get("model_name"),
        name=name,
        **_activation(architecture, config, weights),
    )
    return _scaled(made, config, tensors)


def _architecture(config: Mapping[str, Any]) -> str:
    activation = config.get("activation_fn") or config.get("activation_fn_str")
    if activation == "topk" and config.get("architecture", "standard") == "standard":
        return "topk"
    return str(config.get("architecture", "standard"))


def _activation(architecture: str, config: Mapping[str, Any], weights: _Weights) -> dict[str, Any]:
    if architecture == "gated":
        return {"activation": "gated", "magnitude_scale": np.exp(weights["r_mag"]), "magnitude_bias": weights["b_mag"]}
    if architecture in ("topk", _OURS):
        k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
        return {"activation": "topk", "k": None if k is None else int(k)}
    if architecture.startswith("jumprelu"):
        return {"activation": "jumprelu", "threshold": np.maximum(weights["threshold"], 0)}
    if "batchtopk" in architecture:  # saved while it was trained: at inference it is a JumpReLU dictionary
        return {"activation": "jumprelu", "threshold": np.full(len(weights["b_enc"]), float(weights["topk_threshold"]))}
    return {"activation": "relu"}


def _input_norm(config: Mapping[str, Any], name: str) -> Any:
    normalises = config.get("normalize_activations") or "none"
    if normalises == "expected_average_only_in" or normalises is True:
        warn(
            f"{name}: its activations were scaled to an average norm, and its files do not say by what; it is used as it is, as by SAELens"
        )
        return None
    if normalises not in ("none", "constant_norm_rescale", "layer_norm"):
        raise CircuitGraphError(f"{name}: normalize_activations is {normalises!r}; expected none, constant_norm_rescale or layer_norm")
    return None if normalises == "none" else normalises


def _scaled(made: Dictionary, config: Mapping[str, Any], tensors: Mapping[str, ndarray]) -> Dictionary:
    """With the factors worked in that SAELens multiplies features by: decoder norms before the top `k`, and finetuned scales after."""
    if config.get("rescale_acts_by_decoder_norm"):
        norms = np.linalg.norm(made.decoder, axis=1)
        threshold = None if made.threshold is None else made.threshold  # of the rescaled activations already
        made = replace(
            made,
            encoder=made.encoder * norms,
            encoder_bias=made.encoder_bias * norms,
            decoder=made.decoder / norms[:, None],
            threshold=threshold,
        )
    scale = tensors.get("scaling_factor", tensors.get("finetuning_scaling_factor"))
    if scale is not None and not np.allclose(np.asarray(scale, dtype=float), 1):
        made = replace(made, decoder=made.decoder * np.asarray(scale, dtype=float)[:, None])
    return made


class _Weights:
    """Tensors by name, in float64."""

    def __init__(self, name: str, tensors: Mapping[str, ndarray]) -> None:
        self._name, self._tensors = name, tensors

    def __getitem__(self, key: str) -> ndarray:
        if key not in self._tensors:
            raise CircuitGraphError(
                f"{self._name}: there is no tensor {key!r} among its weights; there are {', '.join(sorted(self._tensors))}"
            )
        return np.asarray(self._tensors[key], dtype=np.float64)


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> Path:
    """Write a dictionary as SAELens does, in float32, for us or for SAELens to read.

    SAELens has no TopK transcoders of its own; it reads them after `import circuitgraph_torch.saelens`. Raises `FileError` where it
    cannot be written, `CircuitGraphError` for what SAELens has no form for.
    """
    import safetensors.numpy

    folder = Path(folder)
    config, tensors = to_saelens(dictionary)
    content = safetensors.numpy.save({key: np.ascontiguousarray(values, dtype=np.float32) for key, values in tensors.items()})
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS, content)
    write_bytes(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
    return folder


def to_saelens(dictionary: Dictionary) -> tuple[dict[str, Any], dict[str, ndarray]]:
    """SAELens's configuration and state of a dictionary."""
    if dictionary.n_later:
        raise CircuitGraphError(
            f"save {dictionary.name}: SAELens has no form for a layer of a cross-layer transcoder; save the arrays yourself"
        )
    tensors = {"W_enc": dictionary.encoder, "W_dec": dictionary.decoder, "b_dec": dictionary.decoder_bias}
    architecture: str = {"relu": "standard"}.get(dictionary.activation, dictionary.activation)
    if dictionary.is_transcoder:
        is_ours = dictionary.activation == "topk" and dictionary.skip is None
        if dictionary.activation not in ("relu", "jumprelu") and not is_ours:
            raise CircuitGraphError(f"{dictionary.name}: SAELens has no {dictionary.activation} transcoders")
        parts = [*["jumprelu"] * (dictionary.activation == "jumprelu"), *["skip"] * (dictionary.skip is not None), "transcoder"]
        architecture = _OURS if is_ours else "_".join(parts)
    if dictionary.activation == "gated":
        tensors |= {
            "b_gate": dictionary.encoder_bias,
            "r_mag": np.log(np.asarray(dictionary.magnitude_scale)),
            "b_mag": dictionary.magnitude_bias,
        }
    else:
        tensors |= {"b_enc": dictionary.encoder_bias}
    if dictionary.activation == "jumprelu":
        tensors["threshold"] = dictionary.threshold
    if dictionary.skip is not None:
        tensors["W_skip"] = dictionary.skip
    end, more = next((end, more) for end, reads, more in _HOOKS if reads == dictionary.reads)
    config = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.is_centred,
        "normalize_activations": dictionary.input_norm or "none",
        "reshape_activations": "hook_z" if dictionary.reads == "attn_z" else "none",
        **({"k": dictionary.k, "rescale_acts_by_decoder_norm": False} if dictionary.k is not None else {}),
        **({"d_out": int(dictionary.decoder.shape[1])} if dictionary.is_transcoder else {}),
        "metadata": {
            "model_name": dictionary.model,
            "hook_name": f"blocks.{(dictionary.layer or 0) - more}.{end}",
            "sae_lens_version": "6.0.0",
        },
    }
    return config, tensors
