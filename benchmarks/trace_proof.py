"""How far a traced model's replay `F(1)` is from the model itself, beside how far the model is from itself.

The error is the largest logit difference on these tokens, over the largest |logit|: the worse of what `trace` measured (its own tokens)
and of the traced model's check "F(1) is the model" (8 prompts of 16 random tokens; for SmolLM2 also 16 IOI prompts). Two noise floors of
the untouched model on the same prompts stand beside it: loaded with sdpa against loaded with eager attention, and in float32 against
float64. The first says how much the order of sums matters, the second how far the model is from what it would say without rounding.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from benchmarks import subjects
from benchmarks.machine import Watch
from benchmarks.tables import Table, options, publish
from circuitgraph import PromptPairs, TraceError, trace

MOST_ERROR = 1e-5


@dataclass(frozen=True)
class Proved:
    """Differences are relative. `attention_noise` is None where the model has one implementation only, `rounding_noise` where it does not
    run in float64; `refused` says why there is no trace."""

    model: str
    prompts: str = "random"
    edges: int = 0
    largest_logit: float = 0.0
    error: float = float("nan")
    attention_noise: float | None = None
    rounding_noise: float | None = None
    refused: str = ""

    @property
    def verdict(self) -> str:
        return "refused" if self.refused else "PASS" if self.error <= MOST_ERROR else "FAIL"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=1, help="nothing is timed here, and tiny models gain nothing")
    parser.add_argument("--models", nargs="+", help="names of tests/families.py, or smollm2; default: all")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # tiny vocabularies lack the usual special tokens
    models = chosen.models or [*subjects.families().FAMILIES, *(["smollm2"] if subjects.has_smollm2() else [])]
    watch = Watch()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)  # a family without MLPs
        found = [row for model in models for row in proved(model)]
    command = " ".join(["python -m benchmarks.trace_proof", *(["--models", *chosen.models] if chosen.models else [])])
    publish(table(found), [{**asdict(row), "verdict": row.verdict} for row in found], command=command, watch=watch, file=chosen.json)


def proved(name: str) -> list[Proved]:
    """Trace one model and measure it on one or more kinds of prompts."""
    try:
        traced: Any = trace(subjects.SMOLLM2 if name == "smollm2" else subjects.families().tiny(name))
    except TraceError as error:
        return [Proved(name, refused=str(error))]
    prompts = {"random": subjects.random_pairs(traced.architecture.vocabulary, prompts=8, length=16)}
    if name == "smollm2":
        prompts["IOI"] = subjects.ioi_pairs(traced, prompts=16)
    return [_measured(name, traced, kind, pairs) for kind, pairs in prompts.items()]


def _measured(name: str, traced: Any, kind: str, pairs: PromptPairs) -> Proved:
    (check,) = islice(traced.checks(pairs), 1)
    if check.name != "F(1) is the model":
        raise AssertionError(f"expected the check of F(1) first, got {check.name!r}")
    logits = _logits(traced.module, pairs)
    return Proved(
        name,
        kind,
        traced.graph.n_edges,
        float(logits.abs().max()),
        max(check.error, traced.proof.logits_error) if kind == "random" else check.error,
        attention_noise(traced.module, pairs, logits),
        rounding_noise(traced.module, pairs, logits),
    )


def attention_noise(model: Any, pairs: PromptPairs, logits: Tensor) -> float | None:
    """The untouched model with eager attention against the same with sdpa; None where it has no such choice."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            sdpa, eager = (_logits(_loaded(type(model), Path(folder), kind), pairs) for kind in ("sdpa", "eager"))
        except ValueError as error:
            if "attention implementation" not in str(error) and "attn_implementation" not in str(error):
                raise
            return None
    if min(_relative(sdpa, logits), _relative(eager, logits)) > MOST_ERROR:
        raise AssertionError(f"{type(model).__name__}: a copy of the model, saved and loaded, is another model")
    return _relative(eager, sdpa)


def rounding_noise(model: nn.Module, pairs: PromptPairs, logits: Tensor) -> float | None:
    """The untouched model in float32 against the same in float64; None where it does not run in float64."""
    try:
        return _relative(logits.double(), _logits(copy.deepcopy(model).double(), pairs))
    except RuntimeError as error:
        if "Double" not in str(error):
            raise
        return None  # the grouped matrix products of mixtures of experts


def table(found: Sequence[Proved]) -> Table:
    about = (
        f"Differences are relative to the largest |logit|; the model is in float32. Bar: {MOST_ERROR:.0e}. '-' for sdpa against eager: the "
        "family has one attention implementation only; for float64: it does not run in it. Many norms compute in float32 even in a float64 "
        "model, so the last noise floor is a lower bound."
    )
    notes = [
        about,
        *(f"{row.model} is refused: {row.refused}." for row in found if row.refused),
    ]
    columns = (
        "model",
        "tokens",
        "edges",
        "largest |logit|",
        "F(1) against the model",
        "sdpa against eager",
        "float32 against float64",
        "verdict",
    )
    return Table("Trace proof", columns, [_cells(row) for row in found], notes)


def _cells(row: Proved) -> tuple[str, ...]:
    if row.refused:
        return (row.model, *["-"] * 6, row.verdict)
    attention, rounding = ("-" if noise is None else f"{noise:.1e}" for noise in (row.attention_noise, row.rounding_noise))
    sizes = (f"{row.edges:,}", f"{row.largest_logit:.3g}")
    return (row.model, row.prompts, *sizes, f"{row.error:.1e}", attention, rounding, row.verdict)


def _loaded(kind: Any, folder: Path, attention: str) -> nn.Module:
    model = kind.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    assert isinstance(model, nn.Module)
    return model.eval()


def _logits(model: nn.Module, pairs: PromptPairs) -> Tensor:
    with torch.no_grad():
        logits = model(torch.from_numpy(np.stack(pairs.clean))).logits
    assert isinstance(logits, Tensor)
    return logits


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    main()
