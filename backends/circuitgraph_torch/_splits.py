"""Refined components: what each part says, from what the component's own modules compute. Autograd goes through all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from circuitgraph._dictionary import Dictionary, Neurons
from circuitgraph._engine import Rule
from circuitgraph._errors import CircuitGraphError
from circuitgraph._refinement import Refinement

if TYPE_CHECKING:
    from circuitgraph_torch._bank import Plan
    from circuitgraph_torch._joints import AttentionJoint
    from circuitgraph_torch._mlp import MLPJoint


@dataclass(frozen=True, eq=False)
class OutputSplit:
    """Divides vectors by a dictionary of them: features, a skip if there is one, and the rest. `constant` is beside them, of nobody."""

    dictionary: Dictionary
    features: list[int]

    @classmethod
    def of(cls, refinement: Refinement, like: Tensor) -> OutputSplit:
        dictionary = refinement.dictionary
        assert isinstance(dictionary, Dictionary)  # neurons are an MLP's, and have a split of their own
        return cls(
            dictionary.on(lambda array: torch.from_numpy(np.require(array, requirements=("C", "W"))).to(like)), [*refinement.features]
        )

    @property
    def constant(self) -> Tensor | None:
        constant: Tensor | None = self.dictionary.constant
        return constant

    def __call__(self, seen: Tensor, said: Tensor) -> Tensor:
        """`[parts, ..., d_model]` of what was `said`, by what the dictionary has `seen` (which is the same but for a transcoder)."""
        scale, affine = self.dictionary.output_scale(seen), self.dictionary.affine(seen)
        f = self.dictionary.encode(seen, self.features)
        parts = self.decoded(f if scale is None else f * scale)
        parts = parts if affine is None else torch.cat([parts, affine[None]])
        rest = said - parts.sum(0)
        return torch.cat([parts, (rest if self.constant is None else rest - self.constant)[None]])

    def decoded(self, f: Tensor) -> Tensor:
        """What features say, `[features, ..., d_model]`, at activations `[..., features]`."""
        return spread(f, self.dictionary.decoder[self.features])


@dataclass(frozen=True, eq=False)
class AttentionSplit:
    """Divides an attention, by what it says or by what its heads mix, which goes through the output projection after that."""

    output: OutputSplit
    bias: Tensor | None
    projection: Tensor | None

    @classmethod
    def of(cls, refinement: Refinement, joint: AttentionJoint) -> AttentionSplit:
        output = OutputSplit.of(refinement, joint.out_weights)
        if output.dictionary.reads == "attn_out":
            return cls(output, joint.constant, None)
        if joint.post_norm is not None:
            raise CircuitGraphError(f"refine {refinement.component}: what its heads mix goes through a norm; take a dictionary of attn_out")
        return cls(output, joint.constant, joint.out_weights.flatten(0, 1) * joint.scale)

    @property
    def constant(self) -> Tensor | None:
        """What the attention adds to the stream that is no part of it."""
        if self.projection is None:
            return self.output.constant
        if self.output.constant is None:
            return self.bias
        projected = self.output.constant @ self.projection
        return projected if self.bias is None else projected + self.bias

    def __call__(self, joint: AttentionJoint, mixed: Tensor, *, is_frozen: bool) -> Tensor:
        """`[parts, prompts, position, d_model]` from `mixed` `[prompts, position, heads, head_dim]`."""
        if self.projection is None:
            said = joint.write_together(mixed, is_frozen=is_frozen)[0]
            said = said if self.bias is None else said + self.bias
            return self.output(said, said)
        z = mixed.flatten(2)
        return self.output(z, z) @ self.projection


@dataclass(frozen=True, eq=False)
class MLPSplit:
    """Divides an MLP by a dictionary of what it says, or by a transcoder, whose features may each read another input."""

    output: OutputSplit

    @classmethod
    def of(cls, refinement: Refinement, joint: MLPJoint) -> MLPSplit:
        return cls(OutputSplit.of(refinement, joint.like))

    @property
    def has_readers(self) -> bool:
        return self.output.dictionary.is_transcoder

    @property
    def constant(self) -> Tensor | None:
        return self.output.constant

    def __call__(self, joint: MLPJoint, x: Tensor, plan: Plan, rule: Rule) -> Tensor:
        """`[parts, prompts, position, d_model]` from the site's distinct inputs, or, to go back from there, one of each of its readers.

        Reader 0 of the site is the MLP's own, the others are the features'. What has no reader in the plan is zero: nobody needs it.
        """
        if not self.has_readers:
            said = joint(x[0], rule)
            return self.output(said, said)
        own = self.output.decoded(self.activations(joint, x, plan, rule))
        return torch.cat([own, self.rest(joint, own_input(x, plan), own, rule)])

    def activations(self, joint: MLPJoint, x: Tensor, plan: Plan, rule: Rule) -> Tensor:
        """The features, each at what its reader hears, `[prompts, position, features]`."""
        features = self.output.features
        out = x.new_zeros(*x.shape[1:-1], len(features))
        groups: dict[int, list[int]] = {}
        for reader, row in row_of(x, plan).items():
            if reader > 0:
                groups.setdefault(row, []).append(reader - 1)
        if not groups:
            return out
        places = torch.tensor([place for members in groups.values() for place in members], device=x.device)
        found = [self.at(joint, x[row], rule, [features[place] for place in members]) for row, members in groups.items()]
        return out.index_copy(-1, places, torch.cat(found, dim=-1))

    def at(self, joint: MLPJoint, x: Tensor, rule: Rule, features: Sequence[int] | None = None) -> Tensor:
        """Some features, or all that are nodes, where the MLP's input is `x`, `[prompts, position, features]`."""
        seen = transcoded(self.output.dictionary.reads, joint, x, rule)
        f: Tensor = self.output.dictionary.encode(seen, self.output.features if features is None else [*features])
        return f

    def rest(self, joint: MLPJoint, x: Tensor | None, own: Tensor, rule: Rule) -> Tensor:
        """The skip, if there is one, and the error, at the input of the MLP's own reader; nothing where nobody needs it."""
        if x is None:
            return own.new_zeros(1 + (self.output.dictionary.skip is not None), *own.shape[1:])
        seen = transcoded(self.output.dictionary.reads, joint, x, rule)
        return self.output(seen, joint(x, rule))[len(own) :]


