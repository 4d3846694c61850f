"""Random prompt pairs for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from circuitgraph._pairs import PromptPairs


def random_pairs(seed: int = 0, *, lengths: Sequence[int] = (5, 5, 5), vocabulary: int = 13) -> PromptPairs:
    """One pair per length. A corrupted prompt differs from its clean one in the last token and about half of the others, so that
    even a model without attention tells them apart; a wrong answer differs from its answer.

    >>> len(random_pairs(lengths=(4, 6, 4)))
    3
    """
    rng = np.random.default_rng(seed)
    clean = [rng.integers(vocabulary, size=length) for length in lengths]
    shifts = [rng.integers(1, vocabulary, size=length) * (rng.random(length) < 0.5) for length in lengths]
    for shift in shifts:
        shift[-1] = 1
    corrupted = [(ids + shift) % vocabulary for ids, shift in zip(clean, shifts, strict=True)]
    answers = [rng.choice(vocabulary, size=2, replace=False) for _ in lengths]
    return PromptPairs(clean, corrupted, [pair[:1] for pair in answers], [pair[1:] for pair in answers])
