"""Bearing witness for a backend that cannot run the PyTorch original: its logits on a few random tokens, see `circuitgraph._witness`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from circuitgraph._errors import TraceError
from circuitgraph._tensors import read_tensors, weights_hash
from circuitgraph._witness import Witness, save_witness
from circuitgraph_torch._calls import original_logits

_PROMPTS, _LENGTH, _SEED = 2, 12, 0


def write_witness(folder: str | Path, *, last_only: bool = False) -> Path:
    """Run the model in a folder and write what it says into `witness.safetensors` there, so that JAX can prove its trace without PyTorch.

    `last_only` keeps the logits of the last position alone, for large vocabularies. Raises `TraceError` for a folder without a model.

    ```python
    model.save_pretrained("my-model")
    circuitgraph_torch.write_witness("my-model")
    ```
    """
    from circuitgraph_torch._load import load  # which converts GGUF files, and that writes a witness

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise TraceError(f"write_witness({str(folder)!r}): there is no such folder; expected one with config.json and model.safetensors")
    module = load(path).model
    return save_witness(original_witness(module.float(), weights=weights_hash(read_tensors(path)), last_only=last_only), path)


def original_witness(module: nn.Module, *, weights: str = "", last_only: bool = False) -> Witness:
    """What the untouched module says on 2 prompts of 12 random tokens, or fewer if it has fewer positions."""
    parameter = next(module.parameters())
    vocabulary = original_logits(module, torch.zeros(1, 1, dtype=torch.long, device=parameter.device)).shape[-1]
    tokens = np.random.default_rng(_SEED).integers(0, vocabulary, (_PROMPTS, min(_LENGTH, _positions(module))))
    logits = original_logits(module, torch.from_numpy(tokens).to(parameter.device)).float().cpu().numpy()
    if not np.isfinite(logits).all():
        raise TraceError("the model's logits are not finite on a sample of tokens, so they prove nothing; check its weights")
    kept = np.arange(tokens.shape[1])[-1 if last_only else 0 :]
    return Witness(tokens, kept, logits[:, kept], str(parameter.dtype).removeprefix("torch."), weights)


def _positions(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    return getattr(config, "max_position_embeddings", None) or _LENGTH
