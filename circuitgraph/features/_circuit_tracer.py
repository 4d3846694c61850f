"""Transcoders of circuit-tracer: a folder with `config.yaml` and, for each layer, a `layer_N.safetensors`; of a cross-layer transcoder a
`W_enc_N.safetensors` and a `W_dec_N.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._dictionary import Dictionary
from circuitgraph._errors import CircuitGraphError, FileError
from circuitgraph._tensors import read_file
from circuitgraph.features._saelens import place_of_hook
from circuitgraph.files._atomic import read_bytes

if TYPE_CHECKING:
    from numpy import ndarray

CONFIG = "config.yaml"
_PREFIX = {"transcoder_set": "layer_", "cross_layer_transcoder": "W_enc_"}  # of files, by the model_kind


def read_transcoders(folder: Path) -> dict[str, Dictionary]:
    """By component, `m0` onwards. Raises `FileError` for files that are missing or broken, `CircuitGraphError` for what is in them."""
    config = _config(folder / CONFIG)
    kind = config.get("model_kind")
    if kind not in _PREFIX:
        raise CircuitGraphError(f"{folder / CONFIG}: model_kind is {kind!r}; expected {' or '.join(_PREFIX)}")
    files = _by_layer(folder, _PREFIX[kind])
    if not files:
        raise FileError(f"{folder} has no {_PREFIX[kind]}0.safetensors and so on; copy the transcoders' files beside {CONFIG}")
    reader = _cross_layer if kind == "cross_layer_transcoder" else _transcoder
    return {f"m{layer}": reader(file, layer, len(files), config) for layer, file in sorted(files.items())}


def _by_layer(folder: Path, prefix: str) -> dict[int, Path]:
    found = (re.fullmatch(rf"{prefix}(\d+)\.safetensors", file.name) for file in folder.iterdir())
    return {int(match[1]): folder / match[0] for match in found if match}


def _config(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(read_bytes(file, "configuration"))
    except yaml.YAMLError as error:
        raise FileError(f"{file} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise FileError(f"{file} is no mapping; expected model_kind, feature_input_hook and so on")
    return config


def _transcoder(file: Path, layer: int, n_layers: int, config: Mapping[str, Any]) -> Dictionary:
    weights = _weights(file, "W_enc", "W_dec", "b_enc", "b_dec")
    return _made(file, layer, config, weights, weights["W_dec"], weights.get("activation_function.threshold"), skip=weights.get("W_skip"))


def _cross_layer(file: Path, layer: int, n_layers: int, config: Mapping[str, Any]) -> Dictionary:
    """A layer of a cross-layer transcoder, `W_dec` `[features, layers from its own on, d_model]`. Rows for later layers, of which there are
    many, stay mapped from the file."""
    names = "W_enc", "b_enc", "b_dec"
    found = _weights(file, *(f"{name}_{layer}" for name in names))
    weights = {name: found[f"{name}_{layer}"] for name in names}
    rows = _tensors(file.with_name(f"W_dec_{layer}.safetensors"), f"W_dec_{layer}")[f"W_dec_{layer}"]
    wanted = len(weights["W_enc"]), n_layers - layer, len(weights["b_dec"])
    if rows.shape != wanted:
        raise CircuitGraphError(
            f"W_dec_{layer}.safetensors: W_dec_{layer} has shape {rows.shape}; expected {wanted}, with {n_layers} layers"
        )
    later = rows[:, 1:].swapaxes(0, 1) if layer < n_layers - 1 else None
    decoder = np.asarray(rows[:, 0], dtype=np.float64)
    return _made(file, layer, config, weights, decoder, found.get(f"threshold_{layer}"), later=later)


def _made(
    file: Path,
    layer: int,
    config: Mapping[str, Any],
    weights: Mapping[str, ndarray],
    decoder: ndarray,
    threshold: ndarray | None,
    **more: Any,
) -> Dictionary:
    if threshold is not None:
        threshold = np.broadcast_to(np.maximum(threshold, 0), weights["b_enc"].shape).copy()
    reads, _ = place_of_hook(f"blocks.{layer}.{config.get('feature_input_hook', 'hook_resid_mid')}")
    return Dictionary(
        encoder=weights["W_enc"].T,
        decoder=decoder,
        encoder_bias=weights["b_enc"],
        decoder_bias=weights["b_dec"],
        reads=reads,
        activation="relu" if threshold is None else "jumprelu",
        threshold=threshold,
        layer=layer,
        model=config.get("model_name"),
        name=f"{file.parent.name}/{file.stem}",
        **more,
    )


def _weights(file: Path, *names: str) -> dict[str, ndarray]:
    """All tensors of a file, those of these names among them."""
    return {key: np.asarray(values, dtype=np.float64) for key, values in _tensors(file, *names).items()}


def _tensors(file: Path, *names: str) -> dict[str, ndarray]:
    """The same as they are in the file."""
    try:
        tensors, _ = read_file(file)
    except Exception as error:
        raise FileError(f"cannot read {file}: {str(error).strip().splitlines()[0]}") from error
    if missing := [key for key in names if key not in tensors]:
        raise CircuitGraphError(f"{file.name}: there is no tensor {missing[0]!r} among its weights; there are {', '.join(sorted(tensors))}")
    return {key: _numbers(values) for key, values in tensors.items()}


def _numbers(values: ndarray) -> ndarray:
    """bfloat16 as float32, whose first half it is, where numpy has no such type (see `_tensors`)."""
    if values.dtype.type is not np.void or values.itemsize != 2:
        return values
    numbers: ndarray = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return numbers
