"""Features of one MLP of SmolLM2: a dictionary is trained on prompts of the IOI task, its features become nodes, and cards show them.

python examples/smollm2_features.py [STEPS [PROMPTS]]     # 1000 and 16: four and a half minutes on two cores
"""

from __future__ import annotations

import sys

import circuitgraph as cg
from circuitgraph.features import SAETraining, feature_cards, refine, train

MODEL, COMPONENT, TASK = "smollm2-135m", "m24", "ioi"


def main(steps: int = 1000, prompts: int = 16) -> None:
    model = cg.trace(MODEL)
    settings = SAETraining(n_features=2048, k=16, steps=steps, batch=512, first_position=1)
    made = train(model, COMPONENT, TASK, settings, prompts=max(40, steps))
    print(made.report)
    refined = refine(model, {COMPONENT: made.dictionary}, TASK, top=32, prompts=prompts)
    print(f"nodes: {refined.provenance['refined'][0]['fold']}")

    circuit = cg.discover(refined, TASK, cg.EAP(), prompts=prompts)
    scores = dict(zip((edge.name for edge in circuit.graph.edges), circuit.scores[circuit.graph.visible], strict=True))
    direct = {name: score for name, score in scores.items() if name.startswith(f"{COMPONENT}.") and name.endswith("->logits")}
    best = sorted(direct, key=lambda name: -abs(direct[name]))[:5]
    for name in best:
        print(f"{name}: {direct[name]:+.3f} of the logit difference")
    features = [name.partition("->")[0] for name in best if ".f" in name]
    for card in feature_cards(refined, TASK, features, examples=3, tokens=6, prompts=4 * prompts):
        print(card)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
