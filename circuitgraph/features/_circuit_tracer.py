"""Transcoders of circuit-tracer: a folder with `config.yaml` and a `layer_N.safetensors` for each layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuitgraph._dictionary import Dictionary
from circuitgraph._errors import CircuitGraphError, FileError
from circuitgraph._tensors import read_file
from circuitgraph.features._saelens import place_of_hook
from circuitgraph.files._atomic import read_bytes

CONFIG = "config.yaml"


def read_transcoders(folder: Path) -> dict[str, Dictionary]:
    """By component, `m0` onwards. Raises `FileError` for files that are missing or broken, `CircuitGraphError` for what is in them."""
    config = _config(folder / CONFIG)
    if config.get("model_kind") != "transcoder_set":
        raise CircuitGraphError(
            f"{folder / CONFIG}: model_kind is {config.get('model_kind')!r}; expected transcoder_set (features that write to several "
            f"layers are not read yet)"
        )
    found = {int(match[1]): file for file in folder.glob("layer_*.safetensors") if (match := re.fullmatch(r"layer_(\d+)", file.stem))}
    if not found:
        raise FileError(f"{folder} has no layer_0.safetensors and so on; copy the transcoders' files beside {CONFIG}")
    hook = str(config.get("feature_input_hook", "hook_resid_mid"))
    return {f"m{layer}": _transcoder(file, hook, layer, config.get("model_name")) for layer, file in sorted(found.items())}


def _config(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(read_bytes(file, "configuration"))
    except yaml.YAMLError as error:
        raise FileError(f"{file} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise FileError(f"{file} is no mapping; expected model_kind, feature_input_hook and so on")
    return config


def _transcoder(file: Path, hook: str, layer: int, model: str | None) -> Dictionary:
    try:
        tensors, _ = read_file(file)
    except Exception as error:
        raise FileError(f"cannot read {file}: {str(error).strip().splitlines()[0]}") from error
    weights = {key: np.asarray(values, dtype=np.float64) for key, values in tensors.items()}
    if missing := [key for key in ("W_enc", "W_dec", "b_enc", "b_dec") if key not in weights]:
        raise CircuitGraphError(f"{file.name}: there is no tensor {missing[0]!r} among its weights; there are {', '.join(sorted(weights))}")
    threshold = weights.get("activation_function.threshold")
    if threshold is not None:
        threshold = np.broadcast_to(np.maximum(threshold, 0), weights["b_enc"].shape).copy()
    reads, _ = place_of_hook(f"blocks.{layer}.{hook}")
    return Dictionary(
        encoder=weights["W_enc"].T,
        decoder=weights["W_dec"],
        encoder_bias=weights["b_enc"],
        decoder_bias=weights["b_dec"],
        reads=reads,
        activation="relu" if threshold is None else "jumprelu",
        threshold=threshold,
        skip=weights.get("W_skip"),
        layer=layer,
        model=model,
        name=f"{file.parent.name}/{file.stem}",
    )
