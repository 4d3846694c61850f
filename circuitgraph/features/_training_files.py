"""The files of a training: where it is, to go on from there. No file is half-written, and none is a pickle.

`checkpoint.json` says what is trained, how many steps are done and which safetensors file holds the state of that step, with its hash.
It is written last, so that whatever happens it names a whole file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._errors import CircuitGraphError, FileError
from circuitgraph.files import write_bytes
from circuitgraph.files._atomic import parse_json, read_bytes

if TYPE_CHECKING:
    from numpy import ndarray

RECORD = "checkpoint.json"
_STATES = "checkpoint-*.safetensors"
_SCHEMA = 1


@dataclass(frozen=True)
class Checkpoints:
    """Of one training in a folder. `identity`: plain values that say what is trained, on what, and how."""

    folder: Path
    identity: Mapping[str, Any]

    def save(self, step: int, state: Mapping[str, ndarray]) -> None:
        """Raises `FileError` where it cannot be written; what was there before is then still there."""
        import safetensors.numpy

        content = safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in state.items()})
        name = f"checkpoint-{step:08d}.safetensors"
        write_bytes(self.folder / name, content)
        record = {"schema": _SCHEMA, "step": step, "state": name, "sha256": hashlib.sha256(content).hexdigest(), **self.identity}
        write_bytes(self.folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        for old in self.folder.glob(_STATES):
            if old.name != name:
                old.unlink(missing_ok=True)

    def load(self) -> tuple[int, dict[str, ndarray]] | None:
        """The step and the state; none where there is no checkpoint. Raises `FileError` for broken files, `CircuitGraphError` for a
        checkpoint of something else, naming the first difference."""
        import safetensors.numpy

        if not (self.folder / RECORD).is_file():
            return None
        record = parse_json(read_bytes(self.folder / RECORD, "checkpoint"), self.folder / RECORD)
        self._check(record)
        name = str(record.get("state"))
        if Path(name).name != name:
            raise FileError(f"{self.folder / RECORD} points to {name!r}; expected the name of a file beside it")
        content = read_bytes(self.folder / name, "state of the checkpoint")
        if hashlib.sha256(content).hexdigest() != record.get("sha256"):
            raise FileError(f"{self.folder / name} is not the file that {RECORD} names; take another folder, or delete both to start anew")
        return int(record["step"]), safetensors.numpy.load(content)

    def _check(self, record: Mapping[str, Any]) -> None:
        if record.get("schema") != _SCHEMA:
            raise FileError(f"{self.folder / RECORD} has schema {record.get('schema')!r}; this version reads {_SCHEMA}")
        for key, wanted in _flat(self.identity).items():
            got = _flat(record).get(key)
            if got != wanted:
                raise CircuitGraphError(
                    f"train: the checkpoint in {self.folder} is of another training: its {key} is {got!r}, and {wanted!r} was asked for; "
                    f"take another folder, or the same {key}"
                )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """With the settings one by one, as they come out of a file."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return {**{key: value for key, value in plain.items() if key != "settings"}, **plain.get("settings", {})}
