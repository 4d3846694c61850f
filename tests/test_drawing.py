"""Pictures: every live edge is there, whatever the names, and Graphviz says nothing."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from test_circuit import circuits

import circuitgraph.drawing._render as drawing_render
from circuitgraph._circuit import Circuit
from circuitgraph._errors import CircuitGraphError, FileError, UnknownNameError
from circuitgraph._graph import Layer, transformer_graph
from circuitgraph.drawing import render_dot, to_dot
from circuitgraph.drawing._plan import LEGIBLE, find_number, make_plan

TOOLTIP = "{http://www.w3.org/1999/xlink}title"


def _circuit(n: int = 20, layers: list[Layer] | None = None, **kwargs: Any) -> Circuit:
    graph = transformer_graph(layers or [Layer(4, 2)] * 2)
    scores = np.random.default_rng(1).normal(size=graph.shape)
    return Circuit(graph, graph.visible, scores, {"task": "ioi", "model": {"name": "gpt2"}, "algorithm": {"class": "EAP"}, **kwargs}).top(n)


def _tooltips(svg: bytes) -> list[str]:
    return [found for element in ET.fromstring(svg).iter() if (found := element.get(TOOLTIP)) is not None]


@pytest.fixture(scope="module")
def svg() -> bytes:
    return render_dot(to_dot(_circuit()), "svg")


def test_the_svg_has_every_live_edge_with_its_score(svg: bytes) -> None:
    live = _circuit().prune_dead()
    assert live.scores is not None
    for edge in live.edges:
        assert f"{edge}: {live.scores[live.graph.edge_id(edge)]:+.4g}" in _tooltips(svg)
    drawn = {tip.split(": ")[0] for tip in _tooltips(svg) if "->" in tip}
    assert drawn == {edge.name for edge in live.edges}
    titles = {element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")}
    assert set(live.nodes) <= titles


def test_layers_rise_from_the_input_to_the_logits() -> None:
    height: dict[str | None, float] = {}
    for group in ET.fromstring(render_dot(to_dot(_circuit(70)), "svg")).iter("{http://www.w3.org/2000/svg}g"):
        if group.get("class") == "node":
            name = group.findtext("{http://www.w3.org/2000/svg}title")
            text = next(group.iter("{http://www.w3.org/2000/svg}text"), None)
            height[name] = float("nan") if text is None else float(text.get("y", "nan"))
    rows = [
        [height[name] for name in row if name in height] for row in (["logits"], ["m1"], ["a1.h0", "a1.h3"], ["a0.h0", "a0.h1"], ["input"])
    ]
    filled = [row for row in rows if row]
    assert len(filled) >= 4
    for above, below in pairwise(filled):
        assert max(above) < min(below)


@given(circuits())
@settings(max_examples=15, deadline=None)
def test_a_plan_draws_each_live_edge_at_every_detail(circuit: Circuit) -> None:
    live = circuit.prune_dead()
    for detail in ("edges", "nodes", "layers"):
        plan = make_plan(circuit, detail=detail)
        assert {name for line in plan.lines for name, _ in line.edges} == {edge.name for edge in live.edges}
        assert all(line.tail.depth < line.head.depth for line in plan.lines)
        assert len({(line.tail, line.head, line.kind) for line in plan.lines}) == len(plan.lines)
        assert to_dot(circuit, detail=detail) == to_dot(circuit, detail=detail)
    shared = sum(len(live.nodes_of(edge.reader)) for edge in live.edges)
    assert len(make_plan(circuit, detail="edges").lines) == shared


def test_large_circuits_are_merged_and_the_caption_says_so() -> None:
    for layers, n, fact in (
        ([Layer(4, 4)] * 2, 100, None),
        ([Layer(4, 4)] * 3, 210, "q, k and v edges merged"),
        ([Layer(12, 12)] * 4, 3000, "q, k and v edges merged, heads merged by layer"),
    ):
        circuit = _circuit(n, layers)
        plan = make_plan(circuit)
        assert plan.facts[0] == f"{n:,} of {circuit.graph.n_edges:,} edges"
        assert [said for said in plan.facts if "merged" in said] == ([fact] if fact else [])
    plan = make_plan(_circuit(20_000, [Layer(12, 12)] * 12))
    assert len(plan.lines) == LEGIBLE["layers"]
    assert any(fact.startswith(f"the {LEGIBLE['layers']} strongest of ") for fact in plan.facts)
    assert all("\n" not in line.tooltip or line.tooltip.count("\n") <= 12 for line in plan.lines)


def test_the_caption() -> None:
    plan = make_plan(_circuit())
    assert plan.title == "ioi · gpt2 · EAP"
    circuit = Circuit(_circuit().graph, _circuit().mask, provenance={"faithfulness": 0.8765, "task": {"name": "x"}})
    dead = circuit.n_edges - circuit.prune_dead().n_edges
    assert make_plan(circuit).facts == ("20 of 82 edges", "faithfulness 0.876", f"{dead} not drawn: no path from input to logits")
    assert make_plan(circuit, title="my own").title == "my own"
    assert find_number({"report": {"faithfulness": {"value": 1}}}, "faithfulness") == 1.0
    assert find_number({"a": True}, "a") is None


def test_strokes_show_kind_strength_and_sign() -> None:
    graph = transformer_graph([Layer(2, 2)])
    mask, scores = np.zeros(graph.shape, dtype=bool), np.zeros(graph.shape)
    for edge, score in {"input->a0.h0<q>": 4.0, "input->a0.h0<k>": -1.0, "a0.h0->logits": 0.0, "input->logits": np.nan}.items():
        mask[graph.edge_id(edge)], scores[graph.edge_id(edge)] = True, score
    dot = to_dot(Circuit(graph, mask, scores))
    q, k, zero, unscored = (
        next(line for line in dot.splitlines() if f'edgetooltip="{name}' in line)
        for name in ("input->a0.h0<q>", "input->a0.h0<k>", "a0.h0->logits", "input->logits")
    )
    assert "#0072B2" in q
    assert "penwidth=3.80" in q
    assert "style" not in q
    assert "#D55E00" in k
    assert "penwidth=2.25" in k
    assert "style=dashed" in k
    assert "penwidth=0.70" in zero
    assert "penwidth" not in unscored
    assert "negative score" in dot
    assert "width: |score|" in dot
    unscored_dot = to_dot(Circuit(graph, mask))
    assert "negative score" not in unscored_dot
    assert "width: |score|" not in unscored_dot


def test_hostile_titles_are_text(tmp_path: Path) -> None:
    for title in ('<b>&"\\N\\l{x}"</b>', "<x>", "naïve ☃ 中文\\", "a\x00b\x1b[0m\nline", ""):
        svg = _circuit(8).render(tmp_path / "c.svg", title=title).read_bytes()
        shown = " ".join(element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"))
        assert title.replace("\x00", "�").replace("\x1b", "�").replace("\n", " ") in shown


def test_every_format_and_nothing_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for suffix, start in (("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG"), ("dot", b"digraph"), ("gv", b"digraph")):
        assert _circuit().render(str(tmp_path / f"c.{suffix}"), dpi=50).read_bytes().startswith(start)
    assert (tmp_path / "c.dot").read_text() == _circuit().to_dot()
    empty = Circuit(_circuit().graph, np.zeros(_circuit().graph.shape))
    assert b"input" in empty.render(tmp_path / "empty.svg").read_bytes()
    assert capfd.readouterr() == ("", "")


def test_threads(svg: bytes) -> None:
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: render_dot(to_dot(_circuit()), "svg"), range(4))) == {svg}


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileError, match=r"ends in one of .svg, .html, .pdf, .png, .dot, .gv"):
        _circuit().render(tmp_path / "c.jpg")
    with pytest.raises(UnknownNameError, match="unknown detail 'node'; did you mean 'nodes'"):
        _circuit().to_dot(detail="node")  # type: ignore[arg-type]
    with pytest.raises(FileError, match="there is no folder"):
        _circuit().render(tmp_path / "nowhere" / "c.dot")
    with pytest.raises(CircuitGraphError, match="no working Graphviz"):
        render_dot("digraph {", "svg")
    monkeypatch.setattr(drawing_render, "_commands", lambda *_: [])
    with pytest.raises(CircuitGraphError, match=r"pip install 'pygraphviz>=2'"):
        _circuit().render(tmp_path / "c.svg")
    assert list(tmp_path.iterdir()) == []


def test_dot_on_the_path_serves_where_pygraphviz_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "dot"
    fake.write_text('#!/bin/sh\ncat > /dev/null\nprintf "%s" "$*"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(drawing_render, "_PROGRAM", "raise SystemExit('broken')")
    assert render_dot("digraph {}", "png", dpi=7) == b"-Tpng -Gdpi=7"


def test_a_layout_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", slow)
    monkeypatch.setattr(drawing_render, "_commands", lambda *_: [[sys.executable]])
    with pytest.raises(CircuitGraphError, match="no layout in 120 s; draw fewer edges"):
        render_dot("digraph {}", "svg")
