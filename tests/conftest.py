"""Shared by all tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Before anything imports jax: tests compile far more than they compute. With these, XLA compiles a tiny model's queries in a third of the
# time, on one thread; what it compiles is slower, and the same to rounding. A jaxlib that no longer knows a flag says so and stops.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
# What one process has compiled serves the others, and the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs it; asked for what is not there, its client tries for long
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as below, for the scripts that tests run: beside another worker a second thread only waits

import gc

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # tiny models: threads only add noise, and tests may run side by side
hypothesis.settings.register_profile("circuitgraph", deadline=None)  # a shared machine is slow at times, which is no failure
hypothesis.settings.load_profile("circuitgraph")


COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
MOST_COMPILED = 1 << 28  # bytes: of several versions of the code


def pytest_configure(config: pytest.Config) -> None:
    """What was compiled is dropped when it has become too much."""
    is_worker = hasattr(config, "workerinput")
    if not is_worker and sum(file.stat().st_size for file in COMPILED.glob("*")) > MOST_COMPILED:
        shutil.rmtree(COMPILED)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look at it again; tracing makes much that is kept."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)
