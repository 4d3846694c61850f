"""The protocols between the core and a backend. An algorithm sees an `Engine` and numpy, never a framework.

With a mask `m[reader, writer]`, the input of reader `r` is

    x_r = const_r + sum over visible writers w of  m[r, w] * live_w + (1 - m[r, w]) * source_w

and `F(m)` is the metric at the end of that run: `F(1)` is the model, `F(0)` the source run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from circuitgraph._errors import CircuitGraphError, DegenerateError, TaskError, unknown_name
from circuitgraph._graph import Graph
from circuitgraph._metrics import Metric
from circuitgraph._pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

    from circuitgraph._architecture import Architecture

SourceKind = Literal["corrupted", "zero", "mean", "mean-per-position"]


@dataclass(frozen=True)
class Source:
    """Where patched values come from.

    `corrupted`: the pair's corrupted prompt. `zero`. `mean`: one vector per writer, the mean over prompts and positions.
    `mean-per-position`: one per writer and position, over prompts of the same length. Means are over `data`'s clean prompts if given,
    else over the corrupted prompts of the pairs in use.
    """

    kind: SourceKind = "corrupted"
    data: PromptPairs | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(SourceKind):
            raise unknown_name("source", self.kind, get_args(SourceKind))
        if self.data is not None and not isinstance(self.data, PromptPairs):
            raise CircuitGraphError(f"source: its data is {self.data!r}; expected PromptPairs")


@runtime_checkable
class WriterValues(Protocol):
    """What every writer says in one run, kept where the backend keeps it."""

    def __len__(self) -> int:
        """The number of prompts."""
        ...

    def __getitem__(self, prompt: int) -> Float[ndarray, "writers position d_model"]: ...


class Engine(Protocol):
    """A traced model bound to prompt pairs, a metric and a source."""

    @property
    def graph(self) -> Graph: ...

    @property
    def metric(self) -> Metric: ...

    @property
    def n_prompts(self) -> int: ...

    def activations(self, mask: Float[ndarray, "readers writers"] | None = None, *, source: WriterValues | None = None) -> WriterValues:
        """What every writer says in the run under `mask` (default: the model itself)."""
        ...

    def evaluate(
        self, masks: Float[ndarray, "lanes readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "lanes prompts"]:
        """`F` for a stack of masks, per prompt."""
        ...

    def gradient(
        self, mask: Float[ndarray, "readers writers"], *, source: WriterValues | None = None, mix: float = 1.0
    ) -> Float[ndarray, "prompts readers writers"]:
        """`dF/dm`, per prompt: for each edge `<dF/dx_r, live_w - source_w>`.

        With `mix < 1`, `dF/dx_r` is taken in the run whose input embedding is `source + mix * (clean - source)` (a point on the path of
        EAP-IG, Hanna et al. 2024), while `live_w` is still that of `mix = 1`.
        """
        ...

    def reversed(self) -> Engine:
        """The same question with clean and corrupted prompts exchanged: patching in it is denoising. Answers stay."""
        ...


@dataclass(frozen=True)
class Check:
    """One invariant of a trace, measured. `error` and `tolerance` are in the units that `what` names."""

    name: str
    what: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # a NaN error does not hold

    def __str__(self) -> str:
        sign = "ok  " if self.holds else "FAIL"
        return f"{sign} {self.name}: {self.what} {self.error:.2g} (tolerance {self.tolerance:.2g})"


class TracedModel(Protocol):
    """A model whose wiring was found and proved."""

    @property
    def name(self) -> str: ...

    @property
    def graph(self) -> Graph: ...

    @property
    def architecture(self) -> Architecture: ...

    @property
    def tokenizer(self) -> Any | None: ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What identifies the model: id, hash of the weights, dtype, backend and its versions."""
        ...

    def bind(self, pairs: PromptPairs, metric: Metric | str, source: Source | SourceKind = "corrupted") -> Engine: ...

    def logits(self, pairs: PromptPairs) -> Float[ndarray, "prompts vocabulary"]:
        """The untouched model's logits after the last token of each clean prompt."""
        ...

    def checks(self, pairs: PromptPairs) -> Iterator[Check]:
        """The invariants of the trace on these prompts, lazily and cheapest first: `F(1)` is the model, `F(0)` the source run,
        readers are the sum of their writers, padding changes nothing; the last one reports the readers that move nothing."""
        ...


