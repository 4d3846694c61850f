"""How long `import circuitgraph` takes, what it does not import, and how long the discovery of `make demo` takes.

Each import runs in a fresh process; it is timed inside (what a program that imports it waits) and from start to exit, with an empty
program beside it. The demo's command is read from the Makefile; its seconds are those that `discover --json` reports (the search
and the report, on a traced model) and, under the same bar, those of the whole command: imports, reading, tracing, search, picture.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.clock import Spread, timed
from benchmarks.machine import Watch
from benchmarks.subjects import ROOT
from benchmarks.tables import Table, options, publish

MOST_IMPORT_SECONDS = 0.3
MOST_DEMO_SECONDS = 10.0
HEAVY = ("torch", "jax", "networkx", "transformers", "typer")
_PROGRAM = f"""
import time
wall, cpu = time.perf_counter(), time.process_time()
import circuitgraph
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
import json, sys
print(json.dumps({{"wall": wall, "cpu": cpu, "heavy": [name for name in {HEAVY!r} if name in sys.modules]}}))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--runs", type=int, default=7, help="processes that import circuitgraph")
    parser.add_argument("--demos", type=int, default=3, help="runs of the demo")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    watch = Watch()
    imports = import_times(chosen.runs)
    demo = demo_times(chosen.demos, chosen.threads)
    command = f"python -m benchmarks.startup --runs {chosen.runs} --demos {chosen.demos} --threads {chosen.threads}"
    publish(table(imports, demo), [{"import": imports, "demo": demo}], command=command, watch=watch, file=chosen.json)


def import_times(runs: int) -> dict[str, Any]:
    """Seconds of every run, after one that is not counted (it may write byte code)."""
    found, whole, empty = [], [], []
    for number in range(runs + 1):
        nothing = timed(lambda: _python("-c", "pass")).wall
        seconds = timed(lambda: _python("-c", "import circuitgraph")).wall
        inside = json.loads(_python("-c", _PROGRAM))
        if number:
            found.append(inside)
            whole.append(seconds)
            empty.append(nothing)
    heavy = sorted({name for run in found for name in run["heavy"]})
    return {
        "wall": [run["wall"] for run in found],
        "cpu": [run["cpu"] for run in found],
        "process": whole,
        "empty_process": empty,
        "heavy": heavy,
    }


def demo_times(runs: int, threads: int) -> dict[str, Any]:
    """Seconds of the demo's discovery as it reports them, and of its whole command."""
    discovery, process, circuit = [], [], {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            command = [*demo_command(Path(folder) / "demo"), "--json"]
            started = time.perf_counter()
            circuit = json.loads(_python(*command, environment=environment))
            process.append(time.perf_counter() - started)
            discovery.append(circuit["seconds"])
    kept = {name: circuit[name] for name in ("edges_total", "edges_kept", "faithfulness") if name in circuit}
    return {"discovery": discovery, "process": process, **kept}


def demo_command(output: Path) -> list[str]:
    """What `make demo` runs after installing, as arguments of Python, with another output folder."""
    recipe = (ROOT / "Makefile").read_text()
    line = next((line for line in recipe.splitlines() if line.startswith("\t$(BIN)/circuitgraph discover")), None)
    if line is None:
        raise LookupError("the Makefile's demo runs no `circuitgraph discover` any more; change benchmarks/startup.py with it")
    arguments = [str(output) if word == "$(DEMO)" else word for word in shlex.split(line)[1:]]
    return ["-m", "circuitgraph.cli", *arguments]


def table(imports: dict[str, Any], demo: dict[str, Any]) -> Table:
    wall, cpu = Spread.of(imports["wall"]), Spread.of(imports["cpu"])
    discovery, process = Spread.of(demo["discovery"]), Spread.of(demo["process"])
    rows = (
        ("import circuitgraph, wall", f"{wall} s", f"{MOST_IMPORT_SECONDS} s", _verdict(wall.median <= MOST_IMPORT_SECONDS)),
        ("import circuitgraph, CPU", f"{cpu} s", f"{MOST_IMPORT_SECONDS} s", _verdict(cpu.median <= MOST_IMPORT_SECONDS)),
        ("python -c 'import circuitgraph', start to exit", f"{Spread.of(imports['process'])} s", "-", "-"),
        ("python -c 'pass', start to exit", f"{Spread.of(imports['empty_process'])} s", "-", "-"),
        (f"imported with it, of {', '.join(HEAVY)}", ", ".join(imports["heavy"]) or "none", "none", _verdict(not imports["heavy"])),
        (
            "make demo: the search, as it reports it",
            f"{discovery} s",
            f"{MOST_DEMO_SECONDS:.0f} s",
            _verdict(discovery.median <= MOST_DEMO_SECONDS),
        ),
        (
            "make demo: the whole command, from imports to picture",
            f"{process} s",
            f"{MOST_DEMO_SECONDS:.0f} s",
            _verdict(process.median <= MOST_DEMO_SECONDS),
        ),
    )
    note = f"Median (smallest to largest) of {len(imports['wall'])} fresh processes, and of {len(demo['process'])} demos."
    return Table("Start", ("what", "measured", "bar", "verdict"), rows, (note,))


def _verdict(reached: bool) -> str:
    return "PASS" if reached else "FAIL"


def _python(*arguments: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(['python', *arguments])} failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
