"""The protocols between the core and a backend. An algorithm sees an `Engine` and numpy, never a framework.

With a mask `m[reader, writer]`, the input of reader `r` is

    x_r = const_r + sum over visible writers w of  m[r, w] * live_w + (1 - m[r, w]) * source_w

and `F(m)` is the metric at the end of that run: `F(1)` is the model, `F(0)` the source run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
    from circuitgraph._linear import LinearRun
    from circuitgraph._refinement import Refinement

SourceKind = Literal["corrupted", "zero", "mean", "mean-per-position", "optimal"]


@dataclass(frozen=True, eq=False)
class Source:
    """Where patched values come from.

    `corrupted`: the pair's corrupted prompt. `zero`. `mean`: one vector per writer, the mean over prompts and positions.
    `mean-per-position`: one per writer and position, over prompts of the same length. Means are over `data`'s clean prompts if given,
    else over the corrupted prompts of the pairs in use. `optimal`: one vector per writer that hurts least (Li & Janson 2024), given as
    `constants` `[writers, d_model]`; `discover` and `evaluate` fit them where they are not given.
    """

    kind: SourceKind = "corrupted"
    data: PromptPairs | None = None
    constants: Float[ndarray, "writers d_model"] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(SourceKind):
            raise unknown_name("source", self.kind, get_args(SourceKind))
        if self.data is not None and not isinstance(self.data, PromptPairs):
            raise CircuitGraphError(f"source: its data is {self.data!r}; expected PromptPairs")
        if self.constants is not None:
            constants = np.array(self.constants, dtype=np.float64)
            if self.kind != "optimal" or constants.ndim != 2 or not np.isfinite(constants).all():
                raise CircuitGraphError("source: constants are for 'optimal' only; expected finite numbers [writers, d_model]")
            constants.setflags(write=False)
            object.__setattr__(self, "constants", constants)


@dataclass(frozen=True)
class Rule:
    """How `gradient` goes back through what is not linear in the stream; the forward run is always the model's own.

    `norms`: "frozen" treats the scale of every norm as a constant (the mean that a layer norm takes away is still linear).
    `patterns`: "frozen" treats attention patterns as constants, so edges into `q` and `k` score 0; "recomputed" scores each of these edges
    by what attention says when it alone is patched, to first order after that (the QK fix of AtP*, Kramar et al. 2024; at `m = 1` only).
    `activations`: "ratio" puts act(x) / x in place of act'(x). `gates`: "half" gives each of two multiplied branches half of its gradient.
    `dropped_layer`: nothing goes back through the readers of this layer, and edges into them score 0 (GradDrop, Kramar et al. 2024).
    """

    norms: Literal["exact", "frozen"] = "exact"
    patterns: Literal["exact", "frozen", "recomputed"] = "exact"
    activations: Literal["exact", "ratio"] = "exact"
    gates: Literal["exact", "half"] = "exact"
    dropped_layer: int | None = None


EXACT = Rule()
QK_FIX = Rule(patterns="recomputed")
RELP = Rule(norms="frozen", patterns="frozen", activations="ratio", gates="half")


@runtime_checkable
class WriterValues(Protocol):
    """What every writer says in one run, kept where the backend keeps it."""

    def __len__(self) -> int:
        """The number of prompts."""
        ...

    def __getitem__(self, prompt: int) -> Float[ndarray, "writers position d_model"]: ...


class Engine(Protocol):
    """A traced model bound to prompt pairs, a metric and a source.

    Every mask may have a last axis of spans, `[..., readers, writers, spans]`: the edge at the positions of each part of the prompt, in the
    order of `spans`. Gradients then have it too.
    """

    @property
    def graph(self) -> Graph: ...

    @property
    def metric(self) -> Metric: ...

    @property
    def n_prompts(self) -> int: ...

    @property
    def spans(self) -> tuple[str, ...]:
        """The parts of the prompts by name; none where the pairs do not say."""
        ...

    def activations(self, mask: Float[ndarray, "readers writers"] | None = None, *, source: WriterValues | None = None) -> WriterValues:
        """What every writer says in the run under `mask` (default: the model itself)."""
        ...

    def source_values(self) -> WriterValues:
        """What every writer says in the source run: what a mask of 0 lets readers hear."""
        ...

    def evaluate(
        self, masks: Float[ndarray, "lanes readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "lanes prompts"]:
        """`F` for a stack of masks, per prompt."""
        ...

    def gradient(
        self,
        mask: Float[ndarray, "readers writers"],
        *,
        source: WriterValues | None = None,
        mix: float | Sequence[float] = 1.0,
        rule: Rule = EXACT,
    ) -> Float[ndarray, "prompts readers writers"]:
        """`dF/dm`, per prompt: for each edge `<dF/dx_r, live_w - source_w>`.

        With `mix < 1`, `dF/dx_r` is taken in the run whose input embedding is `source + mix * (clean - source)` (a point on the path of
        EAP-IG, Hanna et al. 2024), while `live_w` is still that of `mix = 1`; of several mixes, which may run together, the mean.
        """
        ...

    def source_gradient(
        self, mask: Float[ndarray, "readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "prompts writers d_model"]:
        """The gradient of `F` under a mask in a vector added to what each writer says in the source run, the same at every position:
        the sum over readers and positions of `(1 - m[r, w]) * dF/dx_r`. (Sources do not depend on each other.)"""
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

    @property
    def refinements(self) -> tuple[Refinement, ...]:
        """The components that are in parts."""
        ...

    def refined(self, refinements: Sequence[Refinement]) -> TracedModel:
        """The same model with some components in parts; layers of a cross-layer transcoder come in one call (see `_refinement.joined`).
        Raises `CircuitGraphError` for a dictionary of another width, `UnknownNameError` for a component that is not there."""
        ...

    def seen_by(self, refinement: Refinement, pairs: PromptPairs) -> Iterator[Float[ndarray, "position width"]]:
        """What a refinement's dictionary reads in the model's own run, for each clean prompt, then for each corrupted one."""
        ...

    def logit_weights(self, refinement: Refinement, features: Sequence[int]) -> Float[ndarray, "features vocabulary"]:
        """The direct effect on the logits of what some features say at activation 1, with the final norm's scale taken as 1, less the mean
        over the vocabulary."""
        ...

    def linear_run(self, tokens: Sequence[int]) -> LinearRun:
        """This model on one prompt, linear but for its MLPs. Raises `CircuitGraphError` where parts are no transcoder's, or of one with an
        input norm of its own; `TaskError` for tokens that it does not have."""
        ...

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

    `done` is the fraction of the work behind it; a generator's last outcome has 1. `prompt_scores`: the scores of each prompt, whose mean
    are the scores, where the algorithm has them. `graph`: the graph of mask and scores where it is not the engine's but split by spans.
    """

    mask: Bool[ndarray, "readers writers"]
    scores: Float[ndarray, "readers writers"] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    done: float = 1.0
    prompt_scores: Float[ndarray, "prompts readers writers"] | None = None
    graph: Graph | None = None


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


