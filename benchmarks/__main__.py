"""Run the benchmarks and write `benchmarks/RESULTS.md` and the tables of `docs/explanation/figures.md`.

    python -m benchmarks                  all of them
    python -m benchmarks eap-2-threads    this one again, beside what the others gave last time on this machine
    python -m benchmarks --peer-python P  all of them, and auto-circuit, which `benchmarks.peer` says how to install there

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
PEER = "peer"  # runs only where its environment is given


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(SCRIPTS)}")
    parser.add_argument("--peer-python", metavar="PATH", help="the Python of an environment with auto-circuit")
    chosen = parser.parse_args()
    scripts = SCRIPTS if chosen.peer_python is None else {**SCRIPTS, PEER: ["peer", "--peer-python", chosen.peer_python]}
    names = chosen.names or [*scripts]
    if unknown := set(names) - set(scripts):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(scripts)}")
    NUMBERS.mkdir(exist_ok=True)
    for name in names:
        run(NUMBERS / f"{name}.json", *scripts[name])
    write_pages(known_reports(NUMBERS))


def known_reports(folder: Path) -> list[Report]:
    """What was measured last of every script, in their order."""
    files = [folder / f"{name}.json" for name in (*SCRIPTS, PEER)]
    if missing := [file.stem for file in files if not file.exists()]:
        print(f"not measured yet: {', '.join(missing)}")
    return [Report.from_json(file.read_text()) for file in files if file.exists()]


def run(file: Path, script: str, *arguments: str) -> None:
    """Run one script; what it prints goes through."""
    print(f"python -m benchmarks.{script} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *arguments, "--json", str(file)], cwd=ROOT, check=True)


def write_pages(reports: Sequence[Report]) -> None:
    """Raises `ValueError` for reports from different machines, which no page may mix."""
    if any(report.machine != reports[0].machine for report in reports):
        raise ValueError(f"{NUMBERS} has reports of different machines or versions; run all: python -m benchmarks")
    page = with_tables(PAGE.read_text(), reports)
    write_bytes(RESULTS, results(reports).encode())
    write_bytes(PAGE, page.encode())
    print(f"wrote {RESULTS.relative_to(ROOT)} and the tables of {PAGE.relative_to(ROOT)}")


def results(reports: Sequence[Report]) -> str:
    """RESULTS.md: the machine, then every table with its command and how busy the machine was."""
    machine = [f"| {name} | {value} |" for name, value in reports[0].machine.items()]
    head = [
        "# Results",
        "",
        "Written by `make bench`; every number in the documentation comes from here.",
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
