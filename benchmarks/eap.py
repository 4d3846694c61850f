"""EAP over all edges, in plain forward passes of the same model on the same batch, and the memory of its process.

A plain forward pass is that of a copy of the Hugging Face model that was never traced, with default settings (`model(ids)` without
gradients: sdpa attention, key-value cache, logits at every position). EAP is `EAP().run(traced.bind(pairs, LogitDiff()))` on a traced
model: embedding, attention calls, source run, forward, backward, scores. Each case runs in a process of its own; memory is measured in
another, which runs EAP once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import subjects
from benchmarks.clock import Spread
from benchmarks.machine import Watch
from benchmarks.processes import in_a_process
from benchmarks.tables import Table, options, publish

MOST_FORWARDS = 3.5
MOST_BYTES = 2_000_000_000
_TITLES = {"gpt2-size": "GPT-2-small size, random", "smollm2": "SmolLM2-135M, IOI", "tiny": "tiny, random"}
_SIZES = ("model", "prompts x tokens", "parameters", "edges")
_COLUMNS = (*_SIZES, "plain forward, s", "EAP, s", "forwards, wall", "forwards, CPU", "peak RSS, GB", "verdict")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="a round is three plain forward passes and one EAP")
    parser.add_argument("--models", nargs="+", choices=tuple(_TITLES), help="default: gpt2-size, and smollm2 if it is installed")
    chosen = parser.parse_args(arguments)
    models = chosen.models or ["gpt2-size", *(["smollm2"] if subjects.has_smollm2() else [])]
    watch = Watch()
    found = [measured(model, frozen, chosen.threads, chosen.rounds) for model in models for frozen in (False, True)]
    command = f"python -m benchmarks.eap --threads {chosen.threads} --rounds {chosen.rounds} --models {' '.join(models)}"
    publish(table(found, chosen.threads, chosen.rounds), found, command=command, watch=watch, file=chosen.json)


def measured(model: str, frozen: bool, threads: int, rounds: int) -> dict[str, Any]:
    """The numbers of one case, from two processes."""
    given = [model, "--threads", str(threads), *(["--frozen"] if frozen else [])]
    case = ["-m", "benchmarks.eap_case"]
    times = in_a_process([*case, "time", *given, "--rounds", str(rounds)], threads)
    return {"model": model, "frozen": frozen, "threads": threads, **times, **in_a_process([*case, "memory", *given], threads)}


def table(found: Sequence[dict[str, Any]], threads: int, rounds: int) -> Table:
    rows = []
    for case in found:
        wall, cpu = Spread(**case["wall_ratio"]), Spread(**case["cpu_ratio"])
        reached = wall.median <= MOST_FORWARDS and case["peak"] <= MOST_BYTES
        rows.append(
            (
                _TITLES[case["model"]],
                " x ".join(map(str, case["prompts"])),
                "frozen" if case["frozen"] else "as they come",
                f"{case['edges']:,}",
                str(Spread(**case["base"])),
                str(Spread(**case["call"])),
                str(wall),
                str(cpu),
                f"{case['peak'] / 1e9:.2f}",
                "PASS" if reached else "FAIL",
            )
        )
    outside = ", ".join(f"{_TITLES[case['model']]} {case['trace_seconds']:.1f} s" for case in found if not case["frozen"])
    ratios = (
        f"Median (smallest to largest) of {rounds} rounds; a ratio is that of one round. Bar: at most {MOST_FORWARDS} forwards (wall) and "
        f"{MOST_BYTES / 1e9:.0f} GB. CPU time counts threads that wait in a loop, so that of one thread is the most robust."
    )
    tracing = (
        "Tracing (finding the wiring and proving it; SmolLM2: with loading) happens once per model and is in the peak, not in the ratio: "
        f"{outside}."
    )
    return Table(f"EAP over all edges, {threads} thread{'s' if threads > 1 else ''}", _COLUMNS, rows, (ratios, tracing))


if __name__ == "__main__":
    main()
