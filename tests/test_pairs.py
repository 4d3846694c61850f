"""Prompt pairs: what they accept, what they refuse, and that buckets lose nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitgraph._errors import TaskError
from circuitgraph._pairs import PromptPairs


@st.composite
def pairs_of_ids(draw: st.DrawFn) -> PromptPairs:
    ids = st.integers(0, 30)
    n = draw(st.integers(1, 8))
    chosen = [draw(st.lists(ids, min_size=3, max_size=6, unique=True)) for _ in range(n)]  # the first 3 answers, the rest wrong
    lengths = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    clean = [draw(st.lists(ids, min_size=k, max_size=k)) for k in lengths]
    return PromptPairs(
        clean=clean,
        corrupted=[[*row[:-1], 31] for row in clean],
        answers=[row[: draw(st.integers(1, 3))] for row in chosen],
        wrong_answers=[row[3:] for row in chosen],
        templates=tuple(str(i) for i in range(n)),
    )


@settings(deadline=None, max_examples=50)  # a loaded machine is no failure
@given(pairs_of_ids())
def test_buckets_are_a_partition(pairs: PromptPairs) -> None:
    buckets = list(pairs.buckets())
    assert sorted(i for bucket in buckets for i in bucket.index) == list(range(len(pairs)))
    lengths = [bucket.clean.shape[1] for bucket in buckets]
    assert lengths == sorted(set(lengths))
    for bucket in buckets:
        for row, i in enumerate(bucket.index):
            assert np.array_equal(bucket.clean[row], pairs.clean[i])
            assert np.array_equal(bucket.corrupted[row], pairs.corrupted[i])
            for sets, all_sets in ((bucket.answers, pairs.answers), (bucket.wrong_answers, pairs.wrong_answers)):
                assert np.array_equal(sets.ids[row][sets.weights[row] > 0], all_sets[i])


@settings(deadline=None, max_examples=50)  # a loaded machine is no failure
@given(pairs_of_ids(), st.randoms(use_true_random=False))
def test_select_takes_what_was_asked_for_in_that_order(pairs: PromptPairs, random: Any) -> None:
    index = [random.randrange(len(pairs)) for _ in range(5)]
    chosen = pairs.select(index)
    assert chosen.templates == tuple(pairs.templates[i] for i in index)
    assert all(np.array_equal(a, pairs.clean[i]) for a, i in zip(chosen.clean, index, strict=True))
    assert all(np.array_equal(a, pairs.answers[i]) for a, i in zip(chosen.answers, index, strict=True))


def test_arrays_and_single_answers_are_accepted() -> None:
    pairs = PromptPairs(
        clean=np.array([[1, 2], [3, 4]]), corrupted=np.array([[1, 5], [3, 6]]), answers=np.array([7, 8]), wrong_answers=[9, 40]
    )
    assert [a.tolist() for a in pairs.answers] == [[7], [8]]
    assert pairs.largest_token == 40


def test_ids_cannot_be_changed() -> None:
    pairs = PromptPairs(clean=[[1]], corrupted=[[2]], answers=[3])
    with pytest.raises(ValueError, match="read-only"):
        pairs.clean[0][0] = 5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"clean": [], "corrupted": [], "answers": []}, "there is no prompt"),
        ({"clean": [[1]], "corrupted": [], "answers": [1]}, "0 corrupted for 1 clean"),
        ({"clean": [[1]], "corrupted": [[2]], "answers": [1, 2]}, "2 answers for 1 clean"),
        ({"clean": [[1]], "corrupted": [[2]], "answers": [1], "wrong_answers": [1, 2]}, "2 wrong_answers for 1"),
        ({"clean": [[1]], "corrupted": [[2]], "answers": [1], "templates": ("a", "b")}, "2 templates for 1"),
        ({"clean": [[1, 2]], "corrupted": [[2]], "answers": [1]}, r"2 clean and 1 corrupted tokens(.|\n)*\[1, 2\](.|\n)*\[2\]"),
        ({"clean": [[]], "corrupted": [[]], "answers": [1]}, "no token"),
        ({"clean": [[1]], "corrupted": [[2]], "answers": [[]]}, "no answer"),
        ({"clean": [[1]], "corrupted": [[1]], "answers": [2]}, "equals the clean one"),
        ({"clean": [["a"]], "corrupted": [[1]], "answers": [2]}, r"clean\[0\]"),
        ({"clean": [[1.5]], "corrupted": [[1]], "answers": [2]}, "expected a row of token ids"),
        ({"clean": [[1]], "corrupted": [[-1]], "answers": [2]}, "none below 0"),
        ({"clean": [[1]], "corrupted": [[2]], "answers": [[3, 3]]}, r"pair 0: answers \[3, 3\] has a token twice"),
        ({"clean": [[1]], "corrupted": [[2]], "answers": [3], "wrong_answers": [[4, 4]]}, "wrong_answers .* has a token twice"),
        ({"clean": [[1]], "corrupted": [[2]], "answers": [3], "wrong_answers": [[4, 3]]}, "token 3 is both an answer and a wrong answer"),
        ({"clean": 5, "corrupted": [[2]], "answers": [3]}, "clean is 5; expected one row"),
        ({"clean": [[1]], "corrupted": [[2]], "answers": 3}, "answers is 3; expected one row"),
    ],
)
def test_refuses(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(TaskError, match=says):
        PromptPairs(**fields)
