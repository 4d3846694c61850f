"""A folder of results that appears whole or not at all, and replaces only what circuitgraph wrote itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from circuitgraph._errors import FileError

RESULTS = ("circuit.json", "circuit.safetensors", "circuit.svg", "circuit.dot", "report.json")


def check_folder(target: Path, *, force: bool = False) -> None:
    """Raises `FileError` when results cannot go to `target`: it exists (unless `force`), or holds files of somebody else."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise FileError(f"{target} exists and is not a folder; choose another output folder")
    if not force:
        raise FileError(f"{target} exists; choose another output folder or add --force to replace it")
    foreign = sorted(path.name for path in target.iterdir() if path.name not in RESULTS or not path.is_file())
    if foreign:
        raise FileError(
            f"{target} holds {foreign[0]!r}, which circuitgraph did not write, so --force does not replace it; choose another folder"
        )


@contextmanager
def result_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its place when the block ends well, and leaves nothing when it does not."""
    check_folder(target, force=force)
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise FileError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())
        _replace(fresh, target, force=force)
    finally:
        _remove(fresh)


def _replace(fresh: Path, target: Path, *, force: bool) -> None:
    check_folder(target, force=force)  # once more: time has passed
    if not target.exists():
        fresh.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    _remove(old)


def _remove(folder: Path) -> None:
    """Delete our own results and the folder, if nothing else is in it."""
    if not folder.is_dir():
        return
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
