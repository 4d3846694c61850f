"""What a dictionary reads in the model's own run: the stream, what a component says or reads, what its heads mix, what its neurons are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from circuitgraph._dictionary import Neurons
from circuitgraph._engine import EXACT
from circuitgraph._refinement import Refinement
from circuitgraph_torch._batch import Batch, Parts
from circuitgraph_torch._forward import SourceRun
from circuitgraph_torch._joints import LayerJoints
from circuitgraph_torch._splits import transcoded

if TYPE_CHECKING:
    from circuitgraph._sites import LayerSites


def logit_weights(parts: Parts, refinement: Refinement, features: Sequence[int]) -> Tensor:
    """The direct effect on the logits of what features say at activation 1, `[features, vocabulary]`."""
    joints, chosen, dictionary = parts.joints, [*features], refinement.dictionary
    like = next(parts.model.parameters())
    number = min(refinement.component.layer, len(joints.layers) - 1)
    if isinstance(dictionary, Neurons):
        mlp = joints.layers[number].mlp
        assert mlp is not None
        return joints.logits.weights(mlp.last.weight[chosen])
    rows = torch.from_numpy(np.ascontiguousarray(dictionary.rows(chosen))).to(like)
    if dictionary.reads == "attn_z":
        attention = joints.layers[number].attention
        assert attention is not None
        rows = rows @ (attention.out_weights.flatten(0, 1) * attention.scale)
    return joints.logits.weights(rows)


def width_of(parts: Parts, refinement: Refinement) -> int:
    """How many numbers the place has that a refinement's dictionary reads. The graph has the component."""
    number, reads = refinement.component.layer, refinement.dictionary.reads
    if reads not in ("attn_z", "neurons"):
        return parts.architecture.d_model
    layer = parts.joints.layers[number]
    if reads == "attn_z":
        assert layer.attention is not None
        return layer.attention.n_heads * layer.attention.head_dim
    assert layer.mlp is not None
    return len(layer.mlp.last.weight)


@torch.no_grad()
def seen_by(parts: Parts, refinement: Refinement, batch: Batch) -> Tensor:
    """`[prompts, position, width]`, on the prompts that a batch runs."""
    number = refinement.component.layer
    run = SourceRun(batch.live.values, parts.joints, parts.sites)
    if refinement.component.kind == "r":
        return run.stream(number)
    layer, sites = parts.joints.layers[number], parts.sites.layers[number]
    if refinement.component.kind == "a":
        return _of_attention(parts, refinement, layer, sites, run)
    assert sites.mlp is not None
    assert layer.mlp is not None
    x = run.heard(sites.mlp)
    if isinstance(refinement.dictionary, Neurons):
        return layer.mlp.last.run(x, EXACT)[1]
    return layer.mlp(x) if refinement.dictionary.reads == "mlp_out" else transcoded(refinement.dictionary.reads, layer.mlp, x, EXACT)


def _of_attention(parts: Parts, refinement: Refinement, layer: LayerJoints, sites: LayerSites, run: SourceRun) -> Tensor:
    joint = layer.attention
    assert sites.attention is not None
    assert joint is not None
    x = run.heard(sites.attention)
    normed = x if joint.norm is None else joint.norm(x)
    projected = functional.linear(normed, joint.weights.flatten(0, 1), joint.biases.flatten())
    mixed = joint.attend(projected, parts.calls(x.shape[1])[refinement.component.layer], rows_are_shared=True)
    if refinement.dictionary.reads == "attn_z":
        return mixed.flatten(2)
    said = joint.write_together(mixed)[0]
    return said if joint.constant is None else said + joint.constant
