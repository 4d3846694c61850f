"""The machine that a figure was measured on, how busy others kept it, and what memory a process took."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("circuitgraph", "torch", "transformers", "nnsight", "jax", "equinox", "numpy")


def description() -> dict[str, str]:
    """CPU, cores, memory, versions; of the kernel without the build, which says more of who hosts a virtual machine than of its speed."""
    found = {
        "CPU": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "Python": platform.python_version(),
    }
    return found | {name: _version(name) for name in _PACKAGES}


def peak_memory() -> int:
    """The most bytes that this process has held. On Linux not `ru_maxrss`, which starts at what the parent held when it forked."""
    peak = _field("/proc/self/status", "VmHWM")
    if peak is not None:
        return int(peak.split()[0]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@dataclass(frozen=True)
class Watch:
    """Started before a measurement, it says afterwards how many cores others kept busy meanwhile."""

    wall: float = field(default_factory=time.perf_counter)
    own: float = field(default_factory=lambda: sum(os.times()[:4]))
    busy: float | None = field(default_factory=lambda: _busy_seconds())

    def __str__(self) -> str:
        """The load average counts this measurement too; the number of cores does not."""
        busy = _busy_seconds()
        load = f"load average {os.getloadavg()[0]:.1f}"
        if self.busy is None or busy is None:
            return load
        others = (busy - self.busy) - (sum(os.times()[:4]) - self.own)
        return f"{load}; others kept {max(0.0, others / (time.perf_counter() - self.wall)):.1f} of {os.cpu_count()} cores busy"


def _busy_seconds() -> float | None:
    """Seconds that all cores together were not idle since the machine started, time taken by other virtual machines included."""
    numbers = _field("/proc/stat", "cpu ", separator="cpu ")
    if numbers is None:
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal, *_ = map(int, numbers.split())
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _field(file: str, name: str, separator: str = ":") -> str | None:
    """The value of the first line that starts with `name`; None where the system has no such file."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(separator, 1)[1].strip() for line in lines if line.startswith(name)), None)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
