"""The ACDC paper's table of Tracr models: our count of its graph is its own count, and what can be reproduced is."""

from __future__ import annotations

import pytest

from benchmarks import tracr_paper
from benchmarks.tracr_paper import LISTS, METHODS, PUBLISHED, Found
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
    left = [*tracr_paper._ties(compiled_model(name), "zero", whole(name))]
    assert ([len(one.edges) for one in left], [len(one.nodes) for one in left]) == LEFT[name]


@pytest.mark.parametrize(("name", "ablation"), [case for case in PUBLISHED if case != ("frac_prevs", "corrupted")])
def test_acdc_and_hisp_have_the_published_areas(name: str, ablation: Ablation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracr_paper, "SWEEP", [1e-20, 1e-6, 1e-3, 1.0])
    for method in ("ACDC", "HISP"):
        found = tracr_paper.areas(method, compiled_model(name), ablation)
        assert found == pytest.approx(PUBLISHED[name, ablation][METHODS.index(method)], abs=6e-4), method


def test_our_hisp_refuses_scores_that_are_all_zero() -> None:
    reverse = compiled_model("reverse")
    with pytest.raises(DegenerateError, match="gradient"):
        HISP().run(reverse.engine("zero", 3, reverse.structural_graph))
