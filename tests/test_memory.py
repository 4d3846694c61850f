"""Budgets for memory, as users write them."""

from __future__ import annotations

from typing import Any

import pytest

import circuitgraph
from circuitgraph._errors import CircuitGraphError
from circuitgraph._memory import MemoryBudget


@pytest.mark.parametrize(("wanted", "total"), [(123, 123), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("400000", 400000)])
def test_budgets_are_bytes_or_texts(wanted: int | str, total: int) -> None:
    assert MemoryBudget.of(wanted, free=None) == MemoryBudget(total, total)


@pytest.mark.parametrize("wanted", ["much", "", "0", 0, -1, True, None, 1.5, "-2GB", ["1GB"]])
def test_other_budgets_are_refused(wanted: Any) -> None:
    with pytest.raises(CircuitGraphError, match="memory_budget: .*; expected a number of bytes, a text such as '8GB', or 'auto'"):
        MemoryBudget.of(wanted, free=None)


def test_auto_is_half_of_what_an_accelerator_has_left_and_a_part_of_a_machine() -> None:
    assert MemoryBudget.of("auto", free=1 << 34).total == 1 << 33
    ours = MemoryBudget.of("auto", free=None)
    assert 0 < ours.total <= 1 << 32
    assert ours.total <= ours.host


def test_parts_of_a_budget_fit_into_it() -> None:
    budget = MemoryBudget.of("1GB", free=None)
    assert budget.batch < budget.lanes < budget.runs == budget.total
    assert budget.halved().total == budget.total // 2
    assert budget.halved().host == budget.host


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_traced_model_keeps_to_it(backend: str) -> None:
    with pytest.raises(CircuitGraphError, match="memory_budget: 'a lot'"):
        circuitgraph.trace("zoo:induction-2l", backend=backend, memory_budget="a lot")
    model: Any = circuitgraph.trace("zoo:induction-2l", backend=backend, memory_budget="64kB")
    pairs = circuitgraph.load_task("induction").pairs(model.tokenizer, 4, seed=0)
    engine: Any = model.bind(pairs, "logit_diff")
    assert [len(batch) for batch in engine.batches] == [1] * 4
