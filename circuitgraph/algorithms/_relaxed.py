"""What the algorithms that optimise a mask share: a loss to go down, its gradient, and how its curve is recorded."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._engine import Engine, WriterValues
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

RECORDS = 10  # how often on the way the loss of the circuit so far is measured


def loss(engine: Engine, mask: Any, *, source: WriterValues | None = None) -> float:
    """The mean metric under a mask, negated where higher is better."""
    values = np.asarray(engine.evaluate(np.asarray(mask, dtype=np.float32)[None], source=source), dtype=np.float64)
    return float(_sign(engine) * values.mean())


def loss_gradient(
    engine: Engine, mask: Float[ndarray, "readers writers"], *, source: WriterValues | None = None
) -> Float[ndarray, "readers writers"]:
    """The gradient of `loss` in the mask; 0 at the model itself for a metric that is flat there."""
    visible = engine.graph.visible
    if engine.metric.flat_at_clean and bool((mask[visible] == 1).all()):
        return np.zeros(visible.shape)
    gradient = np.asarray(engine.gradient(mask.astype(np.float32), source=source), dtype=np.float64).mean(axis=0)
    if not np.isfinite(gradient[visible]).all():
        raise CircuitGraphError(f"the gradient of {engine.metric.name} in the mask is not finite; check the model's weights and dtype")
    return np.where(visible, _sign(engine) * gradient, 0.0)


def _sign(engine: Engine) -> float:
    return -1.0 if engine.metric.higher_is_better else 1.0


def strongest(scores: Float[ndarray, "readers writers"], graph: Graph, n: int) -> Bool[ndarray, "readers writers"]:
    """The `n` visible edges of largest score; of equal ones the first."""
    order = np.argsort(np.where(graph.visible, -scores, np.inf), axis=None, kind="stable")
    kept = np.zeros(graph.visible.size, dtype=bool)
    kept[order[:n]] = True
    return kept.reshape(graph.shape) & graph.visible


def n_wanted(target: float, graph: Graph) -> int:
    """A target as a number of edges: a whole number as it is, else that share of all edges."""
    if not isinstance(target, Integral):
        return max(1, round(target * graph.n_edges))
    if target > graph.n_edges:
        raise CircuitGraphError(f"target: {target} edges asked for, but the graph has {graph.n_edges}")
    return int(target)


def check_target(what: str, target: Any) -> None:
    """Raises `CircuitGraphError` unless it is a whole number of edges or a share of them."""
    is_count = isinstance(target, Integral) and not isinstance(target, bool) and target >= 1
    is_share = isinstance(target, Real) and not isinstance(target, Integral) and 0 < target <= 1
    if not is_count and not is_share:
        raise CircuitGraphError(f"{what} is {target!r}; expected a share of the edges, such as 0.05, or a whole number of them")


def is_record_due(step: int, steps: int) -> bool:
    """Whether the loss is measured after this step (the first is 1): `RECORDS` times, evenly, and after the last."""
    return step == steps or step * RECORDS // steps > (step - 1) * RECORDS // steps


def number(what: str, value: Any, *, above: float = -math.inf) -> None:
    """Raises `CircuitGraphError` unless the value is a finite number above a limit."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= above:
        limit = f" above {above:g}" if math.isfinite(above) else ""
        raise CircuitGraphError(f"{what} is {value!r}; expected a number{limit}")
