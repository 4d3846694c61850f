"""The attention of a block: output projection, projections, norms, and what it writes. Heads are settled in `_find_heads.py`.

Names decide nothing: the output projection is the first linear module that reads a mixture of positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuitgraph._architecture import Attention, Norm, Projection
from circuitgraph_torch._find_heads import ROLES, Layout, Probe, Source, confirms, learn_layout, shaken, source_of
from circuitgraph_torch._find_joints import MissingJointError
from circuitgraph_torch._find_modules import is_linear, probe_norm
from circuitgraph_torch._observe import Call, Observation, Value, rerun


class AttentionFinder:
    """Finds the attention of one block after another; a layout learnt on one is tried first on the next."""

    def __init__(self, seen: Observation) -> None:
        self._seen = seen
        self._layouts: dict[tuple[object, ...], Layout] = {}

    def find(self, block: Call, stream: Value) -> tuple[Attention, Tensor]:
        """The attention of a block whose input is `stream`, and what it adds to the stream but for its scale."""
        calls = self._seen.inside(block.path)
        probe = _output_projection(block, stream, calls)
        key = (probe.o.path.removeprefix(block.path), *((s.linear.path.removeprefix(block.path), s.width) for s in probe.sources))
        layout = self._layouts.get(key)
        if layout is None or not confirms(probe, layout):
            layout = learn_layout(probe)
        self._layouts[key] = layout
        return _described(probe, layout, stream, calls)


def _output_projection(block: Call, stream: Value, calls: Sequence[Call]) -> Probe:
    """The first linear module whose input mixes positions is `o`; the linear modules before it may be its sources."""
    shape = stream.tensor.shape
    linears = [call for call in calls if call.input is not None and call.input.tensor.shape[:2] == shape[:2] and is_linear(call)]
    if not linears:
        raise MissingJointError(f"{block.path!r} has no linear modules over [batch, position, features]")
    inputs = rerun(block, linears, edit_input=(stream.wire, lambda x: shaken(x, range(shape[-1]), position=0)))
    mixes = [bool((after != _input(call))[:, 1:].any()) for call, after in zip(linears, inputs, strict=True)]
    if not any(mixes):
        raise MissingJointError(f"no linear module in {block.path!r} reads anything that depends on earlier positions")
    place = mixes.index(True)
    sources = tuple(Source(linear, _tap(linear, calls)) for linear in linears[:place])
    probe = Probe(block, linears[place], sources)
    if not torch.equal(rerun(block, [probe.o])[0], probe.z()):
        raise MissingJointError(f"{block.path!r} computes something else when it is run again by itself")
    return probe


def _tap(linear: Call, calls: Sequence[Call]) -> Call:
    """The norm that takes a projection's whole output, over all heads, if there is one (OLMo 2); else the projection itself."""
    assert linear.output is not None
    for call in calls:
        if call.reads(linear.output.wire) and _input(call).shape[-1] == linear.output.tensor.shape[-1] and probe_norm(call) is not None:
            return call
    return linear


def _described(probe: Probe, layout: Layout, stream: Value, calls: Sequence[Call]) -> tuple[Attention, Tensor]:
    """The attention with its norms, and what it adds to the stream but for its scale."""
    assert probe.o.output is not None
    sources = {role: source_of(probe, layout, role) for role in ROLES}
    q, k, v = (Projection(sources[role].linear.path, layout.head_dim, layout.starts[role]) for role in ROLES)
    post = next((call for call in calls if call.reads(probe.o.output.wire) and probe_norm(call) is not None), None)
    written = probe.o.output if post is None or post.output is None else post.output
    attention = Attention(
        path=_home(probe, {source.linear.path for source in sources.values()}),
        q=q,
        k=k,
        v=v,
        o=probe.o.path,
        norm=_input_norm([source.linear for source in sources.values()], stream, calls),
        post_norm=None if post is None else probe_norm(post),
        couples_heads=any(sources[role].tap is not sources[role].linear and len(layout.starts[role]) > 1 for role in ROLES),
    )
    return attention, written.tensor


def _home(probe: Probe, paths: set[str]) -> str:
    """The innermost module that has all the projections in it."""
    parts = [path.split(".") for path in (*paths, probe.o.path)]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    home = ".".join(common)
    if not home.startswith(f"{probe.block.path}."):
        raise MissingJointError(f"its projections lie loose in the block {probe.block.path!r}; they should be in a module of their own")
    return home


def _input_norm(linears: Sequence[Call], stream: Value, calls: Sequence[Call]) -> Norm | None:
    """The norm between the stream and the projections, or `None` where they read the stream itself."""
    wires = {value.wire for call in linears if (value := call.input) is not None}
    if wires == {stream.wire}:
        return None
    for call in calls:
        if call.reads(stream.wire) and wires == {value.wire for value in (call.output,) if value is not None}:
            norm = probe_norm(call)
            if norm is not None:
                return norm
    names = ", ".join(sorted(repr(call.path) for call in linears))
    raise MissingJointError(f"the input of {names} is neither the stream that enters the block nor one norm of it")


def _input(call: Call) -> Tensor:
    assert call.input is not None
    return call.input.tensor
