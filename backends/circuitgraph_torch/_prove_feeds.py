"""The proof of the labels: which reader feeds which head, and which is a query, a key, a value.

`F(1)` cannot tell two heads' readers apart, since all of them read the same stream there. So each reader's projection is replaced by
noise at the first position and in the middle in turn, and what moves behind the attention must be what the graph says. Where attention
looks ahead, keys and values move the same positions; there twice the noise must move twice as far for a value, and for a key must not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitgraph._errors import TraceError
from circuitgraph._names import Reader
from circuitgraph_torch._batch import Parts
from circuitgraph_torch._calls import AttentionCall
from circuitgraph_torch._joints import AttentionJoint

_LENGTH = 8
_DRAWS = 8  # a sharp attention pattern may not move for one draw of noise


def prove_feeds(parts: Parts) -> None:
    """Raises `TraceError` at the first reader that does not move what its name and the graph say it moves."""
    graph = parts.sites.graph
    length = min(_LENGTH, parts.longest)
    calls = parts.calls(length)
    for block, layer, joints, call in zip(parts.architecture.blocks, parts.sites.layers, parts.joints.layers, calls, strict=True):
        if joints.attention is None or layer.attention is None or block.attention is None:
            continue
        readers = graph.readers[layer.attention.first : layer.attention.stop]
        feeds = graph.feeds[layer.attention.first : layer.attention.stop, layer.attention_writers.start : layer.attention_writers.stop]
        first_moved, middle_moved, is_linear = _moved(joints.attention, call, length)
        looks_ahead = bool(middle_moved[:, : length // 2].any())
        for reader, fed, first, middle, linear in zip(readers, feeds, first_moved, middle_moved, is_linear.tolist(), strict=True):
            own = [int(name.rpartition(".h")[2]) for name in graph.nodes_of(reader)]
            is_fed = torch.from_numpy(fed.copy()).to(first.device)
            wrong = (first | middle)[:, ~is_fed].any() or not middle.any(0)[own].all()
            kind = _kind_ahead(middle[:, own], linear) if looks_ahead else _kind(first[:, own], middle[:, own])
            if bool(wrong) or kind != reader.kind:
                raise TraceError(_message(reader, block.attention.path, first | middle, kind))


def _moved(joint: AttentionJoint, call: AttentionCall, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """For noise at the first position and in the middle, `[readers, position, heads]`: did this head move there, in any draw?

    And `[readers]`: does twice the change at the first position move everything twice as far?
    """
    n, width = joint.n_readers, joint.head_dim
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(_DRAWS, 1, 1, length, n * width, generator=generator).to(joint.weights)
    noise = torch.randn(_DRAWS, width, generator=generator).to(joint.weights)
    noisy = base.repeat(1, 3, n, 1, 1)
    for reader in range(n):
        features = slice(reader * width, (reader + 1) * width)
        noisy[:, 0, reader, 0, features] = noise
        noisy[:, 1, reader, length // 2, features] = noise
        noisy[:, 2, reader, 0, features] = 2 * noise - base[:, 0, 0, 0, features]
    batch = torch.cat([base.flatten(0, 2), noisy.flatten(0, 2)])
    with torch.no_grad():
        mixed = joint.attend(batch, call, rows_are_shared=False)
    plain, disturbed = mixed[:_DRAWS, None, None], mixed[_DRAWS:].unflatten(0, (_DRAWS, 3, n))
    change = disturbed - plain
    floor = max(1e-3, 4 * torch.finfo(mixed.dtype).eps) * mixed.abs().amax()
    moved = (change.abs().amax(-1) > floor).any(0)
    bent = ((change[:, 2] - 2 * change[:, 0]).abs() > floor).transpose(0, 1).flatten(1).any(1)
    return moved[0], moved[1], ~bent


def _kind(first: Tensor, middle: Tensor) -> str:
    """By what moves `[position, heads]`: a value moves the first position by itself, a key moves later positions, a query only its own."""
    if bool(first[0].any()):
        return "v"
    return "k" if bool(middle[len(middle) // 2 + 1 :].any()) else "q"


def _kind_ahead(middle: Tensor, is_linear: bool) -> str:
    """The same where every position sees all others: a query still moves only its own."""
    elsewhere = torch.arange(len(middle)) != len(middle) // 2
    if not bool(middle[elsewhere].any()):
        return "q"
    return "v" if is_linear else "k"


def _message(reader: Reader, path: str, moved: Tensor, kind: str) -> str:
    heads = torch.nonzero(moved.any(0)).flatten().tolist()
    return (
        f"the replay differs from the model at {path}: what the description calls {reader} moves heads {heads} as a "
        f"{kind} input does; correct its q, k and v projections"
    )
