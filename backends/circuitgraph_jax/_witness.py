"""What the PyTorch original of a checkpoint says on a few tokens: from the file beside the weights, or from PyTorch if it is here.

The one place, with `_load`, that knows of the PyTorch backend; it is imported inside the functions, so JAX alone is enough for the rest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from circuitgraph._witness import Witness, saved_witness


def witness_of_folder(folder: Path, weights: Callable[[], str]) -> Witness | None:
    """The file's, with a warning if it is of other weights; else that of the original, run in float32; None without PyTorch."""
    saved = saved_witness(folder, weights)
    if saved is not None or not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return saved
    from circuitgraph_torch._load import load

    return witness_of_module(load(folder).model.float())


def witness_of_module(module: Any) -> Witness:
    """A live `torch.nn.Module`'s own logits, in its own dtype."""
    from circuitgraph_torch._witness import original_witness

    return original_witness(module)
