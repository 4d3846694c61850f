"""The circuit files of EAP-IG (Hanna et al. 2024) and of the MIB benchmark (Mueller et al. 2025).

    {"cfg": {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"},
     "nodes": {name: {"in_graph": bool, "score"?: float}}, "edges": {edge: {"score": float, "in_graph": bool}}}

Every edge of the model is listed, in the circuit or not, in the order of EAP-IG, so a strict file comes out as it went in. Four
differences between that graph and ours are bridged here, and nowhere else:

- It knows heads, not groups. An edge into a reader that n heads share is listed for each of them with 1/n of its score; on the way back the
  scores are added up, and the edge is kept if any of its parts is.
- Every layer has an MLP there. Edges of MLPs that a model lacks are listed with score 0, not in the graph.
- Unscored edges are NaN, null or missing there, NaN in a `Circuit`, and 0.0 in what we write, so that any JSON reader takes it.
- A node is in the graph when it has kept edges on both sides; a file that says otherwise has this kept in `Circuit.record`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError, FileError, UnknownNameError
from circuitgraph._graph import Graph, Layer, transformer_graph
from circuitgraph._names import Reader, Writer
from circuitgraph.files._atomic import parse_json, read_bytes, write_bytes
from circuitgraph.files._json import load

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray


class _Config(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    n_layers: int = pydantic.Field(ge=1)
    n_heads: int = pydantic.Field(ge=1)
    parallel_attn_mlp: bool = False
    d_model: int | None = None

    def graph(self) -> Graph:
        return transformer_graph([Layer(self.n_heads, self.n_heads, is_parallel=self.parallel_attn_mlp)] * self.n_layers)


class _Edge(pydantic.BaseModel):
    in_graph: bool
    score: float | None = None


class _Node(pydantic.BaseModel):
    in_graph: bool
    score: float | None = None
    neurons: list[float] | None = None


class _File(pydantic.BaseModel):
    cfg: _Config
    nodes: dict[str, _Node | bool]
    edges: dict[str, _Edge]


@dataclass(frozen=True)
class _Bridge:
    """Where each reader and writer of MIB's graph is in ours; -1 where we have none."""

    mib: Graph
    rows: Int[ndarray, " readers"]
    columns: Int[ndarray, " writers"]

    @property
    def shared(self) -> Bool[ndarray, "readers writers"]:
        """The edges of MIB's graph that ours has too."""
        both: Bool[ndarray, "readers writers"] = self.mib.visible & (self.rows >= 0)[:, None] & (self.columns >= 0)[None, :]
        return both

    @property
    def shares(self) -> Int[ndarray, " readers"]:
        """How many readers of MIB's graph are one in ours."""
        return np.array([(self.rows == row).sum() for row in self.rows])


def save_mib(circuit: Circuit, path: str | Path, *, d_model: int | None = None) -> Path:
    """Write a circuit for EAP-IG and MIB; see `to_mib`. Raises `FileError`."""
    return write_bytes(path, json.dumps(to_mib(circuit, d_model=d_model), allow_nan=False).encode("ascii"))


def to_mib(circuit: Circuit, *, d_model: int | None = None) -> dict[str, Any]:
    """What EAP-IG's `Graph.from_json` reads, as a dictionary without NaN or None.

    `d_model` is part of the format; it is found in the provenance of a circuit that was discovered or imported. Raises
    `CircuitGraphError` for a graph that the format cannot describe.
    """
    config = _config(circuit, d_model)
    if circuit.graph.spans:
        raise CircuitGraphError(
            f"to_mib: the format knows no positions; this circuit is split by the spans {', '.join(circuit.graph.spans)}; "
            "discover without PerPosition for one that can be exchanged"
        )
    if parts := [writer.name for writer in circuit.graph.writers if writer.part_of]:
        raise CircuitGraphError(
            f"to_mib: the format knows no features, such as {parts[0]}; circuitgraph.features.merged makes a circuit on whole components"
        )
    bridge = _bridge(_Config(**config), circuit.graph)
    place = np.ix_(bridge.rows, bridge.columns)
    kept = circuit.mask[place] & bridge.shared
    scores = np.zeros(kept.shape)
    if circuit.scores is not None:
        shared = _or_zero(circuit.scores[place] / bridge.shares[:, None])
        scores = np.where(bridge.shared, shared, 0.0)
    edges = {
        f"{bridge.mib.writers[w]}->{bridge.mib.readers[r]}": {"score": float(scores[r, w]), "in_graph": bool(kept[r, w])}
        for r, w in _in_order(bridge.mib)
    }
    return {"cfg": config, "nodes": {**_nodes(bridge.mib, kept), **_remembered(circuit).get("nodes", {})}, "edges": edges}