@dataclass(frozen=True, eq=False)
class CrossLayerSplit:
    """Divides an MLP by a layer of a cross-layer transcoder: its features, those of earlier layers that write here too, and what is left.

    The activations of features go from layer to layer as `[2, prompts, position, features]`: at what their own readers hear, which is what
    they say, and at what their MLP's reader hears, which errors are without. `earlier`: how many features each earlier layer has that write
    here; `rows` `[features, d_model]`: what they add here at activation 1. `is_kept`: whether its own are needed later.
    """

    transcoder: MLPSplit
    earlier: tuple[tuple[int, int], ...]
    rows: Tensor
    is_kept: bool
    has_readers: bool = True

    @classmethod
    def of(cls, refinement: Refinement, joint: MLPJoint) -> CrossLayerSplit:
        dictionary, layer = refinement.dictionary, refinement.component.layer
        assert isinstance(dictionary, Dictionary)
        own = replace(refinement, dictionary=replace(dictionary, later=None), earlier=())
        rows = np.concatenate([np.zeros((0, dictionary.decoder.shape[1])), *(one.rows_at(layer) for one in refinement.earlier)])
        return cls(
            MLPSplit.of(own, joint),
            tuple((one.component.layer, len(one.features)) for one in refinement.earlier),
            torch.from_numpy(rows).to(joint.like),
            is_kept=dictionary.n_later > 0 and len(refinement.features) > 0,
        )

    @property
    def constant(self) -> Tensor | None:
        return self.transcoder.constant

    def gathered(self, active: Mapping[int, Tensor], like: Tensor) -> Tensor:
        """What the features of earlier layers are that write here, from those of each layer; of a batch such as `like`. They are zero where
        nobody needs any of a layer."""
        nothing = like.new_zeros(2, *like.shape[1:-1], 0)
        found = [active[layer] if layer in active else nothing.new_zeros(*nothing.shape[:-1], n) for layer, n in self.earlier]
        return torch.cat([nothing, *found], dim=-1)

    def __call__(self, joint: MLPJoint, x: Tensor, earlier: Tensor, plan: Plan, rule: Rule) -> tuple[Tensor, Tensor | None]:
        """`[parts, prompts, position, d_model]` as of any transcoder, and what its features are where somebody writes them later."""
        split, main = self.transcoder, own_input(x, plan)
        active = split.activations(joint, x, plan, rule)
        own = split.output.decoded(active)
        rest = split.rest(joint, main, own, rule)
        error = rest[-1:] if main is None else rest[-1:] - (earlier[1] @ self.rows)
        parts = torch.cat([own, spread(earlier[0], self.rows), rest[:-1], error])
        if not self.is_kept:
            return parts, None
        return parts, torch.stack([active, torch.zeros_like(active) if main is None else split.at(joint, main, rule)])


