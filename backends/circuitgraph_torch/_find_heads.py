"""Which features of which projection are the queries, keys and values of which head, decided by what they cause.

The input of the output projection `o` is `z`, the heads' weighted values side by side. The block is run again with some outputs of a
linear module changed at one position, and `z` says what those outputs are:

- queries move one head, at that position only;
- keys move the heads of their group, at later positions too;
- values do so as well, and without them (all zero) `z` vanishes in those heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from circuitgraph_torch._find_joints import MissingJointError
from circuitgraph_torch._observe import Call, Edit, rerun

PROBED = 1
"""The position that is changed: the second, so that there is one before it and there are several after it."""

STRENGTHS = (0.0, 10.0, -10.0)
"""What changed outputs are: zero, and large with either sign. A saturated softmax answers to one of the three at least."""

ROLES: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
_Role = Literal["q", "k", "v"]
_Owners = dict[str, dict[int, tuple[str, int]]]
"""Role and head to the source, by its path in the block, and the feature at which that head's part starts."""

_NAMES = {"q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True, eq=False)
class Source:
    """A linear module before the attention, and the call whose output is probed for it: its own, or a norm's over all heads."""

    linear: Call
    tap: Call

    @property
    def width(self) -> int:
        """How many features it has."""
        assert self.linear.output is not None
        return self.linear.output.tensor.shape[-1]


@dataclass(frozen=True, eq=False)
class Probe:
    """A block with its output projection: what `z` does when features of a source change."""

    block: Call
    o: Call
    sources: tuple[Source, ...]
    head_dim: int = 1

    @property
    def n_heads(self) -> int:
        """How many heads `z` has."""
        return self.z().shape[-1] // self.head_dim

    def z(self, source: Source | None = None, edit: Edit | None = None) -> Tensor:
        """`z` as `[batch, position, features]`, with the output of a source edited."""
        if source is None or edit is None:
            assert self.o.input is not None
            return self.o.input.tensor
        return rerun(self.block, [self.o], edits={source.tap: edit})[0]

    def moved(self, source: Source, features: Sequence[int]) -> Tensor:
        """Which `[position, head]` of `z` changes when these features change at the probed position."""
        changed = torch.zeros_like(self.z(), dtype=torch.bool)
        for strength in STRENGTHS:
            changed |= self.z(source, partial(shaken, features=features, strength=strength)) != self.z()
        return self._by_head(changed).any(-1).any(0)

    def vanished(self, source: Source, features: Sequence[int]) -> Tensor:
        """Which heads of `z` are zero when these features are zero everywhere."""
        z = self.z(source, lambda output: output.index_fill(-1, _index(output, features), 0.0))
        return self._by_head(z == 0).all(-1).all(0).all(0)

    def _by_head(self, z: Tensor) -> Tensor:
        """`[batch, position, features]` as `[batch, position, head, head_dim]`."""
        return z.reshape(*z.shape[:-1], -1, self.head_dim)


@dataclass(frozen=True)
class Layout:
    """Which source, by its path in the block, holds which role, and where every head's features start."""

    head_dim: int
    source: dict[str, str]
    starts: dict[str, tuple[int, ...]]


def learn_layout(probe: Probe) -> Layout:
    """Probe every stretch of `head_dim` features of every source."""
    # An MLP that runs before the attention of a parallel block is no source.
    reaching = tuple(source for source in probe.sources if probe.moved(source, range(source.width)).any())
    if not reaching:
        raise MissingJointError(f"{probe.o.path!r} mixes positions, but no linear module before it is the source of what it mixes")
    probe = Probe(probe.block, probe.o, reaching)
    width = probe.z().shape[-1]
    head_dim = _head_dim(probe)
    if any(source.width % head_dim for source in probe.sources):
        widths = ", ".join(f"{source.linear.path!r} has {source.width}" for source in probe.sources)
        raise MissingJointError(f"heads of {head_dim} features do not divide the projections: {widths}, {probe.o.path!r} reads {width}")
    probe = Probe(probe.block, probe.o, probe.sources, head_dim)
    owners: _Owners = {role: {} for role in ROLES}
    for source in probe.sources:
        for start in range(0, source.width, head_dim):
            role, heads = _role(probe, source, range(start, start + head_dim))
            for head in heads:
                if head in owners[role]:
                    raise MissingJointError(
                        f"two parts of the projections act as the {_NAMES[role]} of head {head}: {source.linear.path!r}"
                    )
                owners[role][head] = (source.linear.path.removeprefix(probe.block.path), start)
    return _layout(probe, owners)


def _head_dim(probe: Probe) -> int:
    """How many features a head has: a single feature of a query moves all of its own head's `z`, and no other.

    A value moves single columns of `z`, a key all heads of its group; so the shortest run is a head. In half precision a column at its end
    may happen to stay as it was, so the run is rounded up to a divisor of the width.
    """
    width, runs = probe.z().shape[-1], []
    for source in probe.sources:
        for feature in {0, source.width // 3, source.width // 2, 2 * source.width // 3, source.width - 1}:
            columns = probe.moved(source, [feature]).any(0).nonzero().flatten()
            if len(columns) > 1 and int(columns[1] - columns[0]) == 1:
                runs.append(int(columns[-1] - columns[0]) + 1)
    if not runs:
        names = ", ".join(repr(source.linear.path) for source in probe.sources)
        raise MissingJointError(
            f"no feature of {names} moves a whole head of what {probe.o.path!r} reads, as a query of softmax attention does"
        )
    return next(size for size in range(min(runs), width + 1) if width % size == 0)


def _role(probe: Probe, source: Source, features: range) -> tuple[_Role, list[int]]:
    """What these features are, and to which heads."""
    moved = probe.moved(source, features)
    heads: list[int] = moved.any(0).nonzero().flatten().tolist()
    where = f"features {features.start} to {features.stop - 1} of {source.linear.path!r}"
    if not heads:
        raise MissingJointError(f"{where} move no head")
    if moved[:PROBED].any():
        raise MissingJointError(f"{where} move earlier positions: the attention is not causal")
    if not moved[PROBED + 1 :].any():
        if len(heads) > 1:
            raise MissingJointError(f"{where} act as queries of {len(heads)} heads at once")
        return "q", heads
    return ("v" if probe.vanished(source, features)[heads].all() else "k"), heads


def _layout(probe: Probe, owners: _Owners) -> Layout:
    """Check that every head has queries, keys and values, in groups of neighbours, and write down where."""
    sources, starts = {}, {}
    for role, heads in owners.items():
        lacking = [head for head in range(probe.n_heads) if head not in heads]
        if lacking:
            names = ", ".join(repr(source.linear.path) for source in probe.sources)
            raise MissingJointError(f"nothing in {names} acts as the {_NAMES[role]} of head {lacking[0]}, as in softmax attention")
        places = [heads[head] for head in range(probe.n_heads)]
        groups = list(dict.fromkeys(places))
        size = probe.n_heads // len(groups)
        if places != [group for group in groups for _ in range(size)] or len({path for path, _ in groups}) > 1:
            raise MissingJointError(f"the {_NAMES[role]} are not in groups of {size} neighbouring heads of one projection: {places}")
        sources[role] = groups[0][0]
        starts[role] = tuple(start for _, start in groups)
    if len(starts["q"]) < probe.n_heads or len(starts["k"]) != len(starts["v"]):
        counts = ", ".join(f"{len(starts[role])} of {_NAMES[role]}" for role in ROLES)
        raise MissingJointError(f"{probe.n_heads} heads need as many queries, and as many keys as values; there are {counts}")
    return Layout(probe.head_dim, sources, starts)


def source_of(probe: Probe, layout: Layout, role: str) -> Source:
    """The source in this block that holds a role."""
    return next(source for source in probe.sources if source.linear.path == probe.block.path + layout.source[role])


def confirms(probe: Probe, layout: Layout) -> bool:
    """Whether all queries, all keys and all values of a layout act as such in this block (which is whose was learnt on another)."""
    probe = Probe(probe.block, probe.o, probe.sources, layout.head_dim)

    def part(role: str) -> tuple[Source, list[int]]:
        features = [start + i for start in layout.starts[role] for i in range(layout.head_dim)]
        return source_of(probe, layout, role), features

    queries, keys = probe.moved(*part("q")), probe.moved(*part("k"))
    values_are = bool(probe.vanished(*part("v")).all())
    queries_are = bool(queries[PROBED].all()) and not queries[PROBED + 1 :].any()
    keys_are = bool(keys[PROBED + 1 :].any(0).all()) and not probe.vanished(*part("k")).any()
    return values_are and queries_are and keys_are


def _index(output: Tensor, features: Sequence[int]) -> Tensor:
    return torch.tensor(list(features), device=output.device)


def shaken(output: Tensor, features: Sequence[int], position: int = PROBED, strength: float = STRENGTHS[1]) -> Tensor:
    """The output with these features replaced, at one position, by random numbers that are this much larger than its own."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(output.shape[0], len(features), generator=generator).to(output.device, output.dtype)
    changed = output.clone()
    changed[:, position, _index(output, features)] = strength * (noise + 1) * output.float().std().to(output.dtype)
    return changed