def from_mib(source: str | Path | Mapping[str, Any], graph: Graph | None = None) -> Circuit:
    """Read a circuit of EAP-IG or MIB, from a file or its content; old files whose nodes are plain booleans too.

    Without a `graph`, the circuit is on the graph that the file describes, with readers per head. Raises `FileError` when the file is
    incomplete, or describes another graph than the given one.
    """
    name = "circuit" if isinstance(source, Mapping) else str(source)
    data = source if isinstance(source, Mapping) else parse_json(read_bytes(Path(source), "circuit file"), Path(source))
    try:
        content = _File.model_validate(data)
        bridge = _bridge(content.cfg, content.cfg.graph() if graph is None else graph)
        return _circuit(content, bridge, graph or bridge.mib, name)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise FileError(f"{name} is not a circuit file of EAP-IG or MIB: {where}: {first['msg']}") from error
    except FileError:
        raise
    except CircuitGraphError as error:
        raise FileError(f"{name}: {error}") from error


def load_any(path: str | Path, graph: Graph | None = None) -> Circuit:
    """Read a circuit file of ours, or one of EAP-IG or MIB, on this graph if it is given. Raises `FileError`."""
    path = Path(path)
    is_mib = "cfg" in parse_json(read_bytes(path, "circuit file"), path)
    return from_mib(path, graph) if is_mib else load(path)


def _circuit(content: _File, bridge: _Bridge, graph: Graph, name: str) -> Circuit:
    mask, scores = _read_edges(content, bridge.mib, name)
    stray = (mask | (_or_zero(scores) != 0)) & ~bridge.shared & bridge.mib.visible
    if np.any(stray):
        first = bridge.mib.edges_of(stray)[0]
        raise FileError(f"{name} uses the edge {first}, which the graph does not have")
    nodes = {key: _Node(in_graph=node) if isinstance(node, bool) else node for key, node in content.nodes.items()}
    _refuse_neurons(nodes, name)
    r, w = np.nonzero(bridge.shared)
    place = (bridge.rows[r], bridge.columns[w])
    kept, total = np.zeros(graph.shape, dtype=bool), np.full(graph.shape, -0.0)  # -0.0 + x is x, also for x = -0.0
    np.logical_or.at(kept, place, mask[r, w])
    np.add.at(total, place, _or_zero(scores[r, w]))
    scored = np.zeros(graph.shape, dtype=bool)
    np.logical_or.at(scored, place, ~np.isnan(scores[r, w]))
    total = np.where(scored, total, np.nan)
    record = {key: value for key, value in _said(nodes).items() if value != _nodes(bridge.mib, mask).get(key)}
    return Circuit(
        graph,
        kept,
        total if scored.any() else None,
        provenance={"imported": {"format": "mib", "file": Path(name).name, "cfg": content.cfg.model_dump(exclude_unset=True)}},
        record={"mib": {"nodes": record}} if record else {},
    )


def _read_edges(content: _File, mib: Graph, name: str) -> tuple[Bool[ndarray, "readers writers"], Float[ndarray, "readers writers"]]:
    mask, scores = np.zeros(mib.shape, dtype=bool), np.full(mib.shape, np.nan)
    for edge_name, edge in content.edges.items():
        place = mib.edge_id(edge_name)
        mask[place] = edge.in_graph
        scores[place] = math.nan if edge.score is None else edge.score
    if len(content.edges) < mib.n_edges:
        missing = next(edge for edge in mib.edges if edge.name not in content.edges)
        raise FileError(f"{name} lists {len(content.edges):,} of the {mib.n_edges:,} edges of its model; {missing} is missing")
    return mask, scores


def _or_zero(scores: Float[ndarray, "*any"]) -> Float[ndarray, "*any"]:
    """With 0 for what was not scored."""
    return np.where(np.isnan(scores), 0.0, scores)


def _refuse_neurons(nodes: Mapping[str, _Node], name: str) -> None:
    for node_name, node in nodes.items():
        if node.in_graph and node.neurons is not None and not all(node.neurons):
            raise FileError(f"{name} keeps only some neurons of {node_name}; a circuit of edges would not be the same circuit")


