"""Prompt pairs for people: token by token, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from circuitgraph._prepare import Preparation
from circuitgraph._tokens import Encoder

if TYPE_CHECKING:
    from circuitgraph._task import Task


def described(task: Task, preparation: Preparation) -> str:
    """See `Task.describe`."""
    encoder, pairs = preparation.encoder, preparation.pairs
    prompts = f"{len(task.row)} rows" if task.row else "templates " + ", ".join(pattern.name for pattern in task.patterns)
    bos = f"every prompt begins with {encoder.shown(encoder.prefix)} (bos = true)" if encoder.bos else "no BOS token is added (bos = false)"
    lines = [f"task {task.name}: metric {task.metric}, {prompts}, digest {task.digest[:12]}", bos, *preparation.notes]
    for i in range(len(pairs)):
        template = f" ({pairs.templates[i]})" if pairs.templates and pairs.templates[i] else ""
        lines += ["", f"pair {i + 1}{template}, {len(pairs.clean[i])} tokens; * marks where the prompts differ"]
        clean, corrupted = (encoder.tokens(ids[i].tolist()) for ids in (pairs.clean, pairs.corrupted))
        width, other = (max(map(len, chain(tokens, [head]))) for tokens, head in ((clean, "clean"), (corrupted, "corrupted")))
        spans = [f"  {pairs.span_names[span]}" for span in pairs.spans[i]] if pairs.spans else [""] * len(clean)
        lines.append(f"      {'clean':{width}}  {'corrupted':{other}}{'  span' if pairs.spans else ''}")
        for position, (left, right) in enumerate(zip(clean, corrupted, strict=True)):
            differs = "*" if pairs.clean[i][position] != pairs.corrupted[i][position] else " "
            end = "   <- the answer is read here" if position == len(clean) - 1 else ""
            lines.append(f"  {position:3}{differs}{left:{width}}  {right:{other}}{spans[position]}".rstrip() + end)
        lines += [
            _answer_line("answer", pairs.answers[i].tolist(), encoder),
            _answer_line("wrong", pairs.wrong_answers[i].tolist(), encoder),
        ]
    return "\n".join(lines)


def _answer_line(name: str, ids: Sequence[int], encoder: Encoder) -> str:
    if not ids:
        return f"  {name:7}none"
    shown = [f"{token} ({i})" for token, i in islice(zip(encoder.tokens(ids), ids, strict=True), 6)]
    return f"  {name:7}{', '.join(shown)}" + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")
