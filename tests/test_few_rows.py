"""Few rows through a very wide layer: another order of the same product."""

from __future__ import annotations

import pytest
import torch

from circuitgraph_torch import _few_rows
from circuitgraph_torch._few_rows import linear_of_few


def layer(out: int, *, bias: bool) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(16, out, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [5, 4096, 9000])
@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 60)])
@torch.no_grad()
def test_is_the_layer_itself(shape: tuple[int, ...], out: int, bias: bool) -> None:
    module, x = layer(out, bias=bias), torch.randn(*shape, 16)
    torch.testing.assert_close(linear_of_few(module, x), module(x), atol=1e-6, rtol=1e-5)


def test_a_gradient_goes_back_through_it() -> None:
    module, x = layer(9000, bias=True), torch.randn(4, 16, requires_grad=True)
    (found,) = torch.autograd.grad(linear_of_few(module, x).square().sum(), x)
    (wanted,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_other_numbers_keep_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer(9000, bias=True).double(), torch.randn(4, 16).double()
    assert torch.equal(linear_of_few(module, x), module(x))
    monkeypatch.setattr(_few_rows, "_MOST_ROWS", 3)
    assert torch.equal(linear_of_few(layer(9000, bias=True), x.float()), layer(9000, bias=True)(x.float()))


class Doubled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
def test_a_subclass_speaks_for_itself() -> None:
    torch.manual_seed(0)
    module, x = Doubled(16, 9000), torch.randn(4, 16)
    assert torch.equal(linear_of_few(module, x), module(x))
