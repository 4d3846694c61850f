"""The modes that a model is measured in, and left again: no dropout, no gradients; products of half-precision numbers on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Modes:
    """The modules and parameters of a model, found once: there are hundreds, and each has a mode."""

    def __init__(self, model: nn.Module) -> None:
        self._modules, self._parameters = [*model.modules()], [*model.parameters()]

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Evaluation mode and no gradients, for parameters not even where others are asked for: autograd would keep what theirs need.
        Each module's training mode and each parameter's gradient are given back afterwards."""
        training = [module for module in self._modules if module.training]
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        try:
            for module in training:
                module.training = False
            for parameter in trained:
                parameter.requires_grad_(False)
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True
            for parameter in trained:
                parameter.requires_grad_(True)


def undisturbed(model: nn.Module) -> AbstractContextManager[None]:
    """`Modes.undisturbed` of the model as it is now."""
    return Modes(model).undisturbed()


def wide_products(model: nn.Module) -> AbstractContextManager[object]:
    """Matrix products of a half-precision model on a CPU in float32, and their results rounded.

    Many CPUs have no instructions for them, and the one that goes back through a linear layer is then far slower than in float32. One
    weight at a time is widened.
    """
    parameter = next(model.parameters())
    is_narrow = parameter.device.type == "cpu" and parameter.dtype in (torch.bfloat16, torch.float16)
    narrow: Any = _WideProducts  # PyTorch does not type its modes
    return narrow() if is_narrow else nullcontext()


class _WideProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func not in _PRODUCTS or args[-1].dtype not in (torch.bfloat16, torch.float16):
            return func(*args, **(kwargs or {}))
        further = dict(kwargs or {})
        out = further.pop("out", None)
        product = func.overloadpacket(*(arg.float() for arg in args), **further)
        return product.to(args[-1].dtype) if out is None else out.copy_(product)


_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.bmm.out, _aten.addmm.default)
