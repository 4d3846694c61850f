"""Numbers read off observed tensors: equality up to rounding, scales by least squares, and the simplest number that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

SLACK = 2.0
"""How many units of rounding a handful of operations may lose, in `agrees` and `scales`."""


def rounding(*tensors: Tensor) -> float:
    """The relative rounding error of the coarsest dtype among these; Hugging Face computes norms and softmax in float32 at best."""
    return max(torch.finfo(torch.float32).eps, *(torch.finfo(tensor.dtype).eps for tensor in tensors))


def agrees(left: Tensor, right: Tensor, *, size: Tensor | None = None, eps: float | None = None) -> bool:
    """Whether two tensors are equal up to rounding; `size` is the magnitude of the terms that made them, where those cancel."""
    eps = rounding(left, right) if eps is None else eps
    left, right = left.double(), right.double()
    bound = left.abs() + right.abs() if size is None else left.abs() + right.abs() + size.double().abs()
    return bool(((left - right).abs() <= SLACK * eps * bound + torch.finfo(torch.float32).tiny).all())


def scales(target: Tensor, base: Tensor | None, parts: Sequence[Tensor]) -> tuple[float, ...] | None:
    """The factors with which `target = base + sum of factor * part` holds up to rounding, or `None` if there are none."""
    eps = rounding(target)
    start = torch.zeros_like(target) if base is None else base
    wanted = (target.double() - start.double()).flatten()
    columns = torch.stack([part.double().expand_as(target).flatten() for part in parts], dim=1)
    # Rounding errors grow with the numbers, and some models have entries a thousand times larger than the rest: count relative errors.
    size = (target.double().abs() + start.double().abs()).flatten()
    weight = 1 / (size + columns.abs().sum(1)).clamp_min(torch.finfo(torch.float32).tiny)
    solved: list[float] = torch.linalg.lstsq(columns * weight[:, None], (wanted * weight)[:, None]).solution[:, 0].tolist()

    def fits(factors: Sequence[float]) -> bool:
        terms = columns * torch.tensor(factors, dtype=torch.float64)
        return bool(((wanted - terms.sum(1)).abs() <= SLACK * eps * (size + terms.abs().sum(1))).all())

    if not fits(solved):
        return None
    for place, factor in enumerate(solved):
        before, after = solved[:place], solved[place + 1 :]
        solved[place] = simplest(factor, partial(_fits_between, fits, before, after))
    return tuple(solved)


def _fits_between(fits: Callable[[Sequence[float]], bool], before: Sequence[float], after: Sequence[float], number: float) -> bool:
    return fits([*before, number, *after])


def simplest(number: float, fits: Callable[[float], bool]) -> float:
    """The number of fewest digits, or the inverse of one, that still explains what was observed; else the number itself."""
    return next((candidate for candidate in _simple(number) if fits(candidate)), number)


def _simple(number: float) -> Iterator[float]:
    yield 1.0
    yield 0.0
    if number == 0:
        return
    for digits in range(1, 7):
        yield float(f"{number:.{digits}g}")
        yield 1 / float(f"{1 / number:.{digits}g}")
