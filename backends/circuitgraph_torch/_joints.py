"""A model taken apart at its joints: attention, MLP, logits. The model's own modules compute; only the wiring is ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from circuitgraph._architecture import Architecture, Attention, Projection
from circuitgraph._dictionary import Neurons
from circuitgraph._engine import Rule
from circuitgraph._errors import CircuitGraphError, TraceError
from circuitgraph._refinement import Refinement
from circuitgraph_torch._affine import affine
from circuitgraph_torch._calls import AttentionCall
from circuitgraph_torch._few_rows import linear_of_few
from circuitgraph_torch._mlp import MLPJoint
from circuitgraph_torch._norms import NormJoint, norms_in
from circuitgraph_torch._spare import Room
from circuitgraph_torch._splits import AttentionSplit, CrossLayerSplit, MLPSplit, NeuronSplit, OutputSplit, Split, Splits
from circuitgraph_torch._twin import twin


class AttentionJoint:
    """The attention of one layer between its readers and its heads.

    Readers are ordered `q` heads, `k` inputs, `v` inputs. `weights` `[readers, head_dim, d_model]` and `biases` `[readers, head_dim]`
    project a reader's normalised input; the model's own attention code, with these in place of its own projections, does the rest.
    """

    def __init__(self, model: nn.Module, attention: Attention, d_model: int, *, per_head_kv: bool) -> None:
        self.norm = NormJoint.of(model, attention.norm)
        self.post_norm = NormJoint.of(model, attention.post_norm)
        self.scale = attention.scale
        self.n_heads, self.n_groups = attention.q.n_heads, attention.k.n_heads
        self.head_dim = attention.q.head_dim
        self.group_size = self.n_heads // self.n_groups
        self.kv_per_head = per_head_kv and self.group_size > 1
        self.n_readers = self.n_heads * 3 if self.kv_per_head else self.n_heads + 2 * self.n_groups
        self.first_value = (self.n_heads + self.n_readers) // 2
        self.couples_heads = attention.couples_heads
        self._inner_norms = norms_in(model, attention.path)
        self._load_weights(model, attention, d_model)
        self._make_twin(model, attention, d_model)

    def _load_weights(self, model: nn.Module, attention: Attention, d_model: int) -> None:
        projections = (attention.q, attention.k, attention.v)
        if len({p.head_dim for p in projections}) > 1:
            raise TraceError(f"{attention.path}: queries, keys and values differ in head_dim, which this engine does not read yet")
        parts = [_head_weights(model, p) for p in projections]
        if self.kv_per_head:
            parts = [parts[0], *((w.repeat_interleave(self.group_size, 0), b.repeat_interleave(self.group_size, 0)) for w, b in parts[1:])]
        self.weights = torch.cat([w for w, _ in parts]).contiguous()
        self.biases = torch.cat([b for _, b in parts]).contiguous()
        weight, bias = affine(model.get_submodule(attention.o))
        self.out_weights = weight.T.reshape(self.n_heads, self.head_dim, d_model).contiguous()
        self.out_bias = bias
        if bias is not None and self.post_norm is not None:
            raise TraceError(f"{attention.o}: an output bias under a post-norm belongs to no head; this engine does not read it yet")

    def _make_twin(self, model: nn.Module, attention: Attention, d_model: int) -> None:
        base = attention.path + "."
        self._given = {p.path: _Given() for p in (attention.q, attention.k, attention.v)}
        self._seen = _Seen(d_model)
        replaced: dict[str, nn.Module] = {path.removeprefix(base): given for path, given in self._given.items()}
        replaced[attention.o.removeprefix(base)] = self._seen
        self._twin = twin(model.get_submodule(attention.path), replaced)
        # One pass of the attention code serves all heads, or, with a key and value per head, one head of every group.
        self._passes = [self._columns(attention, member) for member in range(self.group_size if self.kv_per_head else 1)]

    @cached_property
    def at_zero(self) -> Tensor:
        """What readers project of a standardised input of zeros: the biases, and what comes of the norm's, `[readers, head_dim]`."""
        zeros = self.weights.new_zeros(1, self.weights.shape[-1])
        normed = zeros if self.norm is None else self.norm.module(zeros)
        return (self.weights @ normed[0] + self.biases).detach()

    def folded(self, room: Room) -> Tensor:
        """The weights as maps of the standardised input (but for what comes of the norm's bias), `[readers, head_dim, d_model]`."""
        assert self.norm is not None
        return torch.addcmul(self._off_centre, self.weights, self.norm.gain_of(self.weights), out=room(self.n_readers, self.weights[0]))

    @cached_property
    def _off_centre(self) -> Tensor:
        """What a layer norm's taking the mean away takes from the weights, `[readers, head_dim, 1]`, negative."""
        assert self.norm is not None
        mean = (self.weights @ self.norm.gain_of(self.weights) / self.weights.shape[-1])[..., None]
        return -mean if self.norm.kind == "layer" else torch.zeros_like(mean)

    def check_rule(self, rule: Rule) -> None:
        """Raises `CircuitGraphError` where a norm inside the attention, which is left to the model's own code, would have to be frozen."""
        heard = [path for path in self._inner_norms if rule.patterns != "frozen" or path.rpartition(".")[2].startswith("v")]
        if rule.norms == "frozen" and heard:
            raise CircuitGraphError(
                f"gradient: {heard[0]} is a norm inside an attention, whose scale this engine cannot freeze; use a rule with norms 'exact'"
                f"{'' if rule.patterns == 'frozen' else ', or with patterns frozen too'}"
            )

    def _columns(self, attention: Attention, member: int) -> _Columns:
        """For each projection module, which columns of the readers' outputs side by side are its features."""
        features: dict[str, dict[int, int]] = {path: {} for path in self._given}
        reader = 0
        for projection in (attention.q, attention.k, attention.v):
            grouped = projection is not attention.q
            for head in range(projection.n_heads):
                row = reader + (head * self.group_size + member if grouped and self.kv_per_head else head)
                for column, feature in enumerate(projection.features(head)):
                    features[projection.path][feature] = row * self.head_dim + column
            reader += self.n_heads if grouped and self.kv_per_head else projection.n_heads
        columns = {path: [at[f] for f in range(len(at))] for path, at in features.items()}
        return _Columns(columns, self.n_readers * self.head_dim, self.weights.device)

    def attend(self, projected: Tensor, call: AttentionCall, *, rows_are_shared: bool, before: Tensor | None = None) -> Tensor:
        """The heads' mixed values `[prompts, position, heads, head_dim]` from `projected` `[prompts, position, readers * head_dim]`.

        `rows_are_shared`: all readers of a kind say the same within each group, so one pass is enough. `before`: what was projected at
        earlier positions, if those are not in `projected`; there may be several times as many rows as in it, for the same prompts.
        """
        passes = self._passes[:1] if rows_are_shared else self._passes
        if before is not None:
            projected = torch.cat([before.repeat(len(projected) // len(before), 1, 1), projected], 1)
        mixed = [self._pass(projected, columns, call)[:, 0 if before is None else before.shape[1] :] for columns in passes]
        if len(mixed) == 1:
            return mixed[0]
        member = torch.arange(self.n_heads, device=projected.device) % self.group_size
        return torch.stack(mixed)[member, :, :, torch.arange(self.n_heads, device=projected.device)].permute(1, 2, 0, 3)

    def _pass(self, projected: Tensor, columns: _Columns, call: AttentionCall) -> Tensor:
        for path, value in columns.shared_out(projected).items():
            self._given[path].value = value
        n, length = projected.shape[:2]
        args, kwargs = call.with_hidden(call.hidden.new_zeros(1, 1, 1).expand(n, length, call.hidden.shape[-1]))
        self._twin(*args, **kwargs)
        mixed, self._seen.value = self._seen.value, None
        for given in self._given.values():
            given.value = None
        assert mixed is not None, "the attention code did not call its output projection"
        return mixed.reshape(n, length, self.n_heads, self.head_dim)

    def write(self, mixed: Tensor, heads: Sequence[int], *, is_frozen: bool = False) -> Tensor:
        """What the heads add to the stream, `[heads, prompts, position, d_model]`, for some of them.

        `is_frozen`: the scale of a post-norm is a constant going back.
        """
        n, length = mixed.shape[:2]
        chosen = [*heads] if self.post_norm is None else [*range(self.n_heads)]
        whole = len(chosen) == self.n_heads
        values = mixed.reshape(n * length, self.n_heads, self.head_dim).transpose(0, 1)
        weights = self.out_weights if whole else self.out_weights[chosen]
        out = torch.bmm(values if whole else values[chosen], weights).view(len(chosen), n, length, -1)
        if self.post_norm is not None:
            out = self.post_norm.split(out, out.sum(0), is_frozen=is_frozen)
            out = out if len(heads) == self.n_heads else out[[*heads]]
        return out if self.scale == 1.0 else out * self.scale

    def write_together(self, mixed: Tensor, *, is_frozen: bool = False) -> Tensor:
        """The sum of what all heads add to the stream, `[1, prompts, position, d_model]`."""
        out = functional.linear(mixed.flatten(2), self.out_weights.flatten(0, 1).T)[None]
        if self.post_norm is not None:
            out = self.post_norm.split(out, out[0], is_frozen=is_frozen)
        return out if self.scale == 1.0 else out * self.scale

    @property
    def constant(self) -> Tensor | None:
        """What this layer's attention adds to the stream that belongs to no head, `[d_model]`."""
        bias = getattr(self.post_norm.module, "bias", None) if self.post_norm else self.out_bias
        return None if bias is None else bias.detach() * self.scale


class LogitsJoint:
    """The final norm and the unembedding."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self._norm = NormJoint.of(model, architecture.final_norm)
        self._module = model.get_submodule(architecture.unembedding)
        self._scale, self._softcap = architecture.logit_scale, architecture.logit_softcap

    def __call__(self, x: Tensor, tokens: Tensor | None = None, *, is_frozen: bool = False) -> Tensor:
        """Logits `[..., vocabulary]` from the final stream `[..., d_model]`, or only those of `tokens`.

        `is_frozen`: the scale of the final norm is a constant going back.
        """
        y = x if self._norm is None else self._norm(x, is_frozen=is_frozen)
        if not isinstance(self._module, nn.Linear):
            y = self._module(y) if tokens is None else self._module(y)[..., tokens]
        elif tokens is None:
            y = linear_of_few(self._module, y)
        else:
            bias = self._module.bias
            y = functional.linear(y, self._module.weight[tokens], None if bias is None else bias[tokens])
        y = y if self._scale == 1.0 else y * self._scale
        return y if self._softcap is None else torch.tanh(y / self._softcap) * self._softcap

    def weights(self, vectors: Tensor) -> Tensor:
        """What vectors `[..., d_model]` add to the logits `[..., vocabulary]` with the final norm's scale at 1, before soft-capping."""
        if self._norm is not None:
            centred = vectors - vectors.mean(-1, keepdim=True) if self._norm.kind == "layer" else vectors
            vectors = centred * self._norm.gain
        added: Tensor = self._module(vectors) - self._module(torch.zeros_like(vectors))
        return added * self._scale


@dataclass(frozen=True)
class LayerJoints:
    attention: AttentionJoint | None
    mlp: MLPJoint | None
    is_parallel: bool
    splits: Splits = field(default_factory=Splits)

    @property
    def attention_constant(self) -> Tensor | None:
        """What the attention adds to the stream that belongs to no writer, `[d_model]`."""
        whole = self.splits.attention or self.attention
        return None if whole is None else whole.constant

    @property
    def mlp_constant(self) -> Tensor | None:
        """The same of the MLP: nothing, unless it is refined."""
        return None if self.splits.mlp is None else self.splits.mlp.constant

    def refined(self, refinement: Refinement, like: Tensor) -> LayerJoints:
        """With one component in parts."""
        if refinement.component.kind == "r":
            return replace(self, splits=replace(self.splits, stream=OutputSplit.of(refinement, like)))
        if refinement.component.kind == "a":
            assert self.attention is not None  # the graph has it
            return replace(self, splits=replace(self.splits, attention=AttentionSplit.of(refinement, self.attention)))
        assert self.mlp is not None
        return replace(self, splits=replace(self.splits, mlp=_mlp_split(refinement, self.mlp)))


@dataclass(frozen=True)
class ModelJoints:
    """`stream`: of the stream after the last layer, where that is refined."""

    layers: tuple[LayerJoints, ...]
    logits: LogitsJoint
    stream: OutputSplit | None = None

    def refined(self, refinements: Sequence[Refinement], like: Tensor) -> ModelJoints:
        """With some components in parts; `like`: a tensor of the stream's dtype, on its device."""
        layers, stream = [*self.layers], self.stream
        for refinement in refinements:
            number = refinement.component.layer
            if number == len(layers):
                stream = OutputSplit.of(refinement, like)
            else:
                layers[number] = layers[number].refined(refinement, like)
        return replace(self, layers=tuple(layers), stream=stream)

    @classmethod
    def of(cls, model: nn.Module, architecture: Architecture, *, per_head_kv: bool) -> ModelJoints:
        def layer(block: Any) -> LayerJoints:
            attention = block.attention and AttentionJoint(model, block.attention, architecture.d_model, per_head_kv=per_head_kv)
            return LayerJoints(attention, block.mlp and MLPJoint(model, block.mlp), block.parallel)

        with torch.no_grad():
            return cls(tuple(layer(block) for block in architecture.blocks), LogitsJoint(model, architecture))


def _mlp_split(refinement: Refinement, joint: MLPJoint) -> Split:
    if isinstance(refinement.dictionary, Neurons):
        return NeuronSplit.of(refinement, joint)
    return (CrossLayerSplit if refinement.is_cross_layer else MLPSplit).of(refinement, joint)


def _head_weights(model: nn.Module, projection: Projection) -> tuple[Tensor, Tensor]:
    weight, bias = affine(model.get_submodule(projection.path))
    features = torch.tensor([[*projection.features(head)] for head in range(projection.n_heads)], device=weight.device)
    return weight[features], weight.new_zeros(features.shape) if bias is None else bias[features]


class _Columns:
    """Some columns of a last axis of this width for everyone. Where they stand side by side in order, the axis is only cut, which is cheap
    to go back through."""

    def __init__(self, columns: dict[str, list[int]], width: int, device: torch.device) -> None:
        in_order = [column for some in columns.values() for column in some] == [*range(width)]
        self._sizes = [len(some) for some in columns.values()] if in_order else []
        self._index = {path: torch.tensor(some, device=device) for path, some in columns.items()}

    def shared_out(self, values: Tensor) -> dict[str, Tensor]:
        if self._sizes:
            return dict(zip(self._index, values.split(self._sizes, dim=-1), strict=True))
        return {path: values[..., index] for path, index in self._index.items()}


class _Given(nn.Module):
    """Stands in for a projection: says what it was given."""

    value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.value is not None
        return self.value


class _Seen(nn.Module):
    """Stands in for the output projection: keeps what it is shown."""

    value: Tensor | None = None

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self._d_model = d_model

    def forward(self, x: Tensor) -> Tensor:
        self.value = x
        return x.new_zeros(1, 1, 1).expand(*x.shape[:-1], self._d_model)
