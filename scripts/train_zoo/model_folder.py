"""A model folder in Hugging Face format, written whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

CARD = "training.json"


def write_model_folder(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: dict[str, Any]) -> None:
    """Config, weights, tokenizer and `training.json` (how it was made, what was measured); replaces the folder if it exists."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    model.save_pretrained(fresh)
    (fresh / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(fresh)
    _name_the_public_tokenizer_class(fresh / "tokenizer_config.json")
    (fresh / CARD).write_text(json.dumps(card, indent=1) + "\n")
    fresh.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    fresh.rename(folder)


def measure_again(folder: Path, measure: Callable[[LlamaForCausalLM, PreTrainedTokenizerFast], dict[str, Any]]) -> str:
    """The card of a written model with its numbers measured afresh; the card's file is replaced."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    card = json.loads((folder / CARD).read_text())
    text = json.dumps({**card, "measured": measure(model, AutoTokenizer.from_pretrained(folder))}, indent=1) + "\n"
    fresh = folder / f".{CARD}"
    fresh.write_text(text)
    fresh.replace(folder / CARD)
    return text


def _name_the_public_tokenizer_class(file: Path) -> None:
    """transformers 5 writes the name of an internal class that transformers 4 does not know."""
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=1) + "\n")
