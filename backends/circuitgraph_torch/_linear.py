"""A run of one prompt in which attention patterns, the scales of norms and what MLPs say are held, so that all else is linear.

What a target hears (a transcoder feature before its activation, or a logit) is then a sum over what writers say at each position: the
target's gradient, taken back through the values of attention alone, times what was said there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from circuitgraph._dictionary import Dictionary
from circuitgraph._linear import HELD, FeatureTarget, LinearPrompt, LogitTarget
from circuitgraph._metrics import NLL
from circuitgraph._sites import Sites
from circuitgraph_torch._backward import Backward
from circuitgraph_torch._bank import NoBank
from circuitgraph_torch._batch import Batch, Parts
from circuitgraph_torch._forward import Forward, LiveRun, SourceRun, Tape
from circuitgraph_torch._joints import ModelJoints
from circuitgraph_torch._mlp import MLPJoint
from circuitgraph_torch._spare import Room
from circuitgraph_torch._splits import CrossLayerSplit, MLPSplit, Split, Splits, transcoded

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

_AT_ONCE = 32  # targets


class TorchLinearRun:
    """One prompt of a model whose MLPs are in parts, or some of them. See `circuitgraph._linear.LinearRun`."""

    def __init__(self, parts: Parts, prompt: LinearPrompt) -> None:
        self._parts, self._prompt, self._whole = parts, prompt, _unrefined(parts)
        (bucket,) = prompt.pairs.buckets()
        self._batch = Batch(parts, bucket, NLL(), bucket.clean, bucket.clean)
        self._input = parts.embed(bucket.clean)

    @property
    def said(self) -> Float[ndarray, "writers position d_model"]:
        values: Float[ndarray, "writers position d_model"] = self._values.double().cpu().numpy()
        return values

    @property
    @torch.no_grad()
    def logits(self) -> Float[ndarray, " vocabulary"]:
        found: Float[ndarray, " vocabulary"] = self._parts.joints.logits(self._end)[0].double().cpu().numpy()
        return found

    @torch.no_grad()
    def features(self, layer: int) -> Float[ndarray, "position features"]:
        """What the features are that are nodes of this layer's MLP."""
        split, joint = self._transcoder(layer)
        seen = transcoded(split.output.dictionary.reads, joint, self._heard(layer), HELD)
        found: Float[ndarray, "position features"] = split.output.dictionary.encode(seen, split.output.features)[0].double().cpu().numpy()
        return found

    def attributions(self, targets: Sequence[FeatureTarget | LogitTarget]) -> Float[ndarray, "targets writers position"]:
        self._prompt.check_targets(targets)
        n_writers, length = self._values.shape[:2]
        out = np.zeros((len(targets), n_writers, length))
        with self._parts.modes.undisturbed():
            for at in range(0, len(targets), _AT_ONCE):
                chunk = targets[at : at + _AT_ONCE]
                out[at : at + len(chunk)] = _Downwards(self, chunk).scores()
        out[:, [w for w, writer in enumerate(self._parts.sites.graph.writers) if writer.kind == "skip"]] = 0  # gone through, like heads
        return out

    @cached_property
    def _live(self) -> LiveRun:
        with self._parts.modes.undisturbed():
            return self._batch.live

    @property
    def _values(self) -> Tensor:
        return self._live.values[:, 0]

    @cached_property
    def _run(self) -> SourceRun:
        return SourceRun(self._live.values, self._parts.joints, self._parts.sites)

    @property
    def _end(self) -> Tensor:
        return self._live.streams[-1][:, -1]

    def _heard(self, layer: int) -> Tensor:
        """What the MLP of a layer hears, `[1, position, d_model]`."""
        site = self._parts.sites.layers[layer].mlp
        assert site is not None
        return self._run.heard(site)

    def _transcoder(self, layer: int) -> tuple[MLPSplit, MLPJoint]:
        self._prompt.features(layer)  # raises where there is none
        joints = self._parts.joints.layers[layer]
        split = _of_transcoder(joints.splits.mlp)
        assert split is not None
        assert joints.mlp is not None
        return split, joints.mlp

    def direction(self, target: FeatureTarget) -> Tensor:
        """The gradient of what a feature is before its activation, in what its reader hears at the target's position, `[d_model]`."""
        split, joint = self._transcoder(target.layer)
        dictionary = split.output.dictionary
        x = self._heard(target.layer)[0, target.position]
        return _to_stream(dictionary, joint, dictionary.encoder[:, target.feature].clone()[None], x[None])[0]

    def logit_directions(self, tokens: Sequence[int]) -> Tensor:
        """The gradients of logits, less the mean of all, in the stream at the last position, `[tokens, d_model]`."""
        x = self._end.expand(len(tokens), -1).detach().requires_grad_()
        with torch.enable_grad():
            logits = self._parts.joints.logits(x, is_frozen=True)
            total = (logits[torch.arange(len(tokens)), torch.tensor([*tokens])] - logits.mean(-1)).sum()
        return torch.autograd.grad(total, x)[0]

    def through_skip(self, layer: int, grad: Tensor) -> Tensor | None:
        """What goes back through the skip of a layer's transcoder, of a gradient `[..., position, d_model]` of what it says."""
        split = _of_transcoder(self._parts.joints.layers[layer].splits.mlp)
        if split is None or split.output.dictionary.skip is None:
            return None
        joint = self._parts.joints.layers[layer].mlp
        assert joint is not None
        return _to_stream(split.output.dictionary, joint, grad @ split.output.dictionary.skip, self._heard(layer))


