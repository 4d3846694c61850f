"""One case of the EAP benchmark, in a process of its own: prints one line of JSON. `benchmarks.eap` starts it.

`time` runs plain forward passes and EAP in turns. `memory` loads, traces and runs EAP once, and nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from benchmarks import subjects
from benchmarks.clock import compared, timed
from benchmarks.machine import peak_memory
from circuitgraph import EAP, Algorithm, LogitDiff, PromptPairs, TracedModel, trace

MODELS = ("gpt2-size", "smollm2", "tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("measure", choices=("time", "memory"))
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--frozen", action="store_true", help="parameters require no gradient")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.measure == "time":
        print(json.dumps(times(chosen.model, frozen=chosen.frozen, rounds=chosen.rounds)))
    else:
        print(json.dumps(memory(chosen.model, frozen=chosen.frozen)))


def times(model: str, *, frozen: bool, rounds: int) -> dict[str, Any]:
    """Seconds and ratios. The first call of either is a warm-up; that of EAP is reported by itself."""
    traced, pairs, trace_seconds = _traced(model, frozen)
    module = _untouched(_module(traced))
    ids = torch.from_numpy(np.stack(pairs.clean))

    def plain() -> None:
        with torch.no_grad():
            module(ids)

    def eap() -> None:
        run_scoring(EAP(), traced, pairs)

    plain()
    first = timed(eap)
    comparison = compared(eap, plain, rounds=rounds)
    return {
        "edges": traced.graph.n_edges,
        "prompts": list(ids.shape),
        "requires_grad": any(parameter.requires_grad for parameter in _module(traced).parameters()),
        "trace_seconds": trace_seconds,
        "first_seconds": first.wall,
        **asdict(comparison),
    }


def memory(model: str, *, frozen: bool) -> dict[str, Any]:
    """Peak bytes of this process, before EAP (imports, model, trace) and after."""
    traced, pairs, _ = _traced(model, frozen)
    before = peak_memory()
    run_scoring(EAP(), traced, pairs)
    return {"peak_before_eap": before, "peak": peak_memory()}


def run_scoring(algorithm: Algorithm, traced: TracedModel, pairs: PromptPairs) -> None:
    """All of it, from prompts to scores, as on prompts of a length that the model has not seen since it was traced."""
    parts = traced._parts  # type: ignore[attr-defined]  # the torch backend's own; it remembers the attention calls of every length
    parts._calls.clear()
    scores = algorithm.run(traced.bind(pairs, LogitDiff())).scores
    if not parts._calls:
        raise AssertionError("the attention calls are remembered elsewhere now, so that this time would not count them; clear them here")
    if scores is None or not np.isfinite(scores).all() or not scores.any():
        raise AssertionError(f"{algorithm} gave no scores, so its time means nothing")


def _traced(model: str, frozen: bool) -> tuple[TracedModel, PromptPairs, float]:
    started = time.perf_counter()
    if model == "smollm2":
        traced = trace(subjects.SMOLLM2)
        pairs = subjects.ioi_pairs(traced, prompts=16)
    else:
        size = (12, 12, 768, 50257) if model == "gpt2-size" else (2, 2, 16, 50)
        names = ("n_layers", "n_heads", "d_model", "vocabulary")
        module = subjects.random_gpt2(**dict(zip(names, size, strict=True)))
        started = time.perf_counter()
        traced = trace(module)
        pairs = subjects.random_pairs(size[-1], prompts=8, length=16)
    _module(traced).requires_grad_(not frozen)
    return traced, pairs, time.perf_counter() - started


def _untouched(module: Any) -> torch.nn.Module:
    """The same model, never traced: nnsight leaves wrappers on the modules that it has watched, and they must not slow the base down."""
    fresh = type(module)(copy.deepcopy(module.config)).eval()
    fresh.load_state_dict(module.state_dict())
    assert isinstance(fresh, torch.nn.Module)
    return fresh.requires_grad_(next(module.parameters()).requires_grad)


def _module(traced: TracedModel) -> torch.nn.Module:
    module = traced.module  # type: ignore[attr-defined]  # the torch backend's own
    assert isinstance(module, torch.nn.Module)
    return module


if __name__ == "__main__":
    main()
