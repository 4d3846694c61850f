"""An algorithm of one's own, tested against models whose circuit is known.

In CI: pytest -p circuitgraph.testing.pytest_plugin --circuitgraph-check tested_algorithm:HalfwayPatching
"""

from dataclasses import dataclass

import numpy as np

from circuitgraph import Engine, Outcome, discover
from circuitgraph.testing import check_algorithm, planted_model


@dataclass(frozen=True)
class HalfwayPatching:
    """Patches every edge half-way and doubles what that does: EAP takes an infinitely small step, activation patching a whole one."""

    def run(self, engine: Engine) -> Outcome:
        graph, full = engine.graph, engine.graph.visible.astype(np.float32)
        sign = 1 if engine.metric.higher_is_better else -1
        model, scores = engine.evaluate(full[None]).mean(), np.zeros(graph.shape)
        edges = np.argwhere(graph.visible)
        for some in np.array_split(edges, range(64, len(edges), 64)):
            masks = np.repeat(full[None], len(some), axis=0)
            masks[np.arange(len(some)), *some.T] = 0.5
            scores[*some.T] = 2 * sign * (model - engine.evaluate(masks).mean(axis=1))
        return Outcome(graph.visible.copy(), scores)


if __name__ == "__main__":
    print(check_algorithm(HalfwayPatching(), backends=["torch", "reference"]))
    planted = planted_model(seed=0)
    found = discover(planted.traced(), planted.pairs, HalfwayPatching()).top(planted.circuit.n_edges)
    print(f"{(found.mask & planted.circuit.mask).sum()} of the {planted.circuit.n_edges} planted edges are its strongest")
