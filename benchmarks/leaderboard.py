"""Every algorithm against every model whose circuit is known: the table of `docs/explanation/leaderboard.md`.

    python -m benchmarks.leaderboard                                   # writes the page
    python -m benchmarks.leaderboard --seeds 1 --algorithms eap relp   # prints some of it

No figure of a machine: costs are counted, not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import Table, between
from circuitgraph import (
    ACDC,
    EAP,
    EAPIG,
    HISP,
    ActivationPatching,
    AttributionPatching,
    CircuitGraphError,
    EdgePruning,
    Engine,
    InformationFlow,
    Magnitude,
    PathPatching,
    PromptPairs,
    Random,
    RelP,
    SubnetworkProbing,
    UniformGradientSampling,
)
from circuitgraph._engine import Algorithm, TracedModel, last_outcome, outcomes
from circuitgraph.evaluation._agreement import auroc
from circuitgraph.files import write_bytes
from circuitgraph.testing import compiled_model, planted_model, trained_model

PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "leaderboard.md"
START, END = "<!-- leaderboard: written by `python -m benchmarks.leaderboard` -->", "<!-- end of leaderboard -->"

KINDS: Mapping[str, Mapping[str, Any]] = {
    "planted, no norms": {},
    "planted, RMS norms, gated MLPs, grouped heads": {"norm": "rms", "mlp": "gated", "n_kv_heads": 2},
    "planted, layer norms, parallel": {"norm": "layer", "parallel": True},
    "planted, with an interaction": {"interaction": True},
    "planted, with inhibition": {"inhibition": True},
    "planted, redundant": {"redundant": True},
}
COMPILED = ("reverse", "sort", "hist")  # what the others say at the last position has one value, or one logit
ALGORITHMS: Mapping[str, Algorithm] = {
    "random": Random(),
    "magnitude": Magnitude(),
    "activation-patching": ActivationPatching(),
    "acdc, 1e-5": ACDC(threshold=1e-5),
    "acdc, 0.3": ACDC(threshold=0.3),
    "eap": EAP(),
    "eap-ig": EAPIG(),
    "eap-ig, activations": EAPIG("activations"),
    "eap-ig, mask": EAPIG("mask"),
    "relp": RelP(),
    "edge-pruning": EdgePruning(target=12, n_steps=100),
    "ugs": UniformGradientSampling(n_steps=60),
    "information-flow": InformationFlow(),
    "activation-patching, nodes": ActivationPatching(level="node"),
    "attribution-patching": AttributionPatching(),
    "attribution-patching, AtP*": AttributionPatching(corrections=("qk-fix", "grad-drop")),
    "hisp": HISP(),
    "subnetwork-probing": SubnetworkProbing(n_steps=60),
    "path-patching": PathPatching(),
}


@dataclass(frozen=True, eq=False)
class Known:
    """A model with its circuit, `truth` `[readers, writers]`."""

    kind: str
    model: TracedModel
    pairs: PromptPairs
    truth: Any
    logit_diff: bool = True  # whether its answers have a wrong one beside them


@dataclass(eq=False)
class Counted:
    """An engine that counts the forward passes of what it is asked."""

    engine: Engine
    forwards: float = field(default=0.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def evaluate(self, masks: Any, **options: Any) -> Any:
        self.forwards += len(masks)
        return self.engine.evaluate(masks, **options)

    def gradient(self, mask: Any, **options: Any) -> Any:
        self.forwards += 3 * np.size(options.get("mix", 1.0))
        return self.engine.gradient(mask, **options)

    def source_gradient(self, mask: Any, **options: Any) -> Any:
        self.forwards += 3
        return self.engine.source_gradient(mask, **options)

    def activations(self, *arguments: Any, **options: Any) -> Any:
        self.forwards += 1
        return self.engine.activations(*arguments, **options)

    def source_values(self) -> Any:
        self.forwards += 1
        return self.engine.source_values()

    def reversed(self) -> Counted:
        return Counted(self.engine.reversed(), self.forwards)


@dataclass(frozen=True)
class Score:
    auroc: float | None
    is_exact: bool
    forwards: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="planted models of each kind")
    parser.add_argument("--algorithms", nargs="+", choices=tuple(ALGORITHMS), default=[*ALGORITHMS])
    chosen = parser.parse_args(arguments)
    models = [*known_models(chosen.seeds)]
    found = {name: [scored(ALGORITHMS[name], known) for known in models] for name in chosen.algorithms}
    table = tabled(models, found)
    table.show()
    if chosen.seeds == parser.get_default("seeds") and len(found) == len(ALGORITHMS):
        write_bytes(PAGE, with_table(PAGE.read_text(), table).encode())
        print(f"wrote the table of {PAGE.name}")


def known_models(seeds: int) -> Iterator[Known]:
    for kind, options in KINDS.items():
        for seed in range(seeds):
            planted = planted_model(seed, prompts=4, **options)
            yield Known(kind, planted.traced(), planted.pairs, planted.circuit.mask)
    for name in COMPILED:
        yield compiled(name)
    trained = trained_model()
    yield Known("SIIT-trained", trained.traced(), trained.pairs(32), trained.circuit.mask)


def compiled(name: str) -> Known:
    """A compiled program with one writer for its embeddings; its circuit is what single patches of a corrupted prompt change."""
    from dataclasses import replace

    program = compiled_model(name)
    model, pairs = replace(program.model, splits_input=False).traced(), program.pairs(3)
    engine = model.bind(pairs, "kl")
    masks = np.repeat(engine.graph.visible[None].astype(float), engine.graph.n_edges, axis=0)
    edges = np.argwhere(engine.graph.visible)
    masks[np.arange(len(edges)), *edges.T] = 0
    truth = np.zeros(engine.graph.shape, dtype=bool)
    truth[*edges.T] = engine.evaluate(masks).max(axis=1) > 1e-6
    return Known(f"Tracr, {name}", model, pairs, truth, logit_diff=False)


def scored(algorithm: Algorithm, known: Known) -> Score | None:
    """None where the algorithm refuses the question."""
    wanted = getattr(algorithm, "default_metric", None) or ("logit_diff" if known.logit_diff else "nll")
    engine = Counted(known.model.bind(known.pairs, wanted))
    try:
        outcome = last_outcome(outcomes(algorithm, engine))  # type: ignore[arg-type]
    except CircuitGraphError:
        return None
    graph, truth = known.model.graph, known.truth
    scores = None if outcome.scores is None else np.abs(np.nan_to_num(np.asarray(outcome.scores)))
    decides = bool((outcome.mask != graph.visible).any())
    mask = outcome.mask if decides or scores is None else graph.largest(scores, int(truth.sum()))
    ranked = None if scores is None else auroc(scores[graph.visible], truth[graph.visible])
    return Score(ranked, bool(np.array_equal(mask, truth)), engine.forwards)


def tabled(models: Sequence[Known], found: Mapping[str, Sequence[Score | None]]) -> Table:
    kinds = [*dict.fromkeys("Tracr" if known.kind.startswith("Tracr") else known.kind for known in models)]
    rows = []
    for name, scores in found.items():
        cells = []
        for kind in kinds:
            of_kind = [score for known, score in zip(models, scores, strict=True) if known.kind.startswith(kind) and score is not None]
            cells.append(_cell(of_kind))
        costs = [score.forwards for score in scores if score is not None]
        rows.append((name, *cells, f"{np.mean(costs):,.0f}"))
    return Table("AUROC, and how many circuits were found to the edge", ("algorithm", *kinds, "forwards"), rows)


def _cell(scores: Sequence[Score]) -> str:
    if not scores:
        return "refused"
    ranked = [score.auroc for score in scores if score.auroc is not None]
    exact = f"{sum(score.is_exact for score in scores)} of {len(scores)}"
    return f"{np.mean(ranked):.3f}, {exact}" if ranked else exact


def with_table(page: str, table: Table) -> str:
    """The page with everything between its two marks replaced. Raises `ValueError` where it has no marks."""
    return between(page, START, END, table.markdown())


if __name__ == "__main__":
    main()
