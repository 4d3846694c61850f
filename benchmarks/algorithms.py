"""Every algorithm on every task: the tables of `docs/explanation/algorithms-compared.md`.

    python -m benchmarks.algorithms             # measures what is missing in benchmarks/results/algorithms, then writes the page
    python -m benchmarks.algorithms zoo         # one table of them
    python -m benchmarks.algorithms --known     # measures nothing: writes the page from what is there

Hours on two cores for SmolLM2, minutes for the zoo; it can be interrupted, and goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import between
from circuitgraph import (
    ACDC,
    EAP,
    EAPIG,
    Algorithm,
    Benchmark,
    EdgePruning,
    Ensemble,
    ScreenedBy,
    Selected,
    SparseFeatureCircuits,
    benchmark,
)
from circuitgraph._benchmark import BASELINES, known_results
from circuitgraph._choosing import named
from circuitgraph.files import write_bytes
from circuitgraph.selection import Greedy, IntegerProgram, SignConsistent

ROOT = Path(__file__).parent.parent
CELLS = ROOT / "benchmarks" / "results" / "algorithms"
PAGE = ROOT / "docs" / "explanation" / "algorithms-compared.md"
GRADIENTS = ("eap", "eap-ig", "eap-ig:path=activations", "eap-ig:path=mask", "relp", "attribution-patching", "information-flow", "hisp")
OPTIMISED = ("edge-pruning", "subnetwork-probing", "ugs")
MEMBERS = (EAP(), EAPIG(), EAPIG(path="mask"))


def alone(*names: str) -> dict[str, Algorithm]:
    """Algorithms as the command line names them."""
    return dict(map(named, names))


def combined(threshold: float) -> dict[str, Algorithm]:
    """Algorithms made of others; those that choose edges keep 5% of them. `threshold`: of ACDC."""
    return {
        "mean of eap, eap-ig, eap-ig:path=mask": Ensemble(MEMBERS, by="mean"),
        "min of eap, eap-ig, eap-ig:path=mask": Ensemble(MEMBERS, by="min"),
        "max of eap, eap-ig, eap-ig:path=mask": Ensemble(MEMBERS, by="max"),
        "eap-ig, greedy 5%": Selected(EAPIG(), Greedy(), size=0.05),
        "eap-ig, sign-consistent 5%": Selected(EAPIG(), SignConsistent(), size=0.05),
        "eap-ig, integer-program 5%": Selected(EAPIG(), IntegerProgram(), size=0.05),
        f"acdc:threshold={threshold}, screened by eap": ScreenedBy(EAP(), then=ACDC(threshold)),
        "sparse-feature-circuits, by eap": SparseFeatureCircuits(estimator=EAP()),
    }


@dataclass(frozen=True)
class Part:
    """Some models with their tasks, and the algorithms they are asked with."""

    models: tuple[tuple[str, tuple[str, ...]], ...]
    algorithms: Mapping[str, Algorithm]
    prompts: int

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """Model, task and algorithm of every cell."""
        return [(model, task, name) for model, tasks in self.models for task in tasks for name in (*BASELINES, *self.algorithms)]


PARTS = {
    "zoo": Part(
        (("zoo:induction-2l", ("induction",)), ("zoo:tiny-english", ("ioi", "greater-than", "subject-verb-agreement"))),
        alone(
            *GRADIENTS,
            "attribution-patching:corrections=qk-fix,grad-drop",
            "path-patching",
            "activation-patching",
            "activation-patching:level=node",
            "acdc:threshold=0.01",
            *OPTIMISED,
        )
        | combined(threshold=0.01)
        | {"edge-pruning, started by eap-ig": EdgePruning(start=EAPIG())},
        prompts=32,
    ),
    "smollm2": Part(
        (("smollm2-135m", ("ioi", "greater-than-digits", "induction", "subject-verb-agreement")),),
        alone(
            *GRADIENTS,
            "attribution-patching:corrections=qk-fix",
            "attribution-patching:corrections=grad-drop",
            "path-patching",
            "activation-patching",
            "activation-patching:level=node",
            "acdc:threshold=0.1",
            *OPTIMISED,
        )
        | combined(threshold=0.1),
        prompts=8,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--known", action="store_true", help="measure nothing, and write the page from what is there")
    arguments = parser.parse_args()
    names = arguments.parts or [*PARTS]
    if unknown := set(names) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    for name in [] if arguments.known else names:
        measure(name)
    write_bytes(PAGE, with_tables(PAGE.read_text(), {name: table(name) for name in PARTS}).encode())
    print(f"wrote the tables of {PAGE.relative_to(ROOT)}")


def measure(name: str) -> None:
    """All cells of a part that are not there yet."""
    part = PARTS[name]
    for model, tasks in part.models:
        benchmark(
            [model],
            tasks,
            part.algorithms,
            folder=CELLS / name,
            prompts=part.prompts,
            progress=lambda done, text: print(f"{done:.0%} {text}", flush=True),
        )


def table(name: str) -> Benchmark:
    """What is known of a part, in its own order."""
    known = {(result.model, result.task, result.algorithm): result for result in known_results(CELLS / name).results}
    return Benchmark(tuple(known[row] for row in PARTS[name].rows if row in known))


def with_tables(page: str, tables: dict[str, Benchmark]) -> str:
    """The page with everything between a part's marks replaced, and how much of it is missing said. Raises `ValueError` without marks."""
    for name, found in tables.items():
        start, end = f"<!-- {name}: written by `python -m benchmarks.algorithms` -->", f"<!-- end of {name} -->"
        missing = len(PARTS[name].rows) - len(found.results)
        note = f"\nNot measured yet: {missing} of {len(PARTS[name].rows)} cells.\n" if missing else ""
        page = between(page, start, end, found.to_markdown() + note)
    return page


if __name__ == "__main__":
    main()
