"""What `torch.compile` would save: a plain forward pass of the whole model compiled, beside the model as it is, and what compiling costs.

The engine runs the model's own modules, one joint after the other, so it could compile less of it than this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from benchmarks import subjects
from benchmarks.clock import Spread, compared, timed
from benchmarks.discovery_case import GPT2_SIZE, LENGTH, TINY
from benchmarks.machine import Watch
from benchmarks.tables import Table, options, publish
from benchmarks.twin import sharing_twin
from circuitgraph import trace

_SIZES = {"gpt2-size": GPT2_SIZE, "tiny": TINY}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", choices=(subjects.SMOLLM2, *_SIZES), default=[subjects.SMOLLM2, "gpt2-size"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    watch = Watch()
    found = [measured(model, chosen.rounds) for model in chosen.models]
    command = f"python -m benchmarks.compiled --models {' '.join(chosen.models)} --threads {chosen.threads} --rounds {chosen.rounds}"
    publish(table(found), found, command=command, watch=watch, file=chosen.json)


def measured(name: str, rounds: int) -> dict[str, Any]:
    module, ids = _subject(name)
    compiled = torch.compile(module)
    plain, quick = _forward(module, ids), _forward(compiled, ids)
    plain()
    first = timed(quick)
    found = compared(quick, plain, rounds=rounds)
    return {"model": name, "prompts": list(ids.shape), "first_seconds": first.wall, **asdict(found)}


def table(found: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for case in found:
        plain, quick = (case[part]["median"] for part in ("base", "call"))
        saved = f"{case['first_seconds'] / (plain - quick):,.0f}" if quick < plain else "never"
        size = " x ".join(map(str, case["prompts"]))
        rows.append((case["model"], size, f"{1e3 * plain:.3g}", str(Spread(**case["wall_ratio"])), f"{case['first_seconds']:.1f}", saved))
    columns = ("model", "prompts x tokens", "plain forward, ms", "compiled, plain forwards", "first call, s", "pays after so many")
    return Table("torch.compile", columns, rows, ("Median (smallest to largest) of rounds; compiled anew for every length of prompts.",))


def _subject(name: str) -> tuple[Any, torch.Tensor]:
    if name in _SIZES:
        pairs = subjects.random_pairs(_SIZES[name]["vocabulary"], prompts=8, length=LENGTH)
        return subjects.random_gpt2(**_SIZES[name]), torch.from_numpy(np.stack(pairs.clean))
    traced = trace(name)
    return sharing_twin(traced.module), torch.from_numpy(np.stack(subjects.task_pairs(traced, "ioi", prompts=16).clean))  # type: ignore[attr-defined]


def _forward(module: Any, ids: torch.Tensor) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            module(ids)

    return forward


if __name__ == "__main__":
    main()
