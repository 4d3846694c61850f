"""`Witness`: what a PyTorch original says on a few tokens, in a file beside the weights.

With it a machine without PyTorch can prove that it computes the same model.
"""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._errors import FileError
from circuitgraph._tensors import read_file

if TYPE_CHECKING:
    from jaxtyping import Float32, Int
    from numpy import ndarray

FILE = "witness.safetensors"
_SCHEMA = 1
_AGAIN = "write it again where PyTorch is: circuitgraph_torch.write_witness(folder)"


@dataclass(frozen=True, eq=False)
class Witness:
    """The logits of the untouched PyTorch model, at some positions of some prompts.

    `logits[:, i]` are those at `positions[i]`. `dtype` is the one that the original computed in, which says how exact they are. `weights`
    is the `weights_hash` of the checkpoint, empty if the model has only just been run.
    """

    tokens: Int[ndarray, "prompts position"]
    positions: Int[ndarray, " kept"]
    logits: Float32[ndarray, "prompts kept vocabulary"]
    dtype: str = "float32"
    weights: str = ""


def save_witness(witness: Witness, folder: Path) -> Path:
    """Write the file whole or not at all; an older one is replaced. Raises `OSError`."""
    from safetensors.numpy import save

    tensors = {name: np.ascontiguousarray(getattr(witness, name)) for name in ("tokens", "positions", "logits")}
    metadata = {"circuitgraph_witness": json.dumps({"schema": _SCHEMA, "dtype": witness.dtype, "weights": witness.weights})}
    temporary = folder / f".{FILE}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(save(tensors, metadata))
        temporary.replace(folder / FILE)
    finally:
        temporary.unlink(missing_ok=True)
    return folder / FILE


def saved_witness(folder: Path, weights: Callable[[], str]) -> Witness | None:
    """The witness beside a checkpoint, or None if there is none that fits, with a warning if there is one.

    `weights` gives the `weights_hash` of the checkpoint; it is called only if there is a witness.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        witness = _read(folder / FILE)
    except FileError as error:
        warnings.warn(f"the witness is not used: {error}", stacklevel=2)
        return None
    if witness.weights != weights():
        warnings.warn(f"the witness is not used: {folder / FILE} is one of other weights than those beside it; {_AGAIN}", stacklevel=2)
        return None
    return witness


def _read(file: Path) -> Witness:
    from safetensors import SafetensorError

    try:
        tensors, metadata = read_file(file)
        about = json.loads(metadata["circuitgraph_witness"])
        if about["schema"] != _SCHEMA:
            raise FileError(f"{file} is of schema {about['schema']}, this circuitgraph reads {_SCHEMA}; update circuitgraph, or {_AGAIN}")
        tokens, positions, logits = (np.array(tensors[name]) for name in ("tokens", "positions", "logits"))
        witness = Witness(tokens, positions, logits, str(about["dtype"]), str(about["weights"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FileError(f"{file} is truncated or no witness ({error}); {_AGAIN}") from error
    prompts, length = witness.tokens.shape if witness.tokens.ndim == 2 else (-1, -1)
    if (
        witness.logits.shape[:-1] != (prompts, *witness.positions.shape)
        or witness.logits.dtype != np.float32
        or not np.isin(witness.positions, np.arange(length)).all()
        or not np.isfinite(witness.logits).all()
    ):
        raise FileError(f"{file}: its tokens, positions and logits do not fit together; {_AGAIN}")
    return witness