def outcomes(algorithm: Algorithm, engine: Engine) -> Iterator[Outcome]:
    """What an algorithm yields on its way, or the one outcome of one that has no steps. Always one, or it raises `CircuitGraphError`."""
    if not isinstance(algorithm, SteppedAlgorithm):
        yield algorithm.run(engine)
        return
    outcome = None
    for outcome in algorithm.steps(engine):
        yield outcome
    if outcome is None:
        raise CircuitGraphError(f"{type(algorithm).__name__}: steps() yielded nothing; expected at least one outcome")


def checked_algorithm(what: str, value: Any) -> Algorithm:
    """Raises `CircuitGraphError` for what is no instance of an algorithm, such as its class."""
    if isinstance(value, type) or not isinstance(value, Algorithm):
        raise CircuitGraphError(f"{what}: {value!r}; expected an instance with a run method, such as ACDC(threshold=0.001)")
    return value


def checked_mask(mask: Any, shape: tuple[int, ...], spans: Sequence[str] = ()) -> Float[ndarray, ...]:
    """A mask, or a stack of them if `shape` has three axes (its first counts for nothing); with a last axis of spans if it has one.

    Raises `CircuitGraphError`.
    """
    try:
        checked = np.asarray(mask)
        checked = checked if checked.dtype.kind in "biuf" else checked.astype(float)
    except (TypeError, ValueError):
        raise CircuitGraphError(f"mask: {mask!r}; expected an array of numbers, 1 for live and 0 for source") from None
    lanes, rest = len(shape) - 2, shape[-2:]
    if checked.ndim == len(shape) + 1 and spans:
        if checked.shape[lanes:] != (*rest, len(spans)):
            known = f"{len(spans)} spans ({', '.join(spans)})"
            raise CircuitGraphError(f"mask of shape {checked.shape}: expected {rest} readers and writers, and the prompts have {known}")
    elif checked.ndim != len(shape) or checked.shape[lanes:] != rest:
        wanted = "[lanes, readers, writers]" if len(shape) == 3 else "[readers, writers]"
        hint = "" if spans else "; a last axis of spans needs prompts with spans"
        raise CircuitGraphError(f"mask of shape {checked.shape}: expected {wanted} with {rest} readers and writers{hint}")
    if not np.isfinite(checked).all():
        raise CircuitGraphError("mask: it holds NaN or infinity; expected finite numbers, 1 for live and 0 for source")
    return checked


