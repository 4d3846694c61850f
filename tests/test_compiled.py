"""Programs compiled by Tracr: what they compute, which edges do it, and what ACDC makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import pytest

from circuitgraph import CircuitGraphError, DegenerateError, UnknownNameError, discover
from circuitgraph._names import Writer
from circuitgraph.algorithms import ACDC
from circuitgraph.evaluation import Protocol, Scale
from circuitgraph.testing import COMPILED, compiled_model
from circuitgraph.testing._compiled import SEEN

EDGES = {"reverse": 94, "frac_prevs": 32, "hist": 13, "sort": 59, "shuffle_dyck2": 2102}
MEASURED = {
    ("reverse", "zero", 3): 11,
    ("reverse", "zero", 5): 9,
    ("reverse", "corrupted", 3): 2,
    ("reverse", "corrupted", 5): 2,
    ("frac_prevs", "zero", 3): 5,
    ("frac_prevs", "corrupted", 3): 3,
    ("hist", "zero", 3): 6,
    ("hist", "corrupted", 3): 4,
    ("sort", "zero", 3): 13,
    ("sort", "corrupted", 3): 7,
}
case = pytest.mark.parametrize(("name", "ablation", "length"), MEASURED, ids=lambda part: str(part))

# The lists in the ACDC paper's code, in our notation
REVERSE = {
    *("tok->m0", "tok->a0.h0<v>", "a0.h0->m0", "tok->m1", "pos->m1", "m0->m1", "m1->m2", "m2->a3.h0<q>", "pos->a3.h0<k>", "tok->a3.h0<v>"),
    "a3.h0->logits",
}
PROPORTION = {"tok->m0", "m0->a1.h0<v>", "a1.h0->logits", *(f"{said}->a1.h0<{kind}>" for said in ("tok", "pos") for kind in "qk")}


@cache
def measured(name: str, ablation: Any, length: int) -> frozenset[str]:
    return compiled_model(name).measured(ablation, length)


def is_balanced(values: Sequence[str]) -> bool:
    depths = [[*accumulate((value == opens) - (value == closes) for value in values)] for opens, closes in ("()", "{}")]
    return all(min(depth) >= 0 and depth[-1] == 0 for depth in depths)


PROGRAMS: dict[str, Callable[[Sequence[Any]], list[Any]]] = {
    "reverse": lambda values: [*values][::-1],
    "frac_prevs": lambda values: [sum(value == "x" for value in values[:n]) / n for n in range(1, len(values) + 1)],
    "hist": lambda values: [values.count(value) for value in values],
    "sort": sorted,
    "shuffle_dyck2": lambda values: [is_balanced(values)] * len(values),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("length", [3, 4, 5])
def test_a_compiled_model_computes_its_program(name: str, length: int) -> None:
    compiled = compiled_model(name)
    logits = compiled.model.forward(compiled.prompts(length))[:, 1:]
    got = np.array(compiled.outputs)[logits.argmax(axis=-1)] if compiled.outputs else logits[..., 0]
    wanted = [PROGRAMS[name](values) for values in compiled.inputs(length)]
    assert np.allclose(got.astype(float), np.array(wanted, dtype=float), atol=1e-6)
    assert compiled.run(compiled.inputs(length)[7]) == pytest.approx(wanted[7], abs=1e-6)


@pytest.mark.parametrize("name", COMPILED)
def test_its_graph_keeps_tokens_and_positions_apart(name: str) -> None:
    graph = compiled_model(name).graph
    assert graph.n_edges == EDGES[name]
    assert graph.nodes[:2] == ("tok", "pos")
    assert [Writer.parse(end) for end in ("tok", "POS")] == [*graph.writers[:2]]
    assert graph.prune_dead(graph.visible).sum() == graph.n_edges


@case
def test_measured_edges_are_those_of_the_table(name: str, ablation: Any, length: int) -> None:
    assert len(measured(name, ablation, length)) == MEASURED[name, ablation, length]


def test_measured_edges_are_those_of_the_paper() -> None:
    """Two of the seven that it lists for `frac_prevs` can carry a signal, and change nothing."""
    assert measured("reverse", "zero", 3) == REVERSE
    assert REVERSE - measured("reverse", "zero", 5) == {"tok->a0.h0<v>", "a0.h0->m0"}
    assert measured("reverse", "corrupted", 3) == {"tok->a3.h0<v>", "a3.h0->logits"}
    assert PROPORTION - measured("frac_prevs", "zero", 3) == {"tok->a1.h0<q>", "tok->a1.h0<k>"}
    assert compiled_model("frac_prevs").structural() == PROPORTION


@pytest.mark.parametrize("ablation", ["zero", "corrupted"])
@pytest.mark.parametrize("name", sorted({*COMPILED} - {"shuffle_dyck2"}))
def test_of_all_edges_only_structural_ones_make_a_difference(name: str, ablation: Any) -> None:
    compiled = compiled_model(name)
    engine = compiled.engine(ablation, 3)
    moving = {edge.name for edge in engine.graph.edges if engine.change_without(edge) > SEEN}
    assert moving == measured(name, ablation, 3)
    assert moving <= compiled.structural()


@pytest.mark.parametrize("ablation", ["zero", "corrupted"])
@pytest.mark.parametrize("name", COMPILED)
def test_without_what_is_not_structural_the_model_is_itself(name: str, ablation: Any) -> None:
    compiled = compiled_model(name)
    assert compiled.engine(ablation, 3).change(compiled.structural_graph.visible) < 1e-12
    assert measured(name, ablation, 3) <= compiled.structural()


@case
def test_acdc_keeps_what_is_measured(name: str, ablation: Any, length: int) -> None:
    compiled = compiled_model(name)
    engine = compiled.engine(ablation, length, compiled.graph if length == 3 else compiled.structural_graph)
    kept = {edge.name for edge in engine.graph.edges_of(ACDC(1e-6).run(engine).mask)}
    assert kept == measured(name, ablation, length)


def test_what_acdc_keeps_of_shuffle_dyck2_depends_on_its_order() -> None:
    compiled = compiled_model("shuffle_dyck2")
    engine = compiled.engine("zero", 3, compiled.structural_graph)
    few = replace(engine, clean=engine.clean[::9], corrupted=engine.corrupted[::9])
    kept = [ACDC(1e-6, group_first=False, order_seed=seed).run(few).mask for seed in (None, 1)]
    assert [int(mask.sum()) for mask in kept] == [26, 22]


def test_shuffle_dyck2_with_one_output_for_all_is_refused_where_another_prompt_is_patched_in() -> None:
    """No three brackets are balanced: every output is the same, so to patch in all of another prompt changes nothing."""
    compiled = compiled_model("shuffle_dyck2")
    engine = compiled.engine("corrupted", 3, compiled.structural_graph)
    assert not ACDC(1e-6).run(engine).mask.any()
    with pytest.raises(DegenerateError, match="every circuit would look perfect"):
        Scale(engine, engine.graph, Protocol(engine.metric.name, engine.n_prompts))
    pairs = compiled.pairs(3).select(range(6))
    with pytest.raises(DegenerateError, match="every circuit would look perfect"):
        discover(compiled.model.traced(), pairs, ACDC(1e-6), metric="kl")


def test_one_position_is_a_question_like_any() -> None:
    """At the last position alone `reverse` needs all that it needs at any."""
    reverse = compiled_model("reverse")
    engine = reverse.model.bind(reverse.pairs(3), "kl", "zero")
    kept = {edge.name for edge in engine.graph.edges_of(ACDC(1e-6).run(engine).mask)}
    assert kept == REVERSE


def test_names_and_lengths_that_there_are_not() -> None:
    with pytest.raises(UnknownNameError, match="unknown compiled model 'revers'; did you mean 'reverse'"):
        compiled_model("revers")
    reverse = compiled_model("reverse")
    with pytest.raises(CircuitGraphError, match="inputs of length 6; it was compiled for at most 5"):
        reverse.prompts(6)
    with pytest.raises(UnknownNameError, match="knows no 4; expected some of \\[1, 2, 3\\]"):
        reverse.run([1, 4])
    with pytest.raises(UnknownNameError, match="unknown ablation 'mean'"):
        reverse.measured("mean", 3)  # type: ignore[arg-type]
