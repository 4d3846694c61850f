"""The modes that a model is measured in, and left again: no dropout, no gradients, no products in fewer digits than their numbers have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Modes:
    """The modules and parameters of a model, found once: there are hundreds, and each has a mode."""

    def __init__(self, model: nn.Module) -> None:
        self._modules, self._parameters = [*model.modules()], [*model.parameters()]

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Evaluation mode, precise products and no gradients, for parameters not even where others are asked for: autograd would keep what
        theirs need. Each module's training mode and each parameter's gradient are given back afterwards."""
        training = [module for module in self._modules if module.training]
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        try:
            for module in training:
                module.training = False
            for parameter in trained:
                parameter.requires_grad_(False)
            with precise_products(), torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True
            for parameter in trained:
                parameter.requires_grad_(True)


def undisturbed(model: nn.Module) -> AbstractContextManager[None]:
    """`Modes.undisturbed` of the model as it is now."""
    return Modes(model).undisturbed()


@contextmanager
def precise_products() -> Iterator[None]:
    """Matrix products of float32 numbers as they are, not as TF32 or bfloat16, and sums of half-precision ones in float32: differences
    between runs can be smaller than what is lost otherwise. What the program allows PyTorch elsewhere is given back afterwards."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _PRECISE]
    allowed = _allowed_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        for owner, name, value in _PRECISE:
            setattr(owner, name, value)
        yield
    finally:
        if allowed is not None:
            torch.set_float32_matmul_precision(allowed)
        for owner, name, value in before:
            setattr(owner, name, value)


def _allowed_precision() -> str | None:
    """What `set_float32_matmul_precision` was told; None where newer settings contradict it, since then PyTorch does not tell."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def widened(x: Tensor) -> Tensor:
    """In float32 what is in half precision; what is not, as it is."""
    return x if x.element_size() >= 4 else x.float()


def wide_products(model: nn.Module) -> AbstractContextManager[object]:
    """Matrix products of a half-precision model on a CPU without instructions for them in float32, and their results rounded.

    There the one that goes back through a linear layer is far slower than in float32. One weight at a time is widened.
    """
    parameter = next(model.parameters())
    is_slow = parameter.device.type == "cpu" and parameter.dtype in _NARROW and not _has_instructions(parameter.dtype)
    narrow: Any = _WideProducts  # PyTorch does not type its modes
    return narrow() if is_slow else nullcontext()


def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of these numbers. PyTorch knows, under names that are its own."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if dtype == torch.bfloat16 else ("_is_amx_fp16_supported",)
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


class _WideProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func not in _PRODUCTS or args[-1].dtype not in _NARROW:
            return func(*args, **(kwargs or {}))
        further = dict(kwargs or {})
        out = further.pop("out", None)
        product = func.overloadpacket(*(arg.float() for arg in args), **further)
        return product.to(args[-1].dtype) if out is None else out.copy_(product)


_NARROW = (torch.bfloat16, torch.float16)
_cuda, _mkldnn = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
_SETTINGS: Sequence[tuple[Any, str, object]] = (
    (_cuda, "allow_fp16_reduced_precision_reduction", False),
    (_cuda, "allow_bf16_reduced_precision_reduction", False),
    (_cuda, "allow_fp16_accumulation", False),
    (_cuda, "fp32_precision", "ieee"),
    (_mkldnn, "fp32_precision", "ieee"),
)
_PRECISE = [(owner, name, value) for owner, name, value in _SETTINGS if hasattr(owner, name)]  # the oldest PyTorch that will do lacks some
_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.bmm.out, _aten.addmm.default)
