"""From whatever names a model to the model: a Hugging Face id or folder, a GGUF file, a bundled `zoo:` name, a live module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from circuitgraph._checkpoint import configuration, folder_or_name, is_gguf, one_clear_error, quietly, tokenizer_of
from circuitgraph._errors import TraceError
from circuitgraph_torch._gguf import converted
from circuitgraph_torch._window import unwrap


@dataclass(frozen=True, eq=False)
class Loaded:
    model: nn.Module
    tokenizer: Any | None
    name: str


def load(model: Any, tokenizer: Any | None = None) -> Loaded:
    """The module, its tokenizer and a name for it.

    Raises `UnknownNameError` for a name that nothing answers to, `TraceError` for files that do not hold a whole decoder.
    """
    if isinstance(model, str | Path):
        loaded = _load_named(str(model))
        return loaded if tokenizer is None else Loaded(loaded.model, tokenizer, loaded.name)
    found = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    module = unwrap(model)
    if not isinstance(module, nn.Module):
        raise TraceError(f"cannot trace a {type(model).__name__}; expected a torch.nn.Module, an nnsight model, or the name of a model")
    config = getattr(module, "config", None)
    return Loaded(module, found, getattr(config, "_name_or_path", "") or type(module).__name__)


def _load_named(name: str) -> Loaded:
    folder = folder_or_name(name)
    with one_clear_error(name, folder), quietly():
        return _from_pretrained(converted(Path(folder)) if is_gguf(folder) else folder, name)


def _from_pretrained(folder: Path | str, name: str) -> Loaded:
    from transformers import AutoModelForCausalLM

    configuration(folder, name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    absent = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if absent:
        raise TraceError(
            f"model {name!r}: its files do not hold {len(absent)} of its tensors, such as {absent[0]}; they would be random numbers"
        )
    return Loaded(model.eval(), tokenizer_of(folder), name)