def _said(nodes: Mapping[str, _Node]) -> dict[str, dict[str, Any]]:
    """What the file says of its nodes, without unscored scores."""
    said: dict[str, dict[str, Any]] = {key: {"in_graph": node.in_graph} for key, node in nodes.items()}
    for key, node in nodes.items():
        if node.score is not None and math.isfinite(node.score):
            said[key]["score"] = node.score
    return said


def _nodes(mib: Graph, kept: Bool[ndarray, "readers writers"]) -> dict[str, dict[str, Any]]:
    """EAP-IG's rule: a node is in the graph when it has kept edges on both sides; the logits always are."""
    fed = (mib.feeds & kept.any(axis=1, keepdims=True)).any(axis=0)
    in_graph = kept.any(axis=0) & (fed | (np.arange(len(mib.writers)) == 0))  # nothing feeds the input
    nodes = {writer.name: {"in_graph": bool(is_in)} for writer, is_in in zip(mib.writers, in_graph, strict=True)}
    return {**nodes, "logits": {"in_graph": True}}


def _remembered(circuit: Circuit) -> Mapping[str, Any]:
    """What an imported file said of its nodes, unless the circuit has been changed since."""
    remembered: Mapping[str, Any] = {} if "derived" in circuit.provenance else circuit.record.get("mib", {})
    return remembered


def _config(circuit: Circuit, d_model: int | None) -> dict[str, Any]:
    heads: dict[int, int] = {}
    for writer in circuit.graph.writers:
        if writer.kind == "head":
            heads[writer.layer] = heads.get(writer.layer, 0) + 1
    if not heads or len(set(heads.values())) > 1 or sorted(heads) != list(range(len(heads))):
        raise CircuitGraphError("to_mib: the format wants the same number of heads in every layer; this graph has another shape")
    remembered = dict(circuit.provenance.get("imported", {}).get("cfg", {}))
    architecture = circuit.provenance.get("architecture")
    width = d_model or remembered.get("d_model") or (architecture.get("d_model") if isinstance(architecture, dict) else None)
    if width is None:
        raise CircuitGraphError("to_mib: the format wants the width of the residual stream, which is not in the provenance; pass d_model=")
    found = {"n_layers": len(heads), "n_heads": heads[0], "parallel_attn_mlp": _is_parallel(circuit.graph), "d_model": int(width)}
    return {**remembered, **found}


def _is_parallel(graph: Graph) -> bool:
    """Whether no MLP sees the heads of its own layer."""
    answers = set()
    for r, reader in enumerate(graph.readers):
        if reader.kind == "mlp":
            own = [w for w, writer in enumerate(graph.writers) if writer.kind == "head" and writer.layer == reader.layer]
            answers.add(not graph.visible[r, own].any())
    if len(answers) > 1:
        raise CircuitGraphError("to_mib: the format has one parallel_attn_mlp for all layers; this graph has layers of both kinds")
    return answers == {True}


def _bridge(config: _Config, graph: Graph) -> _Bridge:
    """Find MIB's graph in ours. Raises `CircuitGraphError` when they are not of one shape."""
    mib = config.graph()
    rows = np.array([_id(graph.reader_id, reader) for reader in mib.readers])
    columns = np.array([_id(graph.writer_id, writer) for writer in mib.writers])
    bridge = _Bridge(mib, rows, columns)
    is_whole = set(range(graph.shape[0])) <= set(rows.tolist()) and set(range(graph.shape[1])) <= set(columns.tolist())
    if not is_whole or (graph.visible[np.ix_(rows, columns)] & (rows >= 0)[:, None] & (columns >= 0) != bridge.shared).any():
        shape = f"{config.n_layers} layers of {config.n_heads} heads, {'parallel' if config.parallel_attn_mlp else 'sequential'}"
        raise CircuitGraphError(f"a circuit file of EAP-IG or MIB for {shape} does not fit {graph!r}")
    return bridge


def _id(find: Any, end: Reader | Writer) -> int:
    try:
        return int(find(end))
    except UnknownNameError:
        return -1


def _in_order(mib: Graph) -> Iterator[tuple[int, int]]:
    """The edges in the order in which EAP-IG makes them: per layer, writers outside, heads and then `q`, `k`, `v` inside."""
    blocks: dict[int, list[int]] = {}  # the readers that see the same writers
    for r, seen in enumerate(mib.visible.sum(axis=1).tolist()):
        blocks.setdefault(seen, []).append(r)
    for seen, block in blocks.items():
        inside = sorted(block, key=lambda r: (mib.readers[r].depth, mib.readers[r].index, "qkv".find(mib.readers[r].kind)))
        for w in range(seen):
            for r in inside:
                yield r, w
