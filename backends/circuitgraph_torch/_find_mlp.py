"""The MLP of a block and the residual sum: what the block adds to the stream besides its attention, and from what."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from circuitgraph._architecture import MLP, Attention, Block, Norm
from circuitgraph_torch._find_joints import MissingJointError
from circuitgraph_torch._find_modules import probe_norm
from circuitgraph_torch._find_numbers import agrees, rounding, scales
from circuitgraph_torch._observe import Call, Observation, Value, apply


@dataclass(frozen=True, eq=False)
class _Sum:
    """`leaving = entering + attention scale * attention + MLP scale * contribution`, with the attention's part known."""

    block: Call
    calls: Sequence[Call]
    entering: Value
    leaving: Value
    attention: Tensor

    def is_middle(self, tensor: Tensor, scale: float) -> bool:
        """Whether this is the stream between attention and MLP."""
        if tensor.numel() != self.entering.tensor.numel():
            return False
        entering, part = self.entering.tensor.double(), scale * self.attention.double()
        eps = rounding(self.leaving.tensor)
        return agrees(tensor.reshape(entering.shape), entering + part, size=entering.abs() + part.abs(), eps=eps)


@dataclass(frozen=True, eq=False)
class _Chain:
    """The calls from the stream to a contribution: a norm or none, modules, a post-norm or none."""

    norm: Norm | None
    modules: tuple[Call, ...]
    post_norm: Norm | None
    is_parallel: bool


def find_block(seen: Observation, block: Call, entering: Value, attention: Attention, written: Tensor) -> Block:
    """The whole block, given its attention and what that writes; raises if the writers do not add up to what leaves the block."""
    assert block.output is not None
    calls = [call for call in seen.inside(block.path) if call.path != attention.path and not call.is_inside(attention.path)]
    calls = [call for call in calls if not attention.path.startswith(f"{call.path}.")]
    total = _Sum(block, calls, entering, block.output, written)
    _refuse_normalised_stream(total)
    for contribution in _contributions(total):
        assert contribution.output is not None
        part = contribution.output.tensor.reshape(entering.tensor.shape)
        found = scales(total.leaving.tensor, entering.tensor, [written, part])
        chain = None if found is None else _walk(total, contribution, found[0])
        if found is not None and chain is not None:
            mlp = MLP(tuple(call.path for call in chain.modules), chain.norm, chain.post_norm, found[1])
            return Block(block.path, dataclasses.replace(attention, scale=found[0]), mlp, chain.is_parallel)
    # Beside rounding in half precision a small MLP could hide: there is none only if no other module had anything to say.
    is_alone = all(probe_norm(call) is not None for call in _contributions(total))
    alone = scales(total.leaving.tensor, entering.tensor, [written]) if is_alone else None
    if alone is None:
        raise MissingJointError(
            f"the stream that leaves {block.path!r} is not the stream that enters it, plus a multiple of the output of {attention.o!r}, "
            f"plus a multiple of the output of another module that reads the stream (tried: {_tried(total)})"
        )
    return Block(block.path, dataclasses.replace(attention, scale=alone[0]), None)


def _refuse_normalised_stream(total: _Sum) -> None:
    for call in total.calls:
        if call.writes(total.leaving.wire) and probe_norm(call) is not None:
            raise MissingJointError(
                f"the residual stream itself is normalised, by {call.path!r} (post-norm): what the writers add is not what later readers "
                f"see, so there is no graph of edges for this model"
            )


def _contributions(total: _Sum) -> list[Call]:
    """The calls that may have made the MLP's contribution: of the stream's size and not zero; outermost first, latest first."""
    size = total.entering.tensor.numel()
    able = [call for call in total.calls if call.output is not None and call.output.tensor.numel() == size]
    able = [call for call in able if call.output is not None and call.output.tensor.any() and not call.reads(call.output.wire)]
    able.reverse()
    return sorted(able, key=lambda call: call.depth)


def _walk(total: _Sum, contribution: Call, scale: float) -> _Chain | None:
    """Go back from a contribution, module by module, until one reads the stream or a norm of it; `None` if that never happens."""
    call: Call | None = contribution
    post_norm = probe_norm(contribution)
    if post_norm is not None:
        call = _maker(total, contribution)
    modules: list[Call] = []
    while call is not None and call.input is not None:
        modules.insert(0, call)
        for norm, value in _read_through(total, call.input):
            is_parallel = value.wire == total.entering.wire
            if (is_parallel or total.is_middle(value.tensor, scale)) and _reproduces(modules):
                return _Chain(norm, tuple(modules), post_norm, is_parallel)
        call = _maker(total, call)
    return None


def _read_through(total: _Sum, value: Value) -> list[tuple[Norm | None, Value]]:
    """What a module reads: the value itself, and what a norm made it from."""
    ways: list[tuple[Norm | None, Value]] = [(None, value)]
    for call in total.calls:
        if call.writes(value.wire) and call.input is not None:
            norm = probe_norm(call)
            if norm is not None:
                ways.append((norm, call.input))
    return ways


def _maker(total: _Sum, reader: Call) -> Call | None:
    """The outermost call whose output is the input of `reader`."""
    assert reader.input is not None
    makers = [call for call in total.calls if call.writes(reader.input.wire)]
    return min(makers, key=lambda call: call.depth, default=None)


def _reproduces(modules: Sequence[Call]) -> bool:
    """Whether the modules, run one after the other on the first one's input, give the last one's output."""
    first, last = modules[0].input, modules[-1].output
    assert first is not None  # only calls with an input and an output get here
    assert last is not None
    tensor: Tensor | None = first.tensor
    for call in modules:
        tensor = None if tensor is None else apply(call.module, tensor)
    size = last.tensor.abs().amax()
    return tensor is not None and tensor.shape == last.tensor.shape and agrees(tensor, last.tensor, size=size)


def _tried(total: _Sum) -> str:
    return ", ".join(repr(call.path) for call in _contributions(total)) or "none"
