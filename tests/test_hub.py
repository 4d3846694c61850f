"""Dictionaries by their names on the hub and in SAELens's list, out of a cache as downloading leaves it: no network."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from safetensors.numpy import save_file

from circuitgraph import FileError
from circuitgraph._dictionary import Dictionary
from circuitgraph.features import load_dictionary, load_transcoders, save_dictionary
from circuitgraph.testing import random_dictionary

X = np.random.default_rng(0).normal(size=(4, 8))
RELEASE = ("gpt2-small-res-jb", "blocks.1.hook_resid_pre", "jbloom/GPT2-Small-SAEs-Reformatted")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def uploaded(hub: Path, repository: str) -> Path:
    """The folder of a repository's files in the cache."""
    of_repository, revision = hub / f"models--{repository.replace('/', '--')}", "0" * 40
    (of_repository / "refs").mkdir(parents=True)
    (of_repository / "refs" / "main").write_text(revision)
    files = of_repository / "snapshots" / revision
    files.mkdir(parents=True)
    return files


def check_same(found: Dictionary, made: Dictionary) -> None:
    np.testing.assert_allclose(found.decode(X, found.encode(X)), made.decode(X, made.encode(X)), atol=1e-5)
    assert found.encode(X).any()


@pytest.mark.parametrize("folder", ["layer_1", None])
def test_a_repository_of_the_hub(hub: Path, tmp_path: Path, folder: str | None) -> None:
    made, files = random_dictionary(3, reads="mlp_out"), uploaded(hub, "somebody/dictionaries")
    saved = save_dictionary(made, tmp_path / "saved")
    shutil.copytree(saved, files / folder if folder else files, dirs_exist_ok=True)
    check_same(load_dictionary("somebody/dictionaries", folder), made)


def test_transcoders_of_the_hub(hub: Path) -> None:
    made, files = random_dictionary(4, activation="relu", reads="mlp_in"), uploaded(hub, "somebody/transcoders")
    config = {"model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    (files / "config.yaml").write_text(yaml.safe_dump(config))
    weights = {"W_enc": made.encoder.T, "W_dec": made.decoder, "b_enc": made.encoder_bias, "b_dec": made.decoder_bias}
    save_file({name: np.ascontiguousarray(values) for name, values in weights.items()}, files / "layer_0.safetensors")
    check_same(load_transcoders("somebody/transcoders")["m0"], made)


def test_a_release_of_saelens(hub: Path, tmp_path: Path) -> None:
    """By SAELens's own list and loader."""
    pytest.importorskip("sae_lens")
    release, sae_id, repository = RELEASE
    made = random_dictionary(5, activation="relu", reads="stream")
    shutil.copytree(save_dictionary(made, tmp_path / "saved"), uploaded(hub, repository) / sae_id)
    found = load_dictionary(release, sae_id)
    check_same(found, made)
    assert found.name == f"{release}/{sae_id}"


def test_what_is_not_there(hub: Path) -> None:
    with pytest.raises(FileError, match=r"there is no folder 'somebody/nothing', and it cannot be downloaded from the hub: "):
        load_dictionary("somebody/nothing", "layer_1")
    with pytest.raises(FileError, match=r"there is no folder 'nothing'; for a repository of the hub give its name"):
        load_dictionary("nothing")


def test_a_release_that_is_not_there(hub: Path) -> None:
    pytest.importorskip("sae_lens")
    with pytest.raises(FileError, match=r"SAELens cannot load nothing layer_1: "):
        load_dictionary("nothing", "layer_1")
