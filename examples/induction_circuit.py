"""Find the induction circuit of a small bundled model, check it on prompts that discovery has not seen, and draw it."""

from __future__ import annotations

from circuitgraph import ACDC, discover, evaluate, trace

model = trace("zoo:induction-2l")
print(model.graph)

circuit = discover(model, "induction", ACDC(threshold=0.001), prompts=32, seed=0)
print(circuit)
print(evaluate(model, "induction", circuit, prompts=200, seed=1))

print("the previous-token heads and the induction heads that read them through their keys:")
for edge in circuit.edges:
    if edge.writer.kind == "head" and edge.reader.kind == "k":
        print(f"  {edge}")
circuit.render("induction.svg")
