"""Dictionaries of dictionary_learning: a folder with `ae.pt`, a state that is read without running any code in it, and `config.json`.

Features have the values that `encode` of the package's version 0.1.0 gives them. (Others of its versions multiply gated and JumpReLU
features by the norm of their decoder's column, and divide by it again before decoding.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._dictionary import Dictionary, Reads
from circuitgraph._errors import CircuitGraphError, FileError
from circuitgraph.files._atomic import parse_json, read_bytes

if TYPE_CHECKING:
    from numpy import ndarray

CONFIG, WEIGHTS = "config.json", "ae.pt"
_PLACES: Mapping[str, tuple[Reads, int]] = {"resid_post": ("stream", 1), "mlp_out": ("mlp_out", 0), "attention_out": ("attn_out", 0)}
_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


def read_dictionary_learning(folder: Path, *, reads: Reads | None = None) -> Dictionary:
    """The dictionary in a folder. `reads`: what it reads, where its configuration names no place of ours."""
    config = parse_json(read_bytes(folder / CONFIG, "configuration"), folder / CONFIG).get("trainer")
    if not isinstance(config, dict) or config.get("dict_class") not in _CLASSES:
        got = config.get("dict_class") if isinstance(config, dict) else None
        raise CircuitGraphError(f"{folder / CONFIG}: its trainer's dict_class is {got!r}; expected one of {', '.join(_CLASSES)}")
    name = folder.name
    if reads is None:
        place = str(config.get("submodule_name") or "")
        reads, more = next((found for key, found in _PLACES.items() if place.startswith(key)), (None, 0))
        if reads is None:
            raise CircuitGraphError(
                f"{name}: its submodule_name is {place!r}, which does not say what it reads; give reads=, such as 'stream'"
            )
    else:
        more = 1 if reads == "stream" else 0
    layer = config.get("layer")
    made = _made(config["dict_class"], _state(folder / WEIGHTS), config, name, reads)
    return replace(made, layer=None if layer is None else int(layer) + more, model=config.get("lm_name"))


def _state(file: Path) -> dict[str, ndarray]:
    """Raises `FileError` for a file that holds more than tensors: unpickling it could run any code."""
    import pickle

    import torch

    if not file.is_file():
        raise FileError(f"there is no {file}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise FileError(f"{file} is no file of tensors alone, so it is not read: {str(error).strip().splitlines()[0]}") from error
    return {key.removeprefix("_orig_mod."): value.double().numpy() for key, value in state.items() if isinstance(value, torch.Tensor)}


def _made(kind: str, state: Mapping[str, ndarray], config: Mapping[str, Any], name: str, reads: Reads) -> Dictionary:
    def of(key: str) -> ndarray:
        if key not in state:
            raise CircuitGraphError(f"{name}: there is no tensor {key!r} among its weights; there are {', '.join(sorted(state))}")
        return state[key]

    if kind == "JumpReluAutoEncoder":
        return Dictionary(
            encoder=of("W_enc"),
            decoder=of("W_dec"),
            encoder_bias=of("b_enc"),
            decoder_bias=of("b_dec"),
            threshold=np.maximum(of("threshold"), 0),
            activation="jumprelu",
            reads=reads,
            name=name,
        )
    if kind == "MatryoshkaBatchTopKSAE":
        encoder, decoder, encoder_bias = of("W_enc"), of("W_dec"), of("b_enc")
    else:
        encoder, decoder = of("encoder.weight").T, of("decoder.weight").T
        encoder_bias = of("gate_bias" if kind == "GatedAutoEncoder" else "encoder.bias")
    if kind == "GatedAutoEncoder":
        return Dictionary(
            encoder=encoder,
            decoder=decoder,
            encoder_bias=encoder_bias,
            decoder_bias=of("decoder_bias"),
            magnitude_scale=np.exp(of("r_mag")),
            magnitude_bias=of("mag_bias"),
            activation="gated",
            is_centred=True,
            reads=reads,
            name=name,
        )
    plain = Dictionary(encoder, decoder, encoder_bias, of(_bias_of(kind)), reads, is_centred=kind != "AutoEncoderNew", name=name)
    if kind == "AutoEncoderTopK":
        return replace(plain, activation="topk", k=int(state["k"]) if "k" in state else int(config["k"]))
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        threshold = float(of("threshold"))
        if threshold < 0:
            raise CircuitGraphError(f"{name}: it was never given a threshold, so what is active depends on the batch; train it further")
        return replace(plain, activation="jumprelu", threshold=np.full(plain.n_features, threshold))
    return plain


def _bias_of(kind: str) -> str:
    return {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
