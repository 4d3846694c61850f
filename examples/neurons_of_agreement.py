"""Which neurons of the first two layers carry the number of the subject to the verb: MLPs by their neurons, and the circuit among these."""

from __future__ import annotations

import sys
from pathlib import Path

import circuitgraph as cg
from circuitgraph.features import Neurons, merged, refine

TASK = "subject-verb-agreement"


def main(picture: str = "neurons.svg") -> None:
    whole = cg.trace("zoo:tiny-english")
    model = refine(whole, {"m0": Neurons(), "m1": Neurons()}, TASK, top=32, prompts=16)
    for refined in model.provenance["refined"]:
        fold = refined["fold"]
        print(f"{refined['component']}: {fold['chosen']} of {fold['active']} neurons are nodes")

    circuit = cg.discover(model, TASK, cg.EAPIG(), prompts=16).top(150).prune_dead()
    print(cg.evaluate(model, TASK, circuit, prompts=16))
    neurons = sorted({edge.writer.name for edge in circuit.edges if edge.writer.kind == "neuron"})
    print(f"{len(neurons)} neurons are in the circuit: {' '.join(neurons)}")
    print(f"as whole components: {merged(circuit, whole.graph)}")
    print(f"the picture: {circuit.render(Path(picture))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
