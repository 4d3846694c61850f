"""From whatever names a model to the model: a Hugging Face id or folder, a GGUF file, a bundled `zoo:` name, a live module."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from circuitgraph._errors import TraceError, UnknownNameError, near_names
from circuitgraph.zoo import PACKAGED, PREFIX, zoo_models, zoo_path
from circuitgraph_torch._gguf import converted, smollm2_file
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
    from safetensors import SafetensorError

    folder = _folder(name)
    try:
        with _quietly():
            if isinstance(folder, Path) and folder.suffix == ".gguf":
                folder = converted(folder)
            return _from_pretrained(folder, name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(folder, Path):
            raise TraceError(f"model {name!r} cannot be loaded from {folder}: {reason}") from error
        hint = near_names(name, [*PACKAGED, *zoo_models()])
        raise UnknownNameError(
            f"unknown model {name!r}; {hint or 'it is no folder, no GGUF file, no bundled model (see `circuitgraph models`)'}; the hub "
            f"did not give it either ({reason})"
        ) from error


def _folder(name: str) -> Path | str:
    """The folder or GGUF file that a name stands for, or the name itself if only the hub may know it."""
    if name.startswith(PREFIX):
        return zoo_path(name)
    if name.lower() in PACKAGED:
        return smollm2_file()
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if path.suffix == ".gguf" or not name or name.startswith((".", "/", "~")):
        raise UnknownNameError(f"model {name!r}: there is no such {'GGUF file' if path.suffix == '.gguf' else 'folder'}")
    return name


def _from_pretrained(folder: Path | str, name: str) -> Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "is_encoder_decoder", False):
        raise TraceError(f"model {name!r} is an encoder-decoder ({config.model_type}); circuitgraph traces decoder-only transformers")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    absent = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if absent:
        raise TraceError(
            f"model {name!r}: its files do not hold {len(absent)} of its tensors, such as {absent[0]}; they would be random numbers"
        )
    return Loaded(model.eval(), _tokenizer(folder), name)


def _tokenizer(folder: Path | str) -> Any | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return None  # a model without one is used with token ids


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars, and no talk of other libraries: what is wrong is said once, by our own error."""
    from transformers.utils import logging as hub_logging

    shows_bars, verbosity = hub_logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    hub_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.setLevel(hub_level)
        hub_logging.set_verbosity(verbosity)
        if shows_bars:
            hub_logging.enable_progress_bar()
