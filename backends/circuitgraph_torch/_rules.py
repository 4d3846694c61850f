"""Going back through an MLP by another rule, where the MLP's code is the model's own.

While the modules run, every call of a torch function with something that depends on their input is looked at. It is linear in that input;
or an activation, `act(x)`, whose derivative may be replaced by `act(x) / x`; or a gate, a product of two things that depend on the input,
each of which may get half of its gradient. Anything else is refused by name, since no rule says how. The values are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from circuitgraph._engine import Rule
from circuitgraph._errors import CircuitGraphError
from circuitgraph_torch._observe import apply
from circuitgraph_torch._twin import twin

_Result = TypeVar("_Result")

# Torch functions by name (`torch.add` and `Tensor.add` are both "add").
_ACTIVATIONS = {"gelu", "silu", "relu", "mish", "leaky_relu", "elu", "selu", "celu", "hardswish"}
_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__"}
# Linear in all their tensors together.
_SUMS = {"add", "sub", "__add__", "__radd__", "__sub__", "__rsub__", "cat", "concat", "stack"}
# Linear in the one tensor that depends on the input.
_MAPS = {"linear", "addmm", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "baddbmm", "einsum"}
# Linear in their first tensor, if nothing else depends on the input.
_SHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "repeat", "permute", "transpose", "t", "movedim"}
_PARTS = {"chunk", "split", "unbind", "narrow", "__getitem__", "contiguous", "clone", "to", "type", "type_as", "float", "double"}
_SCALED = {"half", "bfloat16", "neg", "__neg__", "sum", "mean", "div", "true_divide", "__truediv__", "mul_", "div_", "dropout"}
_FIRST = _SHAPES | _PARTS | _SCALED


class RuledModules:
    """Modules that run one after the other, with a rule for the way back."""

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], rule: Rule) -> None:
        self._names = ", ".join(f"{path} ({type(module).__name__})" for path, module in modules)
        self._own, self._rule = [module for _, module in modules], rule
        self._watch = _Watch(rule, self._names)
        self._modules = [self._ruled(module) for module in self._own]
        self._is_proved = False

    def __call__(self, x: Tensor) -> Tensor:
        with self._watch.following(x):
            y = run(self._modules, x)
            self._watch.check(y)
        if not self._is_proved:
            with torch.no_grad():
                self._is_proved = torch.allclose(run(self._own, x), y, rtol=1e-3, atol=1e-5)
            if not self._is_proved:
                raise self._watch.refusal("something that says other things when its activations are watched")
        return y

    def _ruled(self, module: nn.Module) -> nn.Module:
        """The module, with its activations in a wrapper; parameters are shared, and the original is not touched."""
        if _is_activation(module):
            return _Activation(module, self._watch)
        found = {path: _Activation(inside, self._watch) for path, inside in _activations(module)}
        return twin(module, found) if found else module


def run(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Modules one after the other; of a tuple the first counts (some experts return their router's logits too)."""
    for module in modules:
        y = module(x)
        x = y[0] if isinstance(y, tuple) else y
    return x


