"""What the torch backend sees of a model's attention calls, and which matrix products it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import families
import pytest
import torch
from families import FAMILIES, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import circuitgraph
from circuitgraph_torch._calls import attention_calls
from circuitgraph_torch._modes import wide_products

LENGTH = 7


class Products(TorchDispatchMode):
    """The dtypes of the matrix products that are made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return isinstance(other, type(one)) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bloom"])
def test_calls_are_the_same_where_nothing_is_said(family: str) -> None:
    traced = families.traced(family)
    paths = [block.attention.path for block in traced.architecture.blocks if block.attention]
    whole = attention_calls(traced.module, paths, LENGTH, torch.device("cpu"))
    for seen, known in zip(traced._parts.calls(LENGTH), whole, strict=True):
        args, kwargs = seen.with_hidden(known.hidden)
        assert same(args, known.args)
        assert kwargs.keys() == known.kwargs.keys()
        assert all(same(kwargs[name], known.kwargs[name]) for name in kwargs)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_calls_are_seen_without_the_products(family: str) -> None:
    parts = circuitgraph.trace(tiny(family))._parts  # type: ignore[attr-defined]
    with Products() as made:
        parts.calls(LENGTH)
    # Rotary tables are a product of frequencies and positions.
    assert len(made.dtypes) <= 1


def test_half_precision_is_multiplied_wide() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    left, right = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.randn(2, 4, 5, dtype=torch.bfloat16)
    out = torch.empty(2, 3, 5, dtype=torch.bfloat16)
    with Products() as made, wide_products(model):
        torch.bmm(left, right, out=out)
        product = torch.bmm(left, right)
    assert made.dtypes == [torch.float32] * 2
    assert torch.equal(out, product)
    assert torch.equal(out, (left.float() @ right.float()).to(torch.bfloat16))
