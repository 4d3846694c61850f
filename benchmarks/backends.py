"""PyTorch against JAX: EAP over all edges and many lanes of `evaluate`, each in plain forward passes of its own framework.

The plain forward pass is the framework's own on the same batch, logits at every position: the Hugging Face model in PyTorch, the Equinox
module in JAX, compiled. EAP is `EAP().run(traced.bind(pairs, LogitDiff()))` on a traced model, source run and all; the lanes are masks that
keep a random half of the edges, in every layer. JAX compiles in the first call of each, which is reported by itself and not in the ratios.
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
    *("model", "prompts x tokens", "backend", "plain forward, s", "EAP, s", "EAP, forwards", "EAP, forwards (CPU)"),
    *("lanes, s", "forwards a lane", "compilation, s", "peak RSS, GB", "verdict"),
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
    rows = []
    for case in found:
        eap, lanes = case["eap"], case["evaluate"]
        forwards = Spread(**eap["wall_ratio"])
        compilation = f"{eap['compilation']:.1f} + {lanes['compilation']:.1f}" if case["backend"] == "jax" else "none"
        bar = "" if case["backend"] == "torch" else "PASS" if forwards.median <= MOST_FORWARDS else "FAIL"
        rows.append(
            (
                _TITLES[case["model"]],
                " x ".join(map(str, case["prompts"])),
                case["backend"],
                str(Spread(**eap["base"])),
                str(Spread(**eap["call"])),
                str(forwards),
                str(Spread(**eap["cpu_ratio"])),
                str(Spread(**lanes["call"])),
                f"{lanes['wall_ratio']['median'] / case['lanes']:.2f}",
                compilation,
                f"{case['peak'] / 1e9:.2f}",
                bar,
            )
        )
    note = (
        f"Median (smallest to largest) of {rounds} rounds; a ratio is that of one round. {found[0]['lanes']} lanes. Compilation: what the "
        "first call of EAP and of the lanes takes longer than later ones (tracing the model compiles too, and is not counted here). "
        f"Bar: EAP in at most {MOST_FORWARDS:.0f} plain JAX forwards."
    )
    return Table("PyTorch against JAX", _COLUMNS, rows, (note,))


if __name__ == "__main__":
    main()
