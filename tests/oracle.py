"""`F(m)` through nnsight on the untouched model: every reader's input is overridden there. Slow, and independent of the engine."""

from __future__ import annotations

import copy
from typing import Any

import nnsight
import numpy as np
import torch
from torch import Tensor, nn

from circuitgraph import _architecture as arch


def oracle_logits(model: nn.Module, architecture: arch.Architecture, ids: Tensor, mask: np.ndarray, source: Tensor) -> Tensor:
    """Logits `[prompts, position, vocabulary]` under `mask`; `source` `[writers, prompts, position, d_model]` is patched in."""
    wiring = _Wiring(model, architecture, torch.as_tensor(mask).to(source), source)
    with torch.no_grad():
        return _run(nnsight.NNsight(model), wiring, ids)


def oracle_writers(model: nn.Module, architecture: arch.Architecture, ids: Tensor) -> Tensor:
    """What every writer says in the model's own run."""
    shape = architecture.graph().shape
    wiring = _Wiring(model, architecture, torch.ones(shape).to(next(model.parameters())), None)
    with torch.no_grad():
        _run(nnsight.NNsight(model), wiring, ids)
    return torch.stack(wiring.live)


def _run(wrapped: Any, wiring: _Wiring, ids: Tensor) -> Tensor:
    blocks = wiring.architecture.blocks
    get = wrapped.get
    unembedding, final_norm = get(wiring.architecture.unembedding), wiring.architecture.final_norm
    with wrapped.trace(ids, use_cache=False):
        wiring.begin(get(blocks[0].path).input)
        for block in blocks:
            before = len(wiring.live), wiring.constant
            if block.attention is not None:
                outputs = wiring.projections(block.attention)
                for path in wiring.projection_order(block.attention):
                    get(path).output = outputs[path]
                wiring.add_heads(block.attention, get(block.attention.o).input)
            if block.mlp is not None:
                first = get(block.mlp.modules[0])
                first.input = wiring.mlp_input(block.mlp, *(before if block.parallel else (len(wiring.live), wiring.constant))).reshape(
                    first.input.shape
                )
                last = get(block.mlp.post_norm.path if block.mlp.post_norm else block.mlp.modules[-1]).output
                wiring.add_mlp(block.mlp, last if isinstance(last, Tensor) else last[0])
        unembedding.input = wiring.logits_input(final_norm)
        out = wrapped.output.save()
    return out.logits


class _Wiring:
    """The equation of the design, one reader at a time; rows of the mask are taken in order."""

    def __init__(self, model: nn.Module, architecture: arch.Architecture, mask: Tensor, source: Tensor | None) -> None:
        self.model = copy.deepcopy(model)  # calling the traced model's own modules would advance nnsight
        self.architecture, self.mask, self.source = architecture, mask, source

    def begin(self, embeddings: Tensor) -> None:
        self.live, self.row, self.constant = [embeddings.clone()], 0, torch.zeros_like(embeddings[0, 0])

    def read(self, n_writers: int, constant: Tensor) -> Tensor:
        m = self.mask[self.row]
        self.row += 1
        total = constant.clone()
        for w in range(n_writers):
            total = total + (self.live[w] if self.source is None else m[w] * self.live[w] + (1 - m[w]) * self.source[w])
        return total

    def projection_order(self, attention: arch.Attention) -> list[str]:
        return [*dict.fromkeys((attention.q.path, attention.k.path, attention.v.path))]

    def projections(self, attention: arch.Attention) -> dict[str, Tensor]:
        n_writers, outputs = len(self.live), {}
        for projection in (attention.q, attention.k, attention.v):
            module = self.model.get_submodule(projection.path)
            for head in range(projection.n_heads):
                whole = module(self.norm(attention.norm, self.read(n_writers, self.constant)))
                out = outputs.setdefault(projection.path, torch.zeros_like(whole))
                features = [*projection.features(head)]
                out[..., features] = whole[..., features]
        return outputs

    def add_heads(self, attention: arch.Attention, mixed: Tensor) -> None:
        o, n_heads = self.model.get_submodule(attention.o), attention.q.n_heads
        mixed = mixed.reshape(*self.live[0].shape[:2], -1)
        width = mixed.shape[-1] // n_heads
        bias = o(torch.zeros_like(mixed))
        parts = []
        for head in range(n_heads):
            alone = torch.zeros_like(mixed)
            alone[..., head * width : (head + 1) * width] = mixed[..., head * width : (head + 1) * width]
            parts.append(o(alone) - bias)
        if attention.post_norm is not None:
            total = sum(parts)
            # the post-norms of these families are linear given the scale of the whole: share the normed whole out by projection
            scale = self.norm(attention.post_norm, total) / total
            parts = [part * scale for part in parts]
            bias = torch.zeros_like(bias)
        self.live += [part * attention.scale for part in parts]
        self.constant = self.constant + bias[0, 0] * attention.scale

    def mlp_input(self, mlp: arch.MLP, n_writers: int, constant: Tensor) -> Tensor:
        return self.norm(mlp.norm, self.read(n_writers, constant))

    def add_mlp(self, mlp: arch.MLP, out: Tensor) -> None:
        self.live.append(out.reshape(self.live[0].shape) * mlp.scale)

    def logits_input(self, norm: arch.Norm | None) -> Tensor:
        return self.norm(norm, self.read(len(self.live), self.constant))

    def norm(self, norm: arch.Norm | None, x: Tensor) -> Tensor:
        return x if norm is None else self.model.get_submodule(norm.path)(x)