def row_of(x: Tensor, plan: Plan) -> dict[int, int]:
    """Of a site's readers in the plan, where in `x` each one's input is: among the distinct ones, or each has one of its own."""
    is_apart = len(x) == len(plan.readers) != plan.n_distinct
    return {int(reader): i if is_apart else int(plan.row_of[i]) for i, reader in enumerate(plan.readers)}


def own_input(x: Tensor, plan: Plan) -> Tensor | None:
    """What the MLP's own reader hears, which is the first of its site; none where nobody needs it."""
    row = row_of(x, plan).get(0)
    return None if row is None else x[row]


def spread(f: Tensor, rows: Tensor) -> Tensor:
    """What features say, `[features, ..., d_model]`, at activations `[..., features]`."""
    return f.movedim(-1, 0)[..., None] * rows.view(len(rows), *[1] * (f.dim() - 1), rows.shape[-1])


def transcoded(reads: str, joint: MLPJoint, x: Tensor, rule: Rule) -> Tensor:
    """What a transcoder reads of an MLP's input `x`: that itself, its norm, or its norm without the gain."""
    norm = joint.norm
    if reads == "mlp_stream" or norm is None:
        return x
    is_frozen = rule.norms == "frozen"
    return norm(x, is_frozen=is_frozen) if reads == "mlp_in" else replace(norm, gain=1.0).split(x, x, is_frozen=is_frozen)


@dataclass(frozen=True, eq=False)
class NeuronSplit:
    """Divides an MLP by its neurons: what its last weights read, one number at a time."""

    neurons: list[int]
    has_error: bool
    constant: Tensor | None
    has_readers: bool = False

    @classmethod
    def of(cls, refinement: Refinement, joint: MLPJoint) -> NeuronSplit:
        assert isinstance(refinement.dictionary, Neurons)
        has_error = refinement.parts.has_error
        return cls([*refinement.features], has_error, None if has_error else joint.last.bias)

    def __call__(self, joint: MLPJoint, x: Tensor, plan: Plan, rule: Rule) -> Tensor:
        said, hidden = joint.last.run(x[0], rule)
        rows = joint.last.weight[self.neurons]
        parts = hidden[..., self.neurons].movedim(-1, 0)[..., None] * rows[:, None, None]
        return torch.cat([parts, (said - parts.sum(0))[None]]) if self.has_error else parts


Split = MLPSplit | CrossLayerSplit | NeuronSplit


@dataclass(frozen=True, eq=False)
class Splits:
    """The refined components of one layer."""

    stream: OutputSplit | None = None
    attention: AttentionSplit | None = None
    mlp: Split | None = None
