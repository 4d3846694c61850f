"""Where in the prompt does each edge matter? Indirect objects by position, on a small bundled model."""

from __future__ import annotations

import numpy as np

from circuitgraph import EAP, discover, evaluate, load_task, trace
from circuitgraph.algorithms import PerPosition

model = trace("zoo:tiny-english")
print(load_task("ioi").describe(model.tokenizer, n=1))  # the spans, token by token

circuit = discover(model, "ioi", PerPosition(EAP()), prompts=24)
graph, spans = circuit.graph, circuit.graph.spans
by_span = circuit.scores.reshape(len(graph.readers), -1, len(spans))  # the columns of a writer stand together

print("\nshare of all |scores| at each part of the prompt:")
for span, share in zip(spans, np.abs(by_span).sum((0, 1)) / np.abs(by_span).sum(), strict=True):
    print(f"  {span:8}{share:6.1%}")

print("\nthe edges of which a score without positions hides most: what helps at one place and hurts at another")
hidden = np.abs(by_span).sum(-1) - np.abs(by_span.sum(-1))
for r, w in sorted(np.argwhere(hidden > 0), key=lambda edge: -hidden[tuple(edge)])[:5]:
    places = ", ".join(f"{spans[s]} {by_span[r, w, s]:+.2f}" for s in np.argsort(-np.abs(by_span[r, w]))[:3])
    print(f"  {graph.writers[w * len(spans)].node + '->' + graph.readers[r].name:20}{by_span[r, w].sum():+.2f} is {places}")

strongest = circuit.top(60).prune_dead()
print(f"\n{evaluate(model, 'ioi', strongest, prompts=24, seed=1)}")
strongest.render("ioi-by-position.svg")
