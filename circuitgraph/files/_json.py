"""Our own format, schema 1: one JSON object, and for a large graph a safetensors file beside it.

    {"format": "circuitgraph", "schema": 1,
     "graph": {"writers": [name, ...], "readers": [name, ...],
               "visible": [[[start, stop], ...], ...],      ranges of writer ids, one list per reader
               "feeds": [[[start, stop], ...], ...]},
     "edges": ["input->m0", ...],                           the kept ones, by reader, then by writer
     "scores": [0.5, null, ...]                             one per edge of the graph in that order; null: not scored
            or {"file": NAME.safetensors, "sha256": ...}    a float64 tensor "scores" [readers, writers], NaN: not scored
            or null,
     "confidence": like scores, from 0 to 1; left out where there is none,
     "provenance": {...}, "record": {...}}

Strict JSON, ASCII, never a pickle; `Circuit.load(circuit.save(path)) == circuit`, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError, FileError
from circuitgraph._graph import Graph
from circuitgraph._names import Reader, Writer
from circuitgraph.files._atomic import parse_json, read_bytes, write_bytes

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

SCHEMA = 1
INLINE_LIMIT = 4096
"""Graphs with more edges than this keep their scores in a safetensors file beside the JSON."""

_METADATA = {"format": "circuitgraph scores"}  # one key: safetensors writes several in any order, and the same circuit is the same bytes
_Range = Annotated[list[int], pydantic.Field(min_length=2, max_length=2)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _GraphPart(_Strict):
    writers: list[str]
    readers: list[str]
    visible: list[list[_Range]]
    feeds: list[list[_Range]]


class _Sidecar(_Strict):
    file: Annotated[str, pydantic.Field(pattern=r"^[^/\\]+\.safetensors$")]
    sha256: str


_Matrix = list[float | None] | _Sidecar | None


class _CircuitFile(_Strict):
    format: Literal["circuitgraph"]
    schema_: Annotated[Literal[1], pydantic.Field(alias="schema")]
    graph: _GraphPart
    edges: list[str]
    scores: _Matrix
    confidence: _Matrix = None
    provenance: dict[str, Any]
    record: dict[str, Any]


def save(circuit: Circuit, path: str | Path) -> Path:
    """Write a circuit; an older one of that name is replaced. Raises `FileError`, and then the old one is still there.

    The scores' file is written first: whoever finds the JSON finds what it refers to.
    """
    path, graph = Path(path), circuit.graph
    matrices = {"scores": circuit.scores} | ({} if circuit.confidence is None else {"confidence": circuit.confidence})
    given = {name: values for name, values in matrices.items() if values is not None}
    if given and graph.n_edges > INLINE_LIMIT:
        written: dict[str, Any] = dict.fromkeys(given, _write_sidecar(given, path))
    else:
        written = {name: [None if math.isnan(x) else x for x in values[graph.visible].tolist()] for name, values in given.items()}
    content = {
        "format": "circuitgraph",
        "schema": SCHEMA,
        "graph": {
            "writers": [writer.name for writer in graph.writers],
            "readers": [reader.name for reader in graph.readers],
            "visible": [_ranges(row) for row in graph.visible],
            "feeds": [_ranges(row) for row in graph.feeds],
        },
        "edges": [edge.name for edge in circuit.edges],
        **{name: written.get(name) for name in matrices},
        "provenance": circuit.provenance,
        "record": circuit.record,
    }
    return write_bytes(path, _text(content).encode("ascii"))


def load(path: str | Path) -> Circuit:
    """Read a circuit that `save` wrote. Raises `FileError`: missing, truncated, of a newer schema, or its scores are gone or others."""
    path = Path(path)
    data = parse_json(read_bytes(path, "circuit file"), path)
    _check_schema(data, path)
    try:
        content = _CircuitFile.model_validate(data)
        graph = _graph(content.graph)
        scores, confidence = (_matrix_of(name, getattr(content, name), graph, path) for name in ("scores", "confidence"))
        return Circuit(graph, _mask(content.edges, graph), scores, content.provenance, content.record, confidence)
    except pydantic.ValidationError as error:
        first = max(error.errors(), key=lambda found: len(found["loc"]))  # of the forms of `scores`, the nearest one
        where = ".".join(str(part) for part in first["loc"])
        raise FileError(f"{path} is not a circuit of schema {SCHEMA}: {where}: {first['msg']}") from error
    except FileError:
        raise
    except CircuitGraphError as error:
        raise FileError(f"{path} does not fit together: {error}") from error


def _check_schema(data: dict[str, Any], path: Path) -> None:
    if "cfg" in data and "nodes" in data:
        raise FileError(f"{path} is a circuit file of EAP-IG or MIB; read it with circuitgraph.files.from_mib")
    if data.get("format") != "circuitgraph" or not isinstance(data.get("schema"), int):
        raise FileError(f"{path} is not a circuit file: it has no 'format': 'circuitgraph' with a 'schema'")
    if data["schema"] != SCHEMA:
        advice = "upgrade circuitgraph to read it" if data["schema"] > SCHEMA else "there is no such schema"
        raise FileError(f"{path} has schema {data['schema']}, this version of circuitgraph knows schema {SCHEMA}; {advice}")


def _text(content: dict[str, Any]) -> str:
    """JSON that reads well in an editor and in a diff: one line per kept edge and per fact of the provenance, the rest compact."""
    parts = []
    for key, value in content.items():
        indent = 1 if key in ("edges", "provenance") else None
        separators = (",", ": ") if indent else (",", ":")
        parts.append(f"{json.dumps(key)}: {json.dumps(value, indent=indent, separators=separators, allow_nan=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _ranges(row: Bool[ndarray, " writers"]) -> list[list[int]]:
    """The ids that are set, as [start, stop) ranges."""
    steps = np.flatnonzero(np.diff(row, prepend=False, append=False))
    return [[int(start), int(stop)] for start, stop in steps.reshape(-1, 2)]


def _matrix(rows: list[list[_Range]], shape: tuple[int, int], name: str) -> Bool[ndarray, "readers writers"]:
    if len(rows) != shape[0]:
        raise CircuitGraphError(f"graph.{name} has {len(rows)} rows for {shape[0]} readers")
    matrix = np.zeros(shape, dtype=bool)
    for r, ranges in enumerate(rows):
        for start, stop in ranges:
            if not 0 <= start < stop <= shape[1]:
                raise CircuitGraphError(f"graph.{name}[{r}] has the range [{start}, {stop}] for {shape[1]} writers")
            matrix[r, start:stop] = True
    return matrix


def _graph(part: _GraphPart) -> Graph:
    shape = (len(part.readers), len(part.writers))
    visible, feeds = _matrix(part.visible, shape, "visible"), _matrix(part.feeds, shape, "feeds")
    return Graph(tuple(map(Writer.parse, part.writers)), tuple(map(Reader.parse, part.readers)), visible, feeds)


def _mask(names: list[str], graph: Graph) -> Bool[ndarray, "readers writers"]:
    mask = np.zeros(graph.shape, dtype=bool)
    for name in names:
        mask[graph.edge_id(name)] = True
    if mask.sum() < len(names):
        raise CircuitGraphError("an edge is listed twice")
    return mask


def _matrix_of(name: str, part: _Matrix, graph: Graph, path: Path) -> Float[ndarray, "readers writers"] | None:
    if part is None:
        return None
    if isinstance(part, _Sidecar):
        return _read_sidecar(name, part, path)
    if len(part) != graph.n_edges:
        raise CircuitGraphError(f"there are {len(part)} {name} for {graph.n_edges} edges")
    values = np.zeros(graph.shape)
    values[graph.visible] = [math.nan if x is None else x for x in part]
    return values


def _write_sidecar(matrices: Mapping[str, Float[ndarray, "readers writers"]], path: Path) -> dict[str, str]:
    import safetensors.numpy

    sidecar = path.with_suffix(".safetensors")
    if sidecar == path:
        raise FileError(f"cannot write {path}: the scores go into a file of that name; call the circuit {path.with_suffix('.json').name}")
    if sidecar.exists() and not _is_ours(sidecar):
        raise FileError(f"cannot write {path}: the scores would replace {sidecar}, which circuitgraph did not write; choose another name")
    content = safetensors.numpy.save({name: np.ascontiguousarray(values) for name, values in matrices.items()}, metadata=_METADATA)
    write_bytes(sidecar, content)
    return {"file": sidecar.name, "sha256": hashlib.sha256(content).hexdigest()}


def _is_ours(sidecar: Path) -> bool:
    import safetensors

    try:
        with safetensors.safe_open(sidecar, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == _METADATA["format"]
    except (OSError, safetensors.SafetensorError):
        return False


def _read_sidecar(name: str, part: _Sidecar, path: Path) -> Float[ndarray, "readers writers"]:
    import safetensors
    import safetensors.numpy

    sidecar = path.with_name(part.file)
    if not sidecar.exists():
        raise FileError(f"the scores of {path} are missing: {sidecar} is not there; keep the two files together")
    content = read_bytes(sidecar, "score file")
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise FileError(f"{sidecar} is not the file that {path} was saved with (its sha256 differs); copy both again, or discover again")
    try:
        tensors = safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        raise FileError(f"{sidecar} is not a safetensors file: {error}") from error
    if name not in tensors:
        raise FileError(f"{sidecar} holds no tensor {name!r}; copy it again, or discover again")
    return tensors[name]
