"""One backend on one model, in a process of its own: prints one line of JSON. `benchmarks.backends` starts it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks import subjects
from benchmarks.clock import compared, timed
from benchmarks.discovery import RANDOM_THRESHOLD
from benchmarks.discovery_case import Case, sampled_chunks, sampled_sweep
from benchmarks.machine import peak_memory
from circuitgraph import ACDC, EAP, LogitDiff, PromptPairs, TracedModel, trace

LANES = 64
SWEPT = 4  # calls of the exact sweep
THRESHOLDS = {"gpt2-size": RANDOM_THRESHOLD, "tiny": 0.01}  # of ACDC by KL; on SmolLM2 it would take JAX too long


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backend", choices=("torch", "jax"))
    parser.add_argument("model", choices=("gpt2-size", "smollm2", "tiny"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    traced, pairs = _traced(chosen.backend, chosen.model)
    plain = plain_forward(chosen.backend, traced, pairs, chosen.threads)
    print(json.dumps(measured(traced, pairs, plain, chosen.rounds, THRESHOLDS.get(chosen.model))))


@dataclass(frozen=True)
class Asked:
    """A call to be measured: how many lanes or edges it asks for (0: not counted), and the rounds."""

    call: Callable[[], object]
    number: int
    rounds: int


def measured(traced: TracedModel, pairs: PromptPairs, plain: Callable[[], object], rounds: int, threshold: float | None) -> dict[str, Any]:
    """Seconds and ratios. The first calls are warm-ups, in which JAX compiles; what they take longer than later ones is reported."""
    plain()
    methods = {}
    for name, asked in _asked(traced, pairs, rounds, threshold).items():
        first = timed(asked.call).wall
        comparison = asdict(compared(asked.call, plain, rounds=asked.rounds))
        methods[name] = {**comparison, "asked": asked.number, "compilation": first - comparison["call"]["median"]}
    prompts = [len(pairs), len(pairs.clean[0])]
    return {"edges": traced.graph.n_edges, "prompts": prompts, "methods": methods, "peak": peak_memory()}


def _asked(traced: TracedModel, pairs: PromptPairs, rounds: int, threshold: float | None) -> dict[str, Asked]:
    """Lanes and searches take minutes, so they have fewer rounds."""
    masks = np.random.default_rng(0).integers(0, 2, (LANES, *traced.graph.shape)).astype(np.float32)
    engine, sweep = traced.bind(pairs, LogitDiff()), Case(traced, pairs, chunks=SWEPT)
    n_swept = sum(map(len, sampled_chunks(sweep)))
    found = {
        "EAP": Asked(lambda: _scores(traced, pairs), 0, rounds),
        f"{LANES} random lanes": Asked(lambda: engine.evaluate(masks), LANES, max(2, rounds // 2)),
        f"exact sweep, {n_swept:,} edges": Asked(lambda: [*sampled_sweep(sweep)], n_swept, max(2, rounds // 2)),
    }
    if threshold is not None:
        acdc = ACDC(threshold=threshold)
        found[f"ACDC, kl at {threshold:g}"] = Asked(lambda: acdc.run(traced.bind(pairs, "kl")), traced.graph.n_edges, 1)
    return found


def plain_forward(backend: str, traced: TracedModel, pairs: PromptPairs, threads: int) -> Callable[[], object]:
    """The framework's own forward pass on the clean prompts: logits at every position, no graph."""
    ids, module = np.stack(pairs.clean), traced.module  # type: ignore[attr-defined]  # the backends' own
    if backend == "torch":
        import torch

        torch.set_num_threads(threads)
        tokens = torch.from_numpy(ids)

        def torch_forward() -> None:
            with torch.no_grad():
                module(tokens)

        return torch_forward
    import jax
    import jax.numpy as jnp

    from circuitgraph_jax._queries import plain_logits

    on_device = jnp.asarray(ids, jnp.int32)
    return lambda: jax.block_until_ready(plain_logits(module, on_device))


def _scores(traced: TracedModel, pairs: PromptPairs) -> None:
    """All of EAP, from prompts to scores."""
    if backend_calls := getattr(getattr(traced, "_parts", None), "_calls", None):
        backend_calls.clear()  # what PyTorch remembers of a prompt length: as on prompts of a length that it has not seen
    scores = EAP().run(traced.bind(pairs, LogitDiff())).scores
    if scores is None or not np.isfinite(scores).all() or not scores.any():
        raise AssertionError("EAP gave no scores, so its time means nothing")


def _traced(backend: str, model: str) -> tuple[TracedModel, PromptPairs]:
    if model == "smollm2":
        traced = trace(subjects.SMOLLM2, backend=backend)
        return traced, subjects.ioi_pairs(traced, prompts=8)
    size = (12, 12, 768, 50257) if model == "gpt2-size" else (2, 2, 16, 50)
    module = subjects.random_gpt2(**dict(zip(("n_layers", "n_heads", "d_model", "vocabulary"), size, strict=True)))
    return trace(module, backend=backend), subjects.random_pairs(size[-1], prompts=8, length=16)


if __name__ == "__main__":
    main()
