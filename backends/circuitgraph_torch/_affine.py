"""Linear modules as matrices, whichever way round their weights lie."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from circuitgraph._errors import TraceError


def affine(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight `[out, in]` and bias `[out]` of a module that computes `x @ W.T + b`. Which way round its weight lies is tried out."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
        for matrix in (weight.detach(), weight.detach().T):
            if (bias is None or len(bias) == len(matrix)) and _computes(module, matrix, bias):
                return matrix, None if bias is None else bias.detach()
    raise TraceError(f"{type(module).__name__} is not a plain linear layer; merge adapters or dequantise the model before tracing")


def _computes(module: nn.Module, matrix: Tensor, bias: Tensor | None) -> bool:
    x = torch.linspace(-1, 1, matrix.shape[1], device=matrix.device).to(matrix.dtype).sin()[None]
    try:
        got = module(x)
    except RuntimeError:
        return False  # the other way round: the widths do not fit
    expected = functional.linear(x, matrix, bias)
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-2, atol=1e-3)
