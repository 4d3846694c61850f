"""What the algorithms that optimise a mask share: a loss to go down, its gradient, and how its curve is recorded."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._engine import Engine, WriterValues
from circuitgraph._errors import CircuitGraphError, DegenerateError
from circuitgraph._graph import Graph

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

RECORDS = 10  # how often on the way the loss of the circuit so far is measured


def loss(engine: Engine, mask: Any, *, source: WriterValues | None = None) -> float:
    """The mean metric under a mask, negated where higher is better."""
    values = np.asarray(engine.evaluate(np.asarray(mask, dtype=np.float32)[None], source=source), dtype=np.float64)
    return float(_sign(engine) * values.mean())


def gap(engine: Engine, *, source: WriterValues | None = None) -> float:
    """How far apart the losses of the model and of its source run are: the unit of a price. Raises `DegenerateError` for 0."""
    ends = np.stack([engine.graph.visible, np.zeros(engine.graph.shape)]).astype(np.float32)
    model, patched = np.asarray(engine.evaluate(ends, source=source), dtype=np.float64).mean(axis=1)
    if not abs(model - patched) > 0:
        raise DegenerateError(f"{engine.metric.name} is {model:.4g} in the model and in the source run, so no part of it is worth a price")
    return float(abs(model - patched))


def loss_gradient(
    engine: Engine, mask: Float[ndarray, "readers writers"], *, source: WriterValues | None = None
) -> Float[ndarray, "readers writers"]:
    """The gradient of `loss` in the mask; 0 at the model itself for a metric that is flat there."""
    visible = engine.graph.visible
    if _is_flat(engine, mask):
        return np.zeros(visible.shape)
    down = _downwards(engine, engine.gradient(mask.astype(np.float32), source=source))
    return np.where(visible, down, 0.0)


def source_slope(engine: Engine, mask: Float[ndarray, "readers writers"], source: WriterValues) -> Float[ndarray, "writers d_model"]:
    """The gradient of `loss` in constants that writers say where they are patched."""
    if _is_flat(engine, mask):
        n_writers, _, d_model = source[0].shape
        return np.zeros((n_writers, d_model))
    return _downwards(engine, engine.source_gradient(mask.astype(np.float32), source=source))


def _downwards(engine: Engine, gradient: Float[ndarray, "prompts ..."]) -> Float[ndarray, ...]:
    """The mean over prompts, of the loss."""
    mean: Float[ndarray, ...] = _sign(engine) * np.asarray(gradient, dtype=np.float64).mean(axis=0)
    if not np.isfinite(mean).all():
        raise CircuitGraphError(f"the gradient of {engine.metric.name} is not finite; check the model's weights and dtype")
    return mean


def _is_flat(engine: Engine, mask: Float[ndarray, "readers writers"]) -> bool:
    return engine.metric.flat_at_clean and bool((mask[engine.graph.visible] == 1).all())


def _sign(engine: Engine) -> float:
    return -1.0 if engine.metric.higher_is_better else 1.0


def n_wanted(target: float, graph: Graph) -> int:
    """A target as a number of edges: a whole number as it is, else that share of all edges."""
    if not isinstance(target, Integral):
        return max(1, round(target * graph.n_edges))
    if target > graph.n_edges:
        raise CircuitGraphError(f"target: {target} edges asked for, but the graph has {graph.n_edges}")
    return int(target)


def check_target(what: str, target: Any) -> None:
    """Raises `CircuitGraphError` unless it is a whole number of edges or a share of them."""
    is_whole, is_number = isinstance(target, Integral), isinstance(target, Real) and not isinstance(target, bool)
    if not is_number or target <= 0 or (not is_whole and not target <= 1):
        raise CircuitGraphError(f"{what} is {target!r}; expected a share of the edges, such as 0.05, or a whole number of them")


def is_record_due(step: int, steps: int) -> bool:
    """Whether the loss is measured after this step (the first is 1): `RECORDS` times, evenly, and after the last."""
    return step == steps or step * RECORDS // steps > (step - 1) * RECORDS // steps


def number(what: str, value: Any, *, above: float = -math.inf) -> None:
    """Raises `CircuitGraphError` unless the value is a finite number above a limit."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= above:
        limit = f" above {above:g}" if math.isfinite(above) else ""
        raise CircuitGraphError(f"{what} is {value!r}; expected a number{limit}")
