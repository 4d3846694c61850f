"""A circuit of parts as one of whole components, and the other way round."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError, UnknownNameError
from circuitgraph._graph import Graph
from circuitgraph._names import Reader, Writer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray


def merged(circuit: Circuit, graph: Graph) -> Circuit:
    """The same circuit on the graph that was refined: an edge is kept if one of its parts is, and its score is the sum of theirs.

    A transcoder's features read what their MLP reads. What a feature of a cross-layer transcoder says at a later MLP is a part of that one;
    that it comes from the input of an earlier one, no edge between whole components says, so `prune_dead` may find it unreached there.
    Parts of an attention stand for all of its heads, among which their scores are shared out alike.
    Raises `CircuitGraphError` for a circuit on parts of the stream, which no component of the graph says.
    """
    rows, columns = _places(circuit.graph, graph)
    mask = (rows.T @ circuit.mask @ columns > 0) & graph.visible
    scores = None
    if circuit.scores is not None:
        shares = columns / columns.sum(axis=1, keepdims=True)
        scores = np.where(graph.visible, rows.T @ np.nan_to_num(circuit.scores) @ shares, 0.0)
    return Circuit(graph, mask, scores, circuit.provenance, circuit.record)


def divided(circuit: Circuit, graph: Graph) -> Circuit:
    """A circuit on a refined graph, with every part of each edge that it keeps; without scores, which parts do not share alike."""
    rows, columns = _places(graph, circuit.graph)
    return Circuit(graph, (rows @ circuit.mask @ columns.T > 0) & graph.visible, None, circuit.provenance, circuit.record)


def _places(fine: Graph, coarse: Graph) -> tuple[Float[ndarray, "fine coarse"], Float[ndarray, "fine coarse"]]:
    """1 where a reader, and a writer, of the refined graph stands for one of the other."""
    if any(writer.part_of == "r" for writer in fine.writers):
        raise CircuitGraphError("merged: parts of the stream belong to no component; discover on the graph as it was traced")
    rows, columns = [_reads_for(r, coarse) for r in fine.readers], [_is_whole(w, coarse) for w in fine.writers]
    return np.stack(rows).astype(float), np.stack(columns).astype(float)


def _is_whole(writer: Writer, graph: Graph) -> Bool[ndarray, " writers"]:
    """Of what a writer is a part: itself, its MLP, or every head of its attention."""
    kind = {"m": "mlp", "a": "head"}.get(writer.part_of or "")
    found = np.array([other == writer or (other.layer == writer.layer and other.kind == kind) for other in graph.writers])
    if not found.any():
        raise UnknownNameError(f"merged: the graph has nothing that {writer} is a part of; give the graph that was refined")
    return found


def _reads_for(reader: Reader, graph: Graph) -> Bool[ndarray, " readers"]:
    whole = Reader("mlp", reader.layer) if reader.kind == "feature" else reader
    is_it: Bool[ndarray, " readers"] = np.arange(len(graph.readers)) == graph.reader_id(whole)
    return is_it
