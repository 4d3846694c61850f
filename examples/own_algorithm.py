"""An algorithm of one's own: a frozen dataclass with one method that asks the engine what happens when edges are patched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuitgraph import Engine, Outcome, discover, evaluate, trace


@dataclass(frozen=True)
class LeaveOneWriterOut:
    """Keeps the writers whose removal changes the metric by more than `share` of what removing everything does."""

    share: float = 0.05

    def run(self, engine: Engine) -> Outcome:
        graph = engine.graph
        masks = np.repeat(graph.visible[None].astype(np.float32), len(graph.writers) + 2, axis=0)
        for writer in range(len(graph.writers)):
            masks[writer, :, writer] = 0
        masks[-1] = 0
        metric = engine.evaluate(masks).mean(axis=1)
        effect = np.abs(metric[-2] - metric[:-2]) / np.abs(metric[-2] - metric[-1])
        scores = np.where(graph.visible, effect, 0.0)
        return Outcome(mask=graph.prune_dead(scores > self.share), scores=scores)


model = trace("zoo:induction-2l")
circuit = discover(model, "induction", LeaveOneWriterOut(share=0.1), prompts=32)
print(circuit, circuit.nodes)
print(evaluate(model, "induction", circuit, prompts=32, seed=1))
