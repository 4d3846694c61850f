"""The ACDC paper's table of Tracr models: our count of its graph is its own count, and what can be reproduced is."""

from __future__ import annotations

import itertools
from typing import get_args

import jax
import numpy as np
import pytest

from benchmarks import tracr_paper
from benchmarks.tracr_paper import LISTS, METHODS, PUBLISHED, Found
from benchmarks.tracr_probing import INITIAL, LEARNING_RATE, PENALTIES, Probe
from circuitgraph import DegenerateError
from circuitgraph.algorithms import HISP
from circuitgraph.testing import compiled_model
from circuitgraph.testing._outputs import Ablation

LEFT = {
    "reverse": (
        [103, 100, 83, 70, 67, 64, 51, 42, 39, 36, 27, 22, 19, 16, 11, 10],
        [33, 31, 28, 27, 25, 23, 20, 19, 17, 15, 12, 11, 9, 7, 4, 3],
    ),
    "frac_prevs": ([35, 32, 23, 18, 15, 12, 7, 6], [17, 15, 12, 11, 9, 7, 4, 3]),
}
"""Edges and nodes after each mask of HISP, from experiments/results/plots_data of the paper's repository (16h-tracr-*-l2-True-0.json)."""


def whole(name: str) -> Found:
    return Found.by_edges(edge.name for edge in compiled_model(name).graph.edges)


@pytest.mark.parametrize(("name", "edges", "nodes"), [("reverse", (106, 15), (35, 16)), ("frac_prevs", (38, 10), (19, 11))])
def test_edges_and_nodes_are_counted_as_in_the_papers_code(name: str, edges: tuple[int, int], nodes: tuple[int, int]) -> None:
    everything, listed = whole(name), Found.by_edges(LISTS[name].split())
    assert (len(everything.edges), len(listed.edges)) == edges
    assert (len(everything.nodes), len(listed.nodes)) == nodes


@pytest.mark.parametrize("name", LISTS)
def test_hisp_of_the_paper_is_the_order_of_its_ties(name: str) -> None:
    left = [*tracr_paper._ties(compiled_model(name), whole(name))]
    assert ([len(one.edges) for one in left], [len(one.nodes) for one in left]) == LEFT[name]


@pytest.mark.parametrize(("name", "ablation"), PUBLISHED)
def test_acdc_and_hisp_have_the_published_areas(name: str, ablation: Ablation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracr_paper, "SWEEP", [1e-9, 1e-3, 1.0])
    compiled, everything, listed = compiled_model(name), whole(name), Found.by_edges(LISTS[name].split())
    circuits = {"ACDC": tracr_paper._acdc(tracr_paper.engine(compiled, ablation, 0)), "HISP": tracr_paper._ties(compiled, everything)}
    for method, found in circuits.items():
        expected = PUBLISHED[name, ablation][METHODS.index(method)]
        assert tracr_paper.areas(found, everything, listed) == pytest.approx(expected, abs=6e-4), method


UNUSED = {
    name: [f"a{layer}.h0<{role}>" for layer in layers for role in "qkv"] for name, layers in {"frac_prevs": [0], "reverse": [1, 2]}.items()
}
OF_A0 = ["a0.h0<q>", "a0.h0<k>"]  # of `reverse`
KEPT: dict[tuple[str, Ablation], dict[tuple[int, int], list[str]]] = {
    ("frac_prevs", "zero"): {(23, 12): [], (19, 10): ["a1.h0<q>"]},
    ("frac_prevs", "corrupted"): {(19, 10): ["a1.h0<q>"]},
    ("reverse", "zero"): {(51, 17): OF_A0, (44, 15): [*OF_A0, "a3.h0<q>"], (37, 13): [*OF_A0, "a3.h0<q>", "a3.h0<k>"]},
    ("reverse", "corrupted"): {(28, 10): [*OF_A0, "a0.h0<v>", "a3.h0<q>", "a3.h0<k>"]},
}
"""Edges and nodes that subnetwork probing kept, from the same data (sp-tracr-*-l2-*-0.json; 28 and 10 from the areas), and what leaves that
many where it is masked beside `UNUSED`."""


@pytest.mark.parametrize(("name", "ablation"), PUBLISHED)
def test_the_published_areas_of_probing_keep_every_mlp(name: str, ablation: Ablation) -> None:
    everything, listed = whole(name), Found.by_edges(LISTS[name].split())
    masked = [[*UNUSED[name], *more, "m0", "m1"] for more in KEPT[name, ablation].values()]
    found = [*tracr_paper._keeps_mlps(everything, masked)]
    assert [(len(one.edges), len(one.nodes)) for one in found] == [*KEPT[name, ablation]]
    expected = PUBLISHED[name, ablation][METHODS.index("subnetwork probing")]
    assert tracr_paper.areas(found, everything, listed) == pytest.approx(expected, abs=6e-4)


def test_no_masked_mlp_fits_the_published_counts() -> None:
    """Of all sets of masks in `frac_prevs`."""
    everything, listed = whole("frac_prevs"), Found.by_edges(LISTS["frac_prevs"].split())
    names = Probe(compiled_model("frac_prevs").engine("zero", 3)).names
    for masked in (frozenset(some) for n in range(len(names) + 1) for some in itertools.combinations(names, n)):
        left = everything.without(masked)
        counts = [len(left.edges), len(left.edges & listed.edges), len(left.nodes), len(left.nodes & listed.nodes)]
        if counts in ([23, 10, 12, 11], [19, 7, 10, 9]):
            assert not masked & {"m0", "m1"}


