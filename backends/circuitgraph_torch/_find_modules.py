"""What kind of thing a module is, decided by what it does: a linear map, or a norm of the residual stream."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from circuitgraph._architecture import Norm
from circuitgraph_torch._find_numbers import agrees, rounding, simplest
from circuitgraph_torch._observe import Call, apply

_KINDS: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")


def is_linear(call: Call) -> bool:
    """Whether the call computed `input @ matrix + bias` with the module's own weight."""
    weight = getattr(call.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or call.input is None or call.output is None:
        return False
    shape = (call.output.tensor.shape[-1], call.input.tensor.shape[-1])
    return any(
        tuple(matrix.shape) == shape and _is_affine(call.module, matrix, call.input.tensor, call.output.tensor)
        for matrix in (weight, weight.T)
    )


def probe_norm(call: Call) -> Norm | None:
    """Kind, gain offset and epsilon of a norm, by running it on large and on tiny inputs; `None` if it is not a norm."""
    if not _may_be_norm(call):
        return None
    assert call.input is not None
    like = call.input.tensor
    generator = torch.Generator().manual_seed(0)
    large = (100 * torch.randn(1, 5, like.shape[-1], generator=generator) + 100).to(like.dtype)
    tiny = (1e-3 * torch.randn(1, 5, like.shape[-1], generator=generator)).to(like.dtype)
    outputs = apply(call.module, large), apply(call.module, tiny)
    if outputs[0] is None or outputs[1] is None or outputs[0].shape != large.shape:
        return None
    for kind in _KINDS:
        norm = _fitted(call, kind, (large, outputs[0]), (tiny, outputs[1]))
        if norm is not None:
            return norm
    return None


def _fitted(call: Call, kind: Literal["rms", "layer"], large: tuple[Tensor, Tensor], tiny: tuple[Tensor, Tensor]) -> Norm | None:
    """The norm of this kind that gives both outputs, if there is one."""
    weight, bias = (_parameter(call.module, name, like=large[0]) for name in ("weight", "bias"))

    def explains(offset: float, eps: float, observed: tuple[Tensor, Tensor]) -> bool:
        gain = offset + weight
        expected = gain * _normalised(observed[0], kind, eps) + bias
        return agrees(observed[1].double(), expected, size=2 * gain.abs() + bias.abs(), eps=2 * rounding(observed[1]))

    unit = _normalised(large[0], kind, eps=0.0)
    gain = (unit * (large[1].double() - bias)).sum((0, 1)) / unit.square().sum((0, 1))
    offset = round(float((gain - weight).mean()), 1) + 0.0  # not -0.0
    if not explains(offset, 0.0, large):
        return None
    # The input is tiny, so its output says how much epsilon adds to its variance.
    centred = _centred(tiny[0], kind)
    shape = (offset + weight) * centred
    rate = float((shape * (tiny[1].double() - bias)).sum() / shape.square().sum())
    solved = max(rate**-2 - float(centred.square().mean()), 0.0) if rate > 0 else 0.0
    for eps in (*_named_epsilons(call.module, tiny[0].dtype), simplest(solved, lambda eps: explains(offset, eps, tiny)), solved):
        if explains(offset, eps, tiny):
            return Norm(call.path, kind, eps, offset)
    return None


def _may_be_norm(call: Call) -> bool:
    """Cheap necessary conditions: one tensor in, one of the same shape out, and parameters that are vectors of its width."""
    if call.input is None or call.output is None or call.input.tensor.shape != call.output.tensor.shape:
        return False
    width = call.input.tensor.shape[-1]
    return all(tuple(p.shape) == (width,) for p in call.module.parameters()) and call.input.wire != call.output.wire


def _named_epsilons(module: nn.Module, dtype: torch.dtype) -> list[float]:
    """Small numbers among the module's attributes; the probe has the last word on them."""
    named = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.1]
    return [*named, torch.finfo(dtype).eps]


def _centred(x: Tensor, kind: str) -> Tensor:
    x = x.double()
    return x - x.mean(-1, keepdim=True) if kind == "layer" else x


def _normalised(x: Tensor, kind: str, eps: float) -> Tensor:
    centred = _centred(x, kind)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def _parameter(module: nn.Module, name: str, *, like: Tensor) -> Tensor:
    """A parameter of a norm in double precision; zeros if it has none."""
    parameter = getattr(module, name, None)
    if isinstance(parameter, Tensor):
        return parameter.detach().cpu().double()
    return torch.zeros(like.shape[-1], dtype=torch.float64)


def _is_affine(module: nn.Module, matrix: Tensor, x: Tensor, y: Tensor) -> bool:
    """Whether `y = x @ matrix.T + bias` up to rounding, judged by a sample of the outputs (an unembedding has very many)."""
    if matrix.shape[1] != x.shape[-1] or matrix.shape[0] != y.shape[-1]:
        return False
    bias = getattr(module, "bias", None)
    sample = torch.linspace(0, matrix.shape[0] - 1, min(64, matrix.shape[0])).long()
    rows, x = matrix.detach()[sample.to(matrix.device)].cpu().double(), x.double()
    product, size = linear(x, rows), linear(x.abs(), rows.abs())
    if isinstance(bias, Tensor):
        product = product + bias.detach()[sample.to(bias.device)].cpu().double()
    summing = torch.finfo(torch.float32).eps * matrix.shape[1] ** 0.5  # what adding up so many products loses
    return agrees(y[..., sample].double(), product, size=size, eps=max(rounding(y), summing))
