"""Faithfulness along circuit size, and the two areas of the MIB benchmark: CPR and CMD (Mueller et al. 2025, arXiv:2504.13151)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph
from circuitgraph.evaluation._bootstrap import Estimate, interval_of, resampled_means, rounded
from circuitgraph.evaluation._protocol import Axis, Protocol, Ranking
from circuitgraph.evaluation._scale import Scale

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

MIB_GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Point:
    """One size. `fraction` is its place on the axis, `edges` how many were asked for, `live` how many of them lie on a path."""

    fraction: float
    edges: int
    live: int
    faithfulness: Estimate


@dataclass(frozen=True)
class Area:
    """An area over the sizes. Its protocol says which ranking and which axis."""

    name: str
    estimate: Estimate
    protocol: Protocol

    @property
    def value(self) -> float:
        return self.estimate.value


@dataclass(frozen=True)
class FaithfulnessCurve:
    """Faithfulness per size, for the signed and for the absolute ranking, and the areas, always together.

    `cpr` (circuit performance ratio) is the area under `f` for the signed ranking: more is better, without a bound; it rewards leaving out
    edges that work against the behaviour. `cmd` (circuit-model distance) is the area of `|1 - f|` for the absolute ranking: less is better,
    0 is the model at every size. On the linear axis half of the weight lies above 50% of the edges; `cpr_log` and `cmd_log` give each
    factor in size the same weight, as a mean over the log axis. Intervals are 95% bootstrap intervals over prompts.
    """

    signed: tuple[Point, ...]
    absolute: tuple[Point, ...]
    cpr: Area
    cmd: Area
    cpr_log: Area
    cmd_log: Area
    mib_compat: bool
    protocol: Protocol

    @property
    def areas(self) -> tuple[Area, ...]:
        return self.cpr, self.cmd, self.cpr_log, self.cmd_log

    def rows(self) -> tuple[tuple[str, str], ...]:
        """The areas, and faithfulness by size."""
        compat = ", as MIB computes it" if self.mib_compat else ""
        areas = [(f"{area.name}, {area.protocol.axis} axis{compat}", f"{area.estimate}; {_READING[area.name]}") for area in self.areas]
        points = [
            (
                f"faithfulness at {a.fraction:.1%} ({a.edges} edges)",
                f"{rounded(s.faithfulness.value)} signed, {rounded(a.faithfulness.value)} absolute",
            )
            for s, a in zip(self.signed, self.absolute, strict=True)
        ]
        return (*areas, *points)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_READING = {"CPR": "more is better", "CMD": "less is better"}


@dataclass(frozen=True)
class Curve:
    """The measure: circuits of the edges with the largest scores, at the sizes of `grid` (fractions of all edges).

    Of `n` edges, `int(fraction * n)` are taken, ties by lower id, unscored edges last; then those without a path from input to logits are
    dropped, and `f` is taken as in a report. Areas are trapezoids over the true fraction of edges taken, from 0, where `f` is 0 by
    definition, to 1; on the log axis from one edge or the first of the grid, and divided by the axis' length.

    With `mib_compat` they are those of MIB's code: over the grid's own numbers, even where a small graph has no such size, from the first
    of them on, and on the log axis not divided by its length. MIB also scores collections of circuits: it sorts them by size, gives the
    i-th the i-th number of the grid whatever its size, and adds `f = 1` at the end; that is not a curve of one ranking and not done here.

    Cost: one forward pass per size and ranking.

    >>> from circuitgraph.algorithms import EAP
    >>> from circuitgraph.testing import ReferenceModel, random_pairs
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(random_pairs(3, lengths=[3]), "logit_diff")
    >>> scale = Scale(engine, engine.graph, Protocol("logit_diff", prompts=1))
    >>> curve = Curve().measure(scale, Circuit(engine.graph, engine.graph.visible, EAP().run(engine).scores))
    >>> [point.edges for point in curve.signed]
    [0, 1, 2, 6, 13]
    """

    name: ClassVar[str] = "curve"

    grid: Sequence[float] = MIB_GRID
    mib_compat: bool = False

    def __post_init__(self) -> None:
        grid = np.asarray(self.grid, dtype=float)
        if grid.ndim != 1 or len(grid) < 2 or not (np.diff(grid) > 0).all() or not (grid[0] > 0 and grid[-1] == 1):
            raise CircuitGraphError(f"curve: grid is {self.grid!r}; expected rising fractions above 0, the last of them 1")
        object.__setattr__(self, "grid", tuple(grid.tolist()))

    def measure(self, scale: Scale, circuit: Circuit) -> FaithfulnessCurve:
        if circuit.scores is None:
            raise CircuitGraphError(
                "curve: this circuit has no scores to rank edges by; take one from an algorithm that scores edges, such as eap"
            )
        graph, sizes = scale.graph, self._sizes(scale.graph.n_edges)
        masks = [graph.prune_dead(top(graph, circuit.scores, n, ranking)) for ranking in get_args(Ranking) for _, n in sizes]
        metrics = scale.metrics(masks)
        points = [
            Point(x, n, int(mask.sum()), scale.placed(metric))
            for (x, n), mask, metric in zip([*sizes, *sizes], masks, metrics, strict=True)
        ]
        half = len(sizes)
        curves = {"CPR": metrics[:half], "CMD": metrics[half:]}
        cpr, cmd, cpr_log, cmd_log = (
            self._area(scale, name, axis, [x for x, _ in sizes], curves[name]) for axis in get_args(Axis) for name in curves
        )
        return FaithfulnessCurve(tuple(points[:half]), tuple(points[half:]), cpr, cmd, cpr_log, cmd_log, self.mib_compat, scale.protocol)

    def _sizes(self, n_edges: int) -> list[tuple[float, int]]:
        """Places on the axis and numbers of edges."""
        taken = [(fraction, int(fraction * n_edges)) for fraction in self.grid]
        return taken if self.mib_compat else [(n / n_edges, n) for n in sorted({0, *(n for _, n in taken)})]

    def _area(self, scale: Scale, name: str, axis: Axis, sizes: Sequence[float], metrics: Float[ndarray, "sizes prompts"]) -> Area:
        samples = np.stack([scale.source, scale.model, *metrics])
        value = self._area_of(samples.mean(axis=1)[None], name, axis, sizes)[0]
        interval = None
        if samples.shape[1] > 1:
            interval = interval_of(self._area_of(resampled_means(samples, seed=scale.seed), name, axis, sizes))
        ranking: Ranking = "signed" if name == "CPR" else "absolute"
        return Area(name, Estimate(float(value), interval), dataclasses.replace(scale.protocol, ranking=ranking, axis=axis))

    def _area_of(
        self, means: Float[ndarray, "samples quantities"], name: str, axis: Axis, sizes: Sequence[float]
    ) -> Float[ndarray, " samples"]:
        """The area of each sample of means: those of source run, model, and the circuit of each size."""
        source, model, circuits = means[:, :1], means[:, 1:2], means[:, 2:]
        with np.errstate(divide="ignore", invalid="ignore"):
            f = (circuits - source) / (model - source)
        heights, x = f if name == "CPR" else np.abs(1 - f), np.asarray(sizes)
        area: Float[ndarray, " samples"]
        if axis == "linear":
            area = np.trapezoid(heights, x, axis=1)
            return area
        heights, x = heights[:, x > 0], np.log(x[x > 0])
        if len(x) == 1:
            area = heights[:, 0]  # a graph of one edge has one size
            return area
        area = np.trapezoid(heights, x, axis=1) / (1.0 if self.mib_compat else x[-1] - x[0])
        return area


def top(graph: Graph, scores: Float[ndarray, "readers writers"], n: int, ranking: Ranking) -> Bool[ndarray, "readers writers"]:
    """The `n` edges with the largest score, or |score|; ties go to the lower id, edges without a score come last.

    >>> from circuitgraph._graph import Layer, transformer_graph
    >>> graph = transformer_graph([Layer(n_heads=0, n_kv_heads=0)])   # input->m0, input->logits, m0->logits
    >>> scores = np.array([[1.0, 0.0], [2.0, -3.0]])
    >>> [str(graph.edges_of(top(graph, scores, 1, ranking))[0]) for ranking in ("signed", "absolute")]
    ['input->logits', 'm0->logits']
    """
    ranked = scores[graph.visible] if ranking == "signed" else np.abs(scores[graph.visible])
    mask = np.zeros(graph.shape, dtype=bool)
    mask.flat[np.flatnonzero(graph.visible)[np.argsort(-ranked, kind="stable")[:n]]] = True
    return mask
