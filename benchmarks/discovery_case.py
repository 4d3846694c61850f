"""One method on one model, in a process of its own: prints one line of JSON. `benchmarks.discovery` starts it.

Every number is of one run of the method, `TracedModel.bind` included, tracing not. Its forwards are plain forward passes of an untouched
model with the same weights, on the same prompts in one batch, timed in turns with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from benchmarks import subjects
from benchmarks.clock import Paced, compared, paced
from benchmarks.eap_case import run_scoring
from benchmarks.machine import peak_memory
from benchmarks.products import operations
from benchmarks.twin import sharing_twin
from circuitgraph import ACDC, EAP, EAPIG, ActivationPatching, Engine, Outcome, PromptPairs, TracedModel, trace

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

GPT2_SIZE = {"n_layers": 12, "n_heads": 12, "d_model": 768, "vocabulary": 50257}
TINY = {"n_layers": 2, "n_heads": 2, "d_model": 16, "vocabulary": 50}
LLAMA_1B = {"n_layers": 16, "n_heads": 32, "n_groups": 8, "d_model": 2048, "d_mlp": 8192, "vocabulary": 128256}  # as Llama-3.2-1B
TASKS = {"zoo:induction-2l": "induction", "zoo:tiny-english": "ioi", subjects.SMOLLM2: "ioi"}
MODELS = (*TASKS, "gpt2-size", "llama-1b", "tiny", "tiny-llama")
LENGTH = 16  # tokens of a random prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", choices=tuple(METHODS))
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--metric", default="logit_diff")
    parser.add_argument("--threshold", type=float, default=0.1, help="of ACDC")
    parser.add_argument("--rounds", type=int, default=5, help="of EAP, EAP-IG and the naive forward")
    parser.add_argument("--chunks", type=int, default=16, help="of the sweep: measure so many of its calls, spread evenly; 0: all of it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    traced, pairs = subject(chosen.model, chosen.prompts, chosen.device)
    case = Case(traced, pairs, chosen.metric, chosen.threshold, chosen.rounds, chosen.chunks)
    print(json.dumps(measured(chosen.method, case)))


@dataclass(frozen=True, eq=False)
class Case:
    """What a method is asked, and how long it may be measured."""

    traced: TracedModel
    pairs: PromptPairs
    metric: str = "logit_diff"
    threshold: float = 0.1
    rounds: int = 2
    chunks: int = 0

    def bind(self) -> Engine:
        return self.traced.bind(self.pairs, self.metric)

    @property
    def n_edges(self) -> int:
        return self.traced.graph.n_edges


def measured(method: str, case: Case) -> dict[str, Any]:
    """Seconds and plain forwards of the whole method; `measured_edges` says of how many edges they were measured, where not of all."""
    base = plain_forward(case)
    base()
    found = METHODS[method](case, base)
    return {
        "edges": case.n_edges,
        "prompts": [len(case.pairs), len(case.pairs.clean[0])],
        "per_edge": found["forwards"] / case.n_edges,
        **found,
        "peak": device_peak(case),
    }


def plain_forward(case: Case) -> Callable[[], object]:
    """`model(ids)` of the untouched model: default settings, no gradients, logits at every position."""
    module = case.traced.module  # type: ignore[attr-defined]  # the torch backend's own
    twin = sharing_twin(module)
    ids = torch.from_numpy(np.stack(case.pairs.clean)).to(next(twin.parameters()).device)

    def forward() -> None:
        with torch.no_grad():
            twin(ids)
        if ids.is_cuda:
            torch.cuda.synchronize()

    return forward


def device_peak(case: Case) -> int:
    """The most bytes that the device held: of a GPU what PyTorch had handed out, else of this process."""
    device = next(case.traced.module.parameters()).device  # type: ignore[attr-defined]
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def eap(case: Case, base: Callable[[], object]) -> dict[str, Any]:
    return _scoring(EAP(), case, base)


def eap_ig(case: Case, base: Callable[[], object]) -> dict[str, Any]:
    """EAP-IG inputs with 5 steps."""
    return _scoring(EAPIG(points=5), case, base)


def sweep(case: Case, base: Callable[[], object]) -> dict[str, Any]:
    """Activation patching of every edge, one at a time: all of it, or some of its calls, spread evenly over them."""
    warm_up(case)
    if case.chunks == 0:
        found = paced(_steps(case, ActivationPatching()), base)
        return {**_whole(found), "measured_edges": case.n_edges}
    found = paced(sampled_sweep(case), base)
    measured_edges = sum(map(len, sampled_chunks(case)))
    return {**_whole(found, case.n_edges / measured_edges), "measured_edges": measured_edges}


def acdc(case: Case, base: Callable[[], object]) -> dict[str, Any]:
    warm_up(case)
    found = paced(_steps(case, ACDC(threshold=case.threshold)), base)
    outcome = cast("Outcome", found.last)
    record = outcome.record
    return {
        **_whole(found),
        "kept": int(outcome.mask.sum()),
        "tested": len(record["decisions"]),
        "untested": record["untested"],
        "lanes": record["lanes"],
        "smallest_margin": record["smallest_margin"],
        "products": operations(lambda: [*_steps(case, ACDC(threshold=case.threshold))]) / operations(base),
    }


def naive(case: Case, base: Callable[[], object]) -> dict[str, Any]:
    """What a search costs that runs the whole model for every edge: a few such runs, spread over the edges, times the number of edges.

    A run is `Engine.activations` under a mask without one edge: every layer from the input on, for one lane, nothing taken from other runs
    (and no metric, which would come on top). With one edge less than the model, readers need no sums of their own; under the sparser masks
    of ACDC they do, so this is the least that such a run costs.
    """
    engine = case.bind()
    edges = np.argwhere(engine.graph.visible)
    chosen = iter(np.tile(edges[np.linspace(0, len(edges) - 1, case.rounds + 1).astype(int)], (2, 1)))

    def run() -> None:
        engine.activations(_without(engine, [next(chosen)])[0])

    run()
    found = compared(run, base, rounds=case.rounds)
    return {
        "seconds": found.call.median * case.n_edges,
        "forwards": found.wall_ratio.median * case.n_edges,
        "base": asdict(found.base),
        "measured_edges": case.rounds,
    }


METHODS: dict[str, Callable[[Case, Callable[[], object]], dict[str, Any]]] = {
    "eap": eap,
    "eap-ig": eap_ig,
    "sweep": sweep,
    "acdc": acdc,
    "naive": naive,
}


def warm_up(case: Case) -> None:
    """One run by an engine of its own: what a process or a traced model does once is no part of a search."""
    engine = case.bind()
    engine.evaluate(engine.graph.visible[None].astype(np.float32))


def sampled_sweep(case: Case) -> Iterator[None]:
    """Calls of `evaluate` as `ActivationPatching` makes them, `case.chunks` of them."""
    engine = case.bind()
    engine.evaluate(engine.graph.visible[None].astype(np.float32))
    for edges in sampled_chunks(case):
        engine.evaluate(_without(engine, edges))
        yield


def sampled_chunks(case: Case) -> list[Int[ndarray, "edges 2"]]:
    """The edges of each such call, spread evenly over the graph."""
    size, edges = ActivationPatching().max_lanes, np.argwhere(case.traced.graph.visible)
    chunks = [edges[start : start + size] for start in range(0, len(edges), size)]
    return [chunks[number] for number in np.unique(np.linspace(0, len(chunks) - 1, case.chunks).astype(int))]


def subject(model: str, prompts: int, device: str = "cpu") -> tuple[TracedModel, PromptPairs]:
    """A traced model and prompts of one length for it."""
    if model in TASKS:
        traced = trace(model, device=device)
        return traced, subjects.task_pairs(traced, TASKS[model], prompts=prompts)
    if model in ("gpt2-size", "tiny"):
        size: dict[str, int] = GPT2_SIZE if model == "gpt2-size" else TINY
        module = subjects.random_gpt2(**size)
    else:
        size = LLAMA_1B if model == "llama-1b" else {**TINY, "n_groups": 1, "d_mlp": 32}
        module = subjects.random_llama(**size)
    return trace(module, device=device), subjects.random_pairs(size["vocabulary"], prompts=prompts, length=LENGTH)


def _scoring(algorithm: EAP | EAPIG, case: Case, base: Callable[[], object]) -> dict[str, Any]:
    """A gradient method, several times over; with one round its first run counts, warm-up and all."""
    if case.rounds > 1:
        run_scoring(algorithm, case.traced, case.pairs)
    found = compared(lambda: run_scoring(algorithm, case.traced, case.pairs), base, rounds=case.rounds)
    return {
        "seconds": found.call.median,
        "forwards": found.wall_ratio.median,
        "spread": asdict(found.wall_ratio),
        "cpu_forwards": asdict(found.cpu_ratio),
        "base": asdict(found.base),
        "products": operations(lambda: run_scoring(algorithm, case.traced, case.pairs)) / operations(base),
    }


def _steps(case: Case, algorithm: ACDC | ActivationPatching) -> Iterator[Outcome]:
    """From binding the prompts to the last outcome."""
    yield from algorithm.steps(case.bind())


def _whole(found: Paced, factor: float = 1.0) -> dict[str, Any]:
    return {
        "seconds": found.seconds.wall * factor,
        "cpu_seconds": found.seconds.cpu * factor,
        "forwards": found.ratio * factor,
        "base": asdict(found.base),
    }


def _without(engine: Engine, edges: Any) -> Any:
    """One mask for each edge, without it."""
    masks = np.repeat(engine.graph.visible.astype(np.float32)[None], len(edges), axis=0)
    for mask, (reader, writer) in zip(masks, edges, strict=True):
        mask[reader, writer] = 0
    return masks


if __name__ == "__main__":
    main()
