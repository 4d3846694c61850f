"""In how many digits PyTorch multiplies while an engine asks, whatever the program allows it elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from circuitgraph import PromptPairs, trace
from circuitgraph_torch._modes import precise_products

CUDA, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
PRECISE = ("ieee", "ieee", False, False, False)


def allow_by_the_old_name() -> None:
    torch.set_float32_matmul_precision("medium")


def allow_everywhere() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]  # a property of the module that PyTorch puts there


def allow_in_matmul() -> None:
    CUDA.fp32_precision = "tf32"


def allow_tf32() -> None:
    CUDA.allow_tf32 = True


def allow_nothing() -> None:
    """In half precision PyTorch allows it from the start."""


ALLOWED: list[Callable[[], None]] = [allow_by_the_old_name, allow_everywhere, allow_in_matmul, allow_tf32, allow_nothing]


class Watching(TorchDispatchMode):
    """The settings under which matrix products are made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[object] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.seen.add(settings())
        return func(*args, **(kwargs or {}))


def settings() -> tuple[object, ...]:
    reduced = (CUDA.allow_fp16_reduced_precision_reduction, CUDA.allow_bf16_reduced_precision_reduction, CUDA.allow_fp16_accumulation)
    return (CUDA.fp32_precision, MKLDNN.fp32_precision, *reduced)


@pytest.fixture(params=ALLOWED, ids=lambda allow: allow.__name__)
def allowed(request: pytest.FixtureRequest) -> Iterator[tuple[object, ...]]:
    """What a program allows PyTorch, until the test is over."""
    before = settings()
    request.param()
    yield settings()
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    CUDA.fp32_precision, MKLDNN.fp32_precision = "none", "none"
    assert settings() == before


def test_products_are_precise_inside_only(allowed: tuple[object, ...]) -> None:
    assert allowed != PRECISE
    with precise_products():
        assert settings() == PRECISE
        assert torch.get_float32_matmul_precision() == "highest"
        assert not CUDA.allow_tf32  # PyTorch refuses to tell where old and new settings contradict each other
        with precise_products():
            assert settings() == PRECISE
        assert settings() == PRECISE
    assert settings() == allowed
    with contextlib.suppress(KeyError), precise_products():
        raise KeyError
    assert settings() == allowed


def test_the_old_name_tells_the_same_afterwards() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with precise_products():
            pass
        assert torch.get_float32_matmul_precision() == "high"
        assert CUDA.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        CUDA.fp32_precision, MKLDNN.fp32_precision = "none", "none"


def test_everything_an_engine_does_is_precise(allowed: tuple[object, ...]) -> None:
    with Watching() as traced_with:
        traced = trace(tiny("gpt2"))
    pairs = PromptPairs([[5, 6, 7]], [[5, 9, 7]], [[6]], [[9]])
    with Watching() as asked_with:
        engine = traced.bind(pairs, "logit_diff")
        mask = engine.graph.visible.astype(np.float32)
        engine.evaluate(np.stack([mask, 0 * mask]))
        engine.gradient(mask)
        traced.logits(pairs)
    assert traced_with.seen == asked_with.seen == {PRECISE}
    assert settings() == allowed
