"""JumpReLU and the step function with straight-through gradients (Rajamanoharan et al. 2024, arXiv:2407.14435).

Neither has a useful gradient in its threshold `t`. The gradient of the expected loss is estimated with a rectangle of width `bandwidth`
around it, `K = 1[|z - t| < bandwidth / 2] / bandwidth`:

    d jump(z, t) / dt = -t K                              jump(z, t) = z where z > t, else 0
    d step(z, t) / dt = -K        d step(z, t) / dz = K   step(z, t) = 1 where z > t, else 0

The last is not the paper's: as Conerly et al. 2025 ("Dictionary learning optimization techniques"), the penalty on the number of active
features reaches the encoder too. With thresholds alone, most features of a small dictionary fell below theirs for good.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function


def jump_relu(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`[batch, features]` from pre-activations of that shape and thresholds `[features]`."""
    f: Tensor = _Jump.apply(z, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return f


def step(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 where a feature is active."""
    on: Tensor = _Step.apply(z, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return on


def _near(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((z - threshold).abs() < bandwidth / 2).to(z.dtype) / bandwidth


class _Jump(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        return grads[0] * (z > threshold), -(threshold * _near(z, threshold, ctx.bandwidth) * grads[0]).sum(0), None


class _Step(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = _near(z, threshold, ctx.bandwidth) * grads[0]
        return near, -near.sum(0), None
