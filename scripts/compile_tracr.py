"""Compiles Tracr programs to the data files of `circuitgraph.testing.compiled_model`. Run once; the files are in the repository.

Tracr needs JAX and Haiku of its own, so it gets an environment of its own (Python 3.11; seconds a program):

    python -m venv tracr-env
    tracr-env/bin/pip install tracr-pypi==1.0.0 safetensors
    tracr-env/bin/python scripts/compile_tracr.py

Each program gives `NAME.safetensors`, its weights in float32, and `NAME.json`, what they mean. The number at the end of a label counts what
Tracr has named so far, so all programs are compiled, in this order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

FOLDER = Path(__file__).parent.parent / "circuitgraph" / "testing" / "compiled"
BOS, PAD = "BOS", "compiler_pad"
LONGEST = 5  # tokens after BOS


@dataclass(frozen=True)
class Program:
    """A program of Tracr's library, and the alphabet that it is compiled for. `source`: its call, for people."""

    make: Callable[[], Any]
    source: str
    alphabet: tuple[Any, ...]


PROGRAMS = {
    "reverse": Program(lambda: lib.make_reverse(rasp.tokens), "make_reverse(tokens)", (1, 2, 3)),
    "frac_prevs": Program(lambda: lib.make_frac_prevs(rasp.tokens == "x"), "make_frac_prevs(tokens == 'x')", ("w", "x", "y", "z")),
    "hist": Program(lib.make_hist, "make_hist()", ("a", "b", "c")),
    "sort": Program(
        lambda: lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=LONGEST, min_key=1),
        f"make_sort(tokens, tokens, max_seq_len={LONGEST}, min_key=1)",
        (1, 2, 3),
    ),
    "shuffle_dyck2": Program(lib.make_shuffle_dyck2, "make_shuffle_dyck2()", ("(", ")", "{", "}")),
}


@dataclass(frozen=True)
class Description:
    """What the numbers of a compiled model mean. `outputs`: what each logit stands for; none for a program whose output is a number."""

    program: str
    source: str
    compiler: str
    alphabet: Sequence[Any]
    longest: int
    is_causal: bool
    vocabulary: Sequence[Any]
    labels: Sequence[str]
    output_labels: Sequence[str]
    outputs: Sequence[Any]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, program in PROGRAMS.items():
        sop = program.make()
        model = compiling.compile_rasp_to_model(sop, vocab=set(program.alphabet), max_seq_len=LONGEST, compiler_bos=BOS, compiler_pad=PAD)
        description = described(name, program, sop, model)
        save_file(weights(model), FOLDER / f"{name}.safetensors")
        text = json.dumps(asdict(description), indent=1, ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(name, f"{model.model_config.num_layers} layers of {model.model_config.num_heads} heads")


def described(name: str, program: Program, sop: Any, model: Any) -> Description:
    ids = model.input_encoder.encoding_map
    outputs = [*model.output_encoder.encoding_map] if rasp.is_categorical(sop) else []
    return Description(
        program=name,
        source=program.source,
        compiler="tracr-pypi 1.0.0",
        alphabet=program.alphabet,
        longest=LONGEST,
        is_causal=model.model_config.causal,
        vocabulary=sorted(ids, key=lambda token: ids[token]),
        labels=model.residual_labels,
        output_labels=[f"{sop.label}:{value}" for value in outputs] or [sop.label],
        outputs=outputs,
    )


def weights(model: Any) -> dict[str, np.ndarray]:
    """Heads apart, linear maps as [out, in]: the shapes of `ReferenceModel`. Raises `ValueError` for a bias, which Tracr never has."""
    config, params = model.model_config, model.params
    if any(np.any(np.asarray(values)) for part in params.values() for kind, values in part.items() if kind == "b"):
        raise ValueError("a bias that is not zero; circuitgraph.testing._compiled expects none")
    found = {"embedding": params["token_embed"]["embeddings"], "positions": params["pos_embed"]["embeddings"]}
    for layer in range(config.num_layers):
        at = f"transformer/layer_{layer}"
        for kind in ("query", "key", "value"):
            heads = np.asarray(params[f"{at}/attn/{kind}"]["w"]).T.reshape(config.num_heads, config.key_size, -1)
            found[f"layers.{layer}.attention.{kind[0]}"] = heads
        out = np.asarray(params[f"{at}/attn/linear"]["w"]).reshape(config.num_heads, config.key_size, -1)
        found[f"layers.{layer}.attention.o"] = out.swapaxes(1, 2)
        found[f"layers.{layer}.mlp.up"] = np.asarray(params[f"{at}/mlp/linear_1"]["w"]).T
        found[f"layers.{layer}.mlp.down"] = np.asarray(params[f"{at}/mlp/linear_2"]["w"]).T
    return {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in found.items()}


if __name__ == "__main__":
    main()
