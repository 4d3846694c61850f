"""An MLP taken apart: the model's own modules, and where its neurons can be seen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from circuitgraph._architecture import MLP
from circuitgraph._engine import EXACT, Rule
from circuitgraph._errors import CircuitGraphError, TraceError
from circuitgraph_torch._affine import affine
from circuitgraph_torch._norms import NormJoint, norms_in
from circuitgraph_torch._rules import RuledModules, run
from circuitgraph_torch._twin import twin


class MLPJoint:
    """An MLP from the stream to what it adds to it."""

    def __init__(self, model: nn.Module, mlp: MLP) -> None:
        self.norm = NormJoint.of(model, mlp.norm)
        self._post_norm = NormJoint.of(model, mlp.post_norm)
        self._paths = mlp.modules
        self._modules = [model.get_submodule(path) for path in mlp.modules]
        self._scale = mlp.scale
        self._inner_norms = [path for root in mlp.modules for path in norms_in(model, root)]
        self._ruled: dict[tuple[str, str], RuledModules] = {}

    def __call__(self, x: Tensor, rule: Rule = EXACT) -> Tensor:
        """`[prompts, position, d_model]` to the same. Going back from there is by the rule."""
        is_frozen = rule.norms == "frozen"
        y = x if self.norm is None else self.norm(x, is_frozen=is_frozen)
        y = run(self._modules, y) if rule == EXACT else self._run(y, rule)
        y = y if self._post_norm is None else self._post_norm(y, is_frozen=is_frozen)
        return y if self._scale == 1.0 else y * self._scale

    def _run(self, x: Tensor, rule: Rule) -> Tensor:
        if rule.norms == "frozen" and self._inner_norms:
            raise CircuitGraphError(
                f"gradient: {self._inner_norms[0]} is a norm inside an MLP, whose scale this engine cannot freeze; "
                f"use a rule with norms 'exact'"
            )
        key = rule.activations, rule.gates
        if key == ("exact", "exact"):
            return run(self._modules, x)
        if key not in self._ruled:
            self._ruled[key] = RuledModules([*zip(self._paths, self._modules, strict=True)], rule)
        return self._ruled[key](x)

    @property
    def like(self) -> Tensor:
        """A tensor of its dtype, on its device."""
        return next(parameter for module in self._modules for parameter in module.parameters())

    @cached_property
    def last(self) -> LastLinear:
        """The linear map at its end. Raises `CircuitGraphError` where there is none, or a norm after it mixes what neurons say."""
        if self._post_norm is not None:
            raise CircuitGraphError(f"neurons of {self._paths[-1]}: a norm after the MLP mixes what they say; take a dictionary of mlp_out")
        return LastLinear.of(self._paths, self._modules, self.norm, self._scale)


class LastLinear:
    """The linear module whose output is the MLP's: `weight` `[d_mlp, d_model]` is what each of the neurons that it reads says at 1, `bias`
    `[d_model]` what is said where none of them says anything."""

    def __init__(self, modules: Sequence[nn.Module], last: nn.Module, seen: _Seen, norm: NormJoint | None, scale: float) -> None:
        weight, bias = affine(last)
        self.weight = weight.T * scale
        self.bias = weight.new_zeros(len(weight)) if bias is None else bias * scale
        self._modules, self._seen, self._norm, self._scale = modules, seen, norm, scale

    @classmethod
    def of(cls, paths: Sequence[str], modules: Sequence[nn.Module], norm: NormJoint | None, scale: float) -> LastLinear:
        for name, module in reversed([*modules[-1].named_modules()]):
            found = cls._with(modules, name, module, norm, scale) if _is_linear(module) else None
            if found is not None:
                return found
        raise CircuitGraphError(f"neurons of {paths[-1]}: no single linear map makes its output (a mixture of experts has several)")

    @classmethod
    def _with(cls, modules: Sequence[nn.Module], name: str, module: nn.Module, norm: NormJoint | None, scale: float) -> LastLinear | None:
        """With this module of the last one as the last linear map; None if that is not what makes the output."""
        seen = _Seen(module)
        found = cls([*modules[:-1], seen if name == "" else twin(modules[-1], {name: seen})], module, seen, norm, scale)
        d_model = found.weight.shape[1]
        x = torch.linspace(-1, 1, 2 * d_model, device=found.weight.device).to(found.weight).sin().view(1, 2, d_model)
        with torch.no_grad():
            said, hidden = found.run(x, EXACT)
        is_it = hidden.shape[-1] == len(found.weight) and torch.allclose(hidden @ found.weight + found.bias, said, rtol=1e-3, atol=1e-5)
        return found if is_it else None

    def run(self, x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """What the MLP says at `x`, and its neurons' activations. Raises `CircuitGraphError` for a rule for activations or gates."""
        if (rule.activations, rule.gates) != ("exact", "exact"):
            raise CircuitGraphError("gradient: neurons as nodes have the exact rule for activations and gates only")
        y = x if self._norm is None else self._norm(x, is_frozen=rule.norms == "frozen")
        said = run(self._modules, y)
        hidden, self._seen.value = self._seen.value, None
        assert hidden is not None, "the MLP did not call its last linear map"
        return said if self._scale == 1.0 else said * self._scale, hidden


class _Seen(nn.Module):
    """A module of the model that keeps what it is shown."""

    value: Tensor | None = None

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self._inside = [inside]  # in a list: it belongs to the model

    def forward(self, x: Tensor) -> Tensor:
        self.value = x
        y: Tensor = self._inside[0](x)
        return y


def _is_linear(module: nn.Module) -> bool:
    try:
        affine(module)
    except TraceError:
        return False
    return True
