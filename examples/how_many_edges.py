"""How faithful is a circuit of the n strongest edges, and how faithful are n random ones?"""

from __future__ import annotations

import numpy as np

from circuitgraph import EAP, Circuit, Graph, discover, evaluate, trace

PROMPTS = 32


def random_circuit(graph: Graph, n: int, seed: int) -> Circuit:
    mask = np.zeros(graph.shape, dtype=bool)
    chosen = np.random.default_rng(seed).choice(np.flatnonzero(graph.visible), size=n, replace=False)
    mask.flat[chosen] = True
    return Circuit(graph, mask)


model = trace("zoo:induction-2l")
scored = discover(model, "induction", EAP(), prompts=PROMPTS)
print("edges  strongest  random")
for share in (0.1, 0.2, 0.4, 0.8):
    n = round(share * scored.graph.n_edges)
    strongest = evaluate(model, "induction", scored.top(n), prompts=PROMPTS, seed=1)
    random = evaluate(model, "induction", random_circuit(scored.graph, n, seed=0), metric="logit_diff", prompts=PROMPTS, seed=1)
    print(f"{n:5}  {strongest.faithfulness:9.2f}  {random.faithfulness:6.2f}")
