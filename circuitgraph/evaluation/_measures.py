"""The deeper measures by name: a new one is a file and a line here.

A measure is a frozen dataclass of hyper-parameters with one method, `measure(scale, circuit) -> Finding`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError, unknown_name
from circuitgraph.evaluation._completeness import Completeness
from circuitgraph.evaluation._curve import Curve
from circuitgraph.evaluation._hypotheses import HypothesisTests
from circuitgraph.evaluation._minimality import Minimality
from circuitgraph.evaluation._scale import Scale


class Finding(Protocol):
    """What a measure found."""

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Name and value of each line of a printed report."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; its protocol is among them."""
        ...


@runtime_checkable
class Measure(Protocol):
    """`name` is its key in a report."""

    @property
    def name(self) -> str: ...

    def measure(self, scale: Scale, circuit: Circuit) -> Finding: ...


MEASURES: dict[str, Callable[[], Measure]] = {
    "completeness": Completeness,
    "minimality": Minimality,
    "curve": Curve,
    "tests": HypothesisTests,
}


def measures_named(measures: Sequence[str | Measure]) -> tuple[Measure, ...]:
    """Measures by name with their defaults, or the measures themselves. Raises `UnknownNameError`.

    >>> [measure.name for measure in measures_named(["curve"])]
    ['curve']
    """
    if isinstance(measures, str):
        raise CircuitGraphError(f"measures: {measures!r}; expected a sequence of names, such as ({measures!r},)")
    chosen = tuple(_measure(measure) for measure in measures)
    names = [measure.name for measure in chosen]
    if len(set(names)) < len(names):
        raise CircuitGraphError(f"measures: {', '.join(names)}; expected each once")
    return chosen


def _measure(measure: str | Measure) -> Measure:
    if isinstance(measure, str):
        if measure not in MEASURES:
            raise unknown_name("measure", measure, MEASURES)
        return MEASURES[measure]()
    if isinstance(measure, type) or not isinstance(measure, Measure):
        raise CircuitGraphError(f"measure: {measure!r}; expected a name ({', '.join(MEASURES)}) or an instance such as Curve()")
    return measure
