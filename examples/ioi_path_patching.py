"""Which heads of SmolLM2 move the name, and who tells them which? The first two steps of Wang et al. (2023), by path patching."""

from __future__ import annotations

from circuitgraph import Engine, Writer, load_task, trace
from circuitgraph.algorithms import PathPatching

MODEL, PROMPTS, SEED, MOVERS, SHOWN = "smollm2-135m", 8, 0, 3, 6


def effects(engine: Engine, senders: str, receivers: tuple[str, ...]) -> dict[str, float]:
    """By sender, the share of the logit difference that is lost when the receivers hear it from the corrupted prompt."""
    record = PathPatching(receivers, senders).run(engine).record
    shares = {head: score / record["baseline"] for head, score in record["senders"].items()}
    return dict(sorted(shares.items(), key=lambda share: -share[1]))


def show(title: str, shares: dict[str, float]) -> None:
    print(title)
    for head in [*shares][:SHOWN]:
        print(f"  {head:8} {shares[head]:+.1%}")
    print("  against it:", ", ".join(f"{head} {shares[head]:+.1%}" for head in [*shares][:-3:-1]))


model = trace(MODEL)
engine = model.bind(load_task("ioi").pairs(model.tokenizer, PROMPTS, SEED), "logit_diff")

to_logits = effects(engine, "a*.h*", ("logits",))
show("heads that write the answer into the logits:", to_logits)

movers = [*to_logits][:MOVERS]
first = min(Writer.parse(head).layer for head in movers)
to_queries = effects(engine, f"a0-{first - 1}.h*", tuple(f"{head}<q>" for head in movers))
show(f"heads that tell the queries of {', '.join(movers)}:", to_queries)
