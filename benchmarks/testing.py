"""How long the tools for testing algorithms take: planting and confirming a model, and all checks of one algorithm.

The checks of an algorithm include making and tracing their models; PyTorch is imported before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.clock import Spread, timed
from benchmarks.machine import Watch
from benchmarks.tables import Table, options, publish
from circuitgraph import ACDC, EAP, EAPIG, ActivationPatching
from circuitgraph.testing import check_algorithm, planted_model

MOST_PLANT_SECONDS, MOST_CHECK_SECONDS = 0.2, 60.0
_ALGORITHMS = {"EAP": EAP(), "EAP-IG": EAPIG(), "ACDC": ACDC(1e-5), "activation patching": ActivationPatching()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--models", type=int, default=9, help="planted models, each of another seed")
    parser.add_argument("--algorithms", nargs="+", choices=tuple(_ALGORITHMS), default=[*_ALGORITHMS])
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # tiny models: a second thread only waits
    watch = Watch()
    planted = [timed(lambda seed=seed: planted_model(seed)).wall for seed in range(chosen.models + 1)][1:]  # type: ignore[misc]
    checks = {name: timed(lambda name=name: _check(name)).wall for name in chosen.algorithms}  # type: ignore[misc]
    command = f"python -m benchmarks.testing --models {chosen.models}"
    publish(table(planted, checks), [{"planted": planted, "checks": checks}], command=command, watch=watch, file=chosen.json)


def _check(name: str) -> Any:
    return check_algorithm(_ALGORITHMS[name], backends=("torch", "reference"))


def table(planted: Sequence[float], checks: dict[str, float]) -> Table:
    spread = Spread.of(planted)
    rows = [("planted model of 3 layers x 4 heads, confirmed", f"{spread} s", *_bar(spread.median, MOST_PLANT_SECONDS))]
    rows += [
        (f"all checks of {name}, PyTorch and the reference", f"{seconds:.1f} s", *_bar(seconds, MOST_CHECK_SECONDS))
        for name, seconds in checks.items()
    ]
    return Table("Testing algorithms", ("what", "measured", "bar", "verdict"), rows, ("Of models: median (smallest to largest).",))


def _bar(seconds: float, most: float) -> tuple[str, str]:
    return f"{most:g} s", "PASS" if seconds <= most else "FAIL"


if __name__ == "__main__":
    main()
