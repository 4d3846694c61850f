"""`--refine`: a model in parts, for the commands that trace one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from circuitgraph import features
from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph
from circuitgraph._names import Component
from circuitgraph.features import Dictionary, Neurons, Refinement

Refine = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PART=DICTIONARY",
        help="Put a component in parts: m1=neurons, or by the features of a dictionary: m1=FOLDER, m1=REPOSITORY@FOLDER or m1=RELEASE@ID. "
        "A folder of transcoders alone does all MLPs. Can be repeated.",
    ),
]
Features = Annotated[
    int, typer.Option(min=1, help="With --refine: how many features of each component become nodes, those that say the most.")
]

Dictionaries = Mapping[str, Dictionary | Neurons]
_RECORD = "refine"  # in a circuit's provenance: what was asked for


def dictionaries(asked: Sequence[str]) -> Dictionaries:
    """By component. Raises `CircuitGraphError` or `FileError` for what is no dictionary."""
    found: dict[str, Dictionary | Neurons] = {}
    for one in asked:
        for name, dictionary in _read(one):
            if name in found:
                raise CircuitGraphError(f"--refine {one}: {name} is in parts already; give one dictionary for each component")
            found[name] = dictionary
    return found


def recorded(circuit: Circuit, asked: Sequence[str]) -> Circuit:
    """A circuit that says how its model came to be in parts."""
    return replace(circuit, provenance={**circuit.provenance, _RECORD: [*asked]}) if asked else circuit


def asked_before(circuit: Circuit, file: Path) -> Sequence[str]:
    """How the model of a circuit came to be in parts. Raises `CircuitGraphError` where it is and the circuit does not say."""
    asked: Sequence[str] = circuit.provenance.get(_RECORD) or []
    if (components := _in_parts(circuit.graph)) and not asked:
        raise CircuitGraphError(f"{file} was found on a model with {', '.join(components)} in parts; add --refine for each of them")
    return asked


def in_the_same_parts(traced: Any, circuit: Circuit, chosen: Dictionaries) -> Any:
    """The model with the parts that a circuit's graph has. Raises `CircuitGraphError` for a dictionary that has changed since."""
    if missing := [name for name in _in_parts(circuit.graph) if name not in chosen]:
        raise CircuitGraphError(f"the circuit was found on a model with {missing[0]} in parts too; add --refine {missing[0]}=DICTIONARY")
    before = {one["component"]: one for one in (circuit.provenance.get("model") or {}).get("refined", [])}
    for name, dictionary in chosen.items():
        then = before.get(name, {}).get("sha256")
        if then is not None and (isinstance(dictionary, Neurons) or dictionary.sha256() != then):
            raise CircuitGraphError(
                f"--refine {name}: {dictionary.name} is not the dictionary that the circuit was found with ({then[:8]}); give that one"
            )
    refinements = (_as_in(circuit.graph, Component.parse(name), dictionary) for name, dictionary in chosen.items())
    return traced.refined([one for one in refinements if one is not None])


def _in_parts(graph: Graph) -> list[str]:
    """The components that a graph has in parts."""
    return [*dict.fromkeys(writer.component.name for writer in graph.writers if writer.component is not None)]


def _as_in(graph: Graph, component: Component, dictionary: Dictionary | Neurons) -> Refinement | None:
    """None for a layer of transcoders of which the search made no nodes."""
    parts = [writer for writer in graph.writers if writer.component == component and writer.origin < 0]
    if not parts and dictionary.is_transcoder:
        return None
    if not parts:
        raise CircuitGraphError(f"--refine {component}: the circuit has {component} whole")
    if isinstance(dictionary, Neurons) and not any(writer.kind == "error" for writer in parts):
        dictionary = replace(dictionary, n_features=len(parts))
    return Refinement(component, dictionary, tuple(writer.index for writer in parts if writer.index >= 0))


def _read(asked: str) -> Iterator[tuple[str, Dictionary | Neurons]]:
    name, equals, source = asked.partition("=")
    if not equals and not Path(name).is_dir() and "/" not in name:
        raise CircuitGraphError(f"--refine {asked}: expected a component and a dictionary, such as m1=neurons, or a folder of transcoders")
    if not equals:
        yield from features.load_transcoders(name).items()
    elif source == "neurons":
        yield name, Neurons()
    else:
        place, at, sae_id = source.rpartition("@")
        yield name, features.load_dictionary(place, sae_id) if at and not Path(source).is_dir() else features.load_dictionary(source)
