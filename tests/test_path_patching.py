"""Path patching against the two papers' procedures, done by hand on plain forward passes, and the laws that follow from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import pytest
from engines import EXACT, Row, bound, every_engine
from test_reference import LINEAR, logit_diff

from circuitgraph._engine import Engine
from circuitgraph._errors import CircuitGraphError, DegenerateError
from circuitgraph._graph import Graph, Layer, transformer_graph
from circuitgraph._names import Reader, Writer
from circuitgraph._plugins import new_algorithm
from circuitgraph.algorithms import ActivationPatching, AlongPaths, PathPatching
from circuitgraph.algorithms._paths import Expression
from circuitgraph.testing import ReferenceModel, random_pairs

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layer", "n_layers": 3},
    "grouped": {"n_heads": 4, "n_kv_heads": 2, "rotary_base": 1e4, "n_positions": 0, "gated": True, "act": "silu", "n_layers": 3},
    "coupled": {"post_norm": True, "biases": False, "n_layers": 3},
    "parallel": {"parallel": True, "n_layers": 3},
    "attention only": {"d_mlp": 0, "n_layers": 4},
}
PAIRS = random_pairs(6, lengths=(4, 4))

# ------------------------------------------------------------------------------------------------------------------- the papers, by hand


@dataclass
class Hooked:
    """A plain forward pass of one prompt with hooks: what writers say and what readers hear is recorded, or replaced."""

    model: ReferenceModel
    graph: Graph
    tokens: Any
    replaced: Mapping[str, Any] = field(default_factory=dict)  # what some writers say
    overheard: Mapping[str, Any] = field(default_factory=dict)  # what some readers hear
    said: dict[str, Any] = field(default_factory=dict)
    heard: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stream = self._say(Writer("input"), self.model.embed(self.tokens[None]))
        for number, layer in enumerate(self.model.layers):
            before = stream
            if layer.attention:
                heads = range(layer.attention.n_heads)
                inputs = [[self._hear(Reader(kind, number, h), before) for kind in ("q", "k", "v")] for h in heads]
                parts, rest = layer.attention.parts([layer.attention.head(h, *inputs[h]) for h in heads])
                stream = stream + sum(self._say(Writer("head", number, h), parts[h]) for h in heads) + rest
            if layer.mlp:
                x = self._hear(Reader("mlp", number), before if layer.is_parallel else stream)
                stream = stream + self._say(Writer("mlp", number), layer.mlp(x))
        self.logits = self.model.unembed(self._hear(Reader("logits"), stream)[0, -1])

    def _say(self, writer: Writer, value: Any) -> Any:
        self.said[writer.name] = self.replaced.get(writer.name, value)
        return self.said[writer.name]

    def _hear(self, reader: Reader, value: Any) -> Any:
        name = self.graph.readers[self.graph.reader_id(reader)].name
        self.heard[name] = self.overheard.get(name, value)
        return self.heard[name]


def wang(model: ReferenceModel, graph: Graph, tokens: Any, sender: str, source: Any, receivers: Collection[str], through: Any) -> Any:
    """Logits after the procedure of Wang et al., appendix B: freeze, record, patch."""
    clean = Hooked(model, graph, tokens)
    kinds = {writer.name: writer.kind for writer in graph.writers}
    frozen = {name: value for name, value in clean.said.items() if kinds[name] not in through}
    recorded = Hooked(model, graph, tokens, replaced={**frozen, sender: source}).heard
    return Hooked(model, graph, tokens, overheard={name: recorded[name] for name in receivers}).logits


def along(model: ReferenceModel, graph: Graph, tokens: Any, path: Any, source: Any) -> Any:
    """Logits after one path of Goldowsky-Dill et al.: each node on it hears the one before it anew, and all others as ever."""
    clean = Hooked(model, graph, tokens)
    before, said = graph.writers[path.sender].name, source
    for r, w in path.steps:
        reader, writer = graph.readers[r].name, graph.writers[w].name
        news = clean.heard[reader] + said - clean.said[before]
        before, said = writer, Hooked(model, graph, tokens, overheard={reader: news}).said[writer]
    last = graph.readers[path.receiver].name
    return Hooked(model, graph, tokens, overheard={last: clean.heard[last] + said - clean.said[before]}).logits


def models() -> Any:
    return pytest.mark.parametrize("name", SIZES)


def engine_of(name: str, source: Any = "corrupted") -> tuple[ReferenceModel, Engine]:
    model = ReferenceModel.random(21, **SIZES[name])
    return model, model.bind(PAIRS, "logit_diff", source)


RECEIVERS: dict[str, tuple[str, ...]] = {  # in one layer, in several, and a group's that its heads share
    "gpt2": ("a1.h1<q>", "a2.h0<k>", "m1", "a2.h0<q>"),
    "grouped": ("a1.h3<k>", "a2.h0<v>", "a2.h1<q>"),
    "coupled": ("a1.h0<v>", "a2.h1<q>"),
    "parallel": ("m1", "a2.h1<v>", "logits"),
    "attention only": ("a1.h0<q>", "a2.h1<k>", "a3.h0<v>"),
}


@models()
@pytest.mark.parametrize(
    ("through", "source"),
    [((), "corrupted"), ((), "mean"), (("mlp",), "mean"), (("head",), "zero"), (("head", "mlp"), "corrupted")],
    ids=str,
)
def test_path_patching_is_the_procedure_of_wang_et_al(name: str, through: Any, source: str) -> None:
    model, engine = engine_of(name, source)
    graph, values = engine.graph, engine.source_values()
    clean = engine.evaluate(np.ones((1, *graph.shape)))[0]
    outcome = PathPatching(RECEIVERS[name], through=through).run(engine)
    receivers = {graph.reader_id(receiver) for receiver in RECEIVERS[name]}
    names = [graph.readers[r].name for r in receivers]
    assert sorted(outcome.record["receivers"]) == sorted(names)
    assert outcome.scores is not None
    assert set(np.flatnonzero(outcome.mask.any(axis=1))) == receivers
    for sender, score in outcome.record["senders"].items():
        w = graph.writer_id(sender)
        logits = [wang(model, graph, ids, sender, values[i][None, w], names, through) for i, ids in enumerate(PAIRS.clean)]
        assert score == pytest.approx((clean - logit_diff(logits, PAIRS)).mean(), abs=1e-9), sender
        assert np.array_equal(outcome.scores[:, w], np.where(outcome.mask[:, w], score, 0.0))
    assert len(set(np.round(list(outcome.record["senders"].values()), 6))) > 2


EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "gpt2": (
        "* -> a1.h* -> m* -> a2.h0<k>",
        "input -> m0 -> logits",
        "a0.h1 -> a1-2.h0<q> -> logits",
        "m0 -> logits",
        "input -> a0.h0 -> m0-1 -> a2.h1<q>",
    ),
    "grouped": ("input -> a0.h2<k> -> a1.h1<v> -> a2.h3<v>", "* -> a1.h*<k> -> logits", "a0.h* -> a1.g1<v> -> m2 -> logits"),
    "coupled": ("* -> a1.h1 -> a2.h0<q>", "input -> a0.h*<v> -> m1 -> logits"),
    "parallel": ("input -> m* -> a*.h1<v> -> logits", "m0 -> m1 -> m2 -> logits"),
    "attention only": ("input -> a0.h*<v> -> a1.h0<v> -> a3.h*<v> -> logits", "a0.h0 -> a3.h1<k>"),
}


@models()
def test_along_paths_is_the_procedure_of_goldowsky_dill_et_al(name: str) -> None:
    for expression, source in zip(EXPRESSIONS[name], cycle(("corrupted", "mean")), strict=False):
        model, engine = engine_of(name, source)
        graph, values = engine.graph, engine.source_values()
        clean = engine.evaluate(np.ones((1, *graph.shape)))[0]
        scores = AlongPaths(expression).run(engine).record["paths"]
        for path in Expression(expression).paths(graph, 1000):
            said = [values[i][None, path.sender] for i in range(len(PAIRS))]
            logits = [along(model, graph, ids, path, said[i]) for i, ids in enumerate(PAIRS.clean)]
            assert scores[path.name(graph)] == pytest.approx((clean - logit_diff(logits, PAIRS)).mean(), abs=1e-9), path.name(graph)
        assert max(map(abs, scores.values())) > 1e-3


# -------------------------------------------------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("row", [row for row in EXACT if row.backend != "reference"], ids=str)
def test_every_engine_says_the_same(row: Row) -> None:
    """As the reference, which is by hand."""
    engine, other = (bound(one) for one in (row, Row("reference", row.family)))
    algorithms: Any = (  # one lane at a time: JAX compiles for each number of them
        PathPatching(("a1.h1<q>", "m1"), max_lanes=1),
        PathPatching("m1", "a*.h0", ("mlp",)),
        AlongPaths("* -> m0 -> m1 -> logits", max_lanes=1),
    )
    for algorithm in algorithms:
        found, expected = algorithm.run(engine), algorithm.run(other)
        assert np.allclose(found.scores, expected.scores, atol=row.tolerance)
        assert np.allclose(found.prompt_scores.mean(axis=0), found.scores, atol=1e-6)
        assert np.abs(found.scores).max() > 1e-3


@every_engine
@pytest.mark.parametrize("source", ["corrupted", "zero", "mean-per-position"])
def test_an_engine_tells_of_its_source(row: Row, source: str) -> None:
    engine = bound(row, "logit_diff", source)
    mask = np.random.default_rng(0).uniform(size=(1, *engine.graph.shape))
    said = engine.source_values()
    assert np.allclose(engine.evaluate(mask, source=said), engine.evaluate(mask), atol=row.tolerance)
    assert [said[i].shape for i in range(len(said))] == [engine.activations()[i].shape for i in range(engine.n_prompts)]


@pytest.mark.parametrize(("metric", "direction"), [("logit_diff", "noising"), ("nll", "denoising")])
def test_what_is_also_an_edge_or_a_node(metric: str, direction: Any) -> None:
    """The direct path to one receiver is an edge; every path to the logits together is the node."""
    model = ReferenceModel.random(21, **{**SIZES["grouped"], "n_layers": 2})
    engine = model.bind(PAIRS.select([0]), metric)
    graph = engine.graph
    edges, nodes = (ActivationPatching(level, direction).run(engine) for level in ("edge", "node"))  # type: ignore[arg-type]
    for receiver in ("logits", "a1.h1<q>", "a1.h2<k>"):
        direct = PathPatching(receiver, direction=direction).run(engine)
        paths = AlongPaths(f"* -> {receiver}", direction).run(engine)
        r = graph.reader_id(receiver)
        for found in (direct, paths):
            assert np.allclose(found.scores[r], edges.scores[r], atol=1e-12)  # type: ignore[index]
            assert found.mask.sum() == graph.visible[r].sum()
    everything = PathPatching(through=("head", "mlp"), direction=direction).run(engine)
    assert everything.record["senders"] == pytest.approx(nodes.record["nodes"], abs=1e-12)


def test_paths_of_a_linear_model_are_products_that_add_up() -> None:
    model, pairs = ReferenceModel.random(4, **LINEAR), random_pairs(4, lengths=(4, 5, 4))
    engine = model.bind(pairs, "logit_diff")
    on = [layer.mlp.down @ layer.mlp.up for layer in model.layers if layer.mlp]
    told = [
        model.embed(clean[None])[0, -1] - model.embed(other[None])[0, -1] for clean, other in zip(pairs.clean, pairs.corrupted, strict=True)
    ]
    scores: dict[str, float] = {}
    for length in range(4):
        scores |= AlongPaths(" -> ".join(["input", *["m*"] * length, "logits"])).run(engine).record["paths"]
    assert len(scores) == 8
    products = {"input -> logits": np.eye(8), "input -> m1 -> logits": on[1], "input -> m0 -> m2 -> logits": on[2] @ on[0]}
    for name, product in products.items():
        by_hand = [model.unembedding @ product @ x for x in told]
        assert scores[name] == pytest.approx(logit_diff(by_hand, pairs).mean(), abs=1e-9)
    clean, corrupted = engine.evaluate(np.stack([np.ones(engine.graph.shape), np.zeros(engine.graph.shape)])).mean(axis=1)
    assert sum(scores.values()) == pytest.approx(clean - corrupted, abs=1e-9)


def test_an_edge_has_the_score_of_its_strongest_path() -> None:
    _, engine = engine_of("gpt2")
    outcome = AlongPaths("* -> m1 -> a2.h*<v> -> logits").run(engine)
    paths = [path.split(" -> ") for path in outcome.record["paths"]]  # the strongest first
    scores = list(outcome.record["paths"].values())
    assert [abs(score) for score in scores] == sorted(map(abs, scores), reverse=True)
    assert outcome.scores is not None
    for edge in engine.graph.edges_of(outcome.mask):
        first = next(i for i, path in enumerate(paths) if f"{edge.writer}->{edge.reader}" in _edges(path))
        assert outcome.scores[engine.graph.edge_id(edge)] == scores[first]
    assert set(_edges(paths[0])) <= {edge.name for edge in engine.graph.edges_of(outcome.mask)}


def _edges(path: list[str]) -> list[str]:
    return [f"{before.partition('<')[0]}->{after}" for before, after in pairwise(path)]


def test_chunks_change_nothing_but_the_progress() -> None:
    """Nor does it matter who shares a source: here senders are nodes on other paths."""
    _, engine = engine_of("gpt2")
    for one in (PathPatching, AlongPaths):
        what = RECEIVERS["gpt2"] if one is PathPatching else "* -> * -> a2.h0<q>"
        whole, steps = one(what).run(engine), list(one(what, max_lanes=3).steps(engine))  # type: ignore[arg-type]
        assert [step.done for step in steps] == sorted({step.done for step in steps})
        assert steps[-1].done == 1.0 > steps[-2].done > 0
        assert len(steps) > 2
        assert np.allclose(whole.scores, steps[-1].scores, rtol=0, atol=1e-12)  # type: ignore[arg-type]


def test_senders_are_those_asked_for() -> None:
    _, engine = engine_of("gpt2")
    outcome = PathPatching("a2.h*<q>", senders=("a0.h*", "m1", "a2.h*", "a0.h1")[:2]).run(engine)
    assert list(outcome.record["senders"]) == ["a0.h0", "a0.h1", "m1"]
    everyone = PathPatching(("a1.h0<k>", "m0")).run(engine)
    assert list(everyone.record["senders"]) == ["input", "a0.h0", "a0.h1", "m0"]
    assert everyone.mask.sum() == 4 + 3  # m0 hears the input and its layer's heads, but not itself


def test_the_command_lines_algorithm_has_defaults() -> None:
    _, engine = engine_of("gpt2")
    outcome = new_algorithm("path-patching").run(engine)
    assert list(outcome.record["senders"]) == [writer.name for writer in engine.graph.writers]


# ------------------------------------------------------------------------------------------------------------------------- names, bad ones

GROUPED = transformer_graph([Layer(n_heads=4, n_kv_heads=2)] * 3)

FITS = {
    "input -> logits": ["input -> logits"],
    "A0.1 -> 1.2.Q": ["a0.h1 -> a1.h2<q>"],
    "m0-1 -> m2": ["m0 -> m2", "m1 -> m2"],
    "a1.h0 -> a2.h2": ["a1.h0 -> a2.h2<q>", "a1.h0 -> a2.g1<k>", "a1.h0 -> a2.g1<v>"],
    "m0 -> a1.h*<k>": ["m0 -> a1.g0<k>", "m0 -> a1.g1<k>"],
    "m0 -> a1.h1 -> m1": ["m0 -> a1.h1<q> -> m1", "m0 -> a1.h1<k> -> m1", "m0 -> a1.h1<v> -> m1"],
    "m0 -> a1.g1<k> -> m1": ["m0 -> a1.h2<k> -> m1", "m0 -> a1.h3<k> -> m1"],
    "a2.h* -> * -> logits": ["a2.h0 -> m2 -> logits", "a2.h1 -> m2 -> logits", "a2.h2 -> m2 -> logits", "a2.h3 -> m2 -> logits"],
}


@pytest.mark.parametrize("expression", FITS)
def test_an_expression_fits_these_paths(expression: str) -> None:
    paths = Expression(expression).paths(GROUPED, 100)
    assert sorted(path.name(GROUPED) for path in paths) == sorted(FITS[expression])
    for path in paths:
        if "g" not in path.name(GROUPED).replace("logits", ""):  # the reader of a group ends a path by its own name
            assert Expression(path.name(GROUPED)).paths(GROUPED, 1) == (path,)
        assert all(GROUPED.visible[edge] for edge in path.edges)
        assert all(GROUPED.feeds[step] for step in path.steps)


def test_paths_are_counted_before_they_are_made() -> None:
    large = transformer_graph([Layer(n_heads=12, n_kv_heads=12)] * 12)
    for expression, wanted in (("* -> * -> * -> logits", r"[\d,]{9} paths fit"), ("* -> logits", "157 paths fit")):
        with pytest.raises(CircuitGraphError, match=rf"{wanted}.*each a forward pass, and the limit is 100; write a narrower expression"):
            Expression(expression).paths(large, 100)
    assert len(Expression("* -> logits").paths(large, 157)) == 157


REFUSED: dict[str, str] = {
    "input -> a1.h9<q> -> logits": "unknown reader 'a1.h9<q>'; did you mean 'a1.h.<q>'",
    "a7.h* -> logits": r"unknown writer 'a7.h\*'; did you mean 'a.\.h.'",
    "a2.h1 -> a1.h0<q> -> logits": "there is no edge a2.h1->a1.h0<q>: a1.h0<q> does not come after a2.h1",
    "input -> a1.h1<v> -> a0.h0<q>": "there is no edge a1.h1->a0.h0<q>: a0.h0<q> does not come after a1.h1",
    "a1.h* -> a0-1.h*<k> -> logits": r"no path fits .*: no reader of 'a0-1.h\*<k>' comes after a writer of 'a1.h\*'",
    "input -> m2 -> m1 -> logits": "there is no edge m2->m1",
    "a0.h1<q> -> logits": "'a0.h1<q>' is a reader, and a sender is a writer; expected 'a0.h1'",
    "input -> logits -> m1": "'logits' can only end a path",
    "m0 -> input -> m1": "'input' can only begin a path",
    "logits -> m0": "unknown writer 'logits'",
    "m0 -> input": "unknown reader 'input'",
}


@pytest.mark.parametrize("expression", REFUSED)
def test_paths_that_do_not_exist_are_refused(expression: str) -> None:
    _, engine = engine_of("gpt2")
    with pytest.raises(CircuitGraphError, match=REFUSED[expression]):
        AlongPaths(expression).run(engine)


def test_receivers_before_their_senders_are_refused() -> None:
    _, engine = engine_of("gpt2")
    with pytest.raises(CircuitGraphError, match=r"path patching: no receiver \(a1.h0<q>, a1.h1<q>\) comes after a2.h1"):
        PathPatching("a1.h*<q>", senders=("a0.h1", "a2.h1")).run(engine)
    with pytest.raises(CircuitGraphError, match=r"no receiver \(a0.h0<q>, .*, \.\.\.\) comes after a\*.h\*"):
        PathPatching("a0.h*", senders="a*.h*").run(engine)
    for settings, message in (
        ({"receivers": "a1.h7<q>"}, "unknown reader 'a1.h7<q>'"),
        ({"senders": "m9"}, "unknown writer 'm9'; did you"),
    ):
        with pytest.raises(CircuitGraphError, match=message):
            PathPatching(**settings).run(engine)  # type: ignore[arg-type]


def test_bad_settings_are_named() -> None:
    named: Any = [
        (PathPatching, {"receivers": "h9"}, "'h9' is no name and no pattern of names; expected 'input'"),
        (PathPatching, {"receivers": ()}, "path patching: receivers"),
        (PathPatching, {"senders": 3}, "path patching: senders: 3; expected a name"),
        (PathPatching, {"through": ("attention",)}, "through is .*expected 'head' or 'mlp'"),
        (PathPatching, {"through": "mlp"}, "through is 'mlp'.*in a tuple"),
        (PathPatching, {"direction": "up"}, "path patching: direction is 'up'"),
        (PathPatching, {"max_lanes": 0}, "path patching: max_lanes"),
        (AlongPaths, {"path": "logits"}, "at least a sender and a receiver"),
        (AlongPaths, {"path": "a1.h1 -> -> logits"}, "'' is no name"),
        (AlongPaths, {"path": None}, "path: None"),
        (AlongPaths, {"path": "m0 -> logits", "max_paths": 0}, "along paths: max_paths"),
    ]
    for one, settings, message in named:
        with pytest.raises(CircuitGraphError, match=message):
            one(**settings)


def test_denoising_needs_something_to_restore() -> None:
    _, engine = engine_of("gpt2", "zero")
    for algorithm in (PathPatching(direction="denoising"), AlongPaths("m0 -> logits", "denoising")):
        with pytest.raises(DegenerateError, match="source 'zero' has none"):
            algorithm.run(engine)
