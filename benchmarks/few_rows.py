"""The unembedding of a few last positions, with the weights on the left, beside the linear layer as it is: both with SmolLM2's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.clock import Spread, compared
from benchmarks.machine import Watch
from benchmarks.tables import Table, options, publish
from circuitgraph_torch._few_rows import linear_of_few

D_MODEL, VOCABULARY = 576, 49152


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[4, 16, 64, 128], help="prompts times lanes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    watch = Watch()
    torch.manual_seed(0)
    layer = torch.nn.Linear(D_MODEL, VOCABULARY, bias=False).requires_grad_(False)
    found = [measured(layer, rows, chosen.rounds) for rows in chosen.rows]
    command = f"python -m benchmarks.few_rows --rows {' '.join(map(str, chosen.rows))} --threads {chosen.threads} --rounds {chosen.rounds}"
    publish(table(found), found, command=command, watch=watch, file=chosen.json)


def measured(layer: torch.nn.Linear, rows: int, rounds: int) -> dict[str, Any]:
    x = torch.randn(rows, layer.in_features)
    with torch.no_grad():
        linear_of_few(layer, x)
        return {"rows": rows, **asdict(compared(lambda: linear_of_few(layer, x), lambda: layer(x), rounds=rounds))}


def table(found: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (str(case["rows"]), f"{1e3 * case['base']['median']:.3g}", f"{1e3 * case['call']['median']:.3g}", str(Spread(**case["wall_ratio"])))
        for case in found
    ]
    columns = ("rows", "the layer, ms", "weights on the left, ms", "of the layer's time")
    return Table("Unembedding a few rows", columns, rows, ("Median (smallest to largest) of rounds.",))


if __name__ == "__main__":
    main()
