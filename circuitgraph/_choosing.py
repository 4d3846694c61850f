"""What is said in text about an algorithm and about choosing from its scores, as an algorithm. For the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from circuitgraph import _discover, _plugins
from circuitgraph._engine import Engine, Outcome
from circuitgraph._errors import CircuitGraphError, unknown_name
from circuitgraph.algorithms import ACDC, Selected
from circuitgraph.selection import Greedy, IntegerProgram, Selector, SignConsistent, SignedTopN, Threshold, TopN, default_size

ACDC_THRESHOLD = 0.01
SELECTORS: dict[str, type[Selector]] = {
    "top": TopN,
    "signed-top": SignedTopN,
    "greedy": Greedy,
    "sign-consistent": SignConsistent,
    "integer-program": IntegerProgram,
}


@dataclass(frozen=True)
class Choosing:
    """The options that say which edges to keep, None where not given."""

    threshold: float | None = None
    top: int | None = None
    select: str | None = None
    faithfulness: float | None = None

    def given(self, *names: str) -> list[str]:
        return [f"--{name}" for name in names if getattr(self, name) is not None]


def algorithm(name: str, settings: Sequence[str], choosing: Choosing) -> tuple[Any, Any]:
    """The algorithm, and how to choose from what it scored where no selector is asked for (else None).

    An algorithm that cannot do without a threshold decides edge by edge. A threshold is the algorithm's own where it has one.
    """
    hyper = _plugins.settings(name, settings)
    decides = "threshold" in _plugins.required(name)
    if decides and (given := choosing.given("top", "select", "faithfulness")):
        raise CircuitGraphError(f"{name} decides edge by edge, so it takes --threshold and no {' or '.join(given)}")
    if "threshold" in _plugins.hyper_parameters(name) and choosing.threshold is not None:
        if "threshold" in hyper:
            raise CircuitGraphError(f"--threshold and --set threshold=... are one setting of {name}; give one")
        hyper["threshold"] = choosing.threshold
        choosing = replace(choosing, threshold=None)
    elif decides and _plugins.algorithm_named(name) is ACDC:
        hyper.setdefault("threshold", ACDC_THRESHOLD)
    method = _plugins.new_algorithm(name, **hyper)
    return (method, None) if decides else _chosen(method, choosing)


def _chosen(method: Any, choosing: Choosing) -> tuple[Any, Any]:
    for first, *others in (("threshold", "top", "select", "faithfulness"), ("top", "faithfulness")):
        if choosing.given(first) and (clash := choosing.given(*others)):
            raise CircuitGraphError(f"--{first} and {' and '.join(clash)} exclude each other; give one")
    if not choosing.given("select", "faithfulness"):
        return method, partial(_discover.strongest, top=choosing.top, threshold=choosing.threshold)
    if choosing.select not in (None, *SELECTORS):
        raise unknown_name("selector", choosing.select, SELECTORS)
    return Selected(method, SELECTORS[choosing.select or "top"](), size=choosing.top, faithfulness=choosing.faithfulness), None


def deciding(name: str, settings: Sequence[str], choosing: Choosing) -> Any:
    """The algorithm as one that keeps some edges only, for what repeats it and looks at its circuits."""
    method, choose = algorithm(name, settings, choosing)
    if choose is None:
        return method
    if choosing.threshold is not None:
        return Selected(method, Threshold(choosing.threshold))
    return Decided(method) if choosing.top is None else Selected(method, size=choosing.top)


@dataclass(frozen=True)
class Decided:
    """What an algorithm decided on; of one that keeps every edge, the strongest, by default as many as `discover` keeps."""

    algorithm: Any

    @property
    def default_metric(self) -> str | None:
        """That of the algorithm."""
        return getattr(self.algorithm, "default_metric", None)

    def run(self, engine: Engine) -> Outcome:
        outcome: Outcome = self.algorithm.run(engine)
        graph = outcome.graph or engine.graph
        if not outcome.mask[graph.visible].all():
            return outcome
        return replace(outcome, mask=graph.prune_dead(TopN().choose(graph, outcome, default_size(graph.n_edges)).mask))


def named(text: str) -> tuple[str, Any]:
    """An algorithm and what to call it, from `eap-ig` or, with hyper-parameters, `eap-ig:path=mask:points=16`.

    >>> named("eap-ig:points=2")
    ('eap-ig:points=2', EAPIG(path='inputs', points=2, quadrature='midpoint'))
    """
    name, *settings = text.split(":")
    return text, algorithm(name, settings, Choosing())[0]


def sized(method: Any, n_edges: int) -> Any:
    """The algorithm for a graph: one that chooses and was told neither a size nor a target takes the default size."""
    if isinstance(method, Selected) and method.size is method.faithfulness is None:
        return replace(method, size=default_size(n_edges))
    return method
