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


INSTRUCTIONS = {torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"), torch.float16: ("_is_amx_fp16_supported",)}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype for which the CPU has no instructions."""
    dtype: torch.dtype = request.param
    for name in INSTRUCTIONS[dtype]:
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    return dtype


def test_half_precision_is_multiplied_wide(narrow: torch.dtype) -> None:
    model = tiny("llama", dtype=narrow)
    left, right = torch.randn(2, 3, 4).to(narrow), torch.randn(2, 4, 5).to(narrow)
    out = torch.empty(2, 3, 5, dtype=narrow)
    with Products() as made, wide_products(model):
        torch.bmm(left, right, out=out)
        product = torch.bmm(left, right)
    assert made.dtypes == [torch.float32] * 2
    assert torch.equal(out, product)
    assert torch.equal(out, (left.float() @ right.float()).to(narrow))


def test_half_precision_stays_where_the_cpu_has_instructions(narrow: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, numbers = tiny("llama", dtype=narrow), torch.randn(3, 3).to(narrow)
    for name in INSTRUCTIONS[narrow]:
        with monkeypatch.context() as patch, Products() as made:
            patch.setattr(torch.cpu, name, lambda: True)
            with wide_products(model):
                numbers @ numbers
        assert made.dtypes == [narrow]
