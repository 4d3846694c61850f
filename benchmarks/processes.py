"""A part of a benchmark in a process of its own, so that neither its memory nor what it has warmed up is another's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.subjects import ROOT


def in_a_process(arguments: Sequence[str], threads: int, python: str = sys.executable) -> dict[str, Any]:
    """What `python *arguments` prints as its last line, which is JSON. Raises `RuntimeError` with what it said if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run([python, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
