"""Circuits with nodes taken out, and the sets of nodes to take: what completeness and minimality have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError, unknown_name
from circuitgraph._graph import Graph
from circuitgraph._names import INPUTS
from circuitgraph.evaluation._protocol import Granularity

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray

NodeSet = frozenset[str]


def node_version(circuit: Circuit) -> Bool[ndarray, "readers writers"]:
    """Every edge between two nodes of the circuit: what patching whole nodes leaves live.

    >>> from circuitgraph._graph import Layer, transformer_graph
    >>> graph = transformer_graph([Layer(n_heads=0, n_kv_heads=0)])
    >>> chain = np.array([[True, False], [False, True]])                  # input->m0->logits
    >>> int(node_version(Circuit(graph, chain)).sum()), graph.n_edges     # and input->logits
    (3, 3)
    """
    graph, nodes = circuit.graph, set(circuit.nodes)
    writers = np.array([writer.node in nodes for writer in graph.writers])
    readers = np.array([not nodes.isdisjoint(graph.nodes_of(reader)) for reader in graph.readers])
    between: Bool[ndarray, "readers writers"] = graph.visible & readers[:, None] & writers[None]
    return between


def mask_of(circuit: Circuit, granularity: Granularity) -> Bool[ndarray, "readers writers"]:
    """The circuit's edges, or all edges between its nodes."""
    return circuit.mask if granularity == "edge" else node_version(circuit)


def without(graph: Graph, mask: Bool[ndarray, "readers writers"], nodes: Collection[str]) -> Bool[ndarray, "readers writers"]:
    """The mask with nodes knocked out: nobody reads them any more."""
    live = np.array([writer.node not in nodes for writer in graph.writers])
    rest: Bool[ndarray, "readers writers"] = mask & live[None]
    return rest


def parts_of(circuit: Circuit, what: str) -> tuple[str, ...]:
    """The heads and MLPs of a circuit. Raises `CircuitGraphError` where there is none."""
    parts = tuple(node for node in circuit.nodes if node not in (*INPUTS, "logits"))
    if not parts:
        raise CircuitGraphError(f"{what}: the circuit has no head and no MLP that could be knocked out")
    return parts


def roles_of(circuit: Circuit, roles: Mapping[str, Sequence[str]] | None) -> dict[str, NodeSet]:
    """The parts of a circuit by role; without roles, its heads and its MLPs. Roles without a part in the circuit are left out."""
    parts = [node for node in circuit.nodes if node not in (*INPUTS, "logits")]
    if roles is None:
        kinds = {"heads": [node for node in parts if "." in node], "MLPs": [node for node in parts if "." not in node]}
        return {kind: frozenset(nodes) for kind, nodes in kinds.items() if nodes}
    for node in (node for nodes in roles.values() for node in nodes):
        if node not in circuit.graph.nodes:
            raise unknown_name("node of a role", node, circuit.graph.nodes)
    chosen = {role: frozenset(nodes).intersection(parts) for role, nodes in roles.items()}
    return {role: nodes for role, nodes in chosen.items() if nodes}


def sampled_sets(parts: Sequence[str], n: int, draw: np.random.Generator) -> list[NodeSet]:
    """`n` sets that each part is in with probability 1/2; every set where there are no more than `n`."""
    if 2 ** len(parts) <= n:
        return [*subsets(parts)]
    return [frozenset(np.array(parts)[draw.random(len(parts)) < 0.5].tolist()) for _ in range(n)]


def subsets(parts: Sequence[str]) -> Iterator[NodeSet]:
    """Every set, the smallest first."""
    for size in range(len(parts) + 1):
        yield from map(frozenset, combinations(parts, size))


def some(parts: Collection[str], n: int, draw: np.random.Generator) -> list[str]:
    """At most `n` of them at random."""
    ordered = sorted(parts)
    return ordered if len(ordered) <= n else [ordered[i] for i in draw.choice(len(ordered), n, replace=False)]


def named(nodes: Collection[str], at_most: int = 6) -> str:
    """A set of nodes for a line of a report."""
    first = ", ".join(sorted(nodes)[:at_most]) or "nothing"
    return f"{first} and {len(nodes) - at_most} more" if len(nodes) > at_most else first


def plain(values: Any) -> list[float]:
    """Floats for JSON."""
    return [float(value) for value in values]
