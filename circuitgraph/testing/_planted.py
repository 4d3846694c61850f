"""`planted_model`: a small transformer of which somebody knows the circuit, because it was put there."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._engine import Engine, TracedModel
from circuitgraph._errors import CircuitGraphError, unknown_name, whole_number
from circuitgraph._graph import Graph, Layer, transformer_graph
from circuitgraph._metrics import Metric
from circuitgraph._pairs import PromptPairs
from circuitgraph.algorithms import ActivationPatching
from circuitgraph.testing._planting import ANSWERS, LOOK_UPS, SYMBOLS, Feed, Planter, Size
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._wiring import Options, Part, Wiring, sampled

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

FLOOR = 0.01
"""The least effect of a planted edge, as a share of `F(1) - F(0)`."""

CEILING = {False: 1e-9, True: 2e-3}
"""The most effect of any other edge, by whether there are norms."""


@dataclass(frozen=True, eq=False, repr=False)
class PlantedModel:
    """A model, a task and the circuit that does it.

    `model`: the weights, in numpy. `pairs`: prompts of items and a tag, `[tag+class, ..., tag]`, the answer the class of the item with that
    tag; a corrupted prompt has other tags and classes everywhere. `circuit`: the planted edges, scored by the exact effect of patching each
    (a share of `F(1) - F(0)`). `backups`: those among them that do nothing alone, because others say the same.
    `wiring`: what each part says, and to whom. `settings`: what `planted_model` was told.
    """

    model: ReferenceModel
    pairs: PromptPairs
    circuit: Circuit
    backups: Bool[ndarray, "readers writers"]
    wiring: Wiring
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        """The call that makes it again."""
        return f"planted_model({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    @property
    def graph(self) -> Graph:
        return self.circuit.graph

    @cached_property
    def module(self) -> Any:
        """The same as a Hugging Face module of PyTorch, in float64, for `trace`."""
        from circuitgraph.testing._module import module_of

        return module_of(self.model)

    def traced(self, backend: str = "torch", **options: Any) -> TracedModel:
        """Traced by a backend, or as the numpy reference: "reference"."""
        return traced(self.model, backend, **options)

    def bind(self, metric: Metric | str = "logit_diff", *, backend: str = "reference", **options: Any) -> Engine:
        """An engine for the task."""
        return self.traced(backend).bind(self.pairs, metric, **options)


def traced(model: ReferenceModel, backend: str, **options: Any) -> TracedModel:
    """A reference model as it is, for "reference", or its module traced by a backend."""
    if backend == "reference":
        return model.traced(**options)
    from circuitgraph._plugins import traced as traced_by
    from circuitgraph.testing._module import architecture_of, module_of

    is_padded = any(layer.attention is not None and layer.attention.n_padding for layer in model.layers)
    if backend == "jax" or is_padded:  # JAX knows families by a table, and this is none; PyTorch watches short prompts, here all padding
        options = {"architecture": architecture_of(model), **options}
    return traced_by(module_of(model), backend=backend, **options)


def planted_model(
    seed: int = 0,
    *,
    n_layers: int = 3,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    norm: Literal["rms", "layer"] | None = None,
    mlp: Feed | None = "gelu",
    parallel: bool = False,
    looks_up: bool = True,
    redundant: bool = False,
    interaction: bool = False,
    inhibition: bool = False,
    prompts: int = 2,
) -> PlantedModel:
    """A random circuit, planted in random weights and confirmed by patching every edge.

    A planted edge has an effect of at least `FLOOR`, in either direction; any other one of at most `CEILING`, as shares of `F(1) - F(0)`.
    `looks_up=False`: heads look everywhere alike, and no `q` or `k` edge is planted; with `mlp="linear"` and no norm each edge's effect is
    then linear. `redundant`: three paths say the same, and an MLP says on what two of them say, so that each edge alone does nothing; these
    are confirmed in pairs. `interaction`: an MLP that says only what two paths agree on. `inhibition`: a head that works against the rest.
    Raises `CircuitGraphError` for sizes in which there is no room for what is asked for.

    >>> planted = planted_model(seed=1, n_layers=1, n_heads=1)
    >>> [edge.name for edge in planted.circuit.edges]
    ['input->a0.h0<q>', 'input->a0.h0<k>', 'input->a0.h0<v>', 'a0.h0->logits']
    """
    settings = {name: value for name, value in locals().items() if name == "seed" or value != _DEFAULTS[name]}
    size = _size(n_layers, n_heads, n_kv_heads, norm, mlp, parallel)
    options = Options(looks_up, redundant, interaction, inhibition)
    if mlp == "linear" and (redundant or interaction):
        raise CircuitGraphError(
            "planted model: linear MLPs cannot decide, as redundant paths and interactions need; use gelu, relu or gated"
        )
    layers = [Layer(n_heads, size.n_kv_heads, mlp is not None, parallel)] * n_layers
    graph, rng = transformer_graph(layers), np.random.default_rng(seed)
    wiring = sampled(graph, options, rng)
    model = Planter(size, wiring, looks_up, rng).model(f"planted-{seed}")
    pairs = _prompts(whole_number("planted model: prompts", prompts, 1), rng, looks_up=looks_up)
    backups = _backups(graph, wiring)
    planted = PlantedModel(model, pairs, Circuit(graph, wiring.mask(graph)), backups, wiring, settings)
    return _confirmed(planted, has_norms=norm is not None)


_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(planted_model).parameters.items()}


def _size(n_layers: int, n_heads: int, n_kv_heads: int | None, norm: Any, mlp: Any, parallel: bool) -> Size:
    for what, value in (("layers", n_layers), ("heads", n_heads)):
        whole_number(f"planted model: {what}", value, 1)
    kv = n_heads if n_kv_heads is None else whole_number("planted model: n_kv_heads", n_kv_heads, 1)
    if n_heads % kv:
        raise CircuitGraphError(f"planted model: {n_heads} heads cannot share {kv} keys and values; expected a divisor of {n_heads}")
    for what, value, known in (("norm", norm, ("rms", "layer", None)), ("mlp", mlp, ("gelu", "relu", "linear", "gated", None))):
        if value not in known:
            raise unknown_name(f"planted model: {what}", str(value), [str(name) for name in known])
    return Size(n_layers, n_heads, kv, norm, mlp, parallel)


def _prompts(n: int, rng: np.random.Generator, *, looks_up: bool) -> PromptPairs:
    """Every tag once, in any order, and never the first item asked for: looking for another one must have something to find. Corrupted: the
    next tag and the next class at every position."""
    clean, answers = np.zeros((n, SYMBOLS + 1), dtype=np.int64), np.zeros(n, dtype=np.int64)
    corrupted = clean.copy()
    for prompt in range(n):
        tags, classes, asked = rng.permutation(SYMBOLS), rng.permutation(SYMBOLS), 1 + prompt % (SYMBOLS - 1)
        if not looks_up:
            classes[:] = classes[0]
        for row, step in ((clean, 0), (corrupted, 1)):
            row[prompt, :-1] = (tags + step) % SYMBOLS * SYMBOLS + (classes + step) % SYMBOLS
            row[prompt, -1] = LOOK_UPS + (tags[asked] + step) % SYMBOLS
        answers[prompt] = classes[asked]
    return PromptPairs(clean, corrupted, ANSWERS + answers, ANSWERS + (answers + 1) % SYMBOLS)


def _backups(graph: Graph, wiring: Wiring) -> Bool[ndarray, "readers writers"]:
    """The edges of the heads that vote, into them and out of them."""
    mask = np.zeros(graph.shape, dtype=bool)
    for voting in _votes(wiring):
        for link in wiring.links:
            if link.writer in voting or (link.reader.layer, link.reader.index) in {(head.layer, head.index) for head in voting}:
                mask[graph.reader_id(link.reader), graph.writer_id(link.writer)] = True
    return mask


def _votes(wiring: Wiring) -> list[list[Any]]:
    """The heads of every vote."""
    votes: list[Part] = [part for part in wiring.parts if part.role == "vote"]
    return [
        [link.writer for link in wiring.links if link.reader.kind == "mlp" and link.reader.layer == part.writer.layer] for part in votes
    ]


def _confirmed(planted: PlantedModel, *, has_norms: bool) -> PlantedModel:
    """With the effects of its edges as scores. Raises `CircuitGraphError` where a planted edge does too little or another too much."""
    engine, graph = planted.bind(), planted.graph
    ends = engine.evaluate(np.stack([np.ones(graph.shape), np.zeros(graph.shape)])).mean(axis=1)
    whole = float(ends[0] - ends[1])
    scores = ActivationPatching(max_lanes=max(1, graph.n_edges)).run(engine).scores
    assert scores is not None
    effects = np.asarray(scores) / whole
    for kept in _silenced(planted):
        masks = np.repeat(kept[None], 2, axis=0)
        for r, w in np.argwhere(planted.backups & ~(kept == 0)):
            masks[1] = kept
            masks[1, r, w] = 0
            before, after = engine.evaluate(masks).mean(axis=1)
            effects[r, w] = max(effects[r, w], (before - after) / whole, key=abs)
    _check_effects(planted, effects, ceiling=CEILING[has_norms])
    shown = np.where(planted.backups, np.asarray(scores) / whole, effects)
    circuit = Circuit(graph, planted.circuit.mask, shown, {"planted": planted.model.name})
    return replace(planted, circuit=circuit)


def _silenced(planted: PlantedModel) -> list[Float[ndarray, "readers writers"]]:
    """For every vote, masks without one of its voters, under which the two others count; two of them see every voter."""
    masks = []
    for voters in _votes(planted.wiring):
        for voter in voters[:2]:
            mask = np.ones(planted.graph.shape)
            mask[:, planted.graph.writer_id(voter)] = 0
            for link in planted.wiring.links:
                if (link.reader.layer, link.reader.index) == (voter.layer, voter.index):
                    mask[planted.graph.reader_id(link.reader), planted.graph.writer_id(link.writer)] = 0
            masks.append(mask)
    return masks


def _check_effects(planted: PlantedModel, effects: Float[ndarray, "readers writers"], *, ceiling: float) -> None:
    sizes, kept, graph = np.abs(effects), planted.circuit.mask, planted.graph
    for r, w in np.argwhere(graph.visible):
        name = f"{graph.writers[w].name}->{graph.readers[r].name}"
        if kept[r, w] and not sizes[r, w] >= FLOOR:
            raise CircuitGraphError(
                f"planted model: the planted edge {name} has an effect of {effects[r, w]:.2g}; expected {FLOOR} at least"
            )
        if not kept[r, w] and not sizes[r, w] <= ceiling:
            raise CircuitGraphError(f"planted model: {name} has an effect of {effects[r, w]:.2g}, unplanted; expected at most {ceiling:g}")
