"""Attribution graphs (Ameisen et al. 2025): what every active feature adds to every later one and to the logits, on one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from circuitgraph import _plugins
from circuitgraph._errors import CircuitGraphError, UnknownNameError, near_names, whole_number
from circuitgraph._linear import FeatureTarget, LinearRun, LogitTarget
from circuitgraph._names import Writer
from circuitgraph._tokens import Encoder

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

NodeKind = Literal["feature", "error", "embedding", "logit"]


@dataclass(frozen=True)
class AttributionNode:
    """A feature that is active at a position, what is left of an MLP there, the embedding of a token, or a logit after the last one.

    `index`: the feature's number, or the token's id. `activation`: of a feature. `probability`: of a logit's token.
    """

    kind: NodeKind
    layer: int
    index: int
    position: int
    activation: float | None = None
    probability: float | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """`m3.f12@5`, `m3.err@5`, `input@5` or `logit.17`, with the position behind the `@`."""
        if self.kind == "logit":
            return f"logit.{self.index}"
        if self.kind == "embedding":
            return f"input@{self.position}"
        return f"m{self.layer}.{f'f{self.index}' if self.kind == 'feature' else 'err'}@{self.position}"


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """`weights[t, s]`: what node `s` adds to node `t` (a feature before its activation; a logit less the mean of all), through the values
    of any attention in between, with attention patterns, the scales of norms and what MLPs say held. The weights into a node, and what
    constants add, sum to what it is, exactly.

    `tokens`: the prompt, for people. `supernodes`: nodes that are one thing to you, by a name of yours.
    """

    nodes: tuple[AttributionNode, ...]
    weights: Float[ndarray, "nodes nodes"]
    tokens: tuple[str, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    supernodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights.shape != (len(self.nodes),) * 2:
            raise CircuitGraphError(f"attribution graph: weights of shape {self.weights.shape} for {len(self.nodes)} nodes")
        known = {node.name for node in self.nodes}
        for group, members in self.supernodes.items():
            if strange := [name for name in members if name not in known]:
                raise UnknownNameError(f"supernode {group!r}: there is no node {strange[0]!r}; {near_names(strange[0], known)}")

    def __repr__(self) -> str:
        kinds = [f"{n} {kind}{'s' * (n != 1)}" for kind in ("feature", "error", "embedding", "logit") if (n := int(self._is(kind).sum()))]
        return f"AttributionGraph({', '.join(kinds)}, {int((self.weights != 0).sum()):,} edges)"

    @property
    def influence(self) -> Float[ndarray, " nodes"]:
        """How much of the logits goes through each node: over all ways down from the logits, each weighted by its probability, the product
        of the shares |weight| / sum of |weights| that it has of what is heard on the way."""
        return _influence(_shares(self.weights), self._logit_weights)

    @property
    def replacement_score(self) -> float:
        """The share of what comes to the logits from tokens, not from errors (Ameisen et al. 2025): 1 where features explain all."""
        influence = self.influence
        by_tokens, by_errors = (float(influence[self._is(kind)].sum()) for kind in ("embedding", "error"))
        return by_tokens / (by_tokens + by_errors) if by_tokens + by_errors else 0.0

    @property
    def completeness_score(self) -> float:
        """The share of what a node hears that is no error, over nodes weighted by their influence (Ameisen et al. 2025)."""
        explained = 1 - _shares(self.weights)[:, self._is("error")].sum(axis=1)
        weight = self.influence + self._logit_weights
        return float((explained * weight).sum() / weight.sum())

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> AttributionGraph:
        """The nodes of most influence that have this share of it all, and of the edges between them those that have this share.

        Tokens and logits stay; a feature or an error that leads nowhere, or a feature that hears nothing, goes. The thresholds are those
        of Ameisen et al. Raises `CircuitGraphError` for shares that are none.
        """
        for what, share in (("nodes", nodes), ("edges", edges)):
            if not 0 < share <= 1:
                raise CircuitGraphError(f"prune: {what} is {share!r}; expected a share of the influence, above 0 and up to 1")
        is_end = self._is("embedding") | self._is("logit")
        kept = is_end | (self.influence >= _least(self.influence, nodes))
        weights = np.where(kept[:, None] & kept, self.weights, 0.0)
        shares = _shares(weights)
        through = shares * (_influence(shares, self._logit_weights) + self._logit_weights)[:, None]
        weights = np.where(through >= _least(through, edges), weights, 0.0)
        while True:
            is_dead = ~is_end & (~weights.any(axis=0) | (self._is("feature") & ~weights.any(axis=1)))
            weights[is_dead], weights[:, is_dead] = 0.0, 0.0
            if not (is_dead & kept).any():
                return self._part(kept, weights)
            kept &= ~is_dead

    def label(self, labels: Mapping[str, str]) -> AttributionGraph:
        """With labels for features, by their name without a position (`m3.f12`)."""
        return replace(self, nodes=tuple(replace(node, label=labels.get(node.name.partition("@")[0], node.label)) for node in self.nodes))

    def group(self, supernodes: Mapping[str, Sequence[str]]) -> AttributionGraph:
        """With some nodes grouped, by name. Raises `UnknownNameError` for a node that is not there."""
        return replace(self, supernodes={**self.supernodes, **{name: tuple(members) for name, members in supernodes.items()}})

    def _part(self, kept: Bool[ndarray, " nodes"], weights: Float[ndarray, "nodes nodes"]) -> AttributionGraph:
        names = {self.nodes[i].name for i in np.flatnonzero(kept)}
        groups = {name: tuple(member for member in members if member in names) for name, members in self.supernodes.items()}
        return replace(
            self,
            nodes=tuple(self.nodes[i] for i in np.flatnonzero(kept)),
            weights=weights[np.ix_(kept, kept)],
            supernodes={name: members for name, members in groups.items() if members},
        )

    def _is(self, kind: str) -> Bool[ndarray, " nodes"]:
        return np.array([node.kind == kind for node in self.nodes], dtype=bool)

    @property
    def _logit_weights(self) -> Float[ndarray, " nodes"]:
        return np.array([node.probability or 0.0 if node.kind == "logit" else 0.0 for node in self.nodes])


def attribution_graph(
    model: Any, prompt: str | Sequence[int], *, logits: int = 10, probability: float = 0.95, floor: float = 0.0, backend: str = "torch"
) -> AttributionGraph:
    """The attribution graph of one prompt (Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models").

    `model`: one whose MLPs are in parts by transcoders (`refine`); an MLP that is whole counts as error. `prompt`: a text, or token ids.
    Logits: the most probable tokens up to this many or until they have this `probability` together. Features count where their activation
    is above `floor`. Raises `CircuitGraphError` for a model without a transcoder, `TaskError` for tokens that it does not have.
    """
    traced = _plugins.traced(model, backend=backend)
    encoder = Encoder(traced.tokenizer)
    if isinstance(prompt, str) and traced.tokenizer is None:
        raise CircuitGraphError(f"{traced.name} has no tokenizer; give the prompt as token ids")
    tokens = encoder.encode([prompt])[0] if isinstance(prompt, str) else [int(token) for token in prompt]
    if len(tokens) < 1:
        raise CircuitGraphError("attribution graph: the prompt has no token")
    run: LinearRun = traced.linear_run(tokens)
    writers = traced.graph.writers
    places = [*_places(writers)]
    if not any(writer.kind == "feature" for writer, _ in places):
        raise CircuitGraphError(f"{traced.name}: no MLP is in parts by a transcoder; refine the model first")
    features = _active(run, places, len(tokens), floor)
    ends = _ends(run.logits, whole_number("attribution graph: logits", logits, 1), probability, encoder, len(tokens) - 1)
    errors = [AttributionNode("error", w.layer, -1, p) for w, _ in places if w.kind in ("error", "mlp") for p in range(len(tokens))]
    said = encoder.tokens(tokens)
    words = [AttributionNode("embedding", -1, token, p, label=said[p]) for p, token in enumerate(tokens)]
    nodes = (*features, *errors, *words, *ends)
    targets: list[FeatureTarget | LogitTarget] = [FeatureTarget(node.layer, node.index, node.position) for node in features]
    targets += [LogitTarget(node.index) for node in ends]
    found = run.attributions(targets)
    found[:, 0] = found[:, [w for writer, w in places if writer.kind == "input"]].sum(axis=1)  # `tok` and `pos` are one embedding
    columns = _columns(nodes[: len(nodes) - len(ends)], places)
    weights = np.zeros((len(nodes), len(nodes)))
    rows = [*range(len(features)), *range(len(nodes) - len(ends), len(nodes))]
    weights[np.ix_(rows, range(len(columns)))] = found[:, [w for w, _ in columns], [p for _, p in columns]]
    provenance = {"model": {**traced.provenance, "name": traced.name}, "prompt": prompt if isinstance(prompt, str) else tokens}
    return AttributionGraph(nodes, weights, tuple(said), provenance)


def _places(writers: Sequence[Writer]) -> Sequence[tuple[Writer, int]]:
    """The writers that are nodes, with their columns: the input, features, errors and whole MLPs."""
    return [(writer, w) for w, writer in enumerate(writers) if writer.kind in ("input", "feature", "error", "mlp")]


def _active(run: LinearRun, places: Sequence[tuple[Writer, int]], length: int, floor: float) -> list[AttributionNode]:
    found = []
    for layer in sorted({writer.layer for writer, _ in places if writer.kind == "feature"}):
        numbers = [writer.index for writer, _ in places if writer.kind == "feature" and writer.layer == layer]
        activations = run.features(layer)
        found += [
            AttributionNode("feature", layer, number, position, float(activations[position, i]))
            for position in range(length)
            for i, number in enumerate(numbers)
            if activations[position, i] > floor
        ]
    return found


def _ends(logits: Float[ndarray, " vocabulary"], most: int, enough: float, encoder: Encoder, last: int) -> list[AttributionNode]:
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")[:most]
    n = 1 + int(np.searchsorted(np.cumsum(probabilities[order]), enough))
    chosen = order[: min(n, most)].tolist()
    names = encoder.tokens(chosen)
    return [
        AttributionNode("logit", -1, token, last, probability=float(probabilities[token]), label=name)
        for token, name in zip(chosen, names, strict=True)
    ]


def _columns(nodes: Sequence[AttributionNode], places: Sequence[tuple[Writer, int]]) -> list[tuple[int, int]]:
    """Where each node's contributions stand: its writer and its position."""
    column: dict[tuple[str, int, int], int] = {
        ("error" if writer.kind == "mlp" else writer.kind, writer.layer, writer.index): w for writer, w in places
    }
    return [
        (0 if node.kind == "embedding" else column[node.kind, node.layer, node.index if node.kind == "feature" else -1], node.position)
        for node in nodes
    ]


def _shares(weights: Float[ndarray, "nodes nodes"]) -> Float[ndarray, "nodes nodes"]:
    """Of all that a node hears, by size."""
    sizes = np.abs(weights)
    totals = sizes.sum(axis=1, keepdims=True)
    shares: Float[ndarray, "nodes nodes"] = np.divide(sizes, totals, out=np.zeros_like(sizes), where=totals > 0)
    return shares


def _influence(shares: Float[ndarray, "nodes nodes"], begin: Float[ndarray, " nodes"]) -> Float[ndarray, " nodes"]:
    """`begin @ (A + A^2 + ...)`; the graph has no cycle, so it ends."""
    total, step = np.zeros_like(begin), begin @ shares
    while step.any():
        total, step = total + step, step @ shares
    return total


def _least(values: Float[ndarray, ...], share: float) -> float:
    """The smallest of the largest values that together have this share of the sum; nothing that is 0."""
    ordered = np.sort(values[values > 0], axis=None)[::-1]
    if len(ordered) == 0:
        return np.inf
    at = int(np.searchsorted(np.cumsum(ordered) / ordered.sum(), share - 1e-12))
    return float(ordered[min(at, len(ordered) - 1)])
