"""A norm of the model, with what its backward needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuitgraph._architecture import Norm
from circuitgraph_torch._modes import widened


@dataclass(frozen=True)
class NormJoint:
    """A norm module and what its backward needs: gain `[d_model]` (or a number), epsilon, kind.

    Where it `is_frozen`, its scale (one over the root mean square, or over the standard deviation) is a constant: the forward is still the
    module's own, and taking the mean away is still linear.
    """

    module: nn.Module
    kind: str
    eps: float
    gain: Tensor | float

    @classmethod
    def of(cls, model: nn.Module, norm: Norm | None) -> NormJoint | None:
        if norm is None:
            return None
        module = model.get_submodule(norm.path)
        weight = getattr(module, "weight", None)
        return cls(module, norm.kind, norm.eps, 1.0 if weight is None else weight.detach() + norm.gain_offset)

    def __call__(self, x: Tensor, *, is_frozen: bool = False) -> Tensor:
        y: Tensor = _Frozen.apply(x, self) if is_frozen else self.module(x)  # type: ignore[no-untyped-call]
        return y

    def gain_of(self, like: Tensor) -> Tensor:
        """The gain as `[d_model]`, where it is a number too."""
        return self.gain if isinstance(self.gain, Tensor) else like.new_full(like.shape[-1:], self.gain)

    def standardised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` divided by its scale (and centred, for a layer norm), and one over that scale `[..., 1]`. In half precision it is computed in
        float32, as models do it: a square of 300 is too large for float16."""
        wide = widened(x)
        centred = wide - wide.mean(-1, keepdim=True) if self.kind == "layer" else wide
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return (centred * scale).to(x.dtype), scale.to(x.dtype)

    def backward_(self, grad: Tensor, x: Tensor, *, is_frozen: bool = False) -> Tensor:
        """Turn `grad` of the norm's output into that of its input `x`, in place. `x` broadcasts against `grad`."""
        xhat, scale = self.standardised(x)
        grad.mul_(self.gain)
        along = None if is_frozen else (grad * xhat).mean(-1, keepdim=True)
        if self.kind == "layer":
            grad.sub_(grad.mean(-1, keepdim=True))
        return grad.mul_(scale) if along is None else grad.addcmul_(xhat, along, value=-1).mul_(scale)

    def split(self, parts: Tensor, total: Tensor, *, is_frozen: bool = False) -> Tensor:
        """The norm of `total`, shared out to `parts` that add up to it: all parts get the scale of the total."""
        _, scale = self.standardised(total.detach() if is_frozen else total)
        centred = parts - parts.mean(-1, keepdim=True) if self.kind == "layer" else parts
        return centred * (scale * self.gain)


def norms_in(model: nn.Module, path: str) -> list[str]:
    """Submodules that call themselves norms. Names lie, but here they only decide whether a rule is refused."""
    inside = model.get_submodule(path).named_modules(prefix=path)
    return [name for name, module in inside if "norm" in type(module).__name__.lower()]


class _Frozen(torch.autograd.Function):
    """A norm whose scale is a constant going back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: NormJoint) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        y: Tensor = norm.module(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.norm.backward_(grads[0].clone(), x, is_frozen=True), None
