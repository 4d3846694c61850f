"""Refined components: what each part says, from what the component's own modules compute. Autograd goes through all of it."""

from __future__ import annotations

from collections.abc import Sequence
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
        return cls(dictionary.on(lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(like)), [*refinement.features])

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

    def decoded(self, f: Tensor, which: Sequence[int] | None = None) -> Tensor:
        """What features say, `[features, ..., d_model]`, at activations `[..., features]`."""
        rows = self.dictionary.decoder[self.features if which is None else [*which]]
        said: Tensor = f.movedim(-1, 0)[..., None] * rows.view(len(rows), *[1] * (f.dim() - 1), -1)
        return said


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
        is_apart = len(x) == len(plan.readers) != plan.n_distinct
        row_of = {int(reader): i if is_apart else int(plan.row_of[i]) for i, reader in enumerate(plan.readers)}
        own = self._own(joint, x, row_of, rule)
        if 0 not in row_of:
            n_rest = 1 + (self.output.dictionary.skip is not None)
            return torch.cat([own, own.new_zeros(n_rest, *own.shape[1:])])
        main = x[row_of[0]]
        whole = self.output(self._seen(joint, main, rule), joint(main, rule))
        return torch.cat([own, whole[len(own) :]])

    def _own(self, joint: MLPJoint, x: Tensor, row_of: dict[int, int], rule: Rule) -> Tensor:
        """The features, each at what its reader hears."""
        dictionary, features = self.output.dictionary, self.output.features
        out = x.new_zeros(len(features), *x.shape[1:])
        groups: dict[int, list[int]] = {}
        for reader, row in row_of.items():
            if reader > 0:
                groups.setdefault(row, []).append(reader - 1)
        places = [place for members in groups.values() for place in members]
        said = []
        for row, members in groups.items():
            chosen = [features[place] for place in members]
            said.append(self.output.decoded(dictionary.encode(self._seen(joint, x[row], rule), chosen), chosen))
        return out if not said else out.index_put((torch.tensor(places, device=x.device),), torch.cat(said))

    def _seen(self, joint: MLPJoint, x: Tensor, rule: Rule) -> Tensor:
        return transcoded(self.output.dictionary.reads, joint, x, rule)


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


Split = MLPSplit | NeuronSplit


@dataclass(frozen=True, eq=False)
class Splits:
    """The refined components of one layer."""

    stream: OutputSplit | None = None
    attention: AttentionSplit | None = None
    mlp: Split | None = None
