"""What rounding alone does to what a model says: nearer to it than that no replay can be.

Trained models have positions, mostly among the first, at which a stream is a small difference of large numbers. In half precision the
rounding of the embeddings alone moves them by more than any tolerance that would still tell a wrong trace from a right one elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitgraph_torch._places import Spot, changed

if TYPE_CHECKING:
    from jaxtyping import Float

    from circuitgraph_torch._batch import Parts

_NUDGES = 3
_ROUNDINGS = 4  # a run rounds at every layer, a nudge at the first only


def errors(got: Tensor, expected: Tensor) -> Float[Tensor, "prompts position"]:
    """The largest difference at each position, over the largest value of all."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    expected = expected.to(wide)
    return (got.to(wide) - expected).abs().amax(-1) / expected.abs().max().clamp_min(1e-30)


def judged(found: Float[Tensor, "prompts position"], tolerance: float, moved: Callable[[], Tensor]) -> tuple[float, float]:
    """The error that is worst for what is allowed at its position, and that: the tolerance, or what some roundings move there.

    `moved`: as `moved_by_rounding` gives it, asked for only where the tolerance is not enough.
    """
    if bool((found <= tolerance).all()):
        return float(found.max()), tolerance
    allowed = (_ROUNDINGS * moved()).clamp_min(tolerance)
    worst = int((found / allowed).argmax())  # NaN counts as the largest
    return float(found.flatten()[worst]), float(allowed.flatten()[worst])


def moved_by_rounding(parts: Parts, run: Callable[[], Tensor]) -> Float[Tensor, "prompts position"]:
    """How far what `run` says `[prompts, position, ...]` moves, as `errors` has it, when each number that the first block of the untouched
    model reads moves to one beside it or stays."""
    generator, plain = torch.Generator().manual_seed(0), run()

    def nudged(x: Tensor) -> Tensor:
        steps = torch.randint(-1, 2, x.shape, generator=generator).to(x)
        return x * (1 + torch.finfo(x.dtype).eps * steps)

    with changed(parts.model, [(Spot(parts.architecture.blocks[0].path, "input"), nudged)]):
        return torch.stack([errors(run(), plain) for _ in range(_NUDGES)]).amax(0)
