"""Which heads of SmolLM2 move the name, and who tells them which? The first steps of Wang et al. (2023), by path patching."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from circuitgraph import Engine, PromptPairs, Writer, load_task, trace
from circuitgraph.algorithms import PathPatching

MODEL, SEED, MOVERS, SHOWN = "smollm2-135m", 0, 3, 5
PROMPTS = int(sys.argv[1]) if sys.argv[1:] else 8


def effects(engine: Engine, senders: str, receivers: tuple[str, ...]) -> dict[str, float]:
    """By sender, the share of the logit difference that is lost when the receivers hear it from the corrupted prompt."""
    record = PathPatching(receivers, senders).run(engine).record
    shares = {head: score / record["baseline"] for head, score in record["senders"].items()}
    return dict(sorted(shares.items(), key=lambda share: -share[1]))


def looks(model: Any, pairs: PromptPairs) -> np.ndarray:
    """How much of its attention each head gives the indirect object and the second subject, from the last token: `[layers, heads, 2]`."""
    model.module.set_attn_implementation("eager")
    seen = []
    for ids, answer, wrong in zip(pairs.clean, pairs.answers, pairs.wrong_answers, strict=True):
        places = np.flatnonzero(ids == answer[0])[0], np.flatnonzero(ids == wrong[0])[-1]
        with torch.no_grad():
            patterns = model.module(torch.tensor(ids)[None], output_attentions=True).attentions
        seen.append(torch.stack([layer[0, :, -1][:, list(places)] for layer in patterns]).numpy())
    return np.mean(seen, axis=0)


def show(title: str, shares: dict[str, float], attention: np.ndarray) -> None:
    print(title)
    for head in [*[*shares][:SHOWN], [*shares][-2], [*shares][-1]]:
        writer = Writer.parse(head)
        to_object, to_subject = attention[writer.layer, writer.index]
        print(f"  {head:7} {shares[head]:+6.1%}   attention to the indirect object {to_object:4.0%}, the second subject {to_subject:4.0%}")


model = trace(MODEL)
pairs = load_task("ioi").pairs(model.tokenizer, PROMPTS, SEED)
engine = model.bind(pairs, "logit_diff")

to_logits = effects(engine, "a*.h*", ("logits",))
movers = [*to_logits][:MOVERS]
first = min(Writer.parse(head).layer for head in movers)
to_queries = effects(engine, f"a0-{first - 1}.h*", tuple(f"{head}<q>" for head in movers))

attention = looks(model, pairs)
show("heads that write the answer into the logits, the first and the last:", to_logits, attention)
show(f"heads that tell the queries of {', '.join(movers)}, the first and the last:", to_queries, attention)
