"""GGUF files: converted once, kept in the user's cache folder. Most of the time goes into the tokenizer."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from circuitgraph._checkpoint import conversion_folder, is_converted
from circuitgraph._tensors import read_tensors, weights_hash
from circuitgraph._witness import save_witness
from circuitgraph_torch._witness import original_witness


def converted(file: Path) -> Path:
    """The folder that holds the model of a GGUF file in Hugging Face's format; made if it is not there yet."""
    folder = conversion_folder(file)
    if not is_converted(folder):
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
        save_witness(original_witness(model, weights=weights_hash(read_tensors(work)), last_only=True), work)
        try:
            work.rename(folder)
        except OSError:
            if not is_converted(folder):  # else another process was first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
