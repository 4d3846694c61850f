"""Run the benchmarks and write `benchmarks/RESULTS.md` and the tables of `docs/explanation/figures.md`.

    python -m benchmarks                  all of them
    python -m benchmarks eap-2-threads    this one again, beside what the others gave last time on this machine
    python -m benchmarks --peer-python P  all of them, and auto-circuit, which `benchmarks.peer` says how to install there
    python -m benchmarks --device cuda    discovery on this machine's GPU, into `benchmarks/RESULTS-GPU.md`, which names it

Each script runs in a process of its own and leaves its numbers in `benchmarks/results/`. If one fails, no page is written. The pages have
what there are numbers of.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.subjects import ROOT
from benchmarks.tables import Report, between
from circuitgraph.files._atomic import write_bytes

NUMBERS = ROOT / "benchmarks" / "results"
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
ON_GPU = ROOT / "benchmarks" / "RESULTS-GPU.md"
PAGE = ROOT / "docs" / "explanation" / "figures.md"
START, END = "<!-- results: written by `make bench` -->", "<!-- end of results -->"
SCRIPTS = {
    "trace-proof": ["trace_proof"],
    "eap-1-thread": ["eap", "--threads", "1"],
    "eap-2-threads": ["eap", "--threads", "2", "--models", "gpt2-size"],
    "discovery-zoo": ["discovery", "--models", "zoo:induction-2l", "zoo:tiny-english"],
    "discovery-gpt2-size": ["discovery", "--models", "gpt2-size"],
    "discovery-smollm2": ["discovery", "--models", "smollm2-135m"],
    "floors": ["floors"],
    "discovery-llama-1b": ["discovery", "--models", "llama-1b"],
    "backends-gpt2-size": ["backends", "--models", "gpt2-size", "--threads", "1", "--rounds", "3"],
    "backends-smollm2": ["backends", "--models", "smollm2"],
    "startup": ["startup"],
    "testing": ["testing"],
    "compiled": ["compiled"],
    "few-rows": ["few_rows"],
}
GPU_SCRIPTS = {f"{name}-gpu": [*SCRIPTS[name], "--device", "cuda"] for name in SCRIPTS if name.startswith("discovery")}
PEER = "peer"  # runs only where its environment is given


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(SCRIPTS)}")
    parser.add_argument("--peer-python", metavar="PATH", help="the Python of an environment with auto-circuit")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute; default: cpu")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and chosen.peer_python is not None:
        parser.error("--peer-python: auto-circuit is compared on a CPU; leave out --device")
    scripts = GPU_SCRIPTS if chosen.device == "cuda" else SCRIPTS
    if chosen.peer_python is not None:
        scripts = {**SCRIPTS, PEER: ["peer", "--peer-python", chosen.peer_python]}
    names = chosen.names or [*scripts]
    if unknown := set(names) - set(scripts):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(scripts)}")
    NUMBERS.mkdir(exist_ok=True)
    for name in names:
        run(NUMBERS / f"{name}.json", *scripts[name])
    if chosen.device == "cuda":
        write_results(ON_GPU, known_reports(NUMBERS, [*GPU_SCRIPTS]))
    else:
        write_pages(known_reports(NUMBERS, [*SCRIPTS, PEER]))


def known_reports(folder: Path, names: Sequence[str]) -> list[Report]:
    """What was measured last of these scripts, in their order."""
    files = [folder / f"{name}.json" for name in names]
    if missing := [file.stem for file in files if not file.exists()]:
        print(f"not measured yet: {', '.join(missing)}")
    return [Report.from_json(file.read_text()) for file in files if file.exists()]


def run(file: Path, script: str, *arguments: str) -> None:
    """Run one script; what it prints goes through."""
    print(f"python -m benchmarks.{script} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *arguments, "--json", str(file)], cwd=ROOT, check=True)


def write_pages(reports: Sequence[Report]) -> None:
    """The results, and their tables in the documentation. Raises `ValueError` as `write_results`."""
    page = with_tables(PAGE.read_text(), reports)
    write_results(RESULTS, reports)
    write_bytes(PAGE, page.encode())
    print(f"wrote the tables of {PAGE.relative_to(ROOT)}")


def write_results(file: Path, reports: Sequence[Report]) -> None:
    """Raises `ValueError` for reports from different machines, which no page may mix."""
    if any(report.machine != reports[0].machine for report in reports):
        raise ValueError(f"{NUMBERS} has reports of different machines or versions; run all of them again")
    write_bytes(file, results(reports).encode())
    print(f"wrote {file.name}")


def results(reports: Sequence[Report]) -> str:
    """A page of results: the machine, then every table with its command and how busy the machine was."""
    machine = [f"| {name} | {value} |" for name, value in reports[0].machine.items()]
    head = [
        "# Results",
        "",
        "Written by `python -m benchmarks`; every number in the documentation comes from `RESULTS.md`.",
        "",
        "| | |",
        "| --- | --- |",
        *machine,
    ]
    return "\n".join([*head, "", tables(reports)])


def tables(reports: Sequence[Report]) -> str:
    return "\n".join(
        f"{report.table.markdown()}\n`{report.command}`, {report.date}. The machine meanwhile: {report.load}.\n" for report in reports
    )


def with_tables(page: str, reports: Sequence[Report]) -> str:
    """The page with everything between its two marks replaced. Raises `ValueError` where it has no marks."""
    return between(page, START, END, tables(reports))


if __name__ == "__main__":
    main()
