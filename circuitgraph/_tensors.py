"""The weights of a checkpoint as numpy arrays, straight from its safetensors files: mapped into memory, nothing unpickled, no framework."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy import ndarray

from circuitgraph._errors import TraceError, near_names

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")

_NUMPY = {"BOOL": "bool", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_NUMPY |= {f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
_NUMPY |= {f"F{bits}": f"float{bits}" for bits in (16, 32, 64)}
"""From the types of safetensors to those of numpy; some are known to numpy only once ml_dtypes is imported, as JAX does."""


def read_tensors(folder: Path) -> dict[str, ndarray]:
    """Every tensor of the model in a folder, under each of its names, as read-only views of the mapped files.

    A type that numpy does not have is left as raw bytes (`np.void`). Raises `TraceError` for a folder without safetensors, `OSError`,
    `ValueError` or `SafetensorError` for broken files.
    """
    tensors: dict[str, ndarray] = {}
    for file in _files(folder):
        found, metadata = read_file(file)
        tensors |= found
        # a tensor that two modules share is stored once: safetensors notes {the name left out: the name kept}
        tensors |= {name: found[kept] for name, kept in metadata.items() if kept in found and name not in found}
    promised = _weight_map(folder) if not (folder / _SINGLE).is_file() else {}
    if absent := sorted(promised.keys() - tensors.keys()):
        raise ValueError(f"{promised[absent[0]]} does not hold the tensor {absent[0]} that {_INDEX} promises; copy the files again")
    return tensors


def read_file(file: Path) -> tuple[dict[str, ndarray], dict[str, str]]:
    """The tensors of one safetensors file, and its metadata."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as checked:  # refuses a broken header, and a file that is too short or too long
        metadata = dict(checked.metadata() or {})
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    is_empty = file.stat().st_size == 8 + length
    data = np.empty(0, np.uint8) if is_empty else np.asarray(np.memmap(file, np.uint8, mode="r", offset=8 + length))
    return {name: _view(data, entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in header.items()}, metadata


def tensor(tensors: Mapping[str, ndarray], name: str) -> ndarray:
    """The tensor of that name. Raises `TraceError` naming it if there is none, or if numpy has no such type of numbers."""
    found = tensors.get(name)
    if found is None:
        hint = near_names(name, tensors) or f"there are {len(tensors)}, for example {', '.join(list(tensors)[:3]) or 'none'}"
        raise TraceError(f"the checkpoint has no tensor {name!r}, which the architecture description asks for; {hint}")
    if found.dtype.type is np.void:
        raise TraceError(f"{name}: its numbers are of a type that numpy does not have; save the model in float32 or bfloat16")
    return found


def weights_hash(tensors: Mapping[str, ndarray]) -> str:
    """sha256 over names, shapes and bytes, whatever the order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.shape} ".encode())
        digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _view(data: ndarray, kind: str, shape: list[int], start: int, end: int) -> ndarray:
    size = int(np.prod(shape))
    try:
        dtype = np.dtype(_NUMPY[kind])
    except (KeyError, TypeError):
        dtype = np.dtype((np.void, max(1, (end - start) // max(1, size))))
    return data[start:end].view(dtype).reshape(shape)


def _files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    shards = sorted(set(_weight_map(folder).values()))
    if elsewhere := [name for name in shards if Path(name).name != name]:
        raise ValueError(f"{_INDEX} points to {elsewhere[0]!r}; expected names of files beside it")
    if shards:
        return [folder / name for name in shards]
    pickles = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]
    what = f"only {pickles[0]}, a pickle, which could run any code and is never read" if pickles else f"no {_SINGLE}"
    raise TraceError(
        f"the weights cannot be loaded from {folder}: there is {what}; write them as safetensors once, on a machine with PyTorch: "
        f"transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    """Which file holds which tensor, of a checkpoint in several files; empty for any other."""
    file = folder / _INDEX
    if not file.is_file():
        return {}
    index = json.loads(file.read_text(encoding="utf-8"))
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{_INDEX} has no weight_map; expected {{tensor: file}}")
    return found
