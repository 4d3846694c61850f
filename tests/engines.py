"""One table of engines with the same weights. What stands above the protocol runs over every row, as networkx's suite over its backends.

The numpy reference is the loop-back backend. This module is it: what an outside package would have to offer, `trace` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from twins import small_model, twin

import circuitgraph
from circuitgraph import _plugins
from circuitgraph._dictionary import Neurons
from circuitgraph._engine import Engine, TracedModel
from circuitgraph._errors import unknown_name
from circuitgraph._names import Component
from circuitgraph._refinement import Refinement
from circuitgraph.testing import ReferenceModel, ReferenceTrace, random_cross_layer_transcoder, random_dictionary, random_pairs

BACKENDS = ("reference", "torch", "jax")
every_backend = pytest.mark.parametrize("backend", BACKENDS)

# JAX compiles once for each number of prompts and each length: tests that can do with these prompts share what was compiled.
PAIRS = replace(random_pairs(3, lengths=(3, 5, 5)), answers=[[1], [2, 5], [3]], wrong_answers=[[4, 6], [7], [8, 9, 0]])
SHORT = PAIRS.select([1, 2])

_LLAMA: dict[str, Any] = {"n_kv_heads": 1, "rotary_base": 1e4, "n_positions": 0, "gated": True, "act": "silu", "biases": False}
ONLY_REFERENCE: dict[str, dict[str, Any]] = {
    "gemma": {**_LLAMA, "post_norm": True, "logit_softcap": 3.0},
    "post-norm with biases": {"norm": "layer", "post_norm": True},
    "neox": {"parallel": True, "norm": "layer"},
    "granite": {**_LLAMA, "scale": 0.3},
    "attention only": {"d_mlp": 0},
    "mlp only": {"n_heads": 0, "act": "gelu"},
    "without norms": {"norm": None, "act": "identity"},
}


_DEEPER: dict[str, Any] = {"gpt2 of three layers": {"family": "gpt2", "n_layers": 3}}  # for parts that reach from layer to layer
_D_MODEL = 16  # of the small models; their heads together have as many numbers as the stream


def _parts(component: str, features: tuple[int, ...], seed: int, **options: Any) -> Refinement:
    return Refinement(Component.parse(component), random_dictionary(seed, width=_D_MODEL, **options), features)


def _across_layers(features: tuple[tuple[int, ...], ...], seed: int, **options: Any) -> tuple[Refinement, ...]:
    layers = random_cross_layer_transcoder(len(features), seed, width=_D_MODEL, **options)
    return tuple(Refinement(Component.parse(at), layers[at], chosen) for at, chosen in zip(layers, features, strict=True))


IN_PARTS: dict[str, tuple[str, tuple[Refinement, ...]]] = {
    "gpt2 in parts": (
        "gpt2",
        (
            _parts("m0", (0, 2, 3), 1, activation="jumprelu"),
            _parts("a1", (1, 4), 2, reads="attn_z", activation="gated"),
            _parts("m1", (0, 1, 5), 3, reads="mlp_in", has_skip=True),
        ),
    ),
    "llama in parts": (
        "llama",
        (
            _parts("a0", (0, 1, 2), 4, reads="attn_out", activation="topk"),
            Refinement(Component("m", 0), Neurons(), (1, 3, 4)),
            _parts("m1", (2, 3), 5, reads="mlp_normalized", activation="topk"),
        ),
    ),
    "gpt2, the stream in parts": (
        "gpt2",
        (
            _parts("r0", (0, 5), 6, reads="stream", input_norm="layer_norm"),
            _parts("m0", (1, 2), 7, reads="mlp_stream"),
            _parts("r2", (1, 3), 8, reads="stream", activation="jumprelu"),
        ),
    ),
    "gpt2 across layers": ("gpt2 of three layers", _across_layers(((1, 2), (5,), (5,)), 6, activation="jumprelu", has_skip=True)),
}
"""Models whose components are in parts: every kind of dictionary, of component and of norm somewhere."""


@dataclass(frozen=True)
class Row:
    """One row of the table: a model in a backend. `tolerance` is how far its float64 numbers may be off, relative."""

    backend: str
    family: str
    tolerance: float = 1e-9

    @property
    def traced(self) -> TracedModel:
        return traced(self.backend, self.family)

    def __str__(self) -> str:
        return f"{self.backend}-{self.family}"


# Hugging Face's RMSNorm computes in float32 even in a float64 model; its LayerNorm does not, nor does JAX or the reference.
ROWS = (
    *(Row("reference", family) for family in ("gpt2", "llama", *ONLY_REFERENCE)),
    *(Row("torch", family, tolerance) for family, tolerance in (("gpt2", 1e-9), ("llama", 2e-5))),
    *(Row("jax", family) for family in ("gpt2", "llama")),
    *(Row("reference", family) for family in IN_PARTS),
    *(Row("torch", family, 2e-5 if "llama" in family else 1e-9) for family in IN_PARTS),
)

# Beside the table: all laws hold here too, of all models in parts, but JAX would compile for minutes. `test_refined` and
# `test_cross_layer` ask what the lightest do not.
JAX_IN_PARTS = tuple(Row("jax", family) for family in ("llama in parts", "gpt2, the stream in parts"))

# Rows for algorithms: finite differences and close decisions need float64 throughout. One has heads in groups.
EXACT = tuple(row for row in ROWS if row.family in ("gpt2", "granite"))
every_engine = pytest.mark.parametrize("row", EXACT, ids=str)


@cache
def traced(backend: str, family: str = "gpt2", *, per_head_kv: bool = False) -> TracedModel:
    """A small float64 model, `gpt2` or `llama` with the same weights in every backend, or another one of the reference's."""
    if family in IN_PARTS:
        whole, refinements = IN_PARTS[family]
        return traced(backend, whole, per_head_kv=per_head_kv).refined(refinements)
    if family in ONLY_REFERENCE:
        return ReferenceModel.random(14, **ONLY_REFERENCE[family]).traced(per_head_kv=per_head_kv)
    model = small_model(**_DEEPER.get(family, {"family": family}))
    if backend == "reference":
        return trace(model, per_head_kv=per_head_kv)
    return circuitgraph.trace(model, backend=backend, per_head_kv=per_head_kv)


@cache
def bound(row: Row, metric: str = "logit_diff", source: Any = "corrupted") -> Engine:
    """An engine, bound once for all tests that ask it the same."""
    return row.traced.bind(SHORT, metric, source)


def trace(model: Any, *, per_head_kv: bool = False, dtype: str = "float64") -> ReferenceTrace:
    """A GPT-2 or Llama of Hugging Face, or the folder, id or `zoo:` name of one, as the numpy reference model."""
    if dtype != "float64":
        raise unknown_name("dtype", dtype, ["float64"])
    if not isinstance(model, str | Path):
        return ReferenceTrace(twin(model), per_head_kv)
    from circuitgraph_torch._load import load

    loaded = load(str(model))
    return ReferenceTrace(twin(loaded.model, name=loaded.name), per_head_kv, loaded.tokenizer)


def with_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the loop-back backend by its name, as installing a package would."""
    registered: Callable[[str], EntryPoints] = _plugins._registered

    def and_reference(group: str) -> EntryPoints:
        more = [EntryPoint("reference", __name__, group)] if group == _plugins.BACKENDS else []
        return EntryPoints([*registered(group), *more])

    monkeypatch.setattr(_plugins, "_registered", and_reference)
