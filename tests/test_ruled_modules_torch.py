"""Backward rules through MLPs that are the model's own code: what counts as linear, as an activation, as a gate, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny
from torch import Tensor, nn
from torch.nn import functional

import circuitgraph_torch
from circuitgraph._engine import RELP, Rule
from circuitgraph._errors import CircuitGraphError
from circuitgraph_torch._mlp import MLPJoint
from circuitgraph_torch._rules import RuledModules

MOE = ("mixtral", "qwen3_moe")
SAME_MLPS = (
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gpt_neox_sequential",
    "gemma3",
    "falcon_grouped",
)  # as in llama, gpt_neox, gemma2, falcon
WITH_MLP = [name for name in FAMILIES if name not in (*MOE, *SAME_MLPS, "attention_only", "bloom", "gemma3_multimodal")]


@pytest.mark.parametrize("family", WITH_MLP)
def test_relevance_is_conserved(family: str) -> None:
    """Without biases and with a frozen scale, an MLP is `J(x) x`, where `J` is its RelP gradient; the values are the model's own."""
    module = tiny(family, dtype=torch.float64)
    for name, parameter in module.named_parameters():
        if "bias" in name:
            parameter.zero_()
    found = circuitgraph_torch.find_architecture(module)
    joint = MLPJoint(module, found.blocks[0].mlp)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, found.d_model, generator=generator, dtype=torch.float64).requires_grad_()
    cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    own, ruled = joint(x), joint(x, RELP)
    assert torch.equal(own, ruled)
    total = float((cotangent * own).sum().detach())
    (exact,), (relevance,) = (torch.autograd.grad(y, x, cotangent) for y in (own, ruled))
    assert abs(float((relevance * x).sum().detach()) - total) < 1e-5 * abs(total)
    assert abs(float((exact * x).sum().detach()) - total) > 0.1 * abs(total)
    (half,) = torch.autograd.grad(joint(x, Rule(norms="frozen", gates="half")), x, cotangent)
    (ratio,) = torch.autograd.grad(joint(x, Rule(norms="frozen", activations="ratio")), x, cotangent)
    is_gated = not torch.allclose(ratio, relevance)
    assert is_gated != torch.allclose(half, torch.autograd.grad(joint(x, Rule(norms="frozen")), x, cotangent)[0])


def test_norms_inside_an_mlp_are_not_frozen_in_silence() -> None:
    module = tiny("opt", dtype=torch.float64)
    mlp = circuitgraph_torch.find_architecture(module).blocks[0].mlp
    block = module.get_submodule(mlp.modules[1].rpartition(".")[0])
    block.register_module("sub_norm", nn.LayerNorm(96).double())
    inner = replace(mlp, modules=(mlp.modules[0], mlp.modules[0].replace("fc1", "sub_norm"), mlp.modules[-1]))
    with pytest.raises(CircuitGraphError, match="sub_norm is a norm inside an MLP, whose scale this engine cannot freeze"):
        MLPJoint(module, inner)(torch.ones(1, 2, 64, dtype=torch.float64), Rule(norms="frozen"))
    with pytest.raises(CircuitGraphError, match="computes layer_norm of what depends on its input"):
        MLPJoint(module, inner)(torch.ones(1, 2, 64, dtype=torch.float64, requires_grad=True), Rule(activations="ratio"))


class Plain(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Hidden(torch.autograd.Function):
    """What no torch function shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.sin(x.numpy()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def through(function: Callable[[Tensor], Tensor], rule: Rule = RELP, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a module says, and its gradient by a rule."""
    x = torch.tensor([[[-1.0, 0.0, 0.5, 2.0]]]) if x is None else x
    x = x.clone().requires_grad_()
    y = RuledModules([("mlp", Plain(function))], rule)(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0].flatten()


def _filled(x: Tensor) -> Tensor:
    y = torch.zeros(1, 1, 4)
    y[..., :] = x
    return y


REFUSED: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("softmax", lambda x: x.softmax(-1)),
    ("sigmoid", lambda x: x * x.sigmoid()),
    ("tanh", lambda x: torch.tanh(x)),
    ("pow", lambda x: x**2),
    ("clamp", lambda x: x.clamp(-1, 1)),
    ("layer_norm", lambda x: functional.layer_norm(x, (4,))),
    ("matmul", lambda x: x.transpose(1, 2) @ x),
    ("__rdiv__", lambda x: 1 / (x + 3)),
    ("div", lambda x: x / (x + 3)),
    ("index_add_|zeros", lambda x: torch.zeros(1, 1, 4).index_add_(2, torch.arange(4), x)),
    ("relu_", lambda x: (2 * x).relu_()),
    ("where|gt", lambda x: torch.where(x > 0, x, 0 * x)),
    ("to", lambda x: (x.to(torch.int64) * 2).float()),
    ("__setitem__", lambda x: _filled(x)),
    ("something that PyTorch's functions do not show", lambda x: Hidden.apply(x)),
    ("something that PyTorch's functions do not show", lambda x: 2 * Hidden.apply(x)),
]


@pytest.mark.parametrize(("what", "function"), REFUSED, ids=[f"{i}-{what[:9]}" for i, (what, _) in enumerate(REFUSED)])
def test_what_no_rule_says_is_refused(what: str, function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CircuitGraphError, match=rf"gradient: mlp \(Plain\) computes (its output by )?({what})"):
        through(function)


def test_an_activation_goes_back_by_its_ratio_and_at_zero_by_its_slope() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    for act in (functional.silu, functional.gelu, functional.mish):
        y, grad = through(lambda x, act=act: 3 * act(x))
        assert torch.equal(y.flatten(), 3 * act(x))
        torch.testing.assert_close(grad, 3 * torch.where(x == 0, torch.autograd.functional.jacobian(act, torch.zeros(())), act(x) / x))
        assert not torch.allclose(grad, through(lambda x, act=act: 3 * act(x), Rule(gates="half"))[1])
    with pytest.raises(CircuitGraphError, match="computes Sigmoid, which is 0.5 at 0"):
        RuledModules([("mlp.act", nn.Sigmoid())], RELP)(x.expand(1, 1, 4).clone().requires_grad_())
    in_place = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(inplace=True), nn.Dropout(0.5)).eval()
    given = x.expand(1, 1, 4).clone().requires_grad_()
    y = RuledModules([("mlp", in_place)], RELP)(given)
    torch.testing.assert_close((torch.autograd.grad(y.sum(), given)[0] * given).sum(), y.sum())


def test_a_gate_gives_half_to_each_of_what_depends_on_the_input_and_all_where_only_one_does() -> None:
    weight = nn.Parameter(torch.full((4,), 3.0))
    torch.testing.assert_close(through(lambda x: (x + 1) * (2 * x))[1], torch.tensor([-1.0, 1.0, 2.0, 5.0]))  # (4x + 2) / 2
    torch.testing.assert_close(through(lambda x: (x + 1) * (2 * x), Rule(activations="ratio"))[1], torch.tensor([-2.0, 2.0, 4.0, 10.0]))
    torch.testing.assert_close(through(lambda x: x * weight)[1], torch.full((4,), 3.0))
    torch.testing.assert_close(through(lambda x: x * functional.softplus(weight).sin())[1], functional.softplus(weight).sin().detach())