def check_source_values(values: WriterValues, n_prompts: int) -> None:
    """Raises `CircuitGraphError` for writer values of another number of prompts than the engine has."""
    if len(values) != n_prompts:
        raise CircuitGraphError(f"source values of {len(values)} prompts for an engine with {n_prompts}")


def check_gradient(
    metric: Metric, mask: Float[ndarray, "readers writers"], graph: Graph, mix: float | Sequence[float] = 1.0, rule: Rule = EXACT
) -> None:
    """Raises `DegenerateError` where `dF/dm` is zero or undefined by construction, `CircuitGraphError` for a mix or a rule of nothing."""
    if np.size(mix) == 0 or not np.isfinite(mix).all():
        raise CircuitGraphError(f"mix: {mix!r}; expected a number between 0 (source) and 1 (clean), or several")
    layers = {reader.layer for reader in graph.readers if reader.kind not in ("stream", "logits")}
    if rule.dropped_layer is not None and rule.dropped_layer not in layers:
        n_layers = 1 + max(layers, default=-1)
        raise CircuitGraphError(f"gradient without layer {rule.dropped_layer!r}: the model has {n_layers} layers, from 0")
    if rule.patterns == "recomputed" and (refined := [writer.component for writer in graph.writers if writer.part_of == "a"]):
        raise CircuitGraphError(
            f"gradient: {refined[0]} is refined, so no single head of it can be patched; use a rule with patterns 'exact'"
        )
    is_live = bool(np.all(np.asarray(mask)[graph.visible] == 1))
    if rule.patterns == "recomputed" and not is_live:
        raise CircuitGraphError("a gradient with recomputed attention patterns is that of the model itself; expected a mask of ones")
    check_differentiable(metric)
    if metric.flat_at_clean and is_live and np.all(np.asarray(mix) == 1):
        raise DegenerateError(
            f"metric {metric.name} has zero gradient at the clean run, so attribution there scores every edge 0; "
            "use logit_diff or prob_diff, or a method that works with it: acdc or activation-patching"
        )


def check_differentiable(metric: Metric) -> None:
    """Raises `DegenerateError` for a metric without a gradient."""
    if not metric.is_differentiable:
        raise DegenerateError(
            f"metric {metric.name} has no gradient; use logit_diff, prob_diff or nll, or a method that only evaluates (acdc)"
        )


def check_scores(scores: Float[ndarray, "prompts ..."], dtype: object) -> None:
    """Raises `CircuitGraphError` for a gradient with numbers that are none, as beyond 65504 in float16."""
    if np.isfinite(scores.sum()):
        return
    prompt = int(np.argmax(~np.isfinite(scores).reshape(len(scores), -1).all(axis=1)))
    narrow = str(dtype).removeprefix("torch.")
    hint = "; trace the model with dtype='float32' or 'bfloat16', which hold larger numbers" if narrow == "float16" else ""
    raise CircuitGraphError(f"gradient: it is not a finite number for prompt {prompt} in {narrow}{hint}")


def check_source(source: Source, graph: Graph, d_model: int) -> None:
    """Raises `CircuitGraphError` for optimal constants that are not there or not of this model."""
    if source.kind != "optimal":
        return
    wanted = (len(graph.writers), d_model)
    if source.constants is None:
        raise CircuitGraphError(
            "source 'optimal' without constants: fit them first (circuitgraph.optimal_source), or let discover and evaluate do it"
        )
    if source.constants.shape != wanted:
        raise CircuitGraphError(
            f"source 'optimal': constants of shape {source.constants.shape}; this model has {wanted} [writers, d_model]"
        )


def no_prompt_to_average(length: int | None) -> TaskError:
    """The error for a mean per position over no prompt."""
    return TaskError(f"mean per position: no reference prompt has {length} tokens; give data with prompts of every length in use")


def check_reversible(source: Source) -> None:
    """Raises `DegenerateError` where denoising would restore nothing."""
    if source.kind in ("zero", "optimal"):
        raise DegenerateError(f"denoising restores clean values, and source {source.kind!r} has none; use source 'corrupted' or a mean")