def _activations(module: nn.Module, base: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost submodules that are activations."""
    for name, child in module.named_children():
        if _is_activation(child):
            yield base + name, child
        else:
            yield from _activations(child, f"{base}{name}.")


def _is_activation(module: nn.Module) -> bool:
    """Whether a module has no parameters and maps each number by itself; a dropout does not count, and need not."""
    if isinstance(module, nn.Dropout | nn.Identity) or any(True for _ in (*module.parameters(), *module.buffers())):
        return False
    x = torch.linspace(-3, 3, 8)
    whole = apply(module, x.expand(2, 3, 8).clone())
    alone = [apply(module, number.expand(1, 1, 1).clone()) for number in x]
    if whole is None or whole.shape != (2, 3, 8) or any(one is None or one.numel() != 1 for one in alone):
        return False
    return torch.allclose(whole, torch.stack([one.flatten() for one in alone if one is not None]).T, rtol=1e-4, atol=1e-6)


class _Activation(nn.Module):
    """An activation of the model in a wrapper that the watch knows."""

    def __init__(self, inside: nn.Module, watch: _Watch) -> None:
        super().__init__()
        self._inside, self._watch = [inside], watch  # in a list: it is not to be registered, it belongs to the model

    def forward(self, x: Tensor) -> Tensor:
        return self._watch.activation(self._inside[0], x, type(self._inside[0]).__name__)


class _Watch(TorchFunctionMode):
    """Sees every torch function while modules run, and knows which tensors depend on their input."""

    def __init__(self, rule: Rule, names: str) -> None:
        super().__init__()
        self._rule, self._names = rule, names
        self._live: dict[int, Tensor] = {}  # the tensors are kept, so that no other gets their id
        self._fixed: dict[int, Tensor] = {}  # made of parameters alone
        self._is_aside = False

    @contextmanager
    def following(self, x: Tensor) -> Iterator[None]:
        """Watch what is computed from `x`."""
        self._live = {id(x): x}
        try:
            with self:
                yield
        finally:
            self._live, self._fixed = {}, {}

    def refusal(self, what: str) -> CircuitGraphError:
        return CircuitGraphError(
            f"gradient: {self._names} computes {what}, and the rule says how to go back through linear maps, activations (act(0) = 0) and "
            f"gates only; use the exact rule, or one with activations and gates 'exact'"
        )

    def check(self, y: Tensor) -> None:
        if id(y) not in self._live:
            raise self.refusal("its output by something that PyTorch's functions do not show")

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
        """`function(x)`, a number at a time."""
        with self._aside():
            if not self._depends(x):
                return function(x)
            if self._rule.activations == "exact":
                return self._note(function(x), self._live)
            slope = self._slope(function, x, name)
            with torch.no_grad():
                y = function(x.clone())  # a copy: it may work in place
                ratio = torch.where(x == 0, slope, y / x)
            out: Tensor = _ByRatio.apply(x, y, ratio)  # type: ignore[no-untyped-call]
            return self._note(out, self._live)

    def _slope(self, function: Callable[[Tensor], Tensor], like: Tensor, name: str) -> Tensor:
        """The limit of `act(x) / x` at 0, which is `act'(0)`."""
        with torch.enable_grad():
            zero = torch.zeros(1, 1, 1, dtype=like.dtype, device=like.device, requires_grad=True)
            at_zero = function(zero.clone())
            (slope,) = torch.autograd.grad(at_zero, zero)
        if float(at_zero.detach()) != 0 or not bool(torch.isfinite(slope)):
            raise self.refusal(f"{name}, which is {float(at_zero.detach()):.3g} at 0")
        return slope

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_aside:
            return func(*args, **kwargs)
        given = [*_tensors((args, kwargs))]
        live = [tensor for tensor in given if self._depends(tensor)]
        if not live:
            return self._note(func(*args, **kwargs), self._fixed)
        name = getattr(func, "__name__", str(func))
        if name in _ACTIVATIONS and args and args[0] is live[0] and len(live) == 1 and not kwargs.get("inplace"):
            return self.activation(lambda x: func(x, *args[1:], **kwargs), live[0], name)
        if name == "__setitem__":
            raise self.refusal(f"{name} with what depends on its input")
        result = func(*args, **kwargs)
        made = [*_tensors(result)]
        if not made:
            return result  # a shape, a dtype, a device
        if name in _PRODUCTS and len(live) == 2:
            return self._note(self._gate(result), self._live)
        if not _is_linear(name, given, live) or not all(tensor.is_floating_point() for tensor in made):
            raise self.refusal(f"{name} of what depends on its input")
        return self._note(result, self._live)

    def _gate(self, product: Tensor) -> Tensor:
        if self._rule.gates == "half" and product.requires_grad:
            product.register_hook(lambda grad: grad / 2)  # so that each of the two gets half
        return product

    def _depends(self, tensor: Tensor) -> bool:
        if id(tensor) in self._live:
            return True
        if tensor.grad_fn is not None and id(tensor) not in self._fixed:
            raise self.refusal("something that PyTorch's functions do not show (a custom autograd function)")
        return False

    def _note(self, result: _Result, among: dict[int, Tensor]) -> _Result:
        among.update((id(tensor), tensor) for tensor in _tensors(result) if among is self._live or tensor.grad_fn is not None)
        return result

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Nothing in here is looked at."""
        before, self._is_aside = self._is_aside, True
        try:
            yield
        finally:
            self._is_aside = before


def _is_linear(name: str, given: Sequence[Tensor], live: Sequence[Tensor]) -> bool:
    """Whether a torch function is linear in those of the given tensors that are live."""
    if name in _SUMS:
        return True
    if name in _FIRST:
        return len(live) == 1 and live[0] is given[0]
    return name in _MAPS | _PRODUCTS and len(live) == 1


class _ByRatio(torch.autograd.Function):
    """`y`, with `ratio` for its derivative in `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, ratio: Tensor) -> Tensor:
        ctx.save_for_backward(ratio)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return grads[0] * ratio, None, None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
