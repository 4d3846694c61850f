"""`optimal_source`: fitted constants to ablate with, for a model and a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitgraph._circuit import Circuit
from circuitgraph._engine import Source
from circuitgraph._errors import CircuitGraphError
from circuitgraph._pairs import PromptPairs
from circuitgraph.algorithms import OptimalAblation
from circuitgraph.evaluation._question import pose

if TYPE_CHECKING:
    from circuitgraph._task import Task


def optimal_source(
    model: Any,
    task: Task | PromptPairs | str | Path,
    *,
    prompts: int | None = None,
    seed: int = 0,
    backend: str = "torch",
    circuit: Circuit | None = None,
    ablation: OptimalAblation | None = None,
) -> Source:
    """Fit one vector per writer that hurts least in its place (Li & Janson 2024): a `source` for `discover` and `evaluate`.

    By default for masks of every size, which is what `source="optimal"` does by itself, on the question's own prompts; use this to fit
    on other prompts, with other settings (`ablation`), or for one circuit: the best that constants can do for what it leaves out.

    >>> source = optimal_source("zoo:tiny-english", "ioi", circuit=circuit)                  # doctest: +SKIP
    >>> evaluate("zoo:tiny-english", "ioi", circuit, seed=1, source=source)                  # doctest: +SKIP
    """
    fit = OptimalAblation() if ablation is None else ablation
    if not isinstance(fit, OptimalAblation):
        raise CircuitGraphError(f"ablation: {ablation!r}; expected an instance such as OptimalAblation(n_steps=100)")
    question = pose(model, task, prompts=prompts, seed=seed, metric="kl", backend=backend)
    if circuit is not None and circuit.graph != question.traced.graph:
        raise CircuitGraphError(f"circuit: it is of {circuit.graph!r}, but {question.traced.name} is {question.traced.graph!r}")
    return fit.fit(question.engine, None if circuit is None else circuit.mask)
