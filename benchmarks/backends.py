"""PyTorch against JAX: EAP over all edges, lanes of `evaluate`, the exact sweep and ACDC, in plain forward passes of each framework.

The plain forward pass is the framework's own on the same batch, logits at every position: the Hugging Face model in PyTorch, the Equinox
module in JAX, compiled. EAP is `EAP().run(traced.bind(pairs, LogitDiff()))` on a traced model, source run and all. The random lanes are
masks that keep half of the edges in every layer, so that nothing can be taken from an earlier run; those of the sweep have one edge less
than the model, calls of 64 spread evenly over the edges; ACDC is a whole run. JAX compiles in the first call of each, which is reported by
itself and not in the ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import subjects
from benchmarks.clock import Spread
from benchmarks.machine import Watch
from benchmarks.processes import in_a_process
from benchmarks.tables import Table, options, publish

MOST_FORWARDS = 4.0  # of EAP in JAX
_TITLES = {"gpt2-size": "GPT-2-small size, random", "smollm2": "SmolLM2-135M, IOI", "tiny": "tiny, random"}
_COLUMNS = (
    *("method", "model", "prompts x tokens", "backend", "plain forward, s", "seconds", "forwards", "forwards (CPU)"),
    *("forwards a lane or edge", "compilation, s", "peak RSS, GB", "verdict"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; JAX takes all cores")
    parser.add_argument("--rounds", type=int, default=5, help="a round is three plain forward passes and one call")
    parser.add_argument("--models", nargs="+", choices=tuple(_TITLES), help="default: gpt2-size, and smollm2 if it is installed")
    chosen = parser.parse_args(arguments)
    models = chosen.models or ["gpt2-size", *(["smollm2"] if subjects.has_smollm2() else [])]
    watch = Watch()
    found = [measured(model, backend, chosen.threads, chosen.rounds) for model in models for backend in ("torch", "jax")]
    command = f"python -m benchmarks.backends --threads {chosen.threads} --rounds {chosen.rounds} --models {' '.join(models)}"
    publish(table(found, chosen.rounds), found, command=command, watch=watch, file=chosen.json)


def measured(model: str, backend: str, threads: int, rounds: int) -> dict[str, Any]:
    """The numbers of one case, from a process of its own."""
    case = ["-m", "benchmarks.backends_case", backend, model, "--threads", str(threads), "--rounds", str(rounds)]
    return {"model": model, "backend": backend, **in_a_process(case, threads)}


def table(found: Sequence[dict[str, Any]], rounds: int) -> Table:
    """One row for every method, the backends below each other."""
    asked = dict.fromkeys((case["model"], name) for case in found for name in case["methods"])
    answers = [(name, case) for model, name in asked for case in found if case["model"] == model and name in case["methods"]]
    note = (
        f"Median (smallest to largest) of {rounds} rounds of EAP, and of fewer of the others; a ratio is that of one round. Compilation: "
        "what the first call takes longer than later ones, after the methods above it (tracing the model compiles too, and is not counted "
        f"here). Memory: of the process in which all methods ran. Bar: EAP in at most {MOST_FORWARDS:.0f} plain JAX forwards."
    )
    models = ", ".join(dict.fromkeys(_TITLES[case["model"]] for case in found))
    return Table(f"PyTorch against JAX: {models}", _COLUMNS, [_row(*answer) for answer in answers], (note,))


def _row(name: str, case: dict[str, Any]) -> tuple[str, ...]:
    method = case["methods"][name]
    forwards = Spread(**method["wall_ratio"])
    has_bar = case["backend"] == "jax" and name == "EAP"
    return (
        name,
        _TITLES[case["model"]],
        " x ".join(map(str, case["prompts"])),
        case["backend"],
        str(Spread(**method["base"])),
        str(Spread(**method["call"])),
        str(forwards),
        str(Spread(**method["cpu_ratio"])),
        f"{forwards.median / method['asked']:.3f}" if method["asked"] else "",
        f"{method['compilation']:.1f}" if case["backend"] == "jax" else "none",
        f"{case['peak'] / 1e9:.2f}",
        ("PASS" if forwards.median <= MOST_FORWARDS else "FAIL") if has_bar else "",
    )


if __name__ == "__main__":
    main()