def test_misread_letters_put_bos_anywhere() -> None:
    asked = tracr_paper.engine(compiled_model("frac_prevs"), "corrupted", 0)
    vocabulary = compiled_model("frac_prevs").vocabulary
    assert {vocabulary[token] for token in asked.clean.flat} == {"BOS", "compiler_pad", "w", "x"}
    assert len({*map(tuple, asked.clean.tolist())}) == 50
    assert sorted(asked.clean.tolist()) == sorted(asked.corrupted.tolist())
    assert (asked.clean[:, 1:] == 0).any()


def probe(name: str, ablation: Ablation) -> Probe:
    return Probe(tracr_paper.engine(compiled_model(name), ablation, 0))


def test_an_edge_is_masked_by_its_reader_and_by_the_mlp_that_writes() -> None:
    probing = Probe(compiled_model("frac_prevs").engine("zero", 3))
    z = {name: 0.1 * i for i, name in enumerate(probing.names, start=1)}
    edges, graph = np.asarray(probing.edges(np.array([*z.values()]))), probing.engine.graph
    expected = {
        "tok->a0.h0<k>": z["a0.h0<k>"],
        "pos->a1.h0<q>": z["a1.h0<q>"],
        "m0->a1.h0<v>": z["m0"] * z["a1.h0<v>"],
        "a0.h0->a1.h0<v>": z["a1.h0<v>"],
        "m0->m1": z["m0"],
        "m1->logits": z["m1"],
        "tok->m0": 1,
        "a1.h0->logits": 1,
    }
    assert [float(edges[graph.edge_id(edge)]) for edge in expected] == pytest.approx([*expected.values()])


@pytest.mark.parametrize(("name", "ablation"), PUBLISHED)
def test_probing_is_the_model_at_one_and_the_source_at_zero(name: str, ablation: Ablation) -> None:
    probing = probe(name, ablation)
    clean, corrupted = probing.engine.plain, compiled_model(name).model.forward(probing.engine.corrupted)[:, 1:]
    source = np.zeros_like(clean) if ablation == "zero" else corrupted
    assert float(probing.loss(np.ones(len(probing.names)))) == pytest.approx(0, abs=1e-9)
    assert float(probing.loss(np.zeros(len(probing.names)))) == pytest.approx(((source - clean) ** 2).mean(), rel=1e-4)


@pytest.mark.parametrize(("name", "ablation"), PUBLISHED)
def test_a_head_without_q_k_and_v_says_what_it_says_in_the_source(name: str, ablation: Ablation) -> None:
    probing, graph = probe(name, ablation), compiled_model(name).structural_graph
    for writer in (writer for writer in graph.writers if writer.kind != "input"):
        patched = np.ones(graph.shape)
        patched[:, graph.writer_id(writer)] = 0
        off = [one.partition("<")[0] == writer.name for one in probing.names]
        assert sum(off) == (3 if writer.kind == "head" else 1)
        expected = probing.engine.evaluate(patched[None]).mean()
        assert float(probing.loss(np.where(off, 0.0, 1.0))) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("ablation", get_args(Ablation))
def test_probing_asks_as_the_engine_does(ablation: Ablation) -> None:
    probing = probe("frac_prevs", ablation)
    z = np.random.default_rng(0).uniform(0.1, 0.9, len(probing.names))
    edges = np.asarray(probing.edges(z))
    assert float(probing.loss(z)) == pytest.approx(probing.engine.evaluate(edges[None]).mean(), rel=1e-4)
    by_edges = probing.engine.gradient(edges).mean(axis=0)
    expected = np.einsum("rw,rwz->z", by_edges, np.asarray(jax.jacobian(probing.edges)(z)))
    assert np.asarray(jax.grad(probing.loss)(z)) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_probing_lowers_masks_of_what_does_nothing_at_every_penalty() -> None:
    probing, n_steps = probe("frac_prevs", "corrupted"), 20
    log_alpha = probing.train(0, n_steps)
    does_nothing = [name[:2] in {"a0", "m1"} for name in probing.names]
    assert sum(does_nothing) == 4
    assert INITIAL - log_alpha[:, does_nothing] == pytest.approx(np.full((len(PENALTIES), 4), n_steps * LEARNING_RATE), rel=1e-2)
    assert (probing.train(0, n_steps) == log_alpha).all()


def test_a_last_sample_decides_what_probing_masks() -> None:
    probing = probe("frac_prevs", "zero")
    log_alpha = np.array([[20.0] * 7 + [-20.0]] * len(PENALTIES))
    assert probing.masked(log_alpha, 0) == [["m1"]] * len(PENALTIES)
    assert probing.masked(0 * log_alpha, 0) != probing.masked(0 * log_alpha, 1)


def test_our_hisp_refuses_scores_that_are_all_zero() -> None:
    reverse = compiled_model("reverse")
    with pytest.raises(DegenerateError, match="gradient"):
        HISP().run(reverse.engine("zero", 3, reverse.structural_graph))
