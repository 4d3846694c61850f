"""Files that are either there or not: nothing is ever half-written. And the errors of reading one."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from circuitgraph._errors import FileError


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a whole file or nothing: a temporary file in the same folder takes the place of the old one. Raises `FileError`."""
    path = check_place(path)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_place(path: str | Path) -> Path:
    """The path, if a file can be written there: to be asked before what takes long. Raises `FileError`."""
    path = Path(path)
    if path.is_dir():
        raise FileError(f"cannot write {path}: it is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise FileError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    return path


def read_bytes(path: Path, what: str) -> bytes:
    """The whole file. Raises `FileError` that says what was expected there."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileError(f"there is no {what} {path}; check the name") from error
    except IsADirectoryError as error:
        raise FileError(f"{path} is a folder; give the {what} in it") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object; the NaN that Python writes is accepted. Raises `FileError` for a truncated file."""
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not text, so it is no JSON file; check the name") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{path} is truncated or not JSON ({error}); copy it again, or run the discovery again") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a {type(value).__name__}, not a circuit; expected a JSON object")
    return value
