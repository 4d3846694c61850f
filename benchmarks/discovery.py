"""Discovery over all edges: seconds, plain forward passes and memory of every method, beside one full forward pass per edge.

A plain forward pass is `model(ids)` of an untouched model with the same weights on the same batch: default settings, no gradients, logits
at every position. It is timed in turns with the method, a long method being stopped for it every ten seconds. Every case runs in a process
of its own. What would take hours is measured in part and extrapolated, and its row says so: of the naive search some of its forwards, of
the exact sweep some of its calls, spread evenly over the edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import subjects
from benchmarks.clock import Spread
from benchmarks.machine import Watch
from benchmarks.processes import in_a_process
from benchmarks.tables import Table, options, publish

# Of the KL divergence of the random model, in nats: patching all edges costs it 0.12, and at this threshold ACDC keeps 0.4% of them.
RANDOM_THRESHOLD = 3e-4
SHARE_KEPT = (0.003, 0.03)

_UNITS = {"forwards": "forwards", "per_edge": "forwards an edge", "seconds": "s", "peak": "GB"}


@dataclass(frozen=True)
class Bar:
    """The most that a quantity may be, and what is aimed at."""

    quantity: str
    most: float
    aim: float | None = None


@dataclass(frozen=True)
class Row:
    """A method on some prompts of a model. `share_kept`: where a bar only counts if so many of the edges are kept."""

    method: str
    prompts: int
    metric: str = "logit_diff"
    threshold: float = 0.0
    bars: tuple[Bar, ...] = ()
    share_kept: tuple[float, float] | None = None


ROWS: dict[str, tuple[Row, ...]] = {
    "zoo:induction-2l": (
        *(Row(method, 8) for method in ("naive", "eap", "eap-ig", "sweep")),
        Row("acdc", 8, "kl", 0.001),
    ),
    "zoo:tiny-english": (
        *(Row(method, 8) for method in ("naive", "eap", "eap-ig", "sweep")),
        Row("acdc", 8, "kl", 0.01),
    ),
    "gpt2-size": (
        Row("naive", 8),
        Row("eap", 8, bars=(Bar("forwards", 3.2, 2.7), Bar("peak", 1.6))),
        Row("eap-ig", 8, bars=(Bar("forwards", 11, 9),)),
        Row("sweep", 8, bars=(Bar("per_edge", 0.35, 0.2),)),
        Row("acdc", 8, "kl", RANDOM_THRESHOLD, (Bar("per_edge", 0.05, 0.02), Bar("seconds", 600, 180)), SHARE_KEPT),
    ),
    subjects.SMOLLM2: (
        Row("eap", 16, bars=(Bar("forwards", 3.5, 2.8),)),
        Row("eap-ig", 16),
        Row("naive", 4),
        Row("sweep", 4),
        Row("acdc", 4, "logit_diff", 0.1, (Bar("seconds", 240, 90),)),
        Row("acdc", 4, "kl", 0.05, (Bar("seconds", 80, 30),)),
        Row("acdc", 16, "kl", 0.05, (Bar("seconds", 360, 120),)),
    ),
    "llama-1b": (Row("eap", 8, bars=(Bar("peak", 12, 8),)),),
    "tiny": tuple(Row(method, 8) for method in ("naive", "eap", "sweep", "acdc")),
}
_TITLES = {
    "gpt2-size": "GPT-2-small size, random",
    subjects.SMOLLM2: "SmolLM2-135M, IOI",
    "llama-1b": "Llama, 1B size, random, bfloat16",
    "tiny": "tiny, random",
}
_METHODS = {"naive": "naive: a full forward per edge", "eap": "EAP", "eap-ig": "EAP-IG inputs, 5 steps", "sweep": "exact sweep of edges"}
_COLUMNS = (
    "method",
    "model",
    "prompts x tokens",
    "edges",
    "kept",
    "plain forward, ms",
    "seconds",
    "plain forwards",
    "products alone",
    "forwards an edge",
)
_NOTE = (
    "A plain forward: the median. What has rounds: median (smallest to largest). Products alone: the operations of its matrix products, "
    "by those of a plain forward: what it takes at the speed of that, and larger products may be faster. Naive: the median of some "
    "full masked forwards, nothing taken from other runs, without the metric, times the edges. Sweep: activation patching of each edge "
    "by itself. ACDC: the whole run, from binding the prompts to the circuit. Memory: of the whole process, tracing included."
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(ROWS), default=["zoo:induction-2l", "zoo:tiny-english", "gpt2-size"])
    parser.add_argument("--methods", nargs="+", choices=("naive", "eap", "eap-ig", "sweep", "acdc"), help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of EAP, EAP-IG and the naive forward")
    parser.add_argument("--chunks", type=int, default=16, help="calls of the exact sweep that are measured, for models that are not tiny")
    parser.add_argument("--device", default="cpu", help="of the model: cpu, cuda; on a GPU memory is that of the device")
    chosen = parser.parse_args(arguments)
    watch, found = Watch(), []
    for model in chosen.models:
        for row in (row for row in ROWS[model] if chosen.methods is None or row.method in chosen.methods):
            found.append(measured(model, row, chosen.threads, chosen.rounds, chosen.chunks, chosen.device))
            print(f"{label(row)}, {title(model)}: {found[-1]['seconds']:.1f} s", flush=True)
    given = f"--threads {chosen.threads} --rounds {chosen.rounds} --chunks {chosen.chunks} --models {' '.join(chosen.models)}"
    given += f" --methods {' '.join(chosen.methods)}" if chosen.methods else ""
    given += f" --device {chosen.device}" if chosen.device != "cpu" else ""
    command = f"python -m benchmarks.discovery {given}"
    publish(table(found, chosen.device), found, command=command, watch=watch, file=chosen.json, gpu=gpu(chosen.device))


def measured(model: str, row: Row, threads: int, rounds: int, chunks: int, device: str = "cpu") -> dict[str, Any]:
    """The numbers of one row, from a process of its own."""
    is_small = model.startswith("zoo:") or model == "tiny"
    given = {
        "prompts": row.prompts,
        "metric": row.metric,
        "threshold": row.threshold,
        "rounds": 1 if model == "llama-1b" else rounds,
        "chunks": 0 if is_small else chunks,
        "threads": threads,
        "device": device,
    }
    case = ["-m", "benchmarks.discovery_case", row.method, model]
    found = in_a_process([*case, *(str(part) for name, value in given.items() for part in (f"--{name}", value))], threads)
    return {"model": model, "method": row.method, "row": ROWS[model].index(row), **given, **found}


def table(found: Sequence[dict[str, Any]], device: str = "cpu") -> Table:
    """On a GPU without the bars, which are those of two cores."""
    rows, is_gpu = [], device != "cpu"
    for case in found:
        row = ROWS[case["model"]][case["row"]]
        spread = Spread(**case["spread"]) if "spread" in case else f"{case['forwards']:,.4g}"
        rows.append(
            (
                label(row),
                title(case["model"]),
                " x ".join(map(str, case["prompts"])),
                f"{case['edges']:,}",
                f"{case['kept']:,} ({case['kept'] / case['edges']:.2%})" if "kept" in case else "",
                f"{1e3 * case['base']['median']:,.3g}",
                f"{case['seconds']:,.4g}" + (f" (extrapolated from {case['measured_edges']:,} edges)" if is_extrapolated(case) else ""),
                str(spread),
                f"{case['products']:.2f}" if "products" in case else "",
                "" if "spread" in case else f"{case['per_edge']:.4f}",
                f"{case['peak'] / 1e9:.2f}",
                *(() if is_gpu else verdicts(row, case)),
            )
        )
    last = (f"peak memory of {gpu(device)['GPU']}, GB",) if is_gpu else ("peak RSS, GB", "at least", "aim")
    models = ", ".join(dict.fromkeys(title(case["model"]) for case in found))
    return Table(f"Discovery: {models}", (*_COLUMNS, *last), rows, (_NOTE,))


def verdicts(row: Row, case: dict[str, Any]) -> tuple[str, str]:
    """Whether the bars and the aims are reached, each with what they are; nothing where there are none."""
    if not row.bars:
        return "", ""
    if row.share_kept is not None and not row.share_kept[0] <= case["kept"] / case["edges"] <= row.share_kept[1]:
        low, high = row.share_kept
        return (f"FAIL: the bar is for {low:.1%} to {high:.1%} of the edges kept",) * 2
    least = [(bar.quantity, bar.most) for bar in row.bars]
    aims = [(bar.quantity, bar.aim) for bar in row.bars if bar.aim is not None]
    return verdict(least, case), verdict(aims, case)


def verdict(bars: Sequence[tuple[str, float]], case: dict[str, Any]) -> str:
    values = {**case, "peak": case["peak"] / 1e9}
    reached = all(values[quantity] <= most for quantity, most in bars)
    return f"{'PASS' if reached else 'FAIL'}: {', '.join(f'{most:g} {_UNITS[quantity]}' for quantity, most in bars)}"


def label(row: Row) -> str:
    return _METHODS.get(row.method) or f"ACDC, {row.metric} at {row.threshold:g}"


def title(model: str) -> str:
    return _TITLES.get(model, model)


def is_extrapolated(case: dict[str, Any]) -> bool:
    return bool(case.get("measured_edges", case["edges"]) < case["edges"])


def gpu(device: str) -> dict[str, str]:
    """What `device` is, if it is a GPU."""
    import torch

    if device == "cpu":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {"GPU": found.name, "GPU memory": f"{found.total_memory / 1e9:.0f} GB"}


if __name__ == "__main__":
    main()
