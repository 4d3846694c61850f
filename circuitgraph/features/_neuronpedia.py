"""Attribution graphs as the JSON that Neuronpedia's and circuit-tracer's viewers read: metadata, qParams, nodes, links.

Nodes are named there by layer, feature and position (`3_12_5`), embeddings `E_token_position`, logits by the number after the last layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from circuitgraph._errors import CircuitGraphError, FileError
from circuitgraph.features._attribution import AttributionGraph, AttributionNode, NodeKind
from circuitgraph.files import write_bytes
from circuitgraph.files._atomic import parse_json, read_bytes

_TYPES: dict[NodeKind, str] = {
    "feature": "cross layer transcoder",  # the viewers' name for features of any transcoder
    "error": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
}
_KINDS: dict[str, NodeKind] = {name: kind for kind, name in _TYPES.items()}


class _Node(pydantic.BaseModel):
    node_id: str
    feature: int | None
    layer: str | int
    ctx_idx: int
    feature_type: str
    clerp: str = ""
    activation: float | None = None
    token_prob: float = 0.0


class _Link(pydantic.BaseModel):
    source: str
    target: str
    weight: float


class _Metadata(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    slug: str
    scan: str
    prompt_tokens: list[str]
    prompt: str


class _File(pydantic.BaseModel):
    metadata: _Metadata
    qParams: dict[str, Any]  # noqa: N815, the format's name
    nodes: list[_Node]
    links: list[_Link]


def to_neuronpedia(graph: AttributionGraph, *, slug: str, scan: str | None = None, node_threshold: float = 0.8) -> dict[str, Any]:
    """The graph as that JSON object. `slug`: its name there; `scan`: the model's (default: ours). Supernodes are in `qParams`, pinned."""
    model = graph.provenance.get("model", {})
    n_layers = 1 + max((node.layer for node in graph.nodes), default=-1)
    ids = {node.name: _id(node, n_layers) for node in graph.nodes}
    order = np.argsort(-graph.influence, kind="stable")
    reached = np.empty(len(order))
    total = graph.influence.sum()
    reached[order] = np.cumsum(graph.influence[order]) / total if total else 1.0
    prompt = graph.provenance.get("prompt", "")
    return {
        "metadata": {
            "slug": slug,
            "scan": scan or str(model.get("name", "model")),
            "transcoder_list": [],
            "prompt_tokens": [_plain(token) for token in graph.tokens],
            "prompt": prompt if isinstance(prompt, str) else "".join(_plain(token) for token in graph.tokens),
            "node_threshold": node_threshold,
            "schema_version": 1,
            "info": {"generator": {"name": "circuitgraph"}},
        },
        "qParams": {
            "pinnedIds": [ids[name] for members in graph.supernodes.values() for name in members],
            "supernodes": [[name, *(ids[member] for member in members)] for name, members in graph.supernodes.items()],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [_described(node, ids[node.name], n_layers, float(reached[i])) for i, node in enumerate(graph.nodes)],
        "links": [
            {"source": ids[graph.nodes[s].name], "target": ids[graph.nodes[t].name], "weight": float(graph.weights[t, s])}
            for t, s in np.argwhere(graph.weights)
        ],
    }


def save_neuronpedia(graph: AttributionGraph, path: str | Path, *, scan: str | None = None) -> Path:
    """Write that JSON; the file's name is the slug. Raises `FileError`."""
    path = Path(path)
    return write_bytes(path, json.dumps(to_neuronpedia(graph, slug=path.stem, scan=scan), allow_nan=False).encode())


def from_neuronpedia(source: str | Path | Mapping[str, Any]) -> AttributionGraph:
    """A graph from such a file, or its content, ours or another tool's. Raises `FileError` that names the first field that does not fit."""
    name = "attribution graph" if isinstance(source, Mapping) else str(source)
    data = source if isinstance(source, Mapping) else parse_json(read_bytes(Path(source), "attribution graph"), Path(source))
    try:
        content = _File.model_validate(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FileError(f"{name} is no attribution graph: {where}: {first['msg']}") from error
    nodes = {node.node_id: _read(node, name) for node in content.nodes}
    place = {node_id: i for i, node_id in enumerate(nodes)}
    weights = np.zeros((len(nodes), len(nodes)))
    for link in content.links:
        if link.source not in place or link.target not in place:
            raise FileError(f"{name}: a link from {link.source} to {link.target}, of which one is no node")
        weights[place[link.target], place[link.source]] = link.weight
    groups = {
        str(group[0]): tuple(nodes[member].name for member in group[1:] if member in nodes)
        for group in content.qParams.get("supernodes", [])
    }
    provenance = {"model": {"name": content.metadata.scan}, "prompt": content.metadata.prompt}
    try:
        return AttributionGraph(tuple(nodes.values()), weights, tuple(content.metadata.prompt_tokens), provenance, groups)
    except CircuitGraphError as error:
        raise FileError(f"{name} does not fit together: {error}") from error


def _id(node: AttributionNode, n_layers: int) -> str:
    if node.kind == "embedding":
        return f"E_{node.index}_{node.position}"
    return f"{n_layers + 1 if node.kind == 'logit' else node.layer}_{node.index}_{node.position}"


def _described(node: AttributionNode, node_id: str, n_layers: int, reached: float) -> dict[str, Any]:
    layer = {"embedding": "E", "logit": str(n_layers + 1)}.get(node.kind, str(node.layer))
    label = node.label if node.kind != "logit" else f"Output {node.label} (p={node.probability:.3f})"
    return {
        "node_id": node_id,
        "feature": _paired(node.layer, node.index) if node.kind == "feature" else node.index,
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": _TYPES[node.kind],
        "token_prob": node.probability or 0.0,
        "is_target_logit": node.kind == "logit",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{node.index}-{0 if node.kind == 'feature' else node.position}",
        "clerp": label,
        "influence": reached if node.kind != "logit" else None,
        "activation": node.activation,
    }


def _read(node: _Node, name: str) -> AttributionNode:
    kind = _KINDS.get(node.feature_type)
    parts = node.node_id.split("_")
    if kind is None or len(parts) != 3:
        raise FileError(
            f"{name}: node {node.node_id!r} of type {node.feature_type!r}; expected layer_feature_position, and one of {', '.join(_KINDS)}"
        )
    layer = -1 if kind in ("embedding", "logit") else int(node.layer)
    index = -1 if kind == "error" else int(parts[1])
    probability = node.token_prob if kind == "logit" else None
    return AttributionNode(kind, layer, index, node.ctx_idx, node.activation, probability, node.clerp)


def _paired(layer: int, feature: int) -> int:
    """One number for two (Cantor's pairing function), by which the viewers know features."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _plain(token: str) -> str:
    """A token without the quotes that people see."""
    return token[1:-1] if len(token) > 1 and token[0] == token[-1] and token[0] in "'\"" else token
