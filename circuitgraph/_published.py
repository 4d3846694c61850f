"""Circuits that people have published, each a small JSON file: heads by their role, edges by rules between roles.

    {"about": TEXT, "paper": TEXT, "edges_by": TEXT,
     "model": {"name": TEXT, "layers": N, "heads": N, "mlps": BOOL},
     "roles": {ROLE: [node, ...]},
     "edges": [{"from": [role or node, ...], "to": [role or node, ...], "inputs": "qkv"}, ...]}

A rule stands for every edge that the graph has from one of the writers to one of the readers; `inputs` says which inputs of heads are read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError, unknown_name
from circuitgraph._graph import Graph, Layer, transformer_graph
from circuitgraph._task_files import builtin_folder

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray

Content = Mapping[str, Any]


def reference_circuits() -> dict[str, str]:
    """What each published circuit is about, by name."""
    return {name: _content(path)["about"] for name, path in _files().items()}


def reference_circuit(name: str, *, graph: Graph | None = None) -> Circuit:
    """A published circuit, on the graph of the model that it was found in: `ioi`, `greater-than` or `docstring`.

    `record["roles"]` has the nodes of each role; the provenance names the paper and the model. `graph`: a model's own, to make sure that it
    has this shape. Raises `UnknownNameError`, and `CircuitGraphError` for a graph of another shape. What people wrote down about a circuit
    is theirs: the edges are those of ACDC's authors, who had to decide more than the papers say.

    >>> circuit = reference_circuit("ioi")
    >>> circuit, circuit.record["roles"]["name mover"]
    (Circuit(963 of 32,491 edges, 40 of 158 nodes, no scores), ['a9.h9', 'a10.h0', 'a9.h6'])
    """
    files = _files()
    if name not in files:
        raise unknown_name("reference circuit", name, files)
    content = _content(files[name])
    model = content["model"]
    layer = Layer(model["heads"], model["heads"], has_mlp=model["mlps"])
    own = transformer_graph([layer] * model["layers"])
    if graph is not None and graph != own:
        raise CircuitGraphError(
            f"reference circuit {name} is of {model['name']}, which has {_shape(own)}; the graph given has {_shape(graph)}, "
            "where its nodes do not mean the same"
        )
    provenance = {"reference": name, **{key: content[key] for key in ("about", "paper", "edges_by", "model")}}
    return Circuit(own, _mask(own, content), provenance=provenance, record={"roles": content["roles"]})


def _files() -> dict[str, Path]:
    return {path.stem: path for path in sorted((builtin_folder() / "circuits").glob("*.json"))}


def _content(path: Path) -> Content:
    content: Content = json.loads(path.read_text(encoding="utf-8"))
    return content


def _mask(graph: Graph, content: Content) -> Bool[ndarray, "readers writers"]:
    mask = np.zeros(graph.shape, dtype=bool)
    for rule in content["edges"]:
        writers = [graph.writer_id(node) for node in _nodes(content, rule["from"])]
        readers = [r for node in _nodes(content, rule["to"]) for r in _readers(graph, node, rule.get("inputs", ""))]
        mask[np.ix_(readers, writers)] = True
    mask &= graph.visible
    return mask


def _nodes(content: Content, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        yield from content["roles"].get(name, [name])


def _readers(graph: Graph, node: str, inputs: str) -> Iterator[int]:
    names = [f"{node}<{kind}>" for kind in inputs] if node.startswith("a") else [node]
    yield from map(graph.reader_id, names)


def _shape(graph: Graph) -> str:
    """Its size in the words of a model."""
    heads = Counter(writer.layer for writer in graph.writers if writer.kind == "head")
    mlps = sum(writer.kind == "mlp" for writer in graph.writers)
    per_layer = " or ".join(map(str, sorted(set(heads.values())))) or "no"
    layers = 1 + max((writer.layer for writer in graph.writers), default=-1)
    return f"{layers} layers of {per_layer} heads, {mlps} MLPs and {graph.n_edges:,} edges"
