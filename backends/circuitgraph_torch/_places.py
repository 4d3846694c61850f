"""The places that dictionaries read and write, in the untouched model: as an input or an output of one of its modules.

Reading one runs the model's own forward on many prompts at once and stops when the place has been seen, where `_seen` replays one prompt
from what every writer says. Both must see the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from circuitgraph._architecture import Architecture
from circuitgraph._dictionary import Reads
from circuitgraph._errors import TraceError
from circuitgraph._training import Place
from circuitgraph_torch._calls import forward_arguments, too_long
from circuitgraph_torch._modes import undisturbed

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

Change = Callable[[Tensor], Tensor]
_READ_AT_ONCE = 8192  # positions in one forward


class _SeenAll(Exception):
    """Stops a forward once everything wanted has been seen."""


@dataclass(frozen=True)
class Spot:
    """What goes into, or comes out of, the module at `path`; what the place says is that times `scale`."""

    path: str
    side: Literal["input", "output"]
    scale: float = 1.0


def spots(architecture: Architecture, place: Place) -> tuple[Spot, Spot]:
    """What a dictionary there reads, and what it reconstructs: the same, but for transcoders."""
    layer = place.component.layer
    return _spot(architecture, layer, place.reads), _spot(architecture, layer, "mlp_out" if place.is_transcoder else place.reads)


def _spot(architecture: Architecture, layer: int, reads: Reads) -> Spot:
    if reads == "stream":
        is_last = layer == len(architecture.blocks)
        return Spot(architecture.blocks[layer - is_last].path, "output" if is_last else "input")
    block = architecture.blocks[layer]
    if reads in ("attn_z", "attn_out"):
        assert block.attention is not None  # the place was checked
        said = block.attention.post_norm.path if block.attention.post_norm else block.attention.o
        return Spot(block.attention.o, "input") if reads == "attn_z" else Spot(said, "output", block.attention.scale)
    assert block.mlp is not None
    if reads == "mlp_in":
        return Spot(block.mlp.modules[0], "input")
    return Spot(block.mlp.post_norm.path if block.mlp.post_norm else block.mlp.modules[-1], "output", block.mlp.scale)


def seen_at(model: nn.Module, wanted: Sequence[Spot], ids: Tensor) -> list[Tensor]:
    """What the places say on these tokens `[prompts, position]`: for each `[prompts, position, width]`, from one run that ends there."""
    seen: dict[Spot, Tensor] = {}

    def look(spot: Spot) -> Change:
        def see(value: Tensor) -> Tensor:
            seen[spot] = value.detach().clone()
            if len(seen) == len({*wanted}):
                raise _SeenAll
            return value

        return see

    with changed(model, [(spot, look(spot)) for spot in dict.fromkeys(wanted)]), undisturbed(model), too_long(ids):
        try:
            model(ids, **forward_arguments(model, ids))
        except _SeenAll:
            return [seen[spot].reshape(*ids.shape, -1) * spot.scale for spot in wanted]
    missing = next(spot for spot in wanted if spot not in seen)
    raise TraceError(f"the model's forward ended without calling {missing.path}, so nothing can be read there")


@contextmanager
def changed(model: nn.Module, changes: Sequence[tuple[Spot, Change]]) -> Iterator[None]:
    """The model with the first tensor of floats at each place replaced by what `change` makes of it (as the module has it, unscaled)."""
    handles = [_hooked(model.get_submodule(spot.path), spot, change) for spot, change in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooked(module: nn.Module, spot: Spot, change: Change) -> Any:
    if spot.side == "output":
        return module.register_forward_hook(lambda _module, _args, output: _with_first_changed(output, change)[0])

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        new_args, is_done = _with_first_changed(args, change)
        return new_args, kwargs if is_done else _with_first_changed(kwargs, change)[0]

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _with_first_changed(tree: Any, change: Change) -> tuple[Any, bool]:
    """The same tuples, lists and mappings with their first tensor of floats changed; and whether there was one."""
    if isinstance(tree, Tensor):
        return (change(tree), True) if tree.is_floating_point() else (tree, False)
    if isinstance(tree, dict):
        for key, part in tree.items():
            new, is_done = _with_first_changed(part, change)
            if is_done:
                return {**tree, key: new}, True
    elif type(tree) in (tuple, list):
        for at, part in enumerate(tree):
            new, is_done = _with_first_changed(part, change)
            if is_done:
                return type(tree)([*tree[:at], new, *tree[at + 1 :]]), True
    return tree, False


def batches(prompts: Sequence[Int[ndarray, " position"]], at_once: int = _READ_AT_ONCE) -> Iterator[Int[ndarray, "prompts position"]]:
    """The prompts by length, shortest first, at most so many positions at once (one prompt at least): nothing is padded."""
    by_length: dict[int, list[Int[ndarray, " position"]]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt), []).append(prompt)
    for length, equal in sorted(by_length.items()):
        size = max(1, at_once // length)
        for at in range(0, len(equal), size):
            yield np.stack(equal[at : at + size])


def rows_seen(
    model: nn.Module, wanted: Sequence[Spot], prompts: Sequence[Int[ndarray, " position"]], *, first_position: int
) -> list[Tensor]:
    """What the places say at every position from the first one, for each `[rows, width]` in float32, on the model's device."""
    device, distinct = next(model.parameters()).device, [*dict.fromkeys(wanted)]
    rows = []
    for ids in batches(prompts):
        seen = seen_at(model, distinct, torch.from_numpy(ids).to(device))
        rows.append([value[:, first_position:].flatten(0, 1).float() for value in seen])
    whole = dict(zip(distinct, (torch.cat(column) for column in zip(*rows, strict=True)), strict=True))
    return [whole[spot] for spot in wanted]