class _Downwards:
    """One pass from the logits down, for some targets that share a batch: each has a copy of the prompt."""

    def __init__(self, run: TorchLinearRun, targets: Sequence[FeatureTarget | LogitTarget]) -> None:
        self._run, self._targets = run, targets
        self._tape = Tape(HELD)
        whole, length = run._whole, run._values.shape[1]
        start = run._input.expand(len(targets), -1, -1)
        ones = np.ones((1, *whole.sites.graph.shape), dtype=np.float32)
        nothing = SourceRun(start.new_zeros(ones.shape[2], 1, 1, start.shape[-1]), whole.joints, whole.sites)
        forward = Forward(whole.joints, whole.sites, whole.calls(length), ones, nothing, np.ones(ones.shape[1], dtype=bool), self._tape)
        forward.run(NoBank(ones.shape[2]), start[None], 0)
        self._grad = torch.zeros_like(start)
        self._scores: Float[ndarray, "targets writers position"] = np.zeros((len(targets), len(run._values), length))

    def scores(self) -> Float[ndarray, "targets writers position"]:
        run, whole = self._run, self._run._whole
        self._begin_at_logits()
        back = Backward(whole.joints, whole.sites, _Nothing())
        back.rule = HELD
        for number in range(len(whole.sites.layers) - 1, -1, -1):
            joints, after = whole.joints.layers[number], self._grad
            self._score(run._parts.sites.layers[number].mlp_writers, after)
            self._grad = after + self._into_mlp(number, after)
            step = self._tape.attention.get(number)
            if joints.attention is not None and step is not None:
                of_heads = after if joints.is_parallel else self._grad  # a parallel MLP does not hear them
                which = np.flatnonzero(step.plan.readers >= joints.attention.first_value)
                self._grad = self._grad + back.reader_grads(joints.attention, step, of_heads[None], which).added()[0]
        self._score(range(1), self._grad)
        return self._scores

    def _begin_at_logits(self) -> None:
        rows = [row for row, target in enumerate(self._targets) if isinstance(target, LogitTarget)]
        if rows:
            tokens = [target.token for target in self._targets if isinstance(target, LogitTarget)]
            self._grad[rows, -1] += self._run.logit_directions(tokens)

    def _into_mlp(self, layer: int, after: Tensor) -> Tensor:
        """What goes into the stream that an MLP hears: targets that begin there, and what goes through a skip."""
        skipped = self._run.through_skip(layer, after)
        grad = torch.zeros_like(after) if skipped is None else skipped
        for row, target in enumerate(self._targets):
            if isinstance(target, FeatureTarget) and target.layer == layer:
                grad[row, target.position] += self._run.direction(target)
        return grad

    def _score(self, writers: range, grad: Tensor) -> None:
        said = self._run._values[writers.start : writers.stop]
        products = torch.einsum("tpd,wpd->twp", grad, said)
        self._scores[:, writers.start : writers.stop] = products.double().cpu().numpy()


def _of_transcoder(split: Split | None) -> MLPSplit | None:
    """The split by a transcoder, or by a layer's own part of a cross-layer one; none for an MLP that is whole or in other parts."""
    split = split.transcoder if isinstance(split, CrossLayerSplit) else split
    return split if isinstance(split, MLPSplit) and split.has_readers else None


def _to_stream(dictionary: Dictionary, joint: MLPJoint, grad: Tensor, x: Tensor) -> Tensor:
    """From the gradient of what a transcoder reads to that of the stream `x`, the norm's scale held."""
    if dictionary.reads == "mlp_stream" or joint.norm is None:
        return grad
    norm = joint.norm if dictionary.reads == "mlp_in" else replace(joint.norm, gain=1.0)
    return norm.backward_(grad.clone(), x, is_frozen=True)


def _unrefined(parts: Parts) -> Parts:
    """The same model with whole components."""
    layers = tuple(replace(layer, splits=Splits()) for layer in parts.joints.layers)
    per_head_kv = any(layer.attention is not None and layer.attention.kv_per_head for layer in layers)
    graph = parts.architecture.graph(per_head_kv=per_head_kv)
    return replace(parts, joints=ModelJoints(layers, parts.joints.logits), sites=Sites.of(graph, len(layers)))


class _Nothing:
    """A collector for passes whose gradients of readers nobody wants."""

    def __init__(self) -> None:
        self.room = Room()

    def add(self, site: object, readers: object, grads: Tensor, *, last_only: bool = False) -> None: ...