class Backend(Protocol):
    """A module that is registered under the entry-point group `circuitgraph.backends`."""

    def trace(self, model: Any, **options: Any) -> TracedModel: ...


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an algorithm found: the kept edges, a score per edge, and what it wants on record (plain values only).

    `done` is the fraction of the work behind it; a generator's last outcome has 1.
    """

    mask: Bool[ndarray, "readers writers"]
    scores: Float[ndarray, "readers writers"] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    done: float = 1.0


@runtime_checkable
class Algorithm(Protocol):
    """A frozen dataclass of hyper-parameters with one method. Long ones also have `steps`, a generator of outcomes."""

    def run(self, engine: Engine) -> Outcome: ...


@runtime_checkable
class SteppedAlgorithm(Algorithm, Protocol):
    def steps(self, engine: Engine) -> Iterator[Outcome]: ...


def last_outcome(steps: Iterator[Outcome]) -> Outcome:
    """Run a generator of outcomes to its end."""
    return deque(steps, maxlen=1)[0]


def checked_mask(mask: Any, shape: tuple[int, ...]) -> Float[ndarray, ...]:
    """A mask, or a stack of them if `shape` has three axes (its first counts for nothing). Raises `CircuitGraphError`."""
    try:
        checked = np.asarray(mask)
        checked = checked if checked.dtype.kind in "biuf" else checked.astype(float)
    except (TypeError, ValueError):
        raise CircuitGraphError(f"mask: {mask!r}; expected an array of numbers, 1 for live and 0 for source") from None
    if checked.ndim != len(shape) or checked.shape[-2:] != shape[-2:]:
        wanted = "[lanes, readers, writers]" if len(shape) == 3 else "[readers, writers]"
        raise CircuitGraphError(f"mask of shape {checked.shape}: expected {wanted} with {shape[-2:]} readers and writers")
    if not np.isfinite(checked).all():
        raise CircuitGraphError("mask: it holds NaN or infinity; expected finite numbers, 1 for live and 0 for source")
    return checked


def check_source_values(values: WriterValues, n_prompts: int) -> None:
    """Raises `CircuitGraphError` for writer values of another number of prompts than the engine has."""
    if len(values) != n_prompts:
        raise CircuitGraphError(f"source values of {len(values)} prompts for an engine with {n_prompts}")


def check_gradient(metric: Metric, mask: Float[ndarray, "readers writers"], graph: Graph, mix: float) -> None:
    """Raises `DegenerateError` where `dF/dm` is zero or undefined by construction."""
    if not metric.is_differentiable:
        raise DegenerateError(
            f"metric {metric.name} has no gradient; use logit_diff, prob_diff or nll, or a method that only evaluates (acdc)"
        )
    if metric.flat_at_clean and mix == 1.0 and bool(np.all(np.asarray(mask)[graph.visible] == 1)):
        raise DegenerateError(
            f"metric {metric.name} has zero gradient at the clean run, so attribution there scores every edge 0; "
            "use logit_diff or prob_diff, or a method that works with it: acdc or activation-patching"
        )


def no_prompt_to_average(length: int | None) -> TaskError:
    """The error for a mean per position over no prompt."""
    return TaskError(f"mean per position: no reference prompt has {length} tokens; give data with prompts of every length in use")


def check_reversible(source: Source) -> None:
    """Raises `DegenerateError` where denoising would restore nothing."""
    if source.kind == "zero":
        raise DegenerateError("denoising restores clean values, and source 'zero' has none; use source 'corrupted' or a mean")
