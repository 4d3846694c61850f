"""Memory of runs that are over serves the next, and nobody's numbers change for it."""

from __future__ import annotations

import gc

import families
import numpy as np
import pytest
import torch

from circuitgraph.testing import random_pairs
from circuitgraph_torch import _spare
from circuitgraph_torch._spare import Spare

LIKE = torch.zeros(1)
SHAPE = (4, 1 << 20)  # of float32: 16 MB


def test_memory_that_nobody_holds_is_given_again() -> None:
    spare = Spare()
    first = spare(LIKE, *SHAPE)
    place, part = first.data_ptr(), first[1:, :8]
    del first
    second = spare(LIKE, *SHAPE)
    assert second.data_ptr() != place  # a part of the first is held
    del part
    assert spare(LIKE, *SHAPE, 2).data_ptr() != place  # of another size
    assert spare(LIKE, SHAPE[1], SHAPE[0]).data_ptr() == place


def test_of_much_that_is_given_back_a_little_is_kept() -> None:
    spare = Spare()
    held = [spare(LIKE, *SHAPE) for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in held}) == 5
    held.clear()
    gc.collect()
    assert len(spare._free) == 2


def test_what_was_said_stays_as_it_was_when_more_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_spare, "_LEAST", 1)
    model, pairs = families.traced("gpt2"), random_pairs(3, lengths=(7, 7), vocabulary=families.VOCABULARY)
    engine = model.bind(pairs, "logit_diff")
    mask = np.random.default_rng(0).uniform(size=engine.graph.shape)
    said, under_mask = engine.activations(), engine.activations(mask)
    before = [said[0].copy(), under_mask[1].copy()]
    for seed in range(4):
        other = np.random.default_rng(seed).uniform(size=engine.graph.shape)
        engine.gradient(other)
        model.bind(pairs.select([1, 0]), "logit_diff").gradient(np.ones(engine.graph.shape))
        engine.evaluate(np.stack([mask, other]))
    assert np.array_equal(said[0], before[0])
    assert np.array_equal(under_mask[1], before[1])
