"""How sure the score of each edge is: intervals and signs over resampled prompts, all together and template by template.

Prompts are drawn with replacement inside each stratum (a stratified bootstrap, Efron & Tibshirani 1993), so that every resample has as many
prompts of each template as the data. Templates whose names differ in a number only, `ABBA 1` and `ABBA 2`, are one stratum.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._engine import Algorithm, Source, SourceKind, checked_algorithm
from circuitgraph._errors import CircuitGraphError
from circuitgraph._graph import Graph
from circuitgraph._metrics import Metric
from circuitgraph._pairs import PromptPairs
from circuitgraph.evaluation._bootstrap import CONFIDENCE
from circuitgraph.evaluation._columns import aligned
from circuitgraph.evaluation._question import pose

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray
    from rich.table import Table

    from circuitgraph._task import Task

RESAMPLES = 1000
_CHUNK_BYTES = 1 << 27  # resampled means of so many edges are held at once


@dataclass(frozen=True, eq=False)
class EdgeConfidence:
    """Per edge `[readers, writers]`: the mean score, its 95% bootstrap interval, and the share of resamples that keep the mean's sign.

    `strata`: the mean score of each template's prompts alone, by the template's name. `sign_agrees`: where all of these have one sign.
    """

    graph: Graph
    mean: Float[ndarray, "readers writers"]
    low: Float[ndarray, "readers writers"]
    high: Float[ndarray, "readers writers"]
    sign_consistency: Float[ndarray, "readers writers"]
    strata: Mapping[str, Float[ndarray, "readers writers"]]

    @property
    def sign_agrees(self) -> Bool[ndarray, "readers writers"]:
        """Edges whose score has the same sign in every stratum."""
        signs = np.sign([*self.strata.values()])
        agrees: Bool[ndarray, "readers writers"] = (signs == signs[0]).all(axis=0) & self.graph.visible
        return agrees

    def table(self, n: int = 20) -> Table:
        """The rows for people."""
        from rich.table import Table

        heading, *rows = self._lines(n)
        table = Table(*heading, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        rows = self._lines(20)
        return f"{aligned(rows)}\n{len(rows) - 1} of {self.graph.n_edges:,} edges, the strongest first"

    def _lines(self, n: int) -> list[tuple[str, ...]]:
        """A heading and the rows; a column for each stratum if there are several."""
        named = [name for name in self.strata if name != "all"]
        heading = ("edge", "score", f"{CONFIDENCE:.0%} interval", "sign kept")
        return [(*heading, *named), *(row if named else row[: len(heading)] for row in self.rows(n))]

    def to_dict(self) -> dict[str, Any]:
        """Every edge of the graph, ready for JSON."""
        return {
            f"{self.graph.writers[w]}->{self.graph.readers[r]}": {
                "score": float(self.mean[r, w]),
                "interval": [float(self.low[r, w]), float(self.high[r, w])],
                "sign_consistency": float(self.sign_consistency[r, w]),
                "strata": {name: float(scores[r, w]) for name, scores in self.strata.items()},
            }
            for r, w in np.argwhere(self.graph.visible)
        }

    def rows(self, n: int = 20) -> tuple[tuple[str, ...], ...]:
        """The `n` edges of the largest mean: name, score, interval, sign consistency, and the score in each stratum; as text."""
        order = np.argsort(-np.where(self.graph.visible, np.abs(self.mean), -1).ravel(), kind="stable")
        places = [divmod(int(i), self.graph.shape[1]) for i in order[: min(n, self.graph.n_edges)]]
        return tuple(
            (
                f"{self.graph.writers[w]}->{self.graph.readers[r]}",
                f"{self.mean[r, w]:.4g}",
                f"{self.low[r, w]:.4g} to {self.high[r, w]:.4g}",
                f"{self.sign_consistency[r, w]:.0%}",
                *(f"{scores[r, w]:.4g}" for scores in self.strata.values()),
            )
            for r, w in places
        )


def edge_confidence(
    graph: Graph, prompt_scores: Float[ndarray, "prompts readers writers"] | None, *, templates: Sequence[str] = (), seed: int = 0
) -> EdgeConfidence:
    """How sure each score is, from the scores of single prompts (`Outcome.prompt_scores`) and the prompts' templates.

    >>> from circuitgraph._graph import Layer, transformer_graph
    >>> graph = transformer_graph([Layer(n_heads=1, n_kv_heads=1)])
    >>> scores = np.stack([graph.visible * 1.0, graph.visible * 3.0])
    >>> sure = edge_confidence(graph, scores, templates=("ABBA 1", "BABA 1"))
    >>> sure.mean[-1, 0], sure.sign_consistency[-1, 0], [*sure.strata]
    (np.float64(2.0), np.float64(1.0), ['ABBA', 'BABA'])
    """
    if prompt_scores is None:
        raise CircuitGraphError("edge confidence: the algorithm gave no scores per prompt; use one that averages over prompts, such as eap")
    scores = np.asarray(prompt_scores)
    if scores.shape[1:] != graph.shape or len(scores) < 2:
        raise CircuitGraphError(f"edge confidence: scores of shape {scores.shape}; expected those of 2 prompts or more, {graph.shape} each")
    if templates and len(templates) != len(scores):
        raise CircuitGraphError(f"edge confidence: {len(templates)} templates for {len(scores)} prompts; expected one each")
    groups = strata_of(templates or [""] * len(scores))
    flat = scores[:, graph.visible].astype(np.float64)
    weights = _resampled_weights(groups, len(scores), seed)
    low, high, consistent = _resampled(flat, weights)

    def spread(values: Float[ndarray, " edges"]) -> Float[ndarray, "readers writers"]:
        matrix = np.zeros(graph.shape)
        matrix[graph.visible] = values
        return matrix

    means = {name or "all": spread(flat[rows].mean(axis=0)) for name, rows in groups.items()}
    return EdgeConfidence(graph, spread(flat.mean(axis=0)), spread(low), spread(high), spread(consistent), means)


def strata_of(templates: Sequence[str]) -> dict[str, list[int]]:
    """The prompts of each stratum: templates whose names differ in a number at the end only are one.

    >>> strata_of(["ABBA 1", "BABA 1", "ABBA 2"])
    {'ABBA': [0, 2], 'BABA': [1]}
    """
    groups: dict[str, list[int]] = {}
    for i, template in enumerate(templates):
        groups.setdefault(re.sub(r"[\s_-]*\d+$", "", template) or template, []).append(i)
    return groups


def _resampled_weights(groups: Mapping[str, Sequence[int]], n: int, seed: int) -> Float[ndarray, "resamples prompts"]:
    """How much each prompt counts in the mean of each resample."""
    rng, weights = np.random.default_rng(seed), np.zeros((RESAMPLES, n))
    for rows in groups.values():
        weights[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES) / n
    return weights


def _resampled(
    scores: Float[ndarray, "prompts edges"], weights: Float[ndarray, "resamples prompts"]
) -> tuple[Float[ndarray, " edges"], Float[ndarray, " edges"], Float[ndarray, " edges"]]:
    """Percentiles of the resampled means, and the share of them on the mean's side of 0."""
    n_edges = scores.shape[1]
    low, high, consistent = np.empty(n_edges), np.empty(n_edges), np.empty(n_edges)
    tail, step = (1 - CONFIDENCE) / 2, max(1, _CHUNK_BYTES // (8 * RESAMPLES))
    for at in range(0, n_edges, step):
        part = slice(at, at + step)
        means = weights @ scores[:, part]
        low[part], high[part] = np.quantile(means, [tail, 1 - tail], axis=0)
        consistent[part] = (np.sign(means) == np.sign(scores[:, part].mean(axis=0))).mean(axis=0)
    return low, high, consistent


def confidence(
    model: Any,
    task: Task | PromptPairs | str | Path,
    algorithm: Algorithm,
    *,
    prompts: int | None = None,
    seed: int = 0,
    backend: str = "torch",
    metric: Metric | str | None = None,
    source: Source | SourceKind = "corrupted",
) -> EdgeConfidence:
    """Score every edge once and say how sure each score is; for algorithms whose scores are means over prompts, such as `EAP`.

    >>> confidence("zoo:tiny-english", "ioi", EAP(), prompts=64).rows(3)   # doctest: +SKIP
    """
    checked_algorithm("algorithm", algorithm)
    metric = metric if metric is not None else getattr(algorithm, "default_metric", None)
    question = pose(model, task, prompts=prompts, seed=seed, metric=metric, source=source, backend=backend)
    question.check()
    outcome = algorithm.run(question.engine)
    graph = outcome.graph or question.traced.graph
    return edge_confidence(graph, outcome.prompt_scores, templates=question.pairs.templates, seed=seed)
