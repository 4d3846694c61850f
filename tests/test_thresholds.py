"""A TopK dictionary as a JumpReLU one, which SAELens reads where it is a transcoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import traced

from circuitgraph import CircuitGraphError
from circuitgraph._names import Component
from circuitgraph._refinement import Refinement
from circuitgraph.features import load_dictionary, save_dictionary, thresholded
from circuitgraph.testing import random_dictionary, random_pairs

PAIRS = random_pairs(2, lengths=(6, 6, 4))
MODEL = traced("torch", "gpt2")


def test_as_many_features_are_active_as_were() -> None:
    made = replace(random_dictionary(2, width=16, reads="mlp_in", activation="topk", n_features=64), k=8, layer=1)
    found = thresholded(MODEL, made, PAIRS)
    seen = np.concatenate([*MODEL.seen_by(Refinement(Component("m", 1), made, (0,)), PAIRS)])
    kept, now = made.encode(seen), found.encode(seen)
    assert found.threshold is not None
    np.testing.assert_allclose(found.threshold, np.mean([row[row > 0].min() for row in kept if row.any()]))
    np.testing.assert_allclose(now, np.where(made.magnitudes(seen) > found.threshold, made.magnitudes(seen), 0))
    assert 0.5 < (now > 0).sum() / (kept > 0).sum() < 2
    assert (now[now > 0] > found.threshold[0]).all()


def test_saelens_reads_the_transcoder_that_it_makes(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    made = replace(random_dictionary(3, width=16, reads="mlp_in", activation="topk"), layer=0)
    found = thresholded(MODEL, made, PAIRS)
    folder = save_dictionary(found, tmp_path)
    kind = json.loads((folder / "cfg.json").read_text())["architecture"]
    assert kind == "jumprelu_transcoder"
    theirs = sae_lens.registry.get_sae_class(kind)[0].load_from_disk(str(folder), device="cpu")
    x = np.random.default_rng(0).normal(size=(5, 16))
    with torch.no_grad():
        np.testing.assert_allclose(theirs.encode(torch.from_numpy(x).float()).numpy(), found.encode(x), atol=1e-5)
    np.testing.assert_allclose(load_dictionary(folder).encode(x), found.encode(x), atol=1e-5)


def test_what_has_no_threshold_to_find_is_refused() -> None:
    made = random_dictionary(2, width=16, reads="mlp_in", activation="topk")
    with pytest.raises(CircuitGraphError, match="random-2 does not say of which layer it is; give component"):
        thresholded(MODEL, made, PAIRS)
    with pytest.raises(CircuitGraphError, match="random-2 is relu; expected a topk dictionary"):
        thresholded(MODEL, random_dictionary(2, width=16, activation="relu"), PAIRS, component="m0")
    silent = replace(made, encoder=0 * made.encoder, encoder_bias=0 * made.encoder_bias - 1)
    with pytest.raises(CircuitGraphError, match="no feature of random-2 is active on these prompts"):
        thresholded(MODEL, silent, PAIRS, component="m0")
