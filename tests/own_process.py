"""Scripts, each in a process of its own, forked where PyTorch, transformers and JAX are imported already but nothing of circuitgraph is.

Importing them takes longer than most examples run.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

_IMPORTED = (
    *("torch", "nnsight", "jax", "equinox", "matplotlib", "networkx", "pydantic", "scipy.optimize", "scipy.stats"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"),
)


def run(script: Path, folder: Path, *arguments: str, timeout: float = 300) -> tuple[int | None, str]:
    """The exit code, and all that was printed, of a script that is run in a folder."""
    context, printed = multiprocessing.get_context("forkserver"), folder / "printed.txt"
    context.set_forkserver_preload([*_IMPORTED])
    process = context.Process(target=_run, args=(script, folder, printed, arguments))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, printed.read_text() if printed.exists() else ""


def _run(script: Path, folder: Path, printed: Path, arguments: tuple[str, ...]) -> None:
    os.chdir(folder)
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    assert not any(name.partition(".")[0].startswith("circuitgraph") for name in sys.modules)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
