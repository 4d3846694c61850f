"""From whatever names a model to its weights as numpy arrays, without PyTorch: a name, a folder, a live module, a pytree of arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path
from numpy import ndarray

from circuitgraph._checkpoint import (
    configuration,
    conversion_folder,
    folder_or_name,
    is_converted,
    is_gguf,
    one_clear_error,
    quietly,
    tokenizer_of,
)
from circuitgraph._errors import CircuitGraphError, TraceError
from circuitgraph._tensors import read_tensors, weights_hash
from circuitgraph._witness import FILE as WITNESS_FILE
from circuitgraph._witness import Witness
from circuitgraph_jax._witness import witness_of_folder, witness_of_module

_WANTED_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors", WITNESS_FILE]
_HEAD = "language_model.lm_head."
"""The unembedding of a multi-modal model, which lies beside the decoder, as files call it."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's weights and what is known about them.

    `tensors`: by the names of `state_dict()`, "transformer.h.0.attn.c_attn.weight"; those of files are read-only views of them.
    `config`: as `AutoConfig.from_pretrained(...).to_dict()` gives it, None if the model has none. `witness` gives what the PyTorch
    original says on a few tokens, None if nobody can tell. `weights` gives the hash of the tensors. `forward` is somebody's own JAX
    model, from the ids of one prompt `[position]` to logits `[position, vocabulary]`.
    """

    name: str
    tensors: Mapping[str, ndarray]
    config: Mapping[str, Any] | None
    tokenizer: Any | None
    witness: Callable[[], Witness | None]
    weights: Callable[[], str]
    forward: Callable[[Any], Any] | None = None


def load(model: Any, tokenizer: Any | None = None) -> Checkpoint:
    """The checkpoint behind a name, a folder with config.json and safetensors, a PyTorch or nnsight module, or a pytree of arrays.

    A pytree's tensors are named by their paths: an Equinox module's "blocks.0.attention.query.weight", or the keys of a dict.
    Raises `UnknownNameError` for a name that nothing answers to, `TraceError` for what holds no weights that can be read.
    """
    if isinstance(model, str | Path):
        loaded = _named(str(model))
    elif any(cls.__module__.partition(".")[0] in ("torch", "nnsight") for cls in type(model).__mro__):
        loaded = _torch_module(model)
    else:
        loaded = _pytree(model)
    return loaded if tokenizer is None else replace(loaded, tokenizer=tokenizer)


def with_prefix(tensors: Mapping[str, ndarray], embedding: str) -> dict[str, ndarray]:
    """The tensors by the names that the module has which is described, where the files use those of a part of it, or of a whole around it.

    `embedding` is the description's path of the token embedding, such as "transformer.wte": files of GPT-2 that have "wte.weight" and
    "h.0.ln_1.weight" lack "transformer.". Tensors beside the decoder (the unembedding, a vision tower) are moved as transformers does.

    >>> list(with_prefix({"wte.weight": np.zeros(1), "lm_head.weight": np.zeros(1)}, "transformer.wte"))
    ['transformer.wte.weight', 'lm_head.weight']
    """
    root, _, leaf = embedding.rpartition(".")
    found = [name for name in tensors if f".{name}".endswith(f".{leaf}.weight")]
    if f"{embedding}.weight" in tensors or len(found) != 1:
        return dict(tensors)
    rename = partial(_renamed, old=found[0].removesuffix(f"{leaf}.weight"), new=f"{root}." if root else "")
    return {rename(name): value for name, value in tensors.items()}


def _renamed(name: str, old: str, new: str) -> str:
    """A name, once the decoder is called `new` instead of `old` (with their last dots)."""
    if name.startswith(("lm_head.", _HEAD)):
        return name.removeprefix("language_model.")
    if name.startswith(old):
        return new + name.removeprefix(old)
    around = new.partition(".")[0] + "." if new.count(".") > 1 else ""
    return name if name.startswith(around) else around + name


def _named(name: str) -> Checkpoint:
    folder = folder_or_name(name)
    with one_clear_error(name, folder), quietly():
        path = _converted(Path(folder)) if is_gguf(folder) else folder
        config = configuration(path, name).to_dict()
        here = path if isinstance(path, Path) else _downloaded(path)
        tensors = read_tensors(here)
        weights = cache(partial(weights_hash, tensors))
        if config["model_type"] == "gpt_neox":  # as transformers does
            tensors = {re.sub(r"^embed_out\.", "lm_head.", name): value for name, value in tensors.items()}
        return Checkpoint(name, tensors, config, tokenizer_of(here), partial(witness_of_folder, here, weights), weights)


def _converted(file: Path) -> Path:
    """The folder of a GGUF file's model. PyTorch is needed once, to make it."""
    folder = conversion_folder(file)
    if is_converted(folder):
        return folder
    try:
        from circuitgraph_torch._gguf import converted
    except ModuleNotFoundError as error:
        raise CircuitGraphError(
            f"{file.name} is a GGUF file, which PyTorch converts once: run pip install 'circuitgraph[torch]', or trace it on a machine "
            f"that has PyTorch and copy {folder} from there"
        ) from error
    return converted(file)


def _downloaded(name: str) -> Path:
    """The folder of a model of the hub: its configuration, tokenizer and safetensors, and no file in a sub-folder."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=_WANTED_FILES, ignore_patterns=["*/*"]))


def _torch_module(model: Any) -> Checkpoint:
    from circuitgraph_torch._load import load as load_torch

    loaded = load_torch(model)
    tensors = {name: _from_torch(name, value) for name, value in loaded.model.state_dict().items()}
    config = getattr(loaded.model, "config", None)
    settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
    weights = cache(partial(weights_hash, tensors))
    return Checkpoint(loaded.name, tensors, settings, loaded.tokenizer, partial(witness_of_module, loaded.model), weights)


def _from_torch(name: str, value: Any) -> ndarray:
    """A copy, so that a module that is trained further does not change under the trace."""
    import torch

    if value.is_meta:
        raise TraceError(f"{name}: the module's weights are not loaded yet; nnsight loads them at once with dispatch=True")
    array = value.detach().cpu()
    if array.dtype == torch.bfloat16:
        return np.array(array.view(torch.int16).numpy().view(jnp.bfloat16))
    return np.array(array.numpy())


def _pytree(model: Any) -> Checkpoint:
    leaves, _ = tree_flatten_with_path(model)
    tensors = {".".join(map(_step, path)): np.asarray(leaf) for path, leaf in leaves if _is_numbers(leaf)}
    if not all(tensors):  # a bare array has the empty path
        tensors = {}
    if not tensors:
        raise TraceError(
            f"cannot trace a {type(model).__name__}; expected the name of a model, a torch.nn.Module, an nnsight model, or a pytree of "
            f"arrays such as an Equinox module"
        )
    weights = cache(partial(weights_hash, tensors))
    return Checkpoint(type(model).__name__, tensors, None, None, _nobody, weights, model if callable(model) else None)


def _nobody() -> None:
    """The witness of a model that has no PyTorch original."""


def _step(key: Any) -> str:
    """One step of a path: an attribute's name, a dict's key, or the number of an item."""
    return str(next(getattr(key, field) for field in ("name", "key", "idx") if hasattr(key, field)))


def _is_numbers(leaf: Any) -> bool:
    """Whether it is an array of plain numbers; the keys of a random generator are none."""
    return isinstance(leaf, jax.Array | ndarray) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
